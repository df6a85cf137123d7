"""Where the chat's messages come from: an editor with history on a terminal, plain lines otherwise."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cli.output import note
from cli.text import decode
from localrun.errors import LocalrunError

QUOTES = '"""'


class Lines(Protocol):
    """A source of lines."""

    def read(self, prompt: str) -> str | None:
        """The next line without its end; None when there are no more. Ctrl-C raises KeyboardInterrupt."""


class PlainLines:
    """Lines of stdin, without a prompt: for pipes and scripts. A line that is not UTF-8 is passed over with a note."""

    def read(self, prompt: str) -> str | None:
        while data := sys.stdin.buffer.readline():
            try:
                return decode(data, "the line").rstrip("\r\n")
            except LocalrunError as error:
                note(str(error))
        return None


class EditedLines:
    """Lines typed on a terminal, with editing, history across sessions, and search in it."""

    def __init__(self) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        path = history_path()
        self._session: PromptSession[str] = PromptSession(history=FileHistory(path) if path else InMemoryHistory())

    def read(self, prompt: str) -> str | None:
        try:
            return self._session.prompt(prompt)
        except EOFError:  # Ctrl-D
            return None


def history_path() -> str | None:
    """The file of typed messages, made readable for its owner only; None where there can be none."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "localrun" / "history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError:
        return None
    return str(path)


@dataclass(frozen=True)
class Message:
    """text as the user means it; is_command: it is a line of its own that begins with a slash."""

    text: str
    is_command: bool = False


def read_message(lines: Lines) -> Message | None:
    """The next message, of several lines if it is in triple quotes or its lines end in a backslash; None at the end."""
    line = lines.read("> ")
    if line is None:
        return None
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
