"""y = W x for quantised matrices: one, or one a group (attention heads), straight from their blocks.

Matrices are addresses into memory that somebody else keeps mapped; inputs and outputs are addresses of float32 in C
order.
"""

import numpy as np

from quant.errors import QuantError
from quant.gemm import linear as packed_linear
from quant.gemm import packed as panel
from quant.gemv.activations import q8_bytes
from quant.matrix import ADDRESS, BLOCK, EXPAND, GROUP_BYTES, MATRIX_BYTES, ROW_BYTES, QuantMatrix, check_single_rows
from quant.ops.multiply import expands, multiply_rows, scratch_bytes, scratch_rows, write_q8_rows
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, load_i64, store_f32x16, store_i64
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add, atomic_store, call_3
from quant.threads.pool import Pool, worker_bytes

_UNIT_BYTES = 1 << 19  # weights that a worker takes at a time: its start is read without prefetching, so few starts


# Where the job of multiply() finds its arguments behind the matrix, int64 each.
(
    COUNTER, INTEGER, N_GROUPS, N_ROWS, N_COLS, N_TOKENS, X, OUT, RECORD_BYTES, RECORDS,
    RECORD_TABLE, OUT_TABLE, UNIT_ROWS, SCRATCH, SCRATCH_SIZE,
) = range(MATRIX_BYTES, MATRIX_BYTES + 15 * 8, 8)  # fmt: skip


@kernel("void(int64)")
def _prepare(arguments):
    """What comes before the job: records, their and the outputs' addresses by group, then token; the first unit."""
    a = arguments
    n_groups, n_tokens, n_cols = load_i64(a + N_GROUPS), load_i64(a + N_TOKENS), load_i64(a + N_COLS)
    records, q8_bytes, integer = load_i64(a + RECORDS), load_i64(a + RECORD_BYTES), load_i64(a + INTEGER) != 0
    atomic_store(load_i64(a + COUNTER), 0)
    for group in range(n_groups):
        for t in range(n_tokens):
            at, i = 8 * (n_tokens * group + t), n_groups * t + group
            store_i64(load_i64(a + RECORD_TABLE) + at, records + q8_bytes * i)
            store_i64(load_i64(a + OUT_TABLE) + at, load_i64(a + OUT) + 4 * load_i64(a + N_ROWS) * i)
    write_q8_rows(load_i64(a + X), n_groups * n_tokens, n_cols, integer, q8_bytes, records)


@kernel("void(int64, int64)")
def _multiply(arguments, worker):
    """The job of multiply()."""
    a = arguments
    n_groups, n_rows, n_cols = load_i64(a + N_GROUPS), load_i64(a + N_ROWS), load_i64(a + N_COLS)
    n_tokens, step = load_i64(a + N_TOKENS), load_i64(a + UNIT_ROWS)
    scratch = load_i64(a + SCRATCH) + load_i64(a + SCRATCH_SIZE) * worker
    units = (n_rows + step - 1) // step
    while True:
        unit = atomic_add(load_i64(a + COUNTER), 1)
        if unit >= n_groups * units:
            break
        group, first = unit // units, unit % units * step
        records, outs = load_i64(a + RECORD_TABLE), load_i64(a + OUT_TABLE)
        at, count = 8 * n_tokens * group, min(step, n_rows - first)
        multiply_rows(a, group, first, count, n_cols, n_tokens, records + at, outs + at, 4 * first, scratch)


