"""Rounding for token panels: 16 groups of 32 columns at a time, each to 8 bits and a scale, as activations.py has it.

What is one number a group (its largest magnitude, its scale, its sums) is a lane of a vector here. A rounded block of
16 groups takes 768 bytes: q i8[16][32] @0 | d f32[16] @512 | s f32[16] @576, s = d * sum of q | sums of q's first and
second halves i32[2][16] @640.
"""

import numpy as np
from llvmlite import ir

from quant.simd.core import I16, I32, call, constant, define, f32x16, f32x32, i8x32, shuffle
from quant.simd.dots import dot_u8
from quant.simd.floats import as_f32, maximum, round_to_i8, splat_f32x32, to_f32
from quant.simd.ints import ones_i8x32, zero_i32x8
from quant.simd.memory import load_f32, load_f32x16, load_f32x32, store_f32x16, store_i8x32, store_i32x8, store_i32x16
from quant.simd.rows16 import transpose_strided
from quant.target import isa
from quant.target.jit import inline

BLOCKS_TOGETHER = 16  # of a block
GROUP_COLUMNS = 32
BLOCK_BYTES = 768
D, S, SUMS = 512, 576, 640  # where they begin
_INVERSES = 1024  # in the work memory, behind 16 vectors: f32[16]
WORK_BYTES = _INVERSES + 64


def _round_small(builder, v):
    """f32x32 of at most 127 in magnitude to the nearest integers, ties to even; NaN -> 0."""
    wide = ir.VectorType(I32, 16)
    halves = (shuffle(builder, v, None, range(first, first + 16)) for first in (0, 16))
    name, rest = "llvm.x86.avx512.mask.cvtps2dq.512", (constant(wide, 0), I16(-1), I32(4))
    return builder.trunc(
        shuffle(builder, *(call(builder, name, wide, half, *rest) for half in halves), range(32)), i8x32.ir
    )


def _inverse(builder, largest):
    """127 / largest, kept finite; 0 for 0 and NaN."""
    vector = largest.type
    quotient = builder.fdiv(constant(vector, 127.0), largest)
    bounded = call(builder, "llvm.minnum.v16f32", vector, quotient, constant(vector, float(np.finfo(np.float32).max)))
    positive = builder.fcmp_ordered(">", largest, constant(vector, 0.0))
    return builder.select(positive, bounded, constant(vector, 0.0))


_round = define(i8x32, (f32x32,), _round_small) if isa.has("avx512_vnni") else round_to_i8
_inverse_f32x16 = define(f32x16, (f32x16,), _inverse)


@inline
def _maximum_of_4(vectors):
    a, b, c, d = vectors
    first, second = maximum(as_f32(a), as_f32(b)), maximum(as_f32(c), as_f32(d))
    return maximum(first, second)


@inline
def _sum_of_4(vectors):
    a, b, c, d = vectors
    return a + b + (c + d)


@inline
def _largest(work):
    """The largest lane of each of 16 vectors, but for NaN."""
    first = maximum(_maximum_of_4(transpose_strided(work, 64)), _maximum_of_4(transpose_strided(work + 16, 64)))
    second = maximum(_maximum_of_4(transpose_strided(work + 32, 64)), _maximum_of_4(transpose_strided(work + 48, 64)))
    return maximum(first, second)


@inline
def round_block(x, stride, count, out, work):
    """Round `count` groups (up to 16) of float32, `stride` bytes apart from x on, to a block. work: of WORK_BYTES."""
    for g in range(count):
        first, second = load_f32x16(x + stride * g), load_f32x16(x + stride * g + 64)
        store_f32x16(work + 64 * g, maximum(abs(first), abs(second)))
    largest = _largest(work)
    d = largest * np.float32(1 / 127)
    store_f32x16(out + D, d)
    store_f32x16(work + _INVERSES, _inverse_f32x16(largest))
    for g in range(count):
        inverse = splat_f32x32(load_f32(work + _INVERSES + 4 * g))
        q = _round(load_f32x32(x + stride * g) * inverse)
        store_i8x32(out + GROUP_COLUMNS * g, q)
        store_i32x8(work + 32 * g, dot_u8(zero_i32x8(), ones_i8x32(), q))
    first, second = _sum_of_4(transpose_strided(work, 32)), _sum_of_4(transpose_strided(work + 16, 32))
    store_i32x16(out + SUMS, first)
    store_i32x16(out + SUMS + 64, second)
    store_f32x16(out + S, d * to_f32(first + second))


def row_bytes(n_cols: int) -> int:
    """Bytes of a rounded row: its blocks one behind the other, the last one perhaps not full."""
    return BLOCK_BYTES * (-(-n_cols // (GROUP_COLUMNS * BLOCKS_TOGETHER)))


@inline
def round_row(x, n_cols, out, work):
    """Round n_cols float32 at x, a multiple of 32, to a row of blocks."""
    n_groups = n_cols // GROUP_COLUMNS
    for first in range(0, n_groups, BLOCKS_TOGETHER):
        count = min(BLOCKS_TOGETHER, n_groups - first)
        round_block(x + 4 * GROUP_COLUMNS * first, 4 * GROUP_COLUMNS, count, out, work)
        out += BLOCK_BYTES
