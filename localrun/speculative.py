"""Speculative decoding: several drafts verified in one step, and how many of them pay.

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

from collections import deque
from collections.abc import Sequence

from localrun.drafts import MOST, Draft
from localrun.errors import LocalrunError

_SAMPLES, _PLAIN_SAMPLES = 3, 5  # steps before a cost is believed; that of plain steps is what all others are held to
_RECENT = 31  # of which a cost is the median: other programs disturb single steps by any factor
_MARGIN = 1.04  # more tokens a second than plain steps give, for drafts to be used: medians are uncertain by as much
_MEMORY = 16  # steps that acceptance is remembered for
_STALE_MEMORY = 2  # what it still counts for when drafts are tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024  # tokens between tries
_LOSS, _GRACE = 0.007, 3  # of the plain time, and plain steps: what trying may cost a reply


def check_setting(value: str | int) -> str | int:
    """ "auto", "off" or the number of drafts, 1 to MOST. Raises LocalrunError if it is something else."""
    if value in ("auto", "off"):
        return value
    if str(value) in map(str, range(1, MOST + 1)):
        return int(value)
    raise LocalrunError(f"speculative '{value}'; expected auto, off, or 1 to {MOST} drafts a step")


class _Typical:
    """The median of the last few times that something took; seconds is 0 before the first."""

    def __init__(self, n_needed: int):
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._n_needed = n_needed
        self.seconds = 0.0

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, seconds: float) -> None:
        self._recent.append(seconds)
        self.seconds = sorted(self._recent)[(len(self._recent) - 1) // 2]

    @property
    def is_known(self) -> bool:
        return len(self._recent) >= self._n_needed


class Pace:
    """How many drafts the next step should verify, by what steps took and how many drafts came true.

    With k drafts a step costs c(k) and gives 1 + E(k) tokens: the k with most tokens a second is taken, 0 among them.
    One draft more than that is tried now and then, in pauses that double as long as tries fail. What all steps took
    beyond plain steps for the same tokens is kept as a debt: at _LOSS of the reply's plain time and _GRACE steps there
    are no drafts until the reply has grown, whatever the estimates say. Sampling takes as long a token either way, so
    it is left out.

    Attributes:
        plain_s: what the tokens of this reply would have taken in plain steps, as far as known.
        lost_s: what they took more than that; negative where drafts paid.
    """

    def __init__(self) -> None:
        self._verifying = [_Typical(_SAMPLES if k else _PLAIN_SAMPLES) for k in range(MOST + 1)]
        self._proposing = [_Typical(_SAMPLES) for _ in range(MOST + 1)]
        self._chance = [0.0] * MOST  # that a draft at this depth comes true when those before it did
        self._weight = [0] * MOST  # the steps that this rests on, at most _MEMORY
        self._best = 0  # drafts
        self._since_plain = 0  # steps
        self._tokens = self._next_try = 0
        self.start_reply()

    def start_reply(self) -> None:
        """Debts end with a reply; what is known of costs and drafts stays."""
        self.plain_s = self.lost_s = 0.0
        self._pause = _FIRST_PAUSE
        self._next_try = min(self._next_try, self._tokens + self._pause)

    def next(self) -> int:
        """The drafts that the next step should verify."""
        if not self._verifying[0].is_known or self.lost_s > self._allowance():
            return 0
        if self._best and self._since_plain >= len(self._verifying[0]):
            return 0  # what plain steps cost now, the sooner the less is known of it
        more = self._best + 1
        if more <= MOST and self._tokens >= self._next_try and self._worst_loss(more) <= self._allowance():
            return more
        return self._best

    def record(self, n_drafts: int, n_accepted: int, propose_s: float, verify_s: float) -> None:
        """A step: what was verified, how many came true, and the seconds that proposing and verifying took."""
        self._verifying[n_drafts].add(verify_s)
        self._proposing[n_drafts].add(propose_s)
        self._since_plain = self._since_plain + 1 if n_drafts else 0
        self._tokens += 1 + n_accepted
        if n_drafts > self._best:
            self._tried(n_drafts, n_accepted)
        for depth in range(min(n_drafts, n_accepted + 1)):
            self._weight[depth] = min(self._weight[depth] + 1, _MEMORY)
            self._chance[depth] += ((depth < n_accepted) - self._chance[depth]) / self._weight[depth]
        if self._verifying[0].is_known:
            self._charge(n_drafts, n_accepted, propose_s)
            self._best = self._fastest()

    def _charge(self, n_drafts: int, n_accepted: int, propose_s: float) -> None:
        """Add a step to what the reply took and would have taken.

        Verifying counts by its median, so that a disturbed step is no debt, and never for more than one by one, so that
        neither is the first, which meets cold weights. Proposing counts as it was: after a pause, with reading what was
        missed.
        """
        plain, verify = self._verifying[0].seconds, self._verifying[n_drafts]
        verify_s = verify.seconds if verify.is_known else min(verify.seconds, (1 + n_drafts) * plain)
        self.plain_s += (1 + n_accepted) * plain
        self.lost_s += propose_s + verify_s - (1 + n_accepted) * plain

    def _tried(self, n_drafts: int, n_accepted: int) -> None:
        """One more than usual: the next try is at once where all came true, or their cost is not known yet."""
        newest = n_drafts - 1
        self._weight[newest] = min(self._weight[newest], _STALE_MEMORY)
        if n_accepted == n_drafts or not self._verifying[n_drafts].is_known:
            self._pause = _FIRST_PAUSE
            self._next_try = self._tokens
        else:
            self._next_try = self._tokens + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _fastest(self) -> int:
        """The number of drafts that gives most tokens a second, of those tried; none where the gain is uncertain."""
        tried = [k for k in range(1, MOST + 1) if self._verifying[k].is_known]
        best = max(tried, key=self._rate, default=0)
        return best if best and self._rate(best) > _MARGIN * self._rate(0) else 0

    def _rate(self, n_drafts: int) -> float:
        """Tokens a second of steps with this many drafts."""
        return self._tokens_expected(n_drafts) / self._cost(n_drafts)

    def _cost(self, n_drafts: int) -> float:
        """Seconds of a step; a plain one has nothing to propose."""
        return self._verifying[n_drafts].seconds + (self._proposing[n_drafts].seconds if n_drafts else 0.0)

    def _tokens_expected(self, n_drafts: int) -> float:
        """What a step with this many drafts gives."""
        expected = reached = 1.0
        for chance in self._chance[:n_drafts]:
            reached *= chance
            expected += reached
        return expected

    def _allowance(self) -> float:
        """The debt that trying may run up, in seconds."""
        return _LOSS * self.plain_s + _GRACE * self._verifying[0].seconds

    def _worst_loss(self, n_drafts: int) -> float:
        """The debt after a step of which no draft comes true; an unknown one may cost as much as one by one."""
        plain, cost = self._verifying[0].seconds, self._cost(n_drafts)
        return self.lost_s + (cost - plain if self._verifying[n_drafts].is_known else n_drafts * plain)


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

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """Up to `most` drafts of what follows ids, the last of which the model has not evaluated."""
        n = min(most, self._pace.next() if self.setting == "auto" else int(self.setting))
        return self.draft.propose(ids, n) if n > 0 else []

    def record(self, n_drafts: int, n_accepted: int, propose_s: float, verify_s: float) -> None:
        """A step was verified: how many came true, and the seconds that proposing and verifying took."""
        self._pace.record(n_drafts, n_accepted, propose_s, verify_s)

    @property
    def speed_up(self) -> float | None:
        """Of this reply over plain steps, without sampling; None as long as no plain step tells."""
        pace = self._pace
        return pace.plain_s / (pace.plain_s + pace.lost_s) if pace.plain_s else None
