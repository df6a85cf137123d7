"""What a block format is to everything that computes with one: its layout, and its kernels by signature.

The formats themselves: formats/, a module each or for a pair of twins. They import this; nothing below them does the
reverse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quant.errors import QuantError
from quant.target.kernel import Kernel

GEMV = "void(int64, int64, int64, int64, int64)"
GEMV_BATCH = "void(int64, int64, int64, int64, int64, int64, int64)"
EXPAND = "void(int64, int64, int64)"
REPACK = "void(int64, int64, int64)"
WIDEN = "void(int64, int64, int64)"
QUANTIZE = "void(int64, int64, int64, int64, int64)"

ROWS = 16  # rows that lie interleaved in the formats that have it so
LARGEST_F16, LARGEST_BF16 = 65504.0, 2.0**128 - 2.0**120


def block_layout(n_bytes: int, **fields: str) -> np.dtype:
    """A block's fields by ggml's names, in their order: block_layout(18, d="<f2", qs="16u1").

    n_bytes: of ggml's struct. Packed bits are u1; numbers have types of their own.
    """
    layout = np.dtype(list(fields.items()))
    assert layout.itemsize == n_bytes, f"{layout} takes {layout.itemsize} bytes, not {n_bytes}"
    return layout


def offsets(layout: np.dtype) -> tuple[int, ...]:
    """Where the fields of a block begin, in their order."""
    return tuple(layout.fields[name][1] for name in layout.names)


def halves(layout: np.dtype) -> tuple[int, ...]:
    """Where the f16 fields of a block begin: its scales."""
    return tuple(layout.fields[name][1] for name in layout.names or () if layout[name] == np.float16)


@dataclass(frozen=True)
class PanelFormat:
    """How blocks of one format become packed panels (gemm/packed.py).

    Attributes:
        kind, offset: see there.
        repack: void(rows, n_blocks, out): n_blocks blocks behind each of 16 addresses at `rows`, to k-blocks.
            Of interleaved rows they are one address.
    """

    kind: int
    offset: int
    repack: Kernel


@dataclass(frozen=True)
class Format:
    """One block format and its kernels.

    Attributes:
        name: ggml's, "Q4_K".
        block: weights in a block; a row is a whole number of blocks.
        layout: of a block; of a plain number its type.
        integer: whether gemv reads the 8-bit part of a q8 row (else the float32 part).
        unpack: uint8 (..., n * block_bytes) -> float32 (..., n * block): NumPy, bit-equal to ggml's.
        gemv: void(w, n_rows, n_cols, q8, out): out[r] f32 = row r . x, integer inside a block's
            sub-blocks, float32 across them.
        gemv_batch: void(w, n_rows, n_cols, q8_rows, outs, offset, n_tokens): the same for up to
            gemv.plain.MAX_BATCH tokens, each block decoded once. q8_rows, outs: addresses of n_tokens addresses;
            outs[t][offset + 4*r] = row r . q8_rows[t].
        expand: void(w, n_blocks, out): the same float32 values as unpack. None if rows are interleaved.
        rows: how many rows lie interleaved (interleave.py). All kernels take multiples of so many, from a multiple of
            it on; unpack takes (..., rows, row bytes).
        panels: how blocks become packed panels; None if prompts go through float32. Ask gemm.packed.find() for it.
        quantize: void(x, importance, n_blocks, out, scratch): one row of float32 at x, its columns' importances
            (float32, or address 0 for none), tensor.SCRATCH_BYTES of work memory. None if there is none.
        widen: void(blocks, n_blocks, out): blocks of the plain format to wider ones of this layout. None but for rows
            that are interleaved with such blocks.
        largest: the largest magnitude of a weight that quantize takes: float16's where values or scales are kept in it.
    """

    name: str
    block: int
    layout: np.dtype
    integer: bool
    unpack: Callable[[np.ndarray], np.ndarray]
    gemv: Kernel
    gemv_batch: Kernel
    expand: Kernel | None = None
    rows: int = 1
    panels: PanelFormat | None = None
    quantize: Kernel | None = None
    largest: float = LARGEST_F16
    widen: Kernel | None = None

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return self.layout.itemsize

    @property
    def expand_address(self) -> int:
        """Address of expand, or 0."""
        return self.expand.address if self.expand else 0

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row. Raises QuantError if n_cols is not a whole number of blocks."""
        if n_cols % self.block:
            raise QuantError(f"{self.name} rows are multiples of {self.block} weights; found {n_cols}")
        return n_cols // self.block * self.block_bytes
