"""An indexer's scores by products of bytes: four times as many an instruction as of float32, and a margin for both.

A head's query is scaled to whole numbers from -127 to 127 by its largest value, which its weight makes up for, and
KEYS_TOGETHER keys by theirs. Heads are the lanes of all vectors, as in lanes.py, with four columns a lane; keys have
128 added, as products take one unsigned side (simd/ints.py), and sums begin at what takes that back.

How far a score may be off: rounding moves a value by up to half a step, s / sqrt(12) in root mean square. A key's is
the same for all heads, so that sum |w| |q| s / sqrt(12) bounds the root mean square that it makes of the score, reached
if all heads are alike; queries' are independent, sqrt(sum (w s')^2 / 12) |key|. MARGINS times both is the margin: rows
closer than that to the last one chosen are ranked in float32.
"""

import math

import numpy as np
from numba import types
from numba.core import cgutils

from quant.gemm.lanes import LANES, ROW
from quant.simd.core import I32, I64, define, f32x16, i8x64, i32x16, load, splat, store
from quant.simd.dots import emit_dot_u8
from quant.simd.exact import sqrt
from quant.simd.floats import fma, hmax, hsum, maximum, to_f32, zero_f32x16
from quant.simd.ints import zero_i32x16
from quant.simd.memory import (
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i32x16,
    store_f32,
    store_f32x16,
    store_i8x16,
    store_i32x16,
)
from quant.simd.register_tile import register_tile, switch
from quant.simd.rows16 import low_bytes
from quant.target import isa
from quant.target.jit import inline

MARGINS = 2  # with heads that are not alike, some tens of the root mean square
KEYS_TOGETHER = 96  # keys that are brought into shape and multiplied at a time
TILE = 12  # keys at a time: their totals fill 24 of 32 registers
_WHOLE = np.float32(1.5 * 2**23)  # the lowest bits of a sum with it are the nearest whole number
_WHOLE_BITS = int(_WHOLE.view(np.int32))
_RAISED = np.float32(1.5 * 2**23 + 128)  # the same, with 128 added
_LEAST = np.float32(1e-30)
_bits = define(i32x16, (f32x16,), lambda b, v: b.bitcast(v, i32x16.ir))


def takes(head_dim: int, is_f16: bool) -> bool:
    """Whether keys of such rows are scored so."""
    return isa.has("avx512_vnni") and is_f16 and head_dim % 16 == 0


