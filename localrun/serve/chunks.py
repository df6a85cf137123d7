"""How much of a prompt is read between two steps of running replies: what fits the time, by what chunks have taken."""

from __future__ import annotations

from localrun.limits import PREFILL_CHUNK
from quant.batch import MOST_TOKENS

_LEAST = MOST_TOKENS  # tokens: a step's
_FILLED = 0.9  # of the time, as no chunk takes quite what the one before took
_MOST_GROWTH = 2.0


class ChunkSize:
    """The size of the next chunk, from that of the last one and the seconds it took.

    A chunk of n tokens takes about a + b n seconds, where a is what reading the weights takes. So a chunk that grows
    takes no more than its tokens' share, and the size goes up to where the time is filled without going beyond it.
    Where a alone takes longer than there is time, chunks are as small as can be.
    """

    def __init__(self) -> None:
        self._size, self._seconds = _LEAST, 0.0

    def next(self, most_s: float) -> int:
        """Tokens that should not take longer than this."""
        growth = min(_MOST_GROWTH, _FILLED * most_s / self._seconds) if self._seconds else 1.0
        self._size, self._seconds = max(_LEAST, min(int(self._size * growth), PREFILL_CHUNK)), 0.0
        return self._size

    def record(self, n_tokens: int, seconds: float) -> None:
        """A chunk was read. A prompt's last one, which is shorter, tells nothing."""
        if n_tokens == self._size:
            self._seconds = seconds
