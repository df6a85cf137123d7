"""One kind of row that one layer keeps of a text: a block of memory, in which a window's rows go round.

It knows widths, not meanings. The arrays' rows are tokens' (or pooled ones), in order; of a ring the row of position p
is row p modulo the ring's rows.
"""

from typing import TYPE_CHECKING

import numpy as np

from localrun.models.rows import Rows

if TYPE_CHECKING:
    import torch

_PAGE, _LARGE_PAGE, _LARGE = 1 << 12, 1 << 21, 1 << 22  # bytes: NumPy asks for large pages in arrays from _LARGE on


class Block:
    """Rows of one kind for up to `capacity` tokens; memory is touched only as tokens come.

    Attributes:
        kind: what rows they are.
        rows: (rows, width).
        held: the first position whose row it still has.
    """

    def __init__(self, kind: Rows, capacity: int, dtype: type[np.floating]):
        self.kind = kind
        self.rows = np.empty((kind.count(capacity), kind.width), np.float32 if kind.is_exact else dtype)
        self.held = 0

    @property
    def is_ring(self) -> bool:
        """Whether rows are written over."""
        return self.kind.window > 0

    def holds(self, length: int) -> bool:
        """Whether it has all that the token at position `length` needs."""
        return self.kind.first(length) >= self.held

    def write_to(self, end: int) -> None:
        """Rows of positions below `end` are written, or about to be."""
        if self.is_ring:
            self.held = max(self.held, end - len(self.rows))

    def extend(self, length: int, new: "torch.Tensor") -> "torch.Tensor":
        """Write rows (T, width) of the tokens from position `length` on, or pooled ones that they complete.

        Returns:
            All rows there are then; of a ring a copy of those that the first of these tokens needs, and the new ones.
        """
        import torch

        rows = torch.from_numpy(self.rows)
        if not self.is_ring:
            start = length // self.kind.ratio
            rows[start : start + len(new)] = new
            return rows[: start + len(new)]
        end = length + len(new)  # of a long chunk new rows go over what its first tokens see
        seen = torch.cat([rows[self._places(self.kind.first(length), length)], new.to(rows.dtype)])
        kept = min(len(new), len(rows))
        rows[self._places(end - kept, end)] = seen[len(seen) - kept :]
        return seen

    def get(self, first: int, end: int) -> np.ndarray:
        """The rows of positions first to end - 1: of a ring a copy, else a view of those completed."""
        return self.rows[self._places(first, end)]

    def put(self, end: int, rows: np.ndarray) -> None:
        """Have the last positions before `end` hold these rows; what was before them is lost."""
        first = end - len(rows) if self.is_ring else 0
        self.rows[self._places(first, end)] = rows
        self.held = first

    def _places(self, first: int, end: int) -> slice | np.ndarray:
        if self.is_ring:
            return np.arange(first, end) % max(1, len(self.rows))
        return slice(first // self.kind.ratio, end // self.kind.ratio)

    def resident(self, touched: int) -> int:
        """Bytes of memory once `touched` tokens have been written, in whole pages."""
        page = _LARGE_PAGE if self.rows.nbytes >= _LARGE else _PAGE
        written = min(self.kind.count(touched), len(self.rows)) * self.rows.strides[0]
        return min(-(-written // page) * page, self.rows.nbytes)
