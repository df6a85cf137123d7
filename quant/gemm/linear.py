"""y = W x for many tokens through packed panels: linear.multiply's way from packed.tokens_from tokens on.

The inputs are rounded and written to token panels, one a group; then workers take rows of the matrix.
"""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm.pack_tokens import write_panels
from quant.gemm.packed import (
    K_BLOCK,
    PACKED_MATRIX,
    ROWS,
    SCRATCH_BYTES,
    TOKEN_BYTES,
    multiply_panels,
    packed_matrix,
    tokens_bytes,
)
from quant.matrix import QuantMatrix, row_address
from quant.simd.memory import load_f32, load_f32x16, store_f32, store_f32x16
from quant.simd.struct import address, i64, struct
from quant.target.jit import inline, kernel
from quant.threads.numa import ITEMS, Items, take
from quant.threads.pool import Pool, worker_bytes

ITEM_ROWS = 64  # rows of a work item

MULTIPLY = struct(
    "PackedMultiply",
    weights=PACKED_MATRIX,
    items=ITEMS,
    n_groups=i64,
    n_rows=i64,
    n_cols=i64,
    n_tokens=i64,
    tokens=address,  # a token panel for each group
    out=address,
    sums=address,  # a worker's
    sums_bytes=i64,
    scratch=address,  # a worker's SCRATCH_BYTES
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
    """The job of multiply(). The next item is taken before this one is done, so that it can be prefetched."""
    a = MULTIPLY(arguments)
    n_rows, n_cols, n_tokens = a.n_rows, a.n_cols, a.n_tokens
    sums, scratch = a.sums + a.sums_bytes * worker, a.scratch + SCRATCH_BYTES * worker
    items = (n_rows + ITEM_ROWS - 1) // ITEM_ROWS
    item = take(a.items, worker)
    while item >= 0:
        upcoming = take(a.items, worker)
        following = max(upcoming, 0)
        ahead = row_address(a.weights.matrix, following // items, ITEM_ROWS * (following % items))
        ahead_bytes = a.weights.matrix.row_bytes * ITEM_ROWS if upcoming >= 0 else 0
        group, first = item // items, item % items * ITEM_ROWS
        count = min(ITEM_ROWS, n_rows - first)
        tokens = a.tokens + TOKEN_BYTES * (n_cols // K_BLOCK) * n_tokens * group
        multiply_panels(a.weights, group, first, count, n_cols, tokens, n_tokens, sums, scratch, ahead, ahead_bytes)
        _store_sums(sums, n_tokens, count, a.out + 4 * (n_rows * group + first), 4 * n_rows * a.n_groups)
        item = upcoming


def multiply(pool: Pool, matrix: QuantMatrix, format_: PanelFormat, x: int, n_tokens: int, out: int) -> None:
    """out[t, g] = matrix[g] @ x[t, g]; arguments as linear.multiply's."""
    n_groups, n_inputs = matrix.n_groups, n_tokens * matrix.n_groups
    source = np.arange(n_inputs).reshape(n_tokens, n_groups).T.ravel()
    start = np.arange(0, n_inputs + 1, n_tokens)
    tokens = pool.buffer("panels", tokens_bytes(matrix.n_cols, n_inputs))
    write_panels(pool, format_, x, n_inputs, matrix.n_cols, source, start, tokens)
    n_items = n_groups * -(-matrix.n_rows // ITEM_ROWS)
    items = Items(pool.spread, n_items, n_items)
    sums_bytes = worker_bytes(4 * ITEM_ROWS * n_tokens)
    arguments = MULTIPLY.pack(
        weights=packed_matrix(matrix, format_), items=items.struct,
        n_groups=n_groups, n_rows=matrix.n_rows, n_cols=matrix.n_cols, n_tokens=n_tokens, tokens=tokens, out=out,
        sums=pool.buffer("sums", sums_bytes * pool.n_workers), sums_bytes=sums_bytes,
        scratch=pool.buffer("scratch", SCRATCH_BYTES * pool.n_workers),
    )  # fmt: skip
    pool.run(_multiply.address, arguments)
