"""Quantised matrices in memory that somebody else keeps: as Python holds them, and as kernels read them (MATRIX)."""

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from quant.block_format import Format
from quant.errors import QuantError
from quant.simd.gated import SWIGLU, Activation
from quant.simd.struct import address, i64, struct
from quant.target.jit import inline

MATRIX = struct(
    "Matrix",
    gemv=address,  # kernels of its format, or 0
    gemv_batch=address,
    expand=address,
    block=i64,  # weights in a block
    interleaved=i64,  # rows that lie interleaved, a power of 2
    expand_from=i64,  # tokens from which on rows are expanded to float32
    expand_rows=i64,  # so many at a time
    address=address,
    row_bytes=i64,
    group_bytes=i64,
)
# From so many tokens on expanding a row to float32 costs less than decoding it for a small batch at a time
# (docs/lab-notes.md); plain numbers are not decoded.
EXPAND_FROM, EXPAND_FROM_OF_FLOATS = 16, 6
_NEVER = 1 << 62
_EXPANDED_BYTES = 1 << 18  # of rows in float32 at a time: beside their inputs in L2


Memory = Callable[[int], np.ndarray]  # uint8 of so many bytes


def in_array(n_bytes: int) -> np.ndarray:
    """What NumPy has for it."""
    return np.empty(n_bytes, np.uint8)


@inline
def row_address(matrix, group, row):
    """Where a row of a MATRIX begins; the first of those that it is interleaved with."""
    return matrix.address + matrix.group_bytes * group + matrix.row_bytes * row


