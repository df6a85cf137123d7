"""Where the reasoning of a reply ends and its answer begins, token by token: before that no constraint holds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from localrun.generate.reasoning import TAGS, open_tag
from localrun.generate.stop_strings import overlap
from localrun.text.harmony import CHANNEL, MARKS, MESSAGE, has_channels
from localrun.text.tokenizer import Tokenizer

_ANSWER = "final"  # the channel


class ReasoningEnd(Protocol):
    """Attributes:
    is_over: what comes next is the answer.
    may_begin: tokens that may come next all the same, as reasoning begins with them.
    """

    is_over: bool
    may_begin: Collection[int]

    def restrict(self, logits: np.ndarray) -> None:
        """While it is not over: set what may not come next to -inf."""

    def takes(self, token: int) -> bool:
        """Whether the token that was chosen is no part of the answer."""


def reasoning_end(tokenizer: Tokenizer, prompt: Sequence[int]) -> ReasoningEnd:
    """How a reply to a prompt gets to its answer."""
    return _Channels(tokenizer) if has_channels(tokenizer.controls) else _Tags(tokenizer, prompt)


class NoReasoning:
    """The answer begins at once."""

    is_over, may_begin = True, ()

    def restrict(self, logits: np.ndarray) -> None:
        """Not called: reasoning is over from the beginning."""
        raise AssertionError("there is no reasoning")

    def takes(self, token: int) -> bool:
        """False: no token belongs to reasoning."""
        return False


class _Tags:
    """Reasoning within tags. The prompt has opened one, or closed one, or the reply may begin with one.

    A line break before a tag is allowed, as GLM writes it; then a tag has to come.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer, self._text = tokenizer, ""
        opened = open_tag(tokenizer, prompt)
        self._close = _letters(dict(TAGS)[opened].encode()) if opened else None
        self._must_open = False
        self.may_begin: Collection[int] = ()
        if not opened and not tokenizer.decode(prompt[-16:], special=True).rstrip().endswith(_CLOSING):
            self.may_begin = [*self._opening, *self._breaks] if self._opening else ()

    @property
    def is_over(self) -> bool:
        """Whether the answer has begun."""
        return self._close is None and not self._must_open

    @cached_property
    def _opening(self) -> dict[int, str]:
        """Opening tags that are one token, with the tags that close them."""
        found = {}
        for begin, close in TAGS:
            ids = self._tokenizer.encode(begin, add_special=False, parse_special=True)
            if len(ids) == 1:
                found[ids[0]] = _letters(close.encode())
        return found

    @cached_property
    def _breaks(self) -> list[int]:
        ids = [self._tokenizer.encode(text, add_special=False) for text in ("\n", "\n\n")]
        return [found[0] for found in ids if len(found) == 1]

    @cached_property
    def _beyond(self) -> list[int]:
        """Tokens that would end the tag and begin the answer at once, where the tag is not one token."""
        last = self._close[-1].encode("latin-1") if self._close else b""
        pieces = ((id, self._tokenizer.piece(id)) for id in range(self._tokenizer.n_vocab))
        return [id for id, piece in pieces if piece.partition(last)[2].strip()]

    def restrict(self, logits: np.ndarray) -> None:
        """Rule out, in place, what would end the reply or reasoning otherwise than by its tag: float32 (vocab,)."""
        if self._must_open:
            kept = logits[list(self._opening)]
            logits[:] = -np.inf
            logits[list(self._opening)] = kept
            return
        logits[list(self._tokenizer.eog_ids)] = -np.inf
        if self._close and overlap(self._text, self._close):
            logits[self._beyond] = -np.inf

    def takes(self, token: int) -> bool:
        """Whether a token that was drawn belongs to reasoning, its tags included."""
        may_begin, self.may_begin = self.may_begin, ()
        if self._close is not None:
            text = self._text + _letters(self._tokenizer.piece(token, special=True))
            self._text = text[-len(self._close) :]
            if self._close in text:
                self._close = None
            return True
        if token in self._opening and (token in may_begin or self._must_open):
            self._close, self._must_open = self._opening[token], False
            return True
        self._must_open = token in may_begin
        return self._must_open


_CLOSING = tuple(close for _, close in TAGS)


class _Channels:
    """Harmony: messages in channels, of which one is the answer's (text/harmony.py)."""

    may_begin: Collection[int] = ()

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.is_over = tokenizer, False
        self._marks = {tokenizer.controls[mark]: mark for mark in MARKS}
        self._header: str | None = None  # of the message that is about to begin
        self._is_start = True

    def restrict(self, logits: np.ndarray) -> None:
        """Rule out, in place, the reply's end, and at its start all but a channel: float32 (vocab,)."""
        if self._is_start:
            channel = self._tokenizer.controls[CHANNEL]
            kept = logits[channel]
            logits[:] = -np.inf
            logits[channel] = kept
        logits[list(self._tokenizer.eog_ids)] = -np.inf

    def takes(self, token: int) -> bool:
        """Whether a token that was drawn comes before the answer's text."""
        if self.is_over:
            return False
        self._is_start, mark = False, self._marks.get(token)
        if mark == MESSAGE:
            self.is_over, self._header = (self._header or "").startswith(_ANSWER), None
        elif mark is not None:
            self._header = ""
        elif self._header is not None:
            self._header += self._tokenizer.piece(token).decode("utf-8", "replace")
        return True


def _letters(data: bytes) -> str:
    """Bytes as letters, since a token may be part of a character."""
    return data.decode("latin-1")
