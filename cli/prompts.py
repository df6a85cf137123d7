"""What generate makes of a text or a conversation: a prompt's ids, and the reply in its parts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cli.model import template_settings
from cli.options import ThinkChoice
from cli.output import note
from localrun.errors import LocalrunError
from localrun.generate.reasoning import CONTENT, ReasoningSplitter, open_tag, spelled_tags
from localrun.text.chat_template import stops_of
from localrun.text.prompt import chat_ids, raw_ids

if TYPE_CHECKING:
    from localrun.engine import Engine
    from localrun.generate.reasoning import Part
    from localrun.generate.sampling import Sampling


class Prompts:
    """Prompts of one model, in its chat template; or texts that are continued, if that is asked for or it has none.

    Attributes:
        spelled: control tokens that are part of replies, with their texts.

    Raises LocalrunError for variables that the template lacks.
    """

    def __init__(self, engine: "Engine", raw: bool, think: ThinkChoice, variables: dict[str, Any]) -> None:
        self._engine, self._template = engine, None if raw else engine.template
        self._is_raw = raw
        self._settings = {} if raw else template_settings(engine.template, think, variables)
        self.spelled = spelled_tags(engine.tokenizer) if self._template else {}

    def of_text(self, text: str, system: str | None = None) -> list[int]:
        """The ids of one message of the user's, or of the text itself."""
        if self._template is None:
            if system is not None:
                raise LocalrunError("the file has no chat template, so --system has no place in the prompt")
            if not self._is_raw:
                note("the file has no chat template: the prompt is continued as it is")
                self._is_raw = True  # said once
            return raw_ids(self._engine.tokenizer, text)
        messages = [{"role": "user", "content": text}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        return self.of_messages(messages)

    def of_messages(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a conversation. Raises LocalrunError if there is no template for it, or it is none."""
        if self._template is None:
            raise LocalrunError("without a chat template there is no prompt of messages")
        return chat_ids(self._template, self._engine.tokenizer, messages, self._settings)

    def stops(self, given: Sequence[str]) -> list[str]:
        """Texts that end a reply: those that are given, and the template's own."""
        return [*given, *stops_of(self._template)]

    def constrained(self, sampling: "Sampling") -> "Sampling":
        """The same; where there is no chat no reasoning comes before what a reply has to be."""
        if sampling.constraint is None or self._template is not None:
            return sampling
        return replace(sampling, constraint=replace(sampling.constraint, after_reasoning=False))

    def parts(self, ids: Sequence[int], pieces: Iterable[str]) -> Iterator["Part"]:
        """The pieces of the reply to a prompt, split into what the model thought and what it says."""
        if self._template is None:
            yield from ((CONTENT, piece) for piece in pieces)
            return
        splitter = ReasoningSplitter(open_tag(self._engine.tokenizer, ids))
        for piece in pieces:
            yield from splitter.push(piece)
        yield from splitter.flush()


def collected(parts: Iterable["Part"]) -> dict[str, str]:
    """The texts of a whole reply by kind."""
    texts = {CONTENT: ""}
    for kind, text in parts:
        texts[kind] = texts.get(kind, "") + text
    return texts
