"""A conversation: its messages, its model session, and the files it is saved in. Prints nothing but replies."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from os.path import isfile  # False, not an error, for names too long and folders that can't be looked into
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.interrupt import Interruptible
from cli.model import stream
from localrun.errors import LocalrunError
from localrun.files import read_bytes, replacing
from localrun.generate.reasoning import CONTENT, REASONING, ReasoningSplitter, open_tag, spelled_tags
from localrun.text.chat_template import chatml, stops_of
from localrun.text.prompt import chat_ids

if TYPE_CHECKING:
    from collections.abc import Iterable

    from localrun.engine import Engine
    from localrun.generate.reasoning import Part
    from localrun.generate.sampling import Sampling

FORMAT = "localrun conversation 1"
_ROLES = ("user", "assistant")
_KEYS = {"role", CONTENT, REASONING}
_MOST_BYTES = 1 << 28  # of a saved conversation
_CLOSING = ",.;:!?')"  # marks that no space goes before
_UNFINISHED = "\ufffd"  # stands for a character whose last bytes have not come

Write = Callable[[str, str], None]  # what kind of text it is, REASONING or CONTENT, and the text


@dataclass
class _Cut:
    """A reply that did not end by itself: the ids to go on from, what of them is the reply, and the tag before it."""

    ids: list[int]
    text: str
    opened: str | None


class Conversation:
    """Messages and the session that answers them.

    A model without a chat template gets ChatML if its vocabulary has that, as with llama.cpp. Else there are no roles
    for it, only one text that it and the user add to in turn, until the model ends it; the next message begins another.

    What the model thought before a reply is a field of its own in that message, as transformers has it: whether later
    prompts have it is the template's choice.

    Attributes:
        template: None for such a text.
        settings: variables of the template.
        system: the system message or None.
        messages: {"role", "content"} of user and assistant in turn; "reasoning_content" where the model thought.
        limit: tokens a reply can have, None for no limit.
        carried: text that goes before the next message.
        has_ended: the model has ended the text.
        has_replied: something came of the last reply.

    Raises:
        LocalrunError: a system message, and no place for it.
    """

    def __init__(self, engine: "Engine", sampling: "Sampling", system: str | None, stop: list[str], limit: int | None):
        self.engine, self.sampling, self.limit = engine, sampling, limit
        self.template = engine.template or chatml(engine.tokenizer)
        self.settings: dict[str, Any] = {}
        self.stop = [*stop, *stops_of(self.template)]
        self.instruct(system)
        self.messages: list[dict[str, str]] = []
        self.carried = ""
        self.has_ended = self.has_replied = False
        self.session = engine.session()
        self._spelled = spelled_tags(engine.tokenizer) if self.template else {}
        self._cut: _Cut | None = None

    @property
    def thoughts(self) -> str:
        """What the model thought before its last reply."""
        return self.messages[-1].get(REASONING, "") if self.messages else ""

    def instruct(self, system: str | None) -> None:
        """Set the system message. Raises LocalrunError if there is no place for one."""
        if system is not None and self.template is None:
            raise LocalrunError("this model continues texts: there is no place for a system message")
        self.system = system

    def say(self, text: str, write: Write) -> bool:
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

    def regenerate(self, write: Write) -> bool:
        """Another reply to the last message, in place of the one it had. Raises LocalrunError if there is none."""
        if not self.messages:
            raise LocalrunError("there is no reply to generate again")
        before = self.messages.pop()
        try:
            return self._reply(write)
        finally:
            if self.messages[-1]["role"] == "user":  # no new one came
                self.messages.append(before)

    def resume(self, write: Write) -> bool:
        """Go on with a reply that Ctrl-C or a limit cut, from its very tokens. Raises LocalrunError if none was."""
        if self._cut is None:
            raise LocalrunError("there is no reply that was cut")
        before = self.messages.pop()
        try:
            return self._reply(write, self._cut)
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.append(before)

    def clear(self) -> None:
        """Forgets the messages; the system message stays. The next prompt reuses what it shares with the last."""
        self.messages.clear()
        self.carried = ""
        self.has_ended, self._cut = False, None

    def _prompt_ids(self) -> list[int]:
        if self.template is None:
            return self.engine.tokenizer.encode(_joined(self.messages))
        system = [{"role": "system", "content": self.system}] if self.system else []
        return chat_ids(self.template, self.engine.tokenizer, system + self.messages, self.settings)

    def _reply(self, write: Write, cut: _Cut | None = None) -> bool:
        """Has a reply to the last message written and added to the messages, or the rest of one that was cut."""
        self.has_replied = False
        with Interruptible() as interrupt:
            if cut is None:
                ids = self._prompt_ids()
                cut = _Cut(ids, "", open_tag(self.engine.tokenizer, ids) if self.template else None)
            said = _Said(cut, splits=self.template is not None)
            pieces = stream(self.session, cut.ids, self.sampling, self.limit, self.stop, self._spelled, interrupt.check)
            try:
                for piece in pieces:
                    said.take(piece, write)
                    interrupt.check()
                said.end(write)
            except KeyboardInterrupt:
                if not interrupt.pressed:
                    raise
                said.end(write)
            finally:
                pieces.close()
                if said.parts:
                    self.has_replied = True
                    self.messages.append({"role": "assistant", CONTENT: "", **said.parts})
                    stopped = self.session.finish_reason == "stop"
                    # with stop texts of the user's there is no telling which of the two it was
                    self.has_ended = self.template is None and stopped and not self.stop
                    self._cut = None if stopped else self._rest(cut, said.text)
        return not interrupt.pressed

    def _rest(self, cut: _Cut, text: str) -> _Cut:
        """Where the reply is now, up to its last whole character."""
        if text == cut.text:  # nothing has come, and the session may not have begun
            return cut
        ids, written = cut.ids, list(self.session.reply_ids)
        while written and text.endswith(_UNFINISHED) and self.engine.tokenizer.decode(written).endswith(_UNFINISHED):
            written.pop()
        return _Cut([*ids, *written], text.rstrip(_UNFINISHED), cut.opened)

    def save(self, path: Path) -> None:
        """Writes the messages to path and the cache to path.cache, each whole or not at all, for the user alone.

        Raises LocalrunError if they cannot be written, or would replace what is no saved conversation.
        """
        from localrun.generate.saved import is_saved_session

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


class _Said:
    """The text of a reply as it comes, and its parts.

    Attributes:
        text: all of it, with tags.
        parts: texts by kind.
    """

    def __init__(self, cut: _Cut, splits: bool):
        self.text, self.parts = "", dict[str, str]()
        self._splitter = ReasoningSplitter(cut.opened) if splits else None
        self.take(cut.text, lambda kind, text: None)

    def take(self, piece: str, write: Write) -> None:
        self.text += piece
        self._pass(self._splitter.push(piece) if self._splitter else [(CONTENT, piece)], write)

    def end(self, write: Write) -> None:
        if self._splitter:
            self._pass(self._splitter.flush(), write)

    def _pass(self, parts: "Iterable[Part]", write: Write) -> None:
        for kind, text in parts:
            if text:
                self.parts[kind] = self.parts.get(kind, "") + text
                write(kind, text)


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
        and {"role", CONTENT} <= message.keys() <= _KEYS
        and message["role"] == _ROLES[index % 2]
        and all(isinstance(text, str) for text in message.values())
        for index, message in enumerate(messages)
    )
