"""How many drafts a step should verify: as many as have paid, by what steps took and how many drafts came true."""

from __future__ import annotations

from collections import deque

from localrun.generate.drafts import MOST

_SAMPLES, _PLAIN_SAMPLES = 3, 5  # steps before a cost is believed; that of plain steps is what all others are held to
_RECENT, _PLAIN_RECENT = 31, 5  # steps that a median is over; short for plain steps, as load comes and goes
_MARGIN = 1.04  # more tokens a second than plain steps give, for drafts to be used: medians are uncertain by as much
_MEMORY = 16  # steps that acceptance is remembered for
_STALE_MEMORY = 2  # what it still counts for when drafts are tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 1024  # tokens between tries
_REFRESH = 15  # steps with drafts between two without, at most
_LOSS, _GRACE = 0.007, 3.0  # what trying may cost, in plain steps: a token, and at once
_CREDIT = 10.0  # plain steps: gains that are set against it


class _Typical:
    """The median of the last `n_recent` values; 0 before the first."""

    def __init__(self, n_recent: int):
        self._recent: deque[float] = deque(maxlen=n_recent)
        self.value, self.n_seen = 0.0, 0

    def add(self, value: float) -> None:
        self._recent.append(value)
        self.n_seen += 1
        self.value = sorted(self._recent)[(len(self._recent) - 1) // 2]


class Pace:
    """How many drafts the next step should verify, by what steps took and how many drafts came true.

    Costs are in plain steps, those of the same moment, since what else the machine does slows all steps. With k drafts
    a step costs c(k) and gives 1 + E(k) tokens: the k with most tokens for its cost is taken, 0 among them. One draft
    more than that is tried now and then, in pauses that double as long as tries fail. What steps cost beyond the tokens
    they gave is a debt, of which _LOSS a token is forgiven: at _GRACE there are no drafts until it has shrunk, whatever
    the estimates say. Gains are set against it, up to _CREDIT. So n tokens lose no more than _GRACE + _LOSS n. Sampling
    takes as long a token either way and is left out.

    Attributes:
        tokens: of this reply, since plain steps are known.
        cost: what they took, in plain steps.
    """

    def __init__(self) -> None:
        self._plain_s = _Typical(_PLAIN_RECENT)
        self._verifying = [_Typical(_RECENT) for _ in range(MOST + 1)]  # plain steps, by the number of drafts
        self._proposing = [_Typical(_RECENT) for _ in range(MOST + 1)]
        self._chance = [0.0] * MOST  # that a draft at this depth comes true when those before it did
        self._weight = [0] * MOST  # the steps that this rests on, at most _MEMORY
        self._best = 0  # drafts
        self._since_plain = 0  # steps
        self._position = self._next_try = 0  # tokens
        self._debt = 0.0  # plain steps
        self.start_reply()

    def start_reply(self) -> None:
        """What is known of costs and drafts stays, and debts do; tries come as often again as at first."""
        self.tokens, self.cost = 0, 0.0
        self._pause = _FIRST_PAUSE
        self._next_try = min(self._next_try, self._position + self._pause)

    def next(self) -> int:
        """The drafts that the next step should verify."""
        if self._plain_s.n_seen < _PLAIN_SAMPLES or self._debt > _GRACE:
            return 0
        if self._best and self._since_plain >= min(_REFRESH, self._plain_s.n_seen):
            return 0  # what plain steps cost now, the sooner the less is known of it
        more = self._best + 1
        if more <= MOST and self._position >= self._next_try and self._debt + self._risk(more) <= _GRACE:
            return more
        return self._best

    def record(self, n_drafts: int, n_accepted: int, propose_s: float, verify_s: float) -> None:
        """A step: what was verified, how many came true, and the seconds that proposing and verifying took."""
        self._position += 1 + n_accepted
        self._since_plain = self._since_plain + 1 if n_drafts else 0
        if not n_drafts:
            self._plain_s.add(verify_s)
        if self._plain_s.n_seen < _PLAIN_SAMPLES:
            return
        proposing = propose_s / self._plain_s.value
        if n_drafts:
            self._verifying[n_drafts].add(verify_s / self._plain_s.value)
            self._proposing[n_drafts].add(proposing)
        if n_drafts > self._best:
            self._tried(n_drafts, n_accepted)
        for depth in range(min(n_drafts, n_accepted + 1)):
            self._weight[depth] = min(self._weight[depth] + 1, _MEMORY)
            self._chance[depth] += ((depth < n_accepted) - self._chance[depth]) / self._weight[depth]
        self._charge(n_drafts, 1 + n_accepted, proposing)
        self._best = self._fastest()

    def _charge(self, n_drafts: int, n_tokens: int, proposing: float) -> None:
        """Add a step to what the reply cost.

        Verifying counts by its median, so that a disturbed step is no debt, and before that is known for no more than
        one by one, so that neither is the first, which meets cold weights. Proposing counts as it was: after a pause,
        with reading what was missed.
        """
        verifying = self._verifying[n_drafts].value if n_drafts else 1.0
        cost = proposing + (verifying if self._is_known(n_drafts) else min(verifying, 1.0 + n_drafts))
        self.tokens += n_tokens
        self.cost += cost
        self._debt = max(-_CREDIT, self._debt + cost - (1 + _LOSS) * n_tokens)

    def _tried(self, n_drafts: int, n_accepted: int) -> None:
        """One more than usual: the next try is at once where all came true, or their cost is not known yet."""
        newest = n_drafts - 1
        self._weight[newest] = min(self._weight[newest], _STALE_MEMORY)
        if n_accepted == n_drafts or not self._is_known(n_drafts):
            self._pause = _FIRST_PAUSE
            self._next_try = self._position
        else:
            self._next_try = self._position + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _fastest(self) -> int:
        """The number of drafts that gives most tokens for its cost; none where the gain is uncertain."""
        tried = [k for k in range(1, MOST + 1) if self._is_known(k)]
        best = max(tried, key=self._rate, default=0)
        return best if best and self._rate(best) > _MARGIN else 0

    def _is_known(self, n_drafts: int) -> bool:
        return n_drafts == 0 or self._verifying[n_drafts].n_seen >= _SAMPLES

    def _rate(self, n_drafts: int) -> float:
        """Tokens that steps with this many drafts give for the cost of a plain step."""
        return self._tokens_expected(n_drafts) / self._cost(n_drafts)

    def _tokens_expected(self, n_drafts: int) -> float:
        expected = reached = 1.0
        for chance in self._chance[:n_drafts]:
            reached *= chance
            expected += reached
        return expected

    def _cost(self, n_drafts: int) -> float:
        """Of a step; before it is known, that of one token after the other."""
        if not self._is_known(n_drafts):
            return 1.0 + n_drafts
        return self._verifying[n_drafts].value + self._proposing[n_drafts].value

    def _risk(self, n_drafts: int) -> float:
        """What a step loses of which all but the last draft do as expected, and that one fails."""
        return self._cost(n_drafts) - self._tokens_expected(n_drafts - 1)
