"""Packs rows of float32 into blocks of any format, on all workers.

The kernels are the formats' own (block_format.Format.quantize). Rows are independent and every sum has one order, so
the bytes depend neither on the number of workers nor on the CPU.
"""

import numpy as np

from quant.block_format import Format
from quant.errors import QuantError
from quant.simd.exact import all_within
from quant.simd.memory import bits_to_f32, load_f32, load_f32x16, load_i64, store_i64
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add, call_5
from quant.threads.pool import Pool, worker_bytes

SCRATCH_BYTES = worker_bytes(4096)
_UNIT_WEIGHTS = 1 << 15  # that a worker takes at a time: long beside the dispatch, short enough to share out

# Where the job finds its arguments, int64 each.
(
    COUNTER, PACK, FOUND, X, IMPORTANCE, OUT, N_ROWS, N_COLS, N_BLOCKS, ROW_BYTES, UNIT_ROWS, LIMIT, SCRATCH,
) = range(0, 13 * 8, 8)  # fmt: skip


@inline
def _first_beyond(x, n, limit):
    """The first of n float32 at x that is NaN or of a magnitude above `limit`; n if there is none."""
    i = 0
    while i + 16 <= n and all_within(load_f32x16(x + 4 * i), limit):
        i += 16
    while i < n and abs(load_f32(x + 4 * i)) <= limit:
        i += 1
    return i


@kernel("void(int64, int64)")
def _pack(arguments, worker):
    """The job of pack()."""
    a = arguments
    n_rows, n_cols, step = load_i64(a + N_ROWS), load_i64(a + N_COLS), load_i64(a + UNIT_ROWS)
    found, limit = load_i64(a + FOUND) + 8 * worker, bits_to_f32(load_i64(a + LIMIT))
    scratch = load_i64(a + SCRATCH) + SCRATCH_BYTES * worker
    while True:
        first = atomic_add(load_i64(a + COUNTER), step)
        if first >= n_rows:
            break
        for r in range(first, min(first + step, n_rows)):
            x = load_i64(a + X) + 4 * n_cols * r
            beyond = _first_beyond(x, n_cols, limit)
            if beyond < n_cols:
                store_i64(found, min(load_i64(found), n_cols * r + beyond))
                continue
            out = load_i64(a + OUT) + load_i64(a + ROW_BYTES) * r
            call_5(load_i64(a + PACK), x, load_i64(a + IMPORTANCE), load_i64(a + N_BLOCKS), out, scratch)


def pack(pool: Pool, format_: Format, x: int, n_rows: int, n_cols: int, out: int, importance: int = 0) -> int:
    """Pack a matrix; returns -1, or the flat index of its first weight that is not finite or beyond its largest.

    Rows with such a weight are left out; the others are packed.

    Args:
        x: address of float32 (n_rows, n_cols).
        out: address of n_rows * format_.row_bytes(n_cols) bytes.
        importance: address of float32 (n_cols,), at least 0: how much an error in each column counts; or 0. Q8_0,
            MXFP4 and the floats take no notice of it, as in ggml.

    Raises:
        QuantError: the format can't be packed, or n_cols is not a whole number of its blocks.
    """
    if format_.quantize is None:
        raise QuantError(f"weights can't be quantised to {format_.name}")
    row_bytes = format_.row_bytes(n_cols)
    none = n_rows * n_cols
    found = np.full(pool.n_workers, none, np.int64)
    counter = np.zeros(1, np.int64)
    limit = int(np.float32(format_.largest).view(np.int32))
    arguments = (
        counter.ctypes.data, format_.quantize.address, found.ctypes.data, x, importance, out,
        n_rows, n_cols, n_cols // format_.block, row_bytes, max(1, _UNIT_WEIGHTS // max(1, n_cols)), limit,
        pool.buffer("pack scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_pack.address, np.array(arguments, np.int64))
    index = int(found.min())
    return index if index < none else -1
