"""Products with 32 vectors side by side: their columns are rows of 32 lanes, and a product gives such rows too.

So one row of a matrix gives a row of 32 results, and whatever follows (a softmax, a weighted sum) goes lane by lane.
"""

from itertools import chain

import numpy as np
from numba import types
from numba.core import cgutils

from quant.simd.core import F32, I64, define, f32x16, load, splat, store
from quant.simd.floats import as_f32, zero_f32x16
from quant.simd.memory import load_f32, load_i64, store_f32, store_f32x16, store_i64
from quant.simd.register_tile import add_products, register_tile, switch
from quant.simd.rows16 import transpose
from quant.target import isa
from quant.target.jit import inline

LANES = 32
ROW, LANE_ROW = 4 * LANES, 64  # bytes; of 16 lanes
ADDRESSES = 16 * 8  # scratch for those of 16 rows
# Less than any score. Minus infinity would not do: a token may see nothing of a chunk, and infinity from itself is NaN.
LOWEST = float(np.finfo(np.float32).min)
_ROWS = 12 if isa.has("avx512_vnni") else 3  # of a matrix at a time: their totals fill 24 of 32 registers, 12 of 16


def _tile(builder, n: int, a, row_stride, column_stride, b, depth, c) -> None:
    """Emits c[r] += sum over k of a[r][k] * b[k], for n rows of 32 floats; strides of a in bytes."""
    halves = range(2)
    at = [[builder.add(c, I64(ROW * r + 64 * half)) for half in halves] for r in range(n)]
    totals = [[load(builder, to, f32x16.ir) for to in row] for row in at]
    place = cgutils.alloca_once_value(builder, a)

    def add(index, totals):
        row, first = builder.add(b, builder.mul(index, I64(ROW))), builder.load(place)
        values = [load(builder, builder.add(row, I64(64 * half)), f32x16.ir) for half in halves]
        xs = (load(builder, builder.add(first, builder.mul(row_stride, I64(r))), F32) for r in range(n))
        totals = add_products(builder, totals, (splat(builder, x, f32x16.ir) for x in xs), values)
        builder.store(builder.add(first, column_stride), place)
        return totals

    totals = register_tile(builder, depth, totals, add)
    for to, total in zip(chain(*at), chain(*totals), strict=True):
        store(builder, to, total)


def _multiply_rows(builder, n_rows, *arguments) -> None:
    switch(builder, n_rows, _ROWS, lambda n: _tile(builder, n, *arguments))


_multiply_tile = define(types.void, (types.int64,) * 7, _multiply_rows)


@inline
def add_matmul(n_rows, a, row_stride, column_stride, b, depth, c):
    """c[r] += sum over k of a[r][k] * b[k]: rows of 32 floats. Strides of a in bytes."""
    for r in range(0, n_rows, _ROWS):
        rows = min(_ROWS, n_rows - r)
        _multiply_tile(rows, a + row_stride * r, row_stride, column_stride, b, depth, c + ROW * r)


@inline
def clear(rows, n_rows):
    """Zeros in n_rows rows of 32 floats."""
    for at in range(rows, rows + ROW * n_rows, 64):
        store_f32x16(at, zero_f32x16())


@inline
def pack_16(vectors, stride, first, n_vectors, depth, scale, addresses, packed, packed_stride):
    """scale * the 16 float32 vectors first.., a row a column; behind the last of n_vectors the last one again.

    Args:
        stride, packed_stride: bytes from one vector to the next, and from one row.
        addresses: scratch of ADDRESSES bytes.
    """
    for r in range(16):
        store_i64(addresses + 8 * r, vectors + stride * min(first + r, n_vectors - 1))
    for c in range(0, depth // 4 * 4, 4):
        for e, column in enumerate(transpose(addresses, 4 * c)):
            store_f32x16(packed + packed_stride * (c + e), as_f32(column) * scale)
    for c in range(depth // 4 * 4, depth):
        for r in range(16):
            at = load_i64(addresses + 8 * r) + 4 * c
            store_f32(packed + packed_stride * c + 4 * r, scale * load_f32(at))


@inline
def pack_lanes(vectors, stride, first, n_vectors, depth, scale, addresses, packed):
    """The same of 32 vectors."""
    for half in range(2):
        at = first + 16 * half
        pack_16(vectors, stride, at, n_vectors, depth, scale, addresses, packed + 64 * half, ROW)
