"""Where drafts come from: guesses at the next tokens, for the model to verify.

A draft may be wrong, so what it rests on may be incomplete: its memory can begin anywhere in the text. It must only be
cheap, and the same for the same text, so that seeded replies stay reproducible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from localrun.runtime import DraftedModel, KVCache, MTPModel
from quant.batch import MAX_BATCH

MOST = MAX_BATCH - 1  # drafts a step: the token before them goes with them


class Draft:
    """What proposes tokens. Positions count the tokens of a session.

    Attributes:
        name: for the user.
    """

    name: str

    def read(self, ids: Sequence[int]) -> None:
        """Take notice of a prompt, all of which the model has evaluated."""

    def evaluated(self, start: int, count: int, among: slice = slice(None)) -> None:
        """The model has just evaluated the tokens at positions start to start + count - 1, among others."""

    def forget(self, length: int) -> None:
        """Positions from `length` on no longer hold what they held."""

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """Up to n tokens that may follow ids, of which the model has not evaluated the last."""
        raise NotImplementedError


class NGramDraft(Draft):
    """What came after the last tokens where they occurred before, in the prompt or the reply.

    The longest match of at most `longest` tokens decides, the latest of those equally long.
    """

    name = "n-gram"

    def __init__(self, longest: int = 8, shortest: int = 2, most_places: int = 16):
        self._longest, self._shortest, self._most_places = longest, shortest, most_places
        self._ids: list[int] = []
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)  # the positions after an n-gram

    def read(self, ids: Sequence[int]) -> None:
        """As Draft: note where each run of tokens is, and what follows it."""
        for token in ids[len(self._ids) :]:
            self._places[tuple(self._ids[-self._shortest :])].append(len(self._ids))
            self._ids.append(token)

    def forget(self, length: int) -> None:
        """As Draft: all is forgotten, and read again when it is needed."""
        if length < len(self._ids):
            self._ids.clear()
            self._places.clear()

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Draft: what followed the longest match of the last tokens; none without one."""
        self.read(ids)
        places = self._places.get(tuple(self._ids[-self._shortest :]), ())[: -self._most_places - 1 : -1]
        if not places:
            return []
        place = max(places, key=self._match)  # of equal ones, max takes the first
        found = self._ids[place : place + n]
        while len(found) < n:  # it reaches the end, so the text repeats itself
            found.append(found[place - len(self._ids)])
        return found

    def _match(self, place: int) -> int:
        """How many tokens before `place` are the last of the text."""
        ids, longest = self._ids, min(self._longest, place)
        return next((i for i in range(self._shortest, longest) if ids[place - 1 - i] != ids[-1 - i]), longest)


class MTPDraft(Draft):
    """What the model's own head for multi-token prediction takes for likeliest; for more than one draft it is chained.

    Its row for position i takes the model's hidden state there and the token at i + 1, and predicts the token at i + 2
    (DeepSeek-V3, arXiv 2412.19437, section 2.2). Its cache is contiguous but may begin anywhere: only the last hidden
    states that it has not read are kept, so a stretch without drafts, a long prompt or a saved session costs little,
    and what lies before is not attended to.
    """

    name = "mtp"
    _WINDOW = 32  # hidden states kept: as many as the head takes without torch

    def __init__(self, model: MTPModel, ctx: int):
        assert model.mtp is not None
        model.keep_hidden = True
        self._model, self._mtp = model, model.mtp
        self._cache = self._mtp.new_cache(ctx + MOST)
        self._first = 0  # the position of the cache's first row
        self._hidden: list[np.ndarray] = []  # of the positions after the cache's last

    def evaluated(self, start: int, count: int, among: slice = slice(None)) -> None:
        """As Draft: keep what the model's head read at the last positions, for the next read()."""
        if start != self._first + self._cache.length + len(self._hidden):
            self._start_at(start)
        kept = [*self._hidden, *self._model.hidden[among][-self._WINDOW :].copy()][-self._WINDOW :]
        if len(kept) < len(self._hidden) + count:
            self._start_at(start + count - len(kept))
        self._hidden = kept

    def forget(self, length: int) -> None:
        """As Draft: what is kept from there on is dropped; further back the head begins anew."""
        next_position = self._first + self._cache.length
        if length >= next_position:
            del self._hidden[length - next_position :]
        else:
            self._start_at(length)

    def read(self, ids: Sequence[int]) -> None:
        """As Draft: have the head evaluate the positions whose next token is known by now."""
        if len(ids) - 1 > self._first + self._cache.length:  # the last position waits for the token after it
            self._follow(ids)

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Draft: the head's likeliest tokens, each from the one before; its cache is as it was afterwards."""
        logits, hidden = self._follow(ids)
        length, drafts = self._cache.length, [int(logits.argmax())]
        try:
            while len(drafts) < n:
                logits, hidden = self._mtp.forward(drafts[-1:], hidden, self._cache)
                drafts.append(int(logits.argmax()))
        finally:
            self._cache.truncate(length)
        return drafts

    def _follow(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read the hidden states whose next token is in ids: the last one's logits, float32 (1, vocab), and hidden."""
        start = self._first + self._cache.length
        count = len(ids) - 1 - start
        result = self._mtp.forward(ids[start + 1 : start + 1 + count], np.stack(self._hidden[:count]), self._cache)
        del self._hidden[:count]
        return result

    def _start_at(self, position: int) -> None:
        self._cache.truncate(0)
        self._first = position
        self._hidden = []


class BlockDraft(Draft):
    """A block of drafts in one pass, by a file's blocks (DSpark).

    They read what the model leaves of each token that it has evaluated. Of those the last ones are kept until drafts
    are asked for; where some were not seen, their memory begins anew.
    """

    name = "dspark"
    _WINDOW = 128  # tokens whose hidden values are kept: a window of the published blocks

    def __init__(self, model: DraftedModel, ctx: int):
        assert model.drafter is not None
        model.keep_hidden = True
        self._model, self._drafter = model, model.drafter
        self._cache: KVCache = self._drafter.new_cache(ctx)
        self._first = 0  # the position of the cache's first row
        self._hidden: list[np.ndarray] = []  # of the positions after the cache's last

    def evaluated(self, start: int, count: int, among: slice = slice(None)) -> None:
        """As Draft: keep what the model left at the last positions, for the next propose()."""
        kept = [*self._hidden, *self._model.hidden[among][-self._WINDOW :].copy()][-self._WINDOW :]
        if start != self._next:
            kept = kept[-min(count, self._WINDOW) :]
        if start != self._next or len(kept) < len(self._hidden) + count:
            self._cache.truncate(0)
            self._first = start + count - len(kept)
        self._hidden = kept

    def forget(self, length: int) -> None:
        """As Draft: what is kept from there on is dropped; where the cache cannot go back it is emptied."""
        held = self._first + self._cache.length
        if length >= held:
            del self._hidden[length - held :]
            return
        self._hidden = []
        self._cache.truncate(length - self._first)
        if self._first + self._cache.length != length:  # it cannot go back to there
            self._cache.truncate(0)
            self._first = length

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Draft: up to a block of tokens at once."""
        if self._hidden:
            self._drafter.keep(np.stack(self._hidden), self._cache)
            self._hidden = []
        return self._drafter.draft(ids[-1], n, self._cache)

    @property
    def _next(self) -> int:
        """The position whose hidden values come next."""
        return self._first + self._cache.length + len(self._hidden)
