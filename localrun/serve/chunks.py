"""How much of a prompt is read between two steps of running replies: what fits the time, by what chunks have taken."""

from __future__ import annotations

from localrun.limits import PREFILL_CHUNK

_FILLED = 0.8  # of the time: on a shared machine a chunk may take a fifth longer than the one before
_MOST_GROWTH = 2.0


class ChunkSize:
    """The size of the next chunk, from that of the last one and the seconds it took.

    A chunk of n tokens takes about a + b n seconds, where a is what reading the weights takes. So a chunk that grows
    takes no more than its tokens' share, and the size goes up to where the time is filled without going beyond it.
    Where a alone takes longer than there is time, chunks are as small as can be.

    Args:
        least: tokens; the size of the first one.
    """

    def __init__(self, least: int):
        self._least = self._size = least
        self._seconds = 0.0

    def next(self, most_s: float, n_left: int) -> int:
        """Tokens that should not take longer than this, of so many; what they leave is nothing, or `least` or more."""
        growth = min(_MOST_GROWTH, _FILLED * most_s / self._seconds) if self._seconds else 1.0
        self._size, self._seconds = max(self._least, min(int(self._size * growth), PREFILL_CHUNK)), 0.0
        if n_left - self._size >= self._least:
            return self._size
        return n_left if n_left < self._size or n_left < 2 * self._least else n_left - self._least

    def record(self, n_tokens: int, seconds: float) -> None:
        """A chunk was read. One of another size than it might have been tells nothing."""
        if n_tokens == self._size:
            self._seconds = seconds
