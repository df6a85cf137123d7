"""A conversation: its messages, its model session, and the files it is saved in. Prints nothing but replies."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.interrupt import Interruptible
from cli.model import stream
from localrun.chat_template import CHATML, CHATML_STOP, ChatTemplate, chat_ids
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.sampling import Sampling

FORMAT = "localrun conversation 1"
_ROLES = ("user", "assistant")


class Conversation:
    """Messages and the session that answers them.

    system: the system message or None; messages: {"role", "content"} of user and assistant in turn; limit: tokens a
    reply can have, None for no limit; carried: text that goes before the next message.
    """

    def __init__(self, engine: "Engine", sampling: "Sampling", system: str | None, stop: list[str], limit: int | None):
        self.engine, self.sampling, self.system, self.limit = engine, sampling, system, limit
        self.template = engine.template or ChatTemplate(CHATML, bos_token="", eos_token="")
        self.stop = stop if engine.template else [*stop, CHATML_STOP]
        self.messages: list[dict[str, str]] = []
        self.carried = ""
        self.session = engine.session()

    def say(self, text: str, write: Callable[[str], None]) -> bool:
        """Sends a message and writes the reply as it comes; False if Ctrl-C ended it.

        A message that got no reply at all is forgotten again, so that the roles stay in turn.
        """
        self.messages.append({"role": "user", "content": self.carried + text})
        try:
            return self._reply(write)
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()
            else:
                self.carried = ""

    def regenerate(self, write: Callable[[str], None]) -> bool:
        """Another reply to the last message, in place of the one it had. Raises LocalrunError if there is none."""
        if not self.messages:
            raise LocalrunError("there is no reply to generate again")
        before = self.messages.pop()
        try:
            return self._reply(write)
        finally:
            if self.messages[-1]["role"] == "user":  # no new one came
                self.messages.append(before)

    def clear(self) -> None:
        """Forgets the messages; the system message stays. The next prompt reuses what it shares with the last."""
        self.messages.clear()
        self.carried = ""

    def _reply(self, write: Callable[[str], None]) -> bool:
        system = [{"role": "system", "content": self.system}] if self.system else []
        text = ""
        with Interruptible() as interrupt:
            ids = chat_ids(self.template, self.engine.tokenizer, system + self.messages)
            pieces = stream(self.session, ids, self.sampling, self.limit, self.stop, interrupt.check)
            try:
                for piece in pieces:
                    write(piece)
                    text += piece
                    interrupt.check()
            except KeyboardInterrupt:
                if not interrupt.pressed:
                    raise
            finally:
                pieces.close()
                if text:
                    self.messages.append({"role": "assistant", "content": text})
        return not interrupt.pressed

    def save(self, path: Path) -> None:
        """Writes the messages to path and the cache to path.cache, each whole or not at all.

        Raises LocalrunError if they cannot be written.
        """
        document = {"format": FORMAT, "system": self.system, "messages": self.messages}
        if not path.parent.is_dir():
            raise LocalrunError(f"{path}: there is no directory {path.parent}")
        self.session.save(_cache_path(path))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise LocalrunError(f"{path}: cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> str | None:
        """Replaces the conversation by a saved one; a line saying why its cache could not be used, or None.

        Without the cache the next message only takes longer. Raises LocalrunError if path is no saved conversation.
        """
        document = _read(path)
        self.clear()
        self.system, self.messages = document["system"], document["messages"]
        try:
            self.session.load(_cache_path(path))
        except LocalrunError as error:
            return str(error)
        return None


def _cache_path(path: Path) -> Path:
    return path.with_name(path.name + ".cache")


def _read(path: Path) -> dict[str, Any]:
    """The checked document of a saved conversation."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise LocalrunError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise LocalrunError(f"{path}: is not a saved conversation: not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LocalrunError(f"{path}: is not a saved conversation: expected the format {FORMAT!r}")
    system, messages = document.get("system"), document.get("messages")
    if not (system is None or isinstance(system, str)) or not _in_turn(messages):
        raise LocalrunError(f"{path}: is not a saved conversation: expected texts of user and assistant in turn")
    return document


def _in_turn(messages: Any) -> bool:
    if not isinstance(messages, list) or len(messages) % 2:
        return False
    return all(
        isinstance(message, dict)
        and message.keys() == {"role", "content"}
        and message["role"] == _ROLES[index % 2]
        and isinstance(message["content"], str)
        for index, message in enumerate(messages)
    )
