"""Packs rows of float32 into blocks of any format, on all workers.

A packing kernel is the address of void(x, importance, n_blocks, out, scratch): one row of float32 at x, its columns'
importances (float32, or address 0 for none), SCRATCH_BYTES of work memory. Rows are independent and every sum has one
order, so the bytes depend neither on the number of workers nor on the CPU.
"""

from importlib import import_module

import numpy as np

from quant.block_format import Format
from quant.errors import QuantError
from quant.simd.exact import all_within
from quant.simd.memory import bits_to_f32, load_f32, load_f32x16, load_i64, store_i64
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add, call_5
from quant.threads.pool import Pool, worker_bytes

# A module for each family of kernels, imported (and compiled) when first used: running a model needs none of them.
_MODULES = {
    "F32": "floats",
    "F16": "floats",
    "BF16": "floats",
    "Q8_0": "blocks_32",
    "Q4_0": "blocks_32",
    "Q4_1": "blocks_32",
    "Q5_0": "blocks_32",
    "Q5_1": "blocks_32",
    "Q4_K": "q4_k_q5_k",
    "Q5_K": "q4_k_q5_k",
    "Q6_K": "q6_k",
    "IQ4_NL": "tables",
    "MXFP4": "tables",
}
NAMES = tuple(_MODULES)

SCRATCH_BYTES = worker_bytes(4096)
_UNIT_WEIGHTS = 1 << 15  # that a worker takes at a time: long beside the dispatch, short enough to share out
_LARGEST = {"F32": float(np.finfo(np.float32).max), "BF16": 2.0**128 - 2.0**120, "MXFP4": 2.0**128 - 2.0**120}


def kernel_address(name: str) -> int:
    """The packing kernel of the format called `name`. Raises QuantError if there is none."""
    if name not in _MODULES:
        raise QuantError(f"type {name} can't be packed; these can: {', '.join(NAMES)}")
    return getattr(import_module(f"quant.quantize.{_MODULES[name]}"), name).address


def largest(name: str) -> float:
    """The largest magnitude of a weight that pack() accepts: float16's where values or scales are kept in it."""
    return _LARGEST.get(name, 65504.0)


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
    """Pack a matrix; returns -1, or the flat index of its first weight that is not finite or beyond largest().

    Rows with such a weight are left out; the others are packed.

    Args:
        x: address of float32 (n_rows, n_cols).
        out: address of n_rows * format_.row_bytes(n_cols) bytes.
        importance: address of float32 (n_cols,), at least 0: how much an error in each column counts; or 0. Q8_0,
            MXFP4 and the floats take no notice of it, as in ggml.

    Raises:
        QuantError: the format can't be packed, or n_cols is not a whole number of its blocks.
    """
    row_bytes = format_.row_bytes(n_cols)
    none = n_rows * n_cols
    found = np.full(pool.n_workers, none, np.int64)
    counter = np.zeros(1, np.int64)
    limit = int(np.float32(largest(format_.name)).view(np.int32))
    arguments = (
        counter.ctypes.data, kernel_address(format_.name), found.ctypes.data, x, importance, out,
        n_rows, n_cols, n_cols // format_.block, row_bytes, max(1, _UNIT_WEIGHTS // max(1, n_cols)), limit,
        pool.buffer("pack scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_pack.address, np.array(arguments, np.int64))
    index = int(found.min())
    return index if index < none else -1
