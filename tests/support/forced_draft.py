"""A draft that knows what the model will say, and spoils some of it: acceptance as one likes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrun.generate.drafts import Draft


class ForcedDraft(Draft):
    """Proposes what follows in `truth` (a prompt and its reply), each token right with probability `acceptance`."""

    name = "forced"

    def __init__(self, truth: Sequence[int], acceptance: float, n_vocab: int, seed: int = 0):
        self.truth, self.acceptance, self.n_vocab = list(truth), acceptance, n_vocab
        self._random = np.random.default_rng(seed)

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        tokens = self.truth[len(ids) : len(ids) + n]
        is_right = self._random.random(len(tokens)) < self.acceptance
        return [token if right else (token + 1) % self.n_vocab for token, right in zip(tokens, is_right, strict=True)]
