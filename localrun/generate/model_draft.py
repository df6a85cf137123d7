"""Drafts by a smaller model, in a session of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrun.errors import LocalrunError
from localrun.generate.drafts import MOST, Draft
from localrun.generate.session import Session
from localrun.runtime import Runner


class ModelDraft(Draft):
    """What a smaller model with the same vocabulary takes for likeliest.

    Where it falls behind, in a stretch without drafts or at the end of its own context, it goes on from the last tokens
    alone: a bound on what a new try costs.
    """

    name = "draft model"

    def __init__(self, session: Session):
        self._session = session
        self._window = min(64, session.engine.ctx // 2)
        self._start = 0  # the position of its first token

    def read(self, ids: Sequence[int]) -> None:
        """As Draft: the model evaluates them."""
        self._follow(ids)

    def forget(self, length: int) -> None:
        """As Draft: the model's session forgets them."""
        self._session.forget(max(0, length - self._start))
        if length < self._start:
            self._start = 0

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """As Draft: the model's likeliest tokens, one after the other."""
        if len(ids) - self._start - len(self._session.ids) > self._window:
            self._start_at(len(ids) - self._window)
        drafts = [int(self._follow(ids).argmax())]
        while len(drafts) < n:
            drafts.append(int(self._session.advance(drafts[-1:]).argmax()))
        return drafts

    def _follow(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after ids, of which at least the last is new to it."""
        if len(ids) - self._start > self._session.engine.ctx - MOST:
            self._start_at(len(ids) - self._window)
        return self._session.advance(ids[self._start + len(self._session.ids) :])

    def _start_at(self, position: int) -> None:
        self._start = max(0, position)
        self._session.forget(0)


def check_vocabulary(model: Runner, draft: Runner) -> None:
    """Raises LocalrunError unless the ids of one mean the same to the other."""
    key = "tokenizer.ggml.tokens"
    same_tokens = model.file.metadata.get(key) == draft.file.metadata.get(key)
    if model.model.vocab_size != draft.model.vocab_size or not same_tokens:
        counts = f"{draft.model.vocab_size} tokens; {model.file.path.name} has {model.model.vocab_size}"
        raise LocalrunError(f"{draft.file.path}: its vocabulary is another ({counts}); a draft model needs the same")
