"""Speculative decoding: several drafts verified in one step.

The model evaluates its last token and k drafts at once. The sampler then draws from the first row exactly as it would
without drafts; if what it draws is the draft, the next row is the one that plain decoding would have computed next, and
so on. Whatever is drawn at the first difference is the next token, and the rows behind it are dropped.

This is the rejection rule of Leviathan et al. (arXiv 2211.17192) and Chen et al. (2302.01318) for a draft distribution
with all its weight on one token d: d is taken with probability p(d), any other with its own p, as p without d,
renormalised, is what is drawn in the remaining 1 - p(d). As the sampler is asked once a token, in order, the reply even
is the same token for token, whatever the temperature, the penalties and the drafts, for a model whose rows do not
depend on how many are computed at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from localrun.arguments import whole
from localrun.generate.drafts import MOST, Draft
from localrun.generate.pace import Pace


def check_setting(value: str | int) -> str | int:
    """ "auto", "off" or the number of drafts, 1 to MOST. Raises LocalrunError if it is something else."""
    if isinstance(value, str) and value in ("auto", "off"):
        return value
    count = int(value) if isinstance(value, str) and value in map(str, range(1, MOST + 1)) else value
    return whole("speculative", count, f"auto, off, or 1 to {MOST} drafts a step", low=1, high=MOST)


class Speculation:
    """Drafts for one session, and how many of them.

    Attributes:
        draft: where they come from.
        setting: "auto", or how many drafts every step verifies.
    """

    def __init__(self, draft: Draft, setting: str | int = "auto"):
        self.draft, self.setting = draft, check_setting(setting)
        self._pace = Pace()

    def start_reply(self, ids: Sequence[int]) -> None:
        """A reply to the prompt ids begins; the model has evaluated them all."""
        self.draft.read(ids)
        self._pace.start_reply()

    def propose(self, ids: Sequence[int], last: int, most: int) -> list[int]:
        """Up to `most` drafts of what follows ids, which the model has evaluated, and the token `last`."""
        n = min(most, self._pace.next() if self.setting == "auto" else int(self.setting))
        return self.draft.propose([*ids, last], n) if n > 0 else []

    def record(self, n_drafts: int, n_accepted: int, propose_s: float, verify_s: float) -> None:
        """A step was verified: how many came true, and the seconds that proposing and verifying took."""
        self._pace.record(n_drafts, n_accepted, propose_s, verify_s)

    @property
    def speed_up(self) -> float | None:
        """Of this reply over plain steps, without sampling; None as long as no plain steps tell."""
        return self._pace.tokens / self._pace.cost if self._pace.tokens else None
