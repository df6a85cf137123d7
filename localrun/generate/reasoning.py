"""A reply's text split into what the model thought and what it says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from localrun.generate.stop_strings import overlap
from localrun.text.tokenizer import Tokenizer

# As DeepSeek, Qwen, GLM, Kimi, MiniMax and most others spell it; Hunyuan 3; Seed-OSS; Mistral.
TAGS = (
    ("<think>", "</think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
_LONGEST_PROMPT_END = 16  # tokens, of a template's start of a reply

REASONING, CONTENT = "reasoning_content", "content"
Part = tuple[str, str]


def open_tag(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """The tag that the prompt's end has opened, so that the reply begins within reasoning; None if there is none."""
    end = tokenizer.decode(ids[-_LONGEST_PROMPT_END:], special=True).rstrip()
    return next((begin for begin, _ in TAGS if end.endswith(begin)), None)


def spelled_tags(tokenizer: Tokenizer) -> dict[int, str]:
    """Tags that are control tokens, which a reply's text would lack: id -> text."""
    return {tokenizer.controls[tag]: tag for tags in TAGS for tag in tags if tag in tokenizer.controls}


class ReasoningSplitter:
    """Text in, in any pieces; parts out, (REASONING or CONTENT, text) each.

    Reasoning begins where the reply begins with a tag, or at once if the prompt has opened one. What looks like a tag
    anywhere else is content. Space around tags is no part of either.
    """

    def __init__(self, opened: str | None = None):
        """opened: the tag that the prompt has opened."""
        self._close = dict(TAGS).get(opened or "")  # the tag that is waited for
        self._is_start = opened is None  # the reply may begin with a tag
        self._trims = True  # space at the beginning of a part is left out
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """What comes next is reasoning, as far as is certain."""
        return self._close is not None

    def push(self, text: str) -> Iterator[Part]:
        """What is certain by now."""
        self._held += text
        if self._is_start:
            self._look_for_start()
        if self._close:
            yield from self._reason(self._close)
        if not self._close and not self._is_start:
            yield from self._part(CONTENT, len(self._held))

    def flush(self) -> Iterator[Part]:
        """What is held back, at the end of the reply."""
        self._trims = self._trims and not self._is_start
        yield from self._part(REASONING if self._close else CONTENT, len(self._held))

    def _look_for_start(self) -> None:
        start = self._held.lstrip()
        for begin, close in TAGS:
            if start.startswith(begin):
                self._held, self._close, self._is_start = start[len(begin) :], close, False
                return
        if not any(begin.startswith(start) for begin, _ in TAGS):
            self._is_start = self._trims = False  # content, with the space that it begins with

    def _reason(self, close: str) -> Iterator[Part]:
        at = self._held.find(close)
        if at >= 0:
            yield from self._part(REASONING, len(self._held[:at].rstrip()))
            self._held = self._held[self._held.find(close) + len(close) :]
            self._close, self._trims = None, True
        else:
            certain = self._held[: len(self._held) - overlap(self._held, close)]
            yield from self._part(REASONING, len(certain.rstrip()))

    def _part(self, kind: str, length: int) -> Iterator[Part]:
        """The first `length` characters of what is held."""
        text, self._held = self._held[:length], self._held[length:]
        text = text.lstrip() if self._trims else text
        if text:
            self._trims = False
            yield kind, text
