"""Where the chat's messages come from: an editor with history on a terminal, plain lines otherwise."""

import codecs
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cli.output import note
from cli.text import decode
from localrun.errors import LocalrunError
from localrun.files import user_path

QUOTES = '"""'
_LONGEST_LINE = 1 << 28  # bytes: more is no message, but a device without an end


class Lines(Protocol):
    """A source of lines."""

    def read(self, prompt: str) -> str | None:
        """The next line without its end; None when there are no more. Ctrl-C raises KeyboardInterrupt.

        One that was pasted may hold several.
        """


class PlainLines:
    """Lines of stdin, without a prompt: for pipes and scripts. A line that is not UTF-8 is passed over with a note."""

    def __init__(self) -> None:
        self._mark = codecs.BOM_UTF8  # may stand before the first line

    def read(self, prompt: str) -> str | None:
        """The next line without its end, None where there is no more; one that is no UTF-8 is left out, with a note."""
        while data := self._line():
            try:
                return decode(data, "the line").rstrip("\r\n")
            except LocalrunError as error:
                note(str(error))
        return None

    def _line(self) -> bytes:
        try:
            data = sys.stdin.buffer.readline(_LONGEST_LINE)
        except OSError as error:
            raise LocalrunError(f"stdin: cannot be read: {error.strerror}") from None
        mark, self._mark = self._mark, b""
        return data.removeprefix(mark)


class EditedLines:
    """Lines typed on a terminal, with editing, completion, history across sessions, and search in it.

    What is pasted is one line, whatever ends of lines it has.
    """

    def __init__(self, commands: Mapping[str, tuple[str, tuple[str, ...] | None]], status: Callable[[], str]) -> None:
        """
        Args:
            commands: to complete, as CommandCompleter takes them.
            status: a line to show below.
        """
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        from cli.terminal.command_completer import CommandCompleter

        class KeptHistory(FileHistory):
            """One that a full disk does not end a chat over."""

            def store_string(self, string: str) -> None:
                with suppress(OSError):
                    super().store_string(string)

        path = history_path()
        self._session: PromptSession[str] = PromptSession(
            history=KeptHistory(path) if path else InMemoryHistory(),
            completer=CommandCompleter(commands),
            bottom_toolbar=status,
        )

    def read(self, prompt: str) -> str | None:
        """A line that was edited behind the prompt; None on Ctrl-D. Raises KeyboardInterrupt on Ctrl-C."""
        try:
            return self._session.prompt(prompt)
        except EOFError:  # Ctrl-D
            return None


def history_path() -> str | None:
    """The file of typed messages, made readable for its owner only; None where there can be none."""
    path = user_path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "localrun" / "history"
    if not path.is_absolute():  # the user has no home
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would be waited for
            return None
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError:
        return None
    return str(path)


@dataclass(frozen=True)
class Message:
    """text as the user means it; is_command: it is a line of its own that begins with a slash."""

    text: str
    is_command: bool = False


def read_message(lines: Lines) -> Message | None:
    """The next message; None at the end.

    Of several lines if they are pasted, or in triple quotes, or end in a backslash.
    """
    line = lines.read("> ")
    if line is None:
        return None
    if "\n" in line and not line.lstrip().startswith(QUOTES):
        return Message(line)
    if line.lstrip().startswith(QUOTES):
        return Message(_quoted(line.lstrip().removeprefix(QUOTES), lines))
    if line.lstrip().startswith("/"):
        return Message(line.strip(), is_command=True)
    parts = []
    while line is not None and line.endswith("\\"):
        parts.append(line[:-1])
        line = lines.read(". ")
    return Message("\n".join(parts if line is None else [*parts, line]))


def _quoted(line: str | None, lines: Lines) -> str:
    parts = []
    while line is not None and not line.rstrip().endswith(QUOTES):
        parts.append(line)
        line = lines.read(". ")
    if line is not None:
        parts.append(line.rstrip().removesuffix(QUOTES))
    return "\n".join(parts).strip("\n")
