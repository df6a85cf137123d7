"""y = W x for many tokens through panels: linear.multiply's way from panel.tokens_from tokens on.

The inputs are rounded and written to token panels, one a group; then workers take rows of the matrix.
"""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.pack_tokens import write_panels
from quant.gemm.packed import (
    MATRIX_BYTES,
    ROWS,
    SCRATCH_BYTES,
    STEP,
    TOKEN_BYTES,
    multiply_panels,
    panel_fields,
    tokens_bytes,
)
from quant.matrix import ADDRESS, GROUP_BYTES, ROW_BYTES, QuantMatrix
from quant.simd.memory import load_f32, load_f32x16, load_i64, store_f32, store_f32x16
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, worker_bytes

UNIT_ROWS = 64  # rows that a worker takes at a time

# Where the job of multiply() finds its arguments behind the matrix.
COUNTER, N_GROUPS, N_ROWS, N_COLS, N_TOKENS, TOKENS, OUT, SUMS, SUMS_BYTES, SCRATCH = range(
    MATRIX_BYTES, MATRIX_BYTES + 10 * 8, 8
)


@inline
def _store_sums(sums, n_tokens, n_rows, out, stride):
    """out[stride*t + 4*r] = row r of the sums of token t."""
    for first in range(0, n_rows, 16):
        part, rows = sums + 4 * (first // ROWS * ROWS * n_tokens + first % ROWS), min(16, n_rows - first)
        for t in range(n_tokens):
            at, to = part + 4 * ROWS * t, out + stride * t + 4 * first
            if rows == 16:
                store_f32x16(to, load_f32x16(at))
            else:
                for r in range(rows):
                    store_f32(to + 4 * r, load_f32(at + 4 * r))


@kernel("void(int64, int64)")
def _multiply(arguments, worker):
    """The job of multiply(). The next unit is taken before this one is done, so that it can be prefetched."""
    a = arguments
    n_groups, n_rows, n_cols = load_i64(a + N_GROUPS), load_i64(a + N_ROWS), load_i64(a + N_COLS)
    n_tokens, counter, row_bytes = load_i64(a + N_TOKENS), load_i64(a + COUNTER), load_i64(a + ROW_BYTES)
    sums, scratch = (
        load_i64(a + SUMS) + load_i64(a + SUMS_BYTES) * worker,
        load_i64(a + SCRATCH) + SCRATCH_BYTES * worker,
    )
    units = (n_rows + UNIT_ROWS - 1) // UNIT_ROWS
    unit = atomic_add(counter, 1)
    while unit < n_groups * units:
        upcoming = atomic_add(counter, 1)
        ahead = load_i64(a + ADDRESS) + load_i64(a + GROUP_BYTES) * (upcoming // units)
        ahead += row_bytes * UNIT_ROWS * (upcoming % units)
        ahead_bytes = row_bytes * UNIT_ROWS if upcoming < n_groups * units else 0
        group, first = unit // units, unit % units * UNIT_ROWS
        count = min(UNIT_ROWS, n_rows - first)
        tokens = load_i64(a + TOKENS) + TOKEN_BYTES * (n_cols // STEP) * n_tokens * group
        multiply_panels(a, group, first, count, n_cols, tokens, n_tokens, sums, scratch, ahead, ahead_bytes)
        out = load_i64(a + OUT) + 4 * (n_rows * group + first)
        _store_sums(sums, n_tokens, count, out, 4 * n_rows * n_groups)
        unit = upcoming


def multiply(pool: Pool, matrix: QuantMatrix, format_: PanelFormat, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g] @ x[t, g]; arguments as linear.multiply's."""
    n_groups, n_inputs = matrix.n_groups, n_tokens * matrix.n_groups
    source = np.arange(n_inputs).reshape(n_tokens, n_groups).T.ravel()
    start = np.arange(0, n_inputs + 1, n_tokens)
    tokens = pool.buffer("panels", tokens_bytes(matrix.n_cols, n_inputs))
    write_panels(pool, format_, x, n_inputs, matrix.n_cols, source, start, tokens)
    counter, sums_bytes = np.zeros(1, np.int64), worker_bytes(4 * UNIT_ROWS * n_tokens)
    arguments = (
        *matrix.fields, *panel_fields(format_), counter.ctypes.data,
        n_groups, matrix.n_rows, matrix.n_cols, n_tokens, tokens, out,
        pool.buffer("sums", sums_bytes * pool.n_workers), sums_bytes,
        pool.buffer("scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_multiply.address, np.array(arguments, np.int64))
