"""The chat's loop and its commands."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cli.explain import explain
from cli.figures import timing_line
from cli.model import SETTINGS, max_tokens, template_settings
from cli.options import ThinkChoice
from cli.output import copy, is_screen, note, printable, rate, size, tell, tell_text
from cli.terminal.conversation import Conversation, Write
from cli.terminal.display import FOLD, HIDE, SHOW, Display
from cli.terminal.lines import Lines, Message, read_message
from cli.text import read_text
from localrun.errors import ContextFullError, LocalrunError
from localrun.files import user_path
from localrun.ranks.world import RankError

_CODE = "code"
_SETTINGS = ("temp", *(name for name in SETTINGS if name != "temperature"), "n")
_NAMES = {"temp": "temperature", "n": "n", "num_predict": "n"}  # names that users know from llama-cli and ollama


class Repl:
    """Reads messages and commands until the end of input or /exit."""

    def __init__(
        self, conversation: Conversation, display: Display, think: ThinkChoice, variables: dict[str, Any]
    ) -> None:
        """variables: of the template, as the user gave them; think: what --think says."""
        self._conversation, self._display, self._variables = conversation, display, variables
        self._set_thinking(think)
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/exit": ("end, as Ctrl-D and /bye do", lambda _: None),
            "/bye": ("end", lambda _: None),
            "/clear": ("forget the conversation, keep the system message", self._clear),
            "/regen": ("generate the last reply again", self._regenerate),
            "/continue": ("go on with a reply that was stopped or reached its limit", self._continue),
            "/think": ("show|hide|fold: what is seen of thoughts; on|off|auto: whether there are any", self._think),
            "/system": ('TEXT: set the system message; "" for none; without TEXT show it', self._system),
            "/set": (f"NAME VALUE: {', '.join(_SETTINGS)}", self._set),
            "/show": ("what runs, the settings and the messages", self._show),
            "/save": ("FILE: save messages and cache", self._save),
            "/load": ("FILE: go on with a saved conversation", self._load),
            "/read": ("FILE: put the text of a file before the next message", self._read),
            "/copy": ("put the last reply on the terminal's clipboard; /copy code: its last block of code", self._copy),
            "/stats": ("tokens and speed of the last reply", self._stats),
        }

    def completions(self) -> dict[str, tuple[str, tuple[str, ...] | None]]:
        """For each command what it does, and the words that may follow it; None for names of files."""
        words: dict[str, tuple[str, ...] | None] = dict.fromkeys(("/save", "/load", "/read"))
        words |= {"/think": (SHOW, HIDE, FOLD, *ThinkChoice.__members__), "/set": _SETTINGS, "/copy": (_CODE,)}
        return {name: (text, words.get(name, ())) for name, (text, _) in self._commands.items()}

    def status(self) -> str:
        """How full the context is, and how fast the last reply was."""
        session = self._conversation.session
        used, ctx = len(session.ids), session.engine.ctx
        speed = rate(session.stats.generated_tokens, session.stats.decode_s)
        return f" context {used} of {ctx} tokens ({100 * used // ctx}%)" + (f" | {speed} t/s" if speed else "")

    def run(self, lines: Lines) -> None:
        """The loop. Whatever goes wrong in a turn is a line on stderr, and the chat goes on: there is talk to lose."""
        while True:
            try:
                message = read_message(lines)
            except KeyboardInterrupt:
                note("Ctrl-D or /exit ends the chat")
                continue
            if message is None or (message.is_command and message.text in ("/exit", "/bye")):
                return
            try:
                self._handle(message)
            except KeyboardInterrupt:
                note("interrupted; Ctrl-D or /exit ends the chat")
            except BrokenPipeError:  # nobody reads any more
                raise
            except ContextFullError as error:
                note(f"{error}; /clear starts afresh")
            except RankError as error:  # nothing can be computed any more
                raise LocalrunError(f"{error}{self._kept()}") from None
            except Exception as error:
                note(explain(error))

    def _kept(self) -> str:
        """Where the conversation is saved, for the end of a line; nothing if there is none."""
        if not self._conversation.messages:
            return ""
        name = f"localrun-chat-{time.strftime('%Y%m%d-%H%M%S')}.json"
        for folder in (Path.cwd(), Path(tempfile.gettempdir())):
            with suppress(LocalrunError):
                self._conversation.save(folder / name)
                return f"; the conversation is kept: /load {folder / name}"
        return "; the conversation could not be saved"

    def _handle(self, message: Message) -> None:
        if message.is_command:
            name, _, rest = message.text.partition(" ")
            if name not in self._commands:
                raise LocalrunError(f'unknown command {name}; /help lists them, """ starts a text with a /')
            self._commands[name][1](rest.strip())
        elif message.text.strip():
            self._answer(lambda write: self._conversation.say(message.text, write))

    def _answer(self, reply: Callable[[Write], bool]) -> None:
        """Has a reply shown, and says what there is to say about it."""
        session, conversation = self._conversation.session, self._conversation
        try:
            complete = reply(self._display.push)
        finally:
            self._display.end()
        if not complete:
            forgotten = "" if conversation.has_replied else " before the reply began; the message is forgotten"
            note(f"stopped{forgotten}")
        elif not conversation.has_replied:
            note("the reply is empty; the message is forgotten")
        elif session.finish_reason == "context":
            note(f"the context of {session.engine.ctx} tokens is full; /clear starts afresh")
        elif session.finish_reason == "length":
            note(f"the reply reached {conversation.limit} tokens; /set n -1 lifts the limit, /continue goes on")
        elif conversation.has_ended:
            note("the text has ended; what you write next begins another")
        tell(timing_line(session))

    def _help(self, _rest: str) -> None:
        for name, (text, _) in self._commands.items():
            tell(f"{name:<9} {text}")
        if self._conversation.template is None:
            tell("What you write is continued. Write on where a text has not ended; /clear begins another.")
        tell('A line that ends in \\ goes on; """ starts and ends a text of several lines.')
        tell("Ctrl-C stops a reply, Ctrl-D ends the chat.")

    def _clear(self, _rest: str) -> None:
        self._conversation.clear()
        note("the conversation is forgotten")

    def _regenerate(self, _rest: str) -> None:
        self._answer(self._conversation.regenerate)

    def _continue(self, _rest: str) -> None:
        self._answer(self._conversation.resume)

    def _think(self, rest: str) -> None:
        if rest in (SHOW, HIDE, FOLD):
            self._display.thoughts = rest
            if rest == SHOW and (thoughts := self._conversation.thoughts):
                tell_text(thoughts)
        elif rest in set(ThinkChoice):
            self._set_thinking(ThinkChoice(rest))
        elif rest:
            raise LocalrunError(f"/think {rest}; expected show, hide, fold, on, off or auto")
        note(f"thoughts: {self._display.thoughts}, {self._thinking.value}")

    def _set_thinking(self, think: ThinkChoice) -> None:
        self._conversation.settings = template_settings(self._conversation.template, think, self._variables)
        self._thinking = think

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.instruct(None if rest == '""' else rest)
        tell_text(f"system message: {self._conversation.system or 'none'}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name == "system":
            self._system(value)
            return
        if name:
            self._change(_NAMES.get(name, name), value.strip())
        note(self._settings())

    def _change(self, name: str, value: str) -> None:
        sampling = self._conversation.sampling
        if name not in ("n", *SETTINGS):
            raise LocalrunError(f"unknown setting {name}; there are {self._settings()}")
        kind = int if name in ("top_k", "repeat_last_n", "seed", "n") else float
        try:
            number = kind(value)
        except ValueError:
            what = "a number" if kind is float else "a whole number"
            raise LocalrunError(f"{name} is {value!r}; expected {what}") from None
        if name == "n":
            self._conversation.limit = max_tokens(int(number))
        else:
            self._conversation.sampling = dataclasses.replace(sampling, **{name: number})

    def _settings(self) -> str:
        sampling = self._conversation.sampling
        settings = {"n": self._conversation.limit or -1} | {name: getattr(sampling, name) for name in SETTINGS}
        return ", ".join(f"{name} {value}" for name, value in settings.items())

    def _show(self, _rest: str) -> None:
        conversation = self._conversation
        facts = conversation.engine.describe().items()
        lines = [f"{name}: {printable(str(value))}" for name, value in facts]
        lines += [f"settings: {self._settings()}", f"system: {conversation.system or 'none'}"]
        lines += [f"{message['role']}: {message['content']}" for message in conversation.messages]
        tell_text("\n".join(lines))

    def _save(self, rest: str) -> None:
        self._conversation.save(_path(rest, "/save"))
        note(f"saved {len(self._conversation.messages)} messages and {len(self._conversation.session.ids)} tokens")

    def _load(self, rest: str) -> None:
        problem = self._conversation.load(_path(rest, "/load"))
        cached = f"without their cache ({problem})" if problem else f"and {len(self._conversation.session.ids)} tokens"
        note(f"loaded {len(self._conversation.messages)} messages {cached}")

    def _read(self, rest: str) -> None:
        text = read_text(str(_path(rest, "/read")))
        self._conversation.carried += text + "\n"
        note(f"read {len(text)} characters; they go before the next message")

    def _copy(self, rest: str) -> None:
        messages = self._conversation.messages
        if not messages:
            raise LocalrunError("there is no reply to copy")
        if not is_screen():
            raise LocalrunError("/copy needs a terminal with a clipboard")
        text = messages[-1]["content"]
        if rest == _CODE:
            from cli.terminal.markdown import last_code

            text = last_code(text)
        copy(text)
        note(f"{len(text)} characters for the clipboard")

    def _stats(self, _rest: str) -> None:
        session = self._conversation.session
        tell(timing_line(session))
        config, placement = session.engine.config, session.engine.placement
        bits = placement.cache_bits if placement else 16
        cache = f", {size(config.kv_bytes(len(session.ids), bits))}" if config else ""
        note(f"the context holds {len(session.ids)} of {session.engine.ctx} tokens{cache}")


def _path(rest: str, command: str) -> Path:
    """The file that a command names, in quotes or not."""
    quoted = len(rest) > 1 and rest[0] == rest[-1] and rest[0] in "\"'"
    name = rest[1:-1] if quoted else rest
    if not name:
        raise LocalrunError(f"{command} needs a file name")
    return user_path(name)
