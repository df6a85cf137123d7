"""Harmony, gpt-oss's form of a reply: several messages, each in a channel; the answer is in "final".

    <|channel|>analysis<|message|>reasoning<|end|><|start|>assistant<|channel|>final<|message|>the answer<|return|>

A call of a function is a message to it: <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}<|call|>.
What is read and kept is the text that other models write: <think>reasoning</think> and the answer, and calls as Qwen3
has them, which end with the text where the reply ends with the call. Templates of such models take earlier reasoning
out themselves; gpt-oss's wants messages that have none.
Source: https://cookbook.openai.com/articles/openai-harmony; the chat template of openai/gpt-oss-20b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

START, CHANNEL, MESSAGE, END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
MARKS = (START, CHANNEL, MESSAGE, END)
_OPEN, _CLOSE = "<think>\n", "\n</think>\n\n"
_CALL, _CALL_END = '<tool_call>\n{{"name": "{}", "arguments": ', "}\n</tool_call>"
_REASONING = "analysis"
_FUNCTION = re.compile(r"\bto=functions\.([^\s<\"\\]+)")


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
        self._channel = 0  # where its channel's name begins
        self._close = ""  # the text that ends the message

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
            ended, self._close = self._close or "\n\n", ""
            return ended
        if mark != MESSAGE:
            self._header = "" if mark == START else self._header or ""
            self._channel = len(self._header)
            return ""
        header, self._header = self._header or "", None
        if function := _FUNCTION.search(header):
            self._close = _CALL_END
            return _CALL.format(function[1])
        self._close = _CLOSE if header[self._channel :].startswith(_REASONING) else ""
        return _OPEN if self._close else ""


def without_reasoning(content: str) -> str:
    """The answer of a reply as ChannelDecoder gives it; nothing, if it was cut before that."""
    return content.rpartition(_CLOSE)[2] if _CLOSE in content else "" if content.startswith(_OPEN) else content


def header(channel: str) -> str:
    """The beginning of a message in a channel."""
    return f"{CHANNEL}{channel}{MESSAGE}"


def call_header(function: str) -> str:
    """That of a call of a function."""
    return header(f"commentary to=functions.{function} <|constrain|>json")