def unit_rows(pool: Pool, matrix: QuantMatrix, n_tokens: int) -> int:
    """Rows that a worker takes at a time."""
    together = matrix.format.rows
    if expands.py_func(matrix.format.block, together, n_tokens):
        return scratch_rows(matrix.n_cols)
    share = -(-matrix.n_rows * matrix.n_groups // (4 * pool.n_workers))
    return max(4, together, min(_UNIT_BYTES // matrix.row_bytes, share) // together * together)


def multiply(pool: Pool, matrix: QuantMatrix, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g] @ x[t, g].

    Args:
        x: address of float32 (n_tokens, n_groups, n_cols).
        out: address of float32 (n_tokens, n_groups, n_rows).
    """
    panel_format = panel.find(matrix.format) if n_tokens >= panel.tokens_from(matrix.format) else None
    if panel_format is not None:
        packed_linear.multiply(pool, matrix, panel_format, x, n_tokens, out)
        return
    n_inputs = n_tokens * matrix.n_groups
    per_record, per_worker = q8_bytes(matrix.n_cols), scratch_bytes(matrix.n_cols)
    arguments = (
        *matrix.fields, pool.buffer("counter", 64), matrix.format.integer,
        matrix.n_groups, matrix.n_rows, matrix.n_cols, n_tokens, x, out,
        per_record, pool.buffer("records", per_record * n_inputs),
        pool.buffer("record table", 8 * n_inputs), pool.buffer("out table", 8 * n_inputs),
        unit_rows(pool, matrix, n_tokens), pool.buffer("scratch", per_worker * pool.n_workers), per_worker,
    )  # fmt: skip
    packed = np.array(arguments, np.int64)
    _prepare.ctypes(packed.ctypes.data)
    pool.run(_multiply.address, packed)


@kernel("void(int64, int64)")
def _multiply_transposed(arguments, worker):
    """The job of multiply_transposed(): a worker takes a group at a time."""
    a = arguments
    b = arguments + MATRIX_BYTES
    counter, n_groups, n_rows, n_cols = load_i64(b), load_i64(b + 8), load_i64(b + 16), load_i64(b + 24)
    n_tokens, x, out = load_i64(b + 32), load_i64(b + 40), load_i64(b + 48)
    row = load_i64(b + 56) + load_i64(b + 64) * worker
    n_blocks = n_cols // load_i64(a + BLOCK)
    while True:
        group = atomic_add(counter, 1)
        if group >= n_groups:
            break
        for t in range(n_tokens):
            for c in range(0, n_cols, 16):
                store_f32x16(out + 4 * ((t * n_groups + group) * n_cols + c), zero_f32x16())
        for r in range(n_rows):
            w = load_i64(a + ADDRESS) + load_i64(a + GROUP_BYTES) * group + load_i64(a + ROW_BYTES) * r
            call_3(load_i64(a + EXPAND), w, n_blocks, row)
            for t in range(n_tokens):
                factor = splat_f32x16(load_f32(x + 4 * ((t * n_groups + group) * n_rows + r)))
                total = out + 4 * (t * n_groups + group) * n_cols
                for c in range(0, n_cols, 16):
                    summed = fma(factor, load_f32x16(row + 4 * c), load_f32x16(total + 4 * c))
                    store_f32x16(total + 4 * c, summed)


def multiply_transposed(pool: Pool, matrix: QuantMatrix, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g].T @ x[t, g], in float32.

    Args:
        x: address of float32 (n_tokens, n_groups, n_rows).
        out: address of float32 (n_tokens, n_groups, n_cols).

    Raises:
        QuantError: n_cols is no multiple of 16, or the matrix's rows are interleaved.
    """
    check_single_rows(matrix)
    if matrix.n_cols % 16:
        raise QuantError(f"rows of {matrix.n_cols} weights; a transposed product needs multiples of 16")
    counter = np.zeros(1, np.int64)
    per_worker = worker_bytes(4 * matrix.n_cols)
    row = pool.buffer("scratch", per_worker * pool.n_workers)
    sizes = (matrix.n_groups, matrix.n_rows, matrix.n_cols, n_tokens)
    arguments = np.array([*matrix.fields, counter.ctypes.data, *sizes, x, out, row, per_worker], np.int64)
    pool.run(_multiply_transposed.address, arguments)


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


def expand_rows(pool: Pool, matrix: QuantMatrix, rows: np.ndarray, out: int) -> None:
    """out[i] = the rows[i]-th row of the first group, or of all groups' rows in order, in float32.

    Args:
        rows: int64 (n,), each below n_groups * n_rows.
        out: address of float32 (n, n_cols).

    Raises:
        QuantError: rows are interleaved.
    """
    check_single_rows(matrix)
    group, row = np.divmod(rows.astype(np.int64), matrix.n_rows)
    addresses = matrix.address + group * matrix.group_bytes + row * matrix.row_bytes
    counter = np.zeros(1, np.int64)
    n_blocks = matrix.n_cols // matrix.format.block
    arguments = [counter.ctypes.data, matrix.format.expand_address, n_blocks, 4 * matrix.n_cols]
    pool.run(_expand_rows.address, np.array([*arguments, addresses.ctypes.data, len(rows), out], np.int64))
