"""The block formats by ggml's names, each in a module of its own that is imported (and compiled) when first used."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from quant.errors import QuantError
from quant.target.jit import Kernel

GEMV = "void(int64, int64, int64, int64, int64)"
GEMV_FEW = "void(int64, int64, int64, int64, int64, int64, int64)"
EXPAND = "void(int64, int64, int64)"
PACK = "void(int64, int64, int64, int64, int64)"  # of the packing kernels: pack.py


@dataclass(frozen=True)
class Format:
    """One block format and its kernels.

    Attributes:
        name: ggml's, "Q4_K".
        block: weights in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block.
        integer: whether gemv reads the 8-bit part of an activation record (else the float32 part).
        unpack: uint8 (..., n * block_bytes) -> float32 (..., n * block): NumPy, bit-equal to ggml's.
        gemv: void(w, n_rows, n_cols, record, out): out[r] f32 = row r . x, integer inside a block's
            sub-blocks, float32 across them.
        gemv_few: void(w, n_rows, n_cols, records, outs, offset, n_tokens): the same for up to
            gemv.MOST_FEW tokens, each block decoded once. records, outs: addresses of n_tokens addresses;
            outs[t][offset + 4*r] = row r . records[t].
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
    gemv_few: Kernel
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


_MODULES = {
    "F32": "floats",
    "F16": "floats",
    "BF16": "floats",
    "Q4_0": "q4_0",
    "Q4_1": "q4_1",
    "Q5_0": "q5_0",
    "Q5_1": "q5_1",
    "Q8_0": "q8_0",
    "Q4_K": "q4_k",
    "Q5_K": "q5_k",
    "Q6_K": "q6_k",
    "IQ4_NL": "iq4_nl",
    "IQ4_XS": "iq4_xs",
    "MXFP4": "mxfp4",
}
NAMES = tuple(_MODULES)
INTERLEAVED = (
    "Q4_K_R16",
    "Q5_K_R16",
    "Q6_K_R16",
)  # names of our own: 16 rows of the format before _R16


def get(name: str) -> Format:
    """The format called `name`. Raises QuantError."""
    if name not in _MODULES and name not in INTERLEAVED:
        raise QuantError(f"no kernels for type {name}; there are some for {', '.join((*NAMES, *INTERLEAVED))}")
    return getattr(import_module(f"quant.formats.{_MODULES.get(name, name.lower())}"), name)
