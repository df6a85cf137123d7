"""y = W x for quantised matrices: one, or one a group (attention heads), straight from their blocks.

Matrices are addresses into memory that somebody else keeps mapped; inputs and outputs are addresses of float32, C order.
"""

from dataclasses import dataclass, replace

import numpy as np

from quant.activations import record_bytes
from quant.atomics import atomic_add, call_3
from quant.errors import QuantError
from quant.formats import Format
from quant.jit import kernel
from quant.pool import Pool, barrier
from quant.rows import GEMM_TOKENS, multiply_rows, scratch_bytes, scratch_rows, write_records
from quant.simd import (
    fma_f32x16,
    load_f32,
    load_f32x16,
    load_i64,
    splat_f32x16,
    store_f32x16,
    zero_f32x16,
)

_UNIT_BYTES = 1 << 16  # weights that a worker takes at a time: long enough to stream, short enough to share out


@dataclass(frozen=True)
class Weight:
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

    @property
    def row_bytes(self) -> int:
        """Bytes from one row to the next."""
        return self.format.row_bytes(self.n_cols)

    def rows(self, start: int, count: int) -> "Weight":
        """The same groups, restricted to `count` rows from `start`: a view."""
        if start < 0 or start + count > self.n_rows:
            raise QuantError(f"rows {start}..{start + count} of a matrix with {self.n_rows}")
        return replace(self, address=self.address + start * self.row_bytes, n_rows=count)


def weight(data: np.ndarray, format_: Format, shape: tuple[int, ...]) -> Weight:
    """The uint8 `data` as matrices of `shape` (rows, cols) or (groups, rows, cols). Raises QuantError on its size."""
    *groups, n_rows, n_cols = shape
    n_groups = groups[0] if groups else 1
    group_bytes = n_rows * format_.row_bytes(n_cols)
    if data.dtype != np.uint8 or not data.flags.c_contiguous or data.nbytes != n_groups * group_bytes:
        raise QuantError(f"{format_.name} {shape} takes {n_groups * group_bytes} contiguous bytes; found {data.nbytes}")
    return Weight(format_, data.ctypes.data, n_groups, n_rows, n_cols, group_bytes, data)


# Arguments of _multiply, int64 each.
_FIELDS = (
    "control n_workers counter gemv expand block integer w group_bytes row_bytes n_groups n_rows n_cols "
    "n_tokens x record_bytes records record_table out_table unit_rows scratch scratch_bytes"
).split()


@kernel("void(int64, int64)")
def _multiply(arguments, worker):
    """The job of multiply(); arguments: _FIELDS."""
    a = arguments
    control, n_workers, counter = load_i64(a), load_i64(a + 8), load_i64(a + 16)
    gemv, expand, block, integer = load_i64(a + 24), load_i64(a + 32), load_i64(a + 40), load_i64(a + 48)
    w, group_bytes, row_bytes = load_i64(a + 56), load_i64(a + 64), load_i64(a + 72)
    n_groups, n_rows, n_cols, n_tokens = load_i64(a + 80), load_i64(a + 88), load_i64(a + 96), load_i64(a + 104)
    x, record_bytes, records = load_i64(a + 112), load_i64(a + 120), load_i64(a + 128)
    record_table, out_table, unit_rows = load_i64(a + 136), load_i64(a + 144), load_i64(a + 152)
    scratch = load_i64(a + 160) + load_i64(a + 168) * worker
    n_inputs = n_groups * n_tokens
    write_records(x, n_inputs, n_cols, integer != 0, record_bytes, records, worker, n_workers)
    barrier(control, n_workers)
    units = (n_rows + unit_rows - 1) // unit_rows
    while True:
        unit = atomic_add(counter, 1)
        if unit >= n_groups * units:
            break
        group, first = unit // units, unit % units * unit_rows
        multiply_rows(
            gemv,
            expand,
            block,
            w + group_bytes * group + row_bytes * first,
            row_bytes,
            min(unit_rows, n_rows - first),
            n_cols,
            n_tokens,
            record_table + 8 * n_tokens * group,
            out_table + 8 * n_tokens * group,
            4 * first,
            scratch,
        )


def pack_arguments(fields: list[str], values: dict[str, int]) -> np.ndarray:
    """int64 array of `values` in the order of `fields`."""
    return np.array([values[name] for name in fields], np.int64)


