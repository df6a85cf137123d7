"""What a block format is to everything that computes with one: its sizes, and its kernels by signature.

The formats themselves: formats/, a module each. They import this; nothing below them does the reverse.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quant.errors import QuantError
from quant.target.kernel import Kernel

GEMV = "void(int64, int64, int64, int64, int64)"
GEMV_BATCH = "void(int64, int64, int64, int64, int64, int64, int64)"
EXPAND = "void(int64, int64, int64)"
PACK = "void(int64, int64, int64, int64, int64)"  # of the packing kernels: pack.py


@dataclass(frozen=True)
class Format:
    """One block format and its kernels.

    Attributes:
        name: ggml's, "Q4_K".
        block: weights in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block.
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
    """

    name: str
    block: int
    block_bytes: int
    integer: bool
    unpack: Callable[[np.ndarray], np.ndarray]
    gemv: Kernel
    gemv_batch: Kernel
    expand: Kernel | None
    rows: int = 1

    @property
    def expand_address(self) -> int:
        """Address of expand, or 0."""
        return self.expand.address if self.expand else 0

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row. Raises QuantError if n_cols is not a whole number of blocks."""
        if n_cols % self.block:
            raise QuantError(f"{self.name} rows are multiples of {self.block} weights; found {n_cols}")
        return n_cols // self.block * self.block_bytes
