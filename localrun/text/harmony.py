"""Harmony, gpt-oss's form of a reply: several messages, each in a channel; the answer is in "final".

    <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>final<|message|>the answer<|return|>

What is read and kept is the text that other reasoning models write: <think>reasoning</think> and the answer. Templates
of such models take earlier reasoning out themselves; gpt-oss's wants messages that have none.
Source: https://cookbook.openai.com/articles/openai-harmony; the chat template of openai/gpt-oss-20b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
MARKS = (START, CHANNEL, MESSAGE, END)
_OPEN, _CLOSE = "<think>\n", "\n</think>\n\n"
_REASONING = "analysis"


class Decoder(Protocol):
    """As tokenizer.StreamDecoder."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


def has_channels(controls: Mapping[str, int]) -> bool:
    """Whether a vocabulary has the marks. controls: ids by text."""
    return all(mark in controls for mark in MARKS)


class ChannelDecoder:
    """Token ids of a reply in, text out, its channels' names left out. A text without channels stays as it is."""

    def __init__(self, decoder: Decoder, controls: Mapping[str, int]) -> None:
        """decoder: to which control tokens are no text."""
        self._decoder = decoder
        self._marks = {controls[mark]: mark for mark in MARKS}
        self._header: str | None = None  # what was said of the next message; None within one
        self._reasons = False

    def push(self, id: int) -> str:
        """The characters that id completes, often none or several."""
        mark = self._marks.get(id)
        if mark is not None:
            return self._in_message(self._decoder.flush()) + self._pass(mark)
        return self._in_message(self._decoder.push(id))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._in_message(self._decoder.flush())

    def _in_message(self, text: str) -> str:
        if self._header is None:
            return text
        self._header += text
        return ""

    def _pass(self, mark: str) -> str:
        """The text that stands for a mark."""
        if mark == END:
            ended = _CLOSE if self._reasons else "\n\n"
            self._reasons = False
            return ended
        if mark != MESSAGE:
            self._header = ""
            return ""
        self._reasons, self._header = (self._header or "").startswith(_REASONING), None
        return _OPEN if self._reasons else ""


def without_reasoning(content: str) -> str:
    """The answer of a reply as ChannelDecoder gives it; nothing, if it was cut before that."""
    return content.rpartition(_CLOSE)[2] if _CLOSE in content else "" if content.startswith(_OPEN) else content