def query_bytes(n_heads: int, head_dim: int) -> int:
    """Memory of a query: by blocks of LANES heads bytes, what sums begin at, weights."""
    return -(-n_heads // LANES) * ROW * (head_dim // 4 + 2)


def panel_bytes(head_dim: int) -> int:
    """Memory of KEYS_TOGETHER keys: their scale, bytes, products, sums over heads."""
    return 64 + KEYS_TOGETHER * (head_dim + ROW + 64)


@inline
def block_bytes(head_dim):
    """Of LANES heads."""
    return ROW * (head_dim // 4 + 2)


@inline
def pack_query(packed, packed_weights, n_heads, head_dim, out):
    """A query's lanes and weights (gemm/indexer.py's pack_heads) as bytes.

    Returns the margin of scores for keys whose largest scale is 1.
    """
    shared, own, out_block = np.float32(0.0), np.float32(0.0), block_bytes(head_dim)
    for block in range((n_heads + LANES - 1) // LANES):
        for half in range(0, ROW, 64):
            lanes, weights = packed + ROW * head_dim * block + half, packed_weights + ROW * block + half
            to = out + out_block * block + half
            largest, squares = zero_f32x16() + _LEAST, zero_f32x16()
            for at in range(lanes, lanes + ROW * head_dim, ROW):
                largest = maximum(largest, abs(load_f32x16(at)))
                squares = fma(load_f32x16(at), load_f32x16(at), squares)
            total = _pack_lanes(lanes, head_dim, 127 / largest, to)
            store_i32x16(to + ROW * (head_dim // 4), zero_i32x16() - (total << 7))
            scaled = load_f32x16(weights) * largest * np.float32(1 / 127)
            store_f32x16(to + ROW * (head_dim // 4 + 1), scaled)
            shared += hsum(abs(load_f32x16(weights)) * sqrt(squares))
            own += hsum(scaled * scaled)
    error = shared + np.float32(127) * math.sqrt(np.float32(head_dim) * own)
    return np.float32(error * np.float32(MARGINS / math.sqrt(12)))


@inline
def _pack_lanes(lanes, head_dim, factor, out):
    """16 lanes of head_dim rows as bytes, four columns a lane. Returns the sums of the whole numbers."""
    total = zero_i32x16()
    for c in range(head_dim // 4):
        words = zero_i32x16()
        for e in range(4):
            whole = _bits(fma(load_f32x16(lanes + ROW * (4 * c + e)), factor, _WHOLE)) - _WHOLE_BITS
            total = total + whole
            words = words | (whole & 255) << 8 * e
        store_i32x16(out + ROW * c, words)
    return total


@inline
def pack_keys(keys, row_bytes, n, head_dim, panel):
    """n keys of float16 as bytes. Returns their scale."""
    largest = zero_f32x16() + _LEAST
    for i in range(n):
        for c in range(0, head_dim, 16):
            largest = maximum(largest, abs(load_f16x16(keys + row_bytes * i + 2 * c)))
    scale = hmax(largest) * np.float32(1 / 127)
    store_f32(panel, scale)
    factor = np.float32(1.0) / scale
    for i in range(n):
        row, out = keys + row_bytes * i, panel + 64 + head_dim * i
        for c in range(0, head_dim, 16):
            store_i8x16(out + c, low_bytes(_bits(fma(load_f16x16(row + 2 * c), factor, _RAISED))))
    return scale


def _tile(builder, n: int, keys, head_dim, queries, out) -> None:
    """Emits out[r] = the sum over columns of keys[r] * queries, for n keys; 32 lanes of int32."""
    depth = builder.lshr(head_dim, I64(2))
    starts = builder.add(queries, builder.mul(depth, I64(ROW)))
    totals = [[load(builder, builder.add(starts, I64(64 * half)), i32x16.ir) for half in range(2)] for _ in range(n)]
    place = cgutils.alloca_once_value(builder, keys)

    def add(index, totals):
        at, first = builder.add(queries, builder.mul(index, I64(ROW))), builder.load(place)
        values = [load(builder, builder.add(at, I64(64 * half)), i8x64.ir) for half in range(2)]
        words = (load(builder, builder.add(first, builder.mul(head_dim, I64(r))), I32) for r in range(n))
        rows = (builder.bitcast(splat(builder, word, i32x16.ir), i8x64.ir) for word in words)
        totals = [
            [emit_dot_u8(builder, total, key, value) for total, value in zip(row, values, strict=True)]
            for row, key in zip(totals, rows, strict=True)
        ]
        builder.store(builder.add(first, I64(4)), place)
        return totals

    for r, row in enumerate(register_tile(builder, depth, totals, add)):
        for half, total in enumerate(row):
            store(builder, builder.add(out, I64(ROW * r + 64 * half)), total)


_multiply = define(types.void, (types.int64,) * 5, lambda b, n, *of: switch(b, n, TILE, lambda i: _tile(b, i, *of)))


@inline
def score(query, n_heads, head_dim, panel, n, scores):
    """scores[i] of n packed keys, float32."""
    keys, query_block = panel + 64, block_bytes(head_dim)
    products = keys + KEYS_TOGETHER * head_dim
    sums = products + KEYS_TOGETHER * ROW
    for block in range((n_heads + LANES - 1) // LANES):
        queries = query + query_block * block
        for i in range(0, n, TILE):
            _multiply(min(TILE, n - i), keys + head_dim * i, head_dim, queries, products + ROW * i)
        weights = queries + query_block - ROW
        low, high = load_f32x16(weights), load_f32x16(weights + 64)
        for i in range(n):
            at = products + ROW * i
            x, y = maximum(to_f32(load_i32x16(at)), 0), maximum(to_f32(load_i32x16(at + 64)), 0)
            total = fma(x, low, y * high)
            if block > 0:
                total = total + load_f32x16(sums + 64 * i)
            store_f32x16(sums + 64 * i, total)
    scale = load_f32(panel)
    for i in range(n):
        store_f32(scores + 4 * i, scale * hsum(load_f32x16(sums + 64 * i)))
