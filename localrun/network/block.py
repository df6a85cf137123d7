"""One kind of row that one layer keeps of a text: a block of memory, in which a window's rows go round.

It knows widths, not meanings. The arrays' rows are tokens' (or pooled ones), in order; of a ring the row of position p
is row p modulo the ring's rows.
"""

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from localrun.models.rows import Rows

if TYPE_CHECKING:
    import torch

_PAGE, _LARGE_PAGE, _LARGE = 1 << 12, 1 << 21, 1 << 22  # bytes: large pages where a block has _LARGE or more


class Block:
    """Rows of one kind for up to `capacity` tokens; memory is touched only as tokens come.

    Attributes:
        kind: what rows they are.
        rows: (rows, width).
        held: the first position whose row it still has.
    """

    def __init__(self, kind: Rows, rows: np.ndarray, page: int):
        """page: bytes of one of the memory's."""
        self.kind, self.rows, self._page, self.held = kind, rows, page, 0

    @property
    def is_ring(self) -> bool:
        """Whether rows are written over."""
        return self.kind.window > 0

    @property
    def dtype(self) -> np.dtype:
        """Of values."""
        return self.rows.dtype

    @property
    def address(self) -> int:
        """Of the first row."""
        return self.rows.ctypes.data

    @property
    def tensor(self) -> "torch.Tensor":
        """The rows in torch, the same memory."""
        import torch

        return torch.from_numpy(self.rows)

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

        rows, new = self.tensor, self._stored(new)
        if not self.is_ring:
            start = length // self.kind.ratio
            rows[start : start + len(new)] = new
            return self._read(rows[: start + len(new)])
        end = length + len(new)  # of a long chunk new rows go over what its first tokens see
        seen = torch.cat([rows[self._places(self.kind.first(length), length)], new])
        kept = min(len(new), len(rows))
        rows[self._places(end - kept, end)] = seen[len(seen) - kept :]
        return self._read(seen)

    def _stored(self, new: "torch.Tensor") -> "torch.Tensor":
        """Rows as the memory has them."""
        return new.to(self.tensor.dtype)

    def _read(self, rows: "torch.Tensor") -> "torch.Tensor":
        """Rows of the memory as others see them."""
        return rows

    def get(self, first: int, end: int) -> np.ndarray:
        """The rows of positions first to end - 1: of a ring a copy, else a view of those completed."""
        return self.rows[self._places(first, end)]

    def stored(self, first: int, end: int) -> np.ndarray:
        """The same as the memory has them."""
        return self.rows[self._places(first, end)]

    def write(self, end: int, rows: np.ndarray) -> None:
        """Have the last rows of positions before `end` be these, which stored() gave; the others stay."""
        stop = end // self.kind.ratio
        self.rows[self._places(end - len(rows), end) if self.is_ring else slice(stop - len(rows), stop)] = rows

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
        written = min(self.kind.count(touched), len(self.rows)) * self.rows.strides[0]
        return min(-(-written // self._page) * self._page, self.rows.nbytes)


class PackedBlock(Block):
    """Rows in another form than values side by side; others see float16.

    Attributes:
        rows: uint8 (rows, bytes).
    """

    @property
    def dtype(self) -> np.dtype:
        """Of values, as others see them."""
        return np.dtype(np.float16)

    def get(self, first: int, end: int) -> np.ndarray:
        """As Block.get; a copy, which put() makes the same bytes of."""
        return self._expanded(super().get(first, end))

    def put(self, end: int, rows: np.ndarray) -> None:
        """As Block.put."""
        super().put(end, self._packed(rows))

    def _stored(self, new: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.from_numpy(self._packed(new.numpy()))

    def _read(self, rows: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.from_numpy(self._expanded(rows.numpy()))

    def _packed(self, rows: np.ndarray) -> np.ndarray:
        rows = np.ascontiguousarray(rows, np.float32)
        packed = np.empty((len(rows), self.rows.shape[1]), np.uint8)
        self._pack(rows.ctypes.data, len(rows), packed.ctypes.data)
        return packed

    def _expanded(self, packed: np.ndarray) -> np.ndarray:
        packed = np.ascontiguousarray(packed)
        rows = np.empty((len(packed), self.kind.width), np.float16)
        self._expand(packed.ctypes.data, len(packed), rows.ctypes.data)
        return rows

    def _pack(self, rows: int, n_rows: int, packed: int) -> None:
        """From float32 (n_rows, width) at one address to rows at another."""
        raise NotImplementedError

    def _expand(self, packed: int, n_rows: int, rows: int) -> None:
        """From there to float16."""
        raise NotImplementedError


class ByteBlock(PackedBlock):
    """Rows in 8 bits (quant/gemv/rows_i8.py), of a kind that has groups."""

    def _pack(self, rows: int, n_rows: int, packed: int) -> None:
        from quant.gemv.rows_i8 import pack_rows

        pack_rows.ctypes(rows, n_rows, self.kind.width, self.kind.group, packed)

    def _expand(self, packed: int, n_rows: int, rows: int) -> None:
        from quant.gemv.rows_i8 import expand_rows

        expand_rows.ctypes(packed, n_rows, self.kind.width, self.kind.group, rows)


class ScaledBlock(PackedBlock):
    """Rows of integers with a scale each (quant/gemv/rows_i16.py)."""

    def _pack(self, rows: int, n_rows: int, packed: int) -> None:
        from quant.gemv.rows_i16 import pack_scaled_rows

        pack_scaled_rows.ctypes(rows, n_rows, self.kind.width, packed)

    def _expand(self, packed: int, n_rows: int, rows: int) -> None:
        from quant.gemv.rows_i16 import expand_scaled_rows

        expand_scaled_rows.ctypes(packed, n_rows, self.kind.width, rows)


def new_blocks(kinds: Sequence[Rows], capacity: int, dtype: type[np.floating], bits: int = 16) -> list[Block]:
    """A block of each kind, for up to `capacity` tokens.

    bits: 8 to have groups in bytes, where kinds have some, 16 to have integers; others have values of `dtype`.

    Their memory is fresh, and goes back to the system with them. malloc's would be what blocks before them have written
    to, all of it resident: many short conversations would take the memory of as many full ones.
    """
    types = [_block_type(kind, dtype, bits) for kind in kinds]
    is_packed = [issubclass(type_, PackedBlock) for type_ in types]
    widths = [kind.stored_bytes(bits) if packed else kind.width for kind, packed in zip(kinds, is_packed, strict=True)]
    shapes = [(kind.count(capacity), width) for kind, width in zip(kinds, widths, strict=True)]
    dtypes = [
        np.dtype(np.uint8 if packed else np.float32 if kind.is_exact else dtype)
        for kind, packed in zip(kinds, is_packed, strict=True)
    ]
    sizes = [rows * width * each.itemsize for (rows, width), each in zip(shapes, dtypes, strict=True)]
    starts = np.cumsum([0, *(-(-size // _PAGE) * _PAGE for size in sizes)]).tolist()
    memory = mmap.mmap(-1, max(_PAGE, starts.pop()), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    is_large = max(sizes, default=0) >= _LARGE
    with suppress(OSError, AttributeError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE if is_large else mmap.MADV_NOHUGEPAGE)
    arrays = [np.ndarray(*of, memory, start) for *of, start in zip(shapes, dtypes, starts, strict=True)]
    page = _LARGE_PAGE if is_large else _PAGE
    return [type_(kind, rows, page) for type_, kind, rows in zip(types, kinds, arrays, strict=True)]


def _block_type(kind: Rows, dtype: type[np.floating], bits: int) -> type[Block]:
    if bits == 8 and kind.group:
        return ByteBlock
    return ScaledBlock if bits == 16 and kind.is_scaled and dtype == np.float16 else Block
