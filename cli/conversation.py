"""A conversation: its messages, its model session, and the files it is saved in. Prints nothing but replies."""

import json
from collections.abc import Callable
from os.path import isfile  # False, not an error, for names too long and folders that can't be looked into
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.interrupt import Interruptible
from cli.model import stream
from localrun.errors import LocalrunError
from localrun.files import read_bytes, replacing
from localrun.text.chat_template import CHATML_STOP, chatml
from localrun.text.prompt import chat_ids

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.generate.sampling import Sampling

FORMAT = "localrun conversation 1"
_ROLES = ("user", "assistant")
_MOST_BYTES = 1 << 28  # of a saved conversation
_CLOSING = ",.;:!?')"  # marks that no space goes before


class Conversation:
    """Messages and the session that answers them.

    A model without a chat template gets ChatML if its vocabulary has that, as with llama.cpp. Else there are no roles
    for it, only one text that it and the user add to in turn, until the model ends it; the next message begins another.

    Attributes:
        template: None for such a text.
        system: the system message or None.
        messages: {"role", "content"} of user and assistant in turn.
        limit: tokens a reply can have, None for no limit.
        carried: text that goes before the next message.
        has_ended: the model has ended the text.

    Raises:
        LocalrunError: a system message, and no place for it.
    """

    def __init__(self, engine: "Engine", sampling: "Sampling", system: str | None, stop: list[str], limit: int | None):
        self.engine, self.sampling, self.limit, self.stop = engine, sampling, limit, stop
        self.template = engine.template
        if self.template is None and (template := chatml(engine.tokenizer)):
            self.template, self.stop = template, [*stop, CHATML_STOP]
        self.instruct(system)
        self.messages: list[dict[str, str]] = []
        self.carried = ""
        self.has_ended = False
        self.session = engine.session()

    def instruct(self, system: str | None) -> None:
        """Set the system message. Raises LocalrunError if there is no place for one."""
        if system is not None and self.template is None:
            raise LocalrunError("this model continues texts: there is no place for a system message")
        self.system = system

    def say(self, text: str, write: Callable[[str], None]) -> bool:
        """Sends a message and writes the reply as it comes; False if Ctrl-C ended it.

        A message that got no reply at all is forgotten again, so that the roles stay in turn.
        """
        before = self.messages
        self.messages = [*([] if self.has_ended else before), {"role": "user", "content": self.carried + text}]
        try:
            return self._reply(write)
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages = before
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
        self.has_ended = False

    def _prompt_ids(self) -> list[int]:
        if self.template is None:
            return self.engine.tokenizer.encode(_joined(self.messages))
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_ids(self.template, self.engine.tokenizer, system + self.messages)

    def _reply(self, write: Callable[[str], None]) -> bool:
        text = ""
        with Interruptible() as interrupt:
            ids = self._prompt_ids()
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
                    # with stop texts of the user's there is no telling which of the two it was
                    ended = self.session.finish_reason == "stop" and not self.stop
                    self.has_ended = self.template is None and ended
        return not interrupt.pressed

    def save(self, path: Path) -> None:
        """Writes the messages to path and the cache to path.cache, each whole or not at all, for the user alone.

        Raises LocalrunError if they cannot be written, or would replace what is no saved conversation.
        """
        from localrun.generate.session import is_saved_session

        cache = _cache_path(path)
        if (isfile(path) and not _is_saved(path)) or (isfile(cache) and not is_saved_session(cache)):
            raise LocalrunError(f"{path}: there is something else of that name, or with .cache; choose another name")
        document = {"format": FORMAT, "system": self.system, "messages": self.messages}
        text = json.dumps(document, ensure_ascii=False, indent=1)
        with replacing(path, private=True) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogatepass")
            self.session.save(cache)

    def load(self, path: Path) -> str | None:
        """Replaces the conversation by a saved one; a line saying why its cache could not be used, or None.

        Without the cache the next message only takes longer. Raises LocalrunError if path is no saved conversation, or
        has a system message where there is no place for one; nothing has changed then.
        """
        system, messages = read_saved(path)
        self.instruct(system)
        self.clear()
        self.messages = messages
        try:
            self.session.load(_cache_path(path))
        except LocalrunError as error:
            return str(error)
        return None


def _joined(messages: list[dict[str, str]]) -> str:
    """One text; what the user adds is a word of its own, or begins with a mark that belongs to the word before."""
    text = ""
    for message in messages:
        added = message["content"]
        apart = text and message["role"] == "user" and not (text[-1].isspace() or added[:1].isspace())
        text += f" {added}" if apart and added[:1] not in _CLOSING else added
    return text


def _cache_path(path: Path) -> Path:
    return Path(f"{path}.cache")


def _is_saved(path: Path) -> bool:
    try:
        read_saved(path)
    except LocalrunError:
        return False
    return True


def read_saved(path: Path) -> tuple[str | None, list[dict[str, str]]]:
    """System message and messages of a saved conversation. Raises LocalrunError if the file is none."""
    data = read_bytes(path, str(path), _MOST_BYTES)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise LocalrunError(f"{path}: is not a saved conversation: not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise LocalrunError(f"{path}: is not a saved conversation: expected the format {FORMAT!r}")
    system, messages = document.get("system"), document.get("messages")
    if not (system is None or isinstance(system, str)) or not _in_turn(messages):
        raise LocalrunError(f"{path}: is not a saved conversation: expected texts of user and assistant in turn")
    return system, messages


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