@dataclass(frozen=True)
class QuantMatrix:
    """n_groups matrices of (n_rows, n_cols) in one format.

    Attributes:
        address: of the first block of the first row.
        group_bytes: from one group's first row to the next group's.
        owner: whatever keeps the memory alive.
    """

    format: Format
    address: int
    n_groups: int
    n_rows: int
    n_cols: int
    group_bytes: int
    owner: object = None

    @cached_property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.format.row_bytes(self.n_cols)

    @property
    def expand_from(self) -> int:
        """Tokens from which on products go through rows in float32; beyond any number where those have no kernels."""
        if self.format.rows > 1 or self.n_cols % 16:
            return _NEVER
        return EXPAND_FROM_OF_FLOATS if self.format.block == 1 else EXPAND_FROM

    @property
    def expand_rows(self) -> int:
        """Rows that are expanded at a time."""
        return max(4, min(64, _EXPANDED_BYTES // (4 * self.n_cols) // 4 * 4))

    @cached_property
    def struct(self) -> np.ndarray:
        """The matrix as kernels see it, a packed MATRIX."""
        return MATRIX.pack(
            gemv=self.format.gemv.address, gemv_batch=self.format.gemv_batch.address, expand=self.format.expand_address,
            block=self.format.block, interleaved=self.format.rows, expand_from=self.expand_from,
            expand_rows=self.expand_rows,
            address=self.address, row_bytes=self.row_bytes, group_bytes=self.group_bytes,
        )  # fmt: skip

    def rows(self, start: int, count: int) -> "QuantMatrix":
        """The same groups, restricted to `count` rows from `start`: a view."""
        if start < 0 or start + count > self.n_rows:
            raise QuantError(f"rows {start}..{start + count} of a matrix with {self.n_rows}")
        _check_rows(self.format, start, count)
        return replace(self, address=self.address + start * self.row_bytes, n_rows=count)

    def columns(self, start: int, count: int, memory: Memory = in_array) -> "QuantMatrix":
        """The same rows, restricted to `count` columns from `start`: a copy, since kernels read rows without gaps.

        memory: for that. Raises QuantError unless both are whole blocks.
        """
        f, block = self.format, self.format.block
        if start < 0 or start + count > self.n_cols or start % block or count % block:
            raise QuantError(f"{f.name}: columns {start}..{start + count} of {self.n_cols} in blocks of {block}")
        size = f.rows * f.block_bytes  # of a block in all rows that lie interleaved
        whole = np.lib.stride_tricks.as_strided(
            bytes_at(self.address, self.n_groups * self.group_bytes),
            (self.n_groups, self.n_rows // f.rows, self.n_cols // block, size),
            (self.group_bytes, f.rows * self.row_bytes, size, 1),
        )
        chosen = whole[:, :, start // block : (start + count) // block]
        own = memory(chosen.size)
        own.reshape(chosen.shape)[:] = chosen
        return quant_matrix(own, f, (self.n_groups, self.n_rows, count))


def bytes_at(address: int, n_bytes: int) -> np.ndarray:
    """uint8 (n_bytes,): memory that must stay."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))


def _check_rows(format_: Format, *numbers: int) -> None:
    """Raises QuantError unless interleaved rows stay together."""
    if any(number % format_.rows for number in numbers):
        found = " and ".join(map(str, numbers))
        raise QuantError(f"{format_.name} takes multiples of {format_.rows} rows; found {found}")


def quant_matrix(data: np.ndarray, format_: Format, shape: tuple[int, ...]) -> QuantMatrix:
    """The uint8 `data` as matrices of `shape` (rows, cols) or (groups, rows, cols). Raises QuantError on its size."""
    *groups, n_rows, n_cols = shape
    n_groups = groups[0] if groups else 1
    _check_rows(format_, n_rows)
    group_bytes = n_rows * format_.row_bytes(n_cols)
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes != n_groups * group_bytes:
        raise QuantError(f"{format_.name} {shape} takes {n_groups * group_bytes} contiguous bytes; found {data.nbytes}")
    return QuantMatrix(format_, data.ctypes.data, n_groups, n_rows, n_cols, group_bytes, data)


def check_single_rows(matrix: QuantMatrix) -> None:
    """Raises QuantError if rows are interleaved: one of them has no address."""
    if matrix.format.rows > 1:
        raise QuantError(f"{matrix.format.name}: rows that are interleaved cannot be read one by one")


@dataclass(frozen=True)
class ExpertMatrices:
    """The three stacked matrices: gate and up (E, I, D), down (E, D, I), in any formats.

    Attributes:
        biases: float32 (E, I), (E, I) and (E, D), added to what gate, up and down give; None for none.
        activation: what gate and up become before down.
    """

    gate: QuantMatrix
    up: QuantMatrix
    down: QuantMatrix
    biases: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    activation: Activation = SWIGLU

    @property
    def inner_unit(self) -> int:
        """Whole columns of `inner` that shares are cut by: blocks, rows that lie interleaved, and k-blocks of 32."""
        rows = (matrix.format.rows for matrix in (self.gate, self.up))
        return math.lcm(32, self.down.format.block, *rows)

    def inner(self, start: int, count: int, memory: Memory = in_array) -> "ExpertMatrices":
        """The share of each expert that columns start.. of `inner` are: sums over shares are the experts' sums.

        Rows of gate and up stay where they are, columns of down are copied into `memory`. Down's bias goes with the
        first columns.
        """
        if (start, count) == (0, self.gate.n_rows):
            return self
        biases = None
        if self.biases:
            gate, up, down = self.biases
            parts = (np.ascontiguousarray(bias[:, start : start + count]) for bias in (gate, up))
            biases = *parts, down if start == 0 else np.zeros_like(down)
        gate, up = self.gate.rows(start, count), self.up.rows(start, count)
        return replace(self, gate=gate, up=up, down=self.down.columns(start, count, memory), biases=biases)

    @property
    def bias_addresses(self) -> dict[str, int]:
        """Of gate_bias, up_bias and down_bias; 0 where there are none."""
        addresses = [bias.ctypes.data for bias in self.biases] if self.biases else [0, 0, 0]
        return dict(zip(("gate_bias", "up_bias", "down_bias"), addresses, strict=True))

    def __post_init__(self):
        """Raises QuantError on shapes that don't belong together."""
        gate, up, down = self.gate, self.up, self.down
        shape = (gate.n_groups, gate.n_rows, gate.n_cols)
        if shape != (up.n_groups, up.n_rows, up.n_cols) or shape != (down.n_groups, down.n_cols, down.n_rows):
            raise QuantError("gate, up and down experts have shapes that do not belong together")
        for bias, matrix in zip(self.biases or (), (gate, up, down), strict=False):
            if bias.shape != (matrix.n_groups, matrix.n_rows) or bias.dtype != np.float32:
                raise QuantError(f"a bias of {bias.dtype} {bias.shape} for experts' {matrix.n_rows} rows")
