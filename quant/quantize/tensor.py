"""Packs rows of float32 into blocks of any format, on all workers.

The kernels are the formats' own (block_format.Format.quantize). Rows are independent and every sum has one order, so
the bytes depend neither on the number of workers nor on the CPU.
"""

import numpy as np

from quant.block_format import Format
from quant.errors import QuantError
from quant.quantize import codebook
from quant.simd.exact import all_within
from quant.simd.memory import load_f32, load_f32x16
from quant.simd.struct import address, atomic, f32, i64, pointer, struct
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_5
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

SCRATCH_BYTES = worker_bytes(codebook.SCRATCH_BYTES)  # the most that a format needs; only what is used is touched
_ITEM_WEIGHTS = 1 << 15  # of a work item: long beside the dispatch, short enough to share out

PACK_ROWS = struct(
    "PackRows",
    counter=atomic,
    pack=address,  # the kernel
    found=pointer(i64),  # by worker: the first weight that is not finite or beyond the limit
    x=address,
    importance=address,
    out=address,
    n_rows=i64,
    n_cols=i64,
    n_blocks=i64,
    row_bytes=i64,
    item_rows=i64,
    limit=f32,
    scratch=address,
)


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
    a = PACK_ROWS(arguments)
    n_cols, scratch = a.n_cols, a.scratch + SCRATCH_BYTES * worker
    for first in work_items(a.counter, a.n_rows, a.item_rows):
        for r in range(first, min(first + a.item_rows, a.n_rows)):
            x = a.x + 4 * n_cols * r
            beyond = _first_beyond(x, n_cols, a.limit)
            if beyond < n_cols:
                a.found[worker] = min(a.found[worker], n_cols * r + beyond)
                continue
            call_5(a.pack, x, a.importance, a.n_blocks, a.out + a.row_bytes * r, scratch)


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
    arguments = PACK_ROWS.pack(
        counter=0, pack=format_.quantize.address, found=found.ctypes.data, x=x, importance=importance, out=out,
        n_rows=n_rows, n_cols=n_cols, n_blocks=n_cols // format_.block, row_bytes=row_bytes,
        item_rows=max(1, _ITEM_WEIGHTS // max(1, n_cols)), limit=format_.largest,
        scratch=pool.buffer("pack scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_pack.address, arguments)
    index = int(found.min())
    return index if index < none else -1