def unit_rows(pool: Pool, matrix: Weight, n_tokens: int) -> int:
    """Rows that a worker takes at a time."""
    if n_tokens >= GEMM_TOKENS:
        return scratch_rows(matrix.n_cols)
    share = -(-matrix.n_rows * matrix.n_groups // (4 * pool.n_workers))
    return max(4, min(_UNIT_BYTES // matrix.row_bytes, share))


def multiply(pool: Pool, matrix: Weight, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g] @ x[t, g].

    Args:
        x: address of float32 (n_tokens, n_groups, n_cols).
        out: address of float32 (n_tokens, n_groups, n_rows).
    """
    n_groups, n_rows, n_cols = matrix.n_groups, matrix.n_rows, matrix.n_cols
    n_inputs = n_tokens * n_groups
    bytes_ = record_bytes(n_cols)
    records = pool.buffer("records", bytes_ * n_inputs)
    order = np.arange(n_inputs, dtype=np.int64).reshape(n_tokens, n_groups).T.ravel()  # by group, then token
    tables = np.stack([records + bytes_ * order, out + 4 * n_rows * order])
    counter = np.zeros(1, np.int64)
    values = {
        "control": pool.control,
        "n_workers": pool.n_workers,
        "counter": counter.ctypes.data,
        "gemv": matrix.format.gemv,
        "expand": matrix.format.expand,
        "block": matrix.format.block,
        "integer": int(matrix.format.integer),
        "w": matrix.address,
        "group_bytes": matrix.group_bytes,
        "row_bytes": matrix.row_bytes,
        "n_groups": n_groups,
        "n_rows": n_rows,
        "n_cols": n_cols,
        "n_tokens": n_tokens,
        "x": x,
        "record_bytes": bytes_,
        "records": records,
        "record_table": tables[0].ctypes.data,
        "out_table": tables[1].ctypes.data,
        "unit_rows": unit_rows(pool, matrix, n_tokens),
        "scratch": pool.buffer("scratch", scratch_bytes(n_cols) * pool.n_workers),
        "scratch_bytes": scratch_bytes(n_cols),
    }
    pool.run(_multiply.address, pack_arguments(_FIELDS, values))


@kernel("void(int64, int64)")
def _multiply_transposed(arguments, worker):
    """The job of multiply_transposed(): a worker takes a group at a time."""
    a = arguments
    counter, expand, block, w = load_i64(a), load_i64(a + 8), load_i64(a + 16), load_i64(a + 24)
    group_bytes, row_bytes, n_groups = load_i64(a + 32), load_i64(a + 40), load_i64(a + 48)
    n_rows, n_cols, n_tokens = load_i64(a + 56), load_i64(a + 64), load_i64(a + 72)
    x, out, row = load_i64(a + 80), load_i64(a + 88), load_i64(a + 96) + 4 * n_cols * worker
    while True:
        group = atomic_add(counter, 1)
        if group >= n_groups:
            break
        for t in range(n_tokens):
            for c in range(0, n_cols, 16):
                store_f32x16(out + 4 * ((t * n_groups + group) * n_cols + c), zero_f32x16())
        for r in range(n_rows):
            call_3(expand, w + group_bytes * group + row_bytes * r, n_cols // block, row)
            for t in range(n_tokens):
                factor = splat_f32x16(load_f32(x + 4 * ((t * n_groups + group) * n_rows + r)))
                total = out + 4 * (t * n_groups + group) * n_cols
                for c in range(0, n_cols, 16):
                    summed = fma_f32x16(factor, load_f32x16(row + 4 * c), load_f32x16(total + 4 * c))
                    store_f32x16(total + 4 * c, summed)


def multiply_transposed(pool: Pool, matrix: Weight, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g].T @ x[t, g], in float32.

    Args:
        x: address of float32 (n_tokens, n_groups, n_rows).
        out: address of float32 (n_tokens, n_groups, n_cols).

    Raises:
        QuantError: n_cols is no multiple of 16.
    """
    if matrix.n_cols % 16:
        raise QuantError(f"rows of {matrix.n_cols} weights; a transposed product needs multiples of 16")
    counter = np.zeros(1, np.int64)
    row = pool.buffer("scratch", 4 * matrix.n_cols * pool.n_workers)
    arguments = [counter.ctypes.data, matrix.format.expand, matrix.format.block, matrix.address, matrix.group_bytes]
    arguments += [matrix.row_bytes, matrix.n_groups, matrix.n_rows, matrix.n_cols, n_tokens, x, out, row]
    pool.run(_multiply_transposed.address, np.array(arguments, np.int64))


@kernel("void(int64, int64)")
def _expand_rows(arguments, worker):
    """The job of expand_rows(): a worker takes 16 rows at a time."""
    a = arguments
    counter, expand, n_blocks, out_bytes = load_i64(a), load_i64(a + 8), load_i64(a + 16), load_i64(a + 24)
    rows, n_rows, out = load_i64(a + 32), load_i64(a + 40), load_i64(a + 48)
    while True:
        first = atomic_add(counter, 16)
        if first >= n_rows:
            break
        for r in range(first, min(first + 16, n_rows)):
            call_3(expand, load_i64(rows + 8 * r), n_blocks, out + out_bytes * r)


def expand_rows(pool: Pool, matrix: Weight, rows: np.ndarray, out: int) -> None:
    """out[i] = the rows[i]-th row of the first group, or of all groups' rows in order, in float32.

    Args:
        rows: int64 (n,), each below n_groups * n_rows.
        out: address of float32 (n, n_cols).
    """
    group, row = np.divmod(rows.astype(np.int64), matrix.n_rows)
    addresses = matrix.address + group * matrix.group_bytes + row * matrix.row_bytes
    counter = np.zeros(1, np.int64)
    n_blocks = matrix.n_cols // matrix.format.block
    arguments = [counter.ctypes.data, matrix.format.expand, n_blocks, 4 * matrix.n_cols]
    pool.run(_expand_rows.address, np.array([*arguments, addresses.ctypes.data, len(rows), out], np.int64))
