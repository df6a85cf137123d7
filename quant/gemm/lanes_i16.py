"""Products with 32 vectors side by side in 16-bit integers: those of lanes.py, twice as many at a time.

A vector has a scale of its own and is rounded to a length of at most LENGTH. So a product of two is below 2^31 in
magnitude (Cauchy-Schwarz), whatever their number of columns, and sums in int32 are exact. Of vectors of about equal
columns that keeps some 12 bits of each: a 16-bit float has 11 (bfloat16 8). vpdpwssd multiplies pairs of columns, as
many at a time as vdpbf16ps does, which fewer CPUs have and some run at half the rate.

Vectors side by side ("lanes") are rows of 32 pairs of int16, a row for two columns. Vectors one after the other
("rows") are rows of int16, whose columns behind the last one are zero.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import types
from numba.core import cgutils

from quant.gemm.lanes import LOWEST, ROW
from quant.simd.core import F32, I32, I64, constant, define, f32x16, i8x64, i32x16, load, shuffle, splat, store
from quant.simd.dots import emit_dot_i16
from quant.simd.exact import at_most, sqrt
from quant.simd.floats import (
    emit_fma,
    exp2,
    fma,
    greater,
    hmax,
    hsum,
    maximum,
    scaled_to_i16,
    splat_f32x16,
    zero_f32x16,
)
from quant.simd.memory import (
    emit_prefetch,
    load_f16x16,
    load_f32,
    load_f32x16,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_low_i16x16,
    store_low_i16x32,
)
from quant.simd.register_tile import register_tile
from quant.target.jit import inline

# Of rows, whose largest column is not looked for, and of lanes; the other way round for gemv/rows_i16.py's.
LENGTH, LENGTH_OF_LANES = 32767.0, 65472.0
ROWS = 12  # of a product at a time: their totals fill 24 of 32 registers
AHEAD = 32  # bytes brought into L2 for each pair of a step's products: as many as may be needed soon
_HEADS, COLUMNS = 8, 32  # of weights where they are rows, and of what they weigh, at a time
# Of values, of a sum of weights, and of one: the first two have a product of less than 2^31. Rows of LENGTH as values
# leave less for sums.
MOST_VALUE, MOST_SUM, MOST_WEIGHT, MOST_SUM_OF_ROWS = 2.0**13 - 1, 2.0**18 - 256, 2.0**15 - 1, 2.0**16 - 64
_TINY = 1e-30  # added to what is divided by; unlike a maximum it lets NaN through


def pad16(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // 16) * 16


# ---- products --------------------------------------------------------------------------------------------------------


def emit_tile(
    builder, size: tuple[int, int], a, row_stride, column_stride, b, b_stride, n_pairs, finish: Callable
) -> None:
    """Emits finish(r, totals): the vectors sum over pairs k of a[r][k] . b[k], float32, for `size` rows and vectors.

    Strides in bytes: of a's rows, and from one pair of columns to the next.
    """
    n, n_vectors = size
    zero = constant(i32x16.ir, 0)
    # A pointer for every four rows: their addresses are sums that a load can make, with few registers.
    places = [
        cgutils.alloca_once_value(builder, builder.add(a, builder.mul(row_stride, I64(r)))) for r in range(0, n, 4)
    ]
    offsets = [builder.mul(row_stride, I64(r)) for r in range(4)]

    def add(index, totals):
        row = builder.add(b, builder.mul(index, b_stride))
        columns = [load(builder, builder.add(row, I64(64 * i)), i32x16.ir) for i in range(n_vectors)]
        firsts = [builder.load(place) for place in places]
        sums = []
        for r, row_totals in enumerate(totals):
            pair = splat(builder, load(builder, builder.add(firsts[r // 4], offsets[r % 4]), I32), i32x16.ir)
            sums.append(
                [emit_dot_i16(builder, total, column, pair) for total, column in zip(row_totals, columns, strict=True)]
            )
        for place, first in zip(places, firsts, strict=True):
            builder.store(builder.add(first, column_stride), place)
        return sums

    totals = register_tile(builder, n_pairs, [[zero] * n_vectors for _ in range(n)], add)
    for r, row in enumerate(totals):
        finish(r, [builder.sitofp(total, f32x16.ir) for total in row])


def _scaled(n: int):
    """An intrinsic of multiply()'s arguments but the first, for n rows."""

    def emit(builder, a, row_stride, scales, b, n_pairs, c, c_stride) -> None:
        def finish(r, totals):
            scale = splat(builder, load(builder, builder.add(scales, I64(4 * r)), F32), f32x16.ir)
            to = builder.add(c, builder.mul(c_stride, I64(r)))
            for half, total in enumerate(totals):
                store(builder, builder.add(to, I64(64 * half)), builder.fmul(total, scale))

        emit_tile(builder, (n, 2), a, row_stride, I64(4), b, I64(ROW), n_pairs, finish)

    return define(types.void, (types.int64,) * 7, emit)


def _folded(n: int):
    """The same of fold_columns()."""

    def emit(builder, a, row_stride, b, n_pairs, factors, c) -> None:
        old, new = (
            [load(builder, builder.add(factors, I64(ROW * i + 64 * half)), f32x16.ir) for half in range(2)]
            for i in range(2)
        )

        def finish(r, totals):
            for half, total in enumerate(totals):
                at = builder.add(c, I64(ROW * r + 64 * half))
                kept = builder.fmul(load(builder, at, f32x16.ir), old[half])
                store(builder, at, emit_fma(builder, total, new[half], kept))

        emit_tile(builder, (n, 2), a, I64(4), row_stride, b, I64(ROW), n_pairs, finish)

    return define(types.void, (types.int64,) * 6, emit)


def emit_unpacked(builder, a, b, size: int, half: int):
    """Of each quarter of two vectors of bytes its lower or upper half, `size` bytes of either in turn."""
    firsts = [16 * quarter + 8 * half + unit for quarter in range(4) for unit in range(0, 8, size)]
    return shuffle(builder, a, b, [side + first + i for first in firsts for side in (0, 64) for i in range(size)])


def _folded_rows(n: int):
    """The same of fold_rows(), for so many heads and COLUMNS."""

    def emit(builder, weights, rows, row_stride, n_pairs, ahead, factors, c, c_stride) -> None:
        zero = constant(i32x16.ir, 0)

        def add(index, totals):
            emit_prefetch(builder, builder.add(ahead, builder.mul(index, I64(AHEAD))), 2)
            at = builder.add(rows, builder.mul(row_stride, builder.mul(index, I64(2))))
            both = [load(builder, each, i8x64.ir) for each in (at, builder.add(at, row_stride))]
            columns = [emit_unpacked(builder, *both, 2, half) for half in range(2)]
            at, sums = builder.add(weights, builder.mul(index, I64(64))), []
            for r, row_totals in enumerate(totals):
                pair = splat(builder, load(builder, builder.add(at, I64(4 * r)), I32), i32x16.ir)
                each = zip(row_totals, columns, strict=True)
                sums.append([emit_dot_i16(builder, total, pair, column) for total, column in each])
            return sums

        totals = register_tile(builder, n_pairs, [[zero] * 2 for _ in range(n)], add)
        for r, (low, high) in enumerate(totals):
            old, new = (
                splat(builder, load(builder, builder.add(factors, I64(64 * i + 4 * r)), F32), f32x16.ir)
                for i in range(2)
            )
            to = builder.add(c, builder.mul(c_stride, I64(r)))
            for i in range(2):  # as unpacking left them: quarters of `low` and of `high` in turn are in order
                quarters = [16 * side + 4 * quarter for quarter in (2 * i, 2 * i + 1) for side in (0, 1)]
                lanes = [first + j for first in quarters for j in range(4)]
                total = builder.sitofp(shuffle(builder, low, high, lanes), f32x16.ir)
                at = builder.add(to, I64(64 * i))
                store(builder, at, emit_fma(builder, total, new, builder.fmul(load(builder, at, f32x16.ir), old)))

    return define(types.void, (types.int64,) * 8, emit)


def _scaled_16(builder, a, row_stride, scales, b, n_pairs, ahead, c) -> None:
    """Two pairs at a time."""
    zero, n = constant(i32x16.ir, 0), range(16)
    firsts = [builder.add(a, builder.mul(row_stride, I64(r))) for r in n]

    def add(index, totals):
        emit_prefetch(builder, builder.add(ahead, builder.mul(index, I64(2 * AHEAD))), 2)
        for pair in range(2):
            lanes = load(builder, builder.add(b, builder.add(builder.mul(index, I64(128)), I64(64 * pair))), i32x16.ir)
            column = builder.add(builder.mul(index, I64(8)), I64(4 * pair))
            rows = (load(builder, builder.add(first, column), I32) for first in firsts)
            each = zip(totals, rows, strict=True)
            totals = [[emit_dot_i16(builder, total, lanes, splat(builder, row, i32x16.ir))] for (total,), row in each]
        return totals

    totals = register_tile(builder, builder.lshr(n_pairs, I64(1)), [[zero]] * 16, add)
    for r, (total,) in enumerate(totals):
        scale = splat(builder, load(builder, builder.add(scales, I64(4 * r)), F32), f32x16.ir)
        store(builder, builder.add(c, I64(64 * r)), builder.fmul(builder.sitofp(total, f32x16.ir), scale))


# Few sizes: each is compiled, and what is left of a block of rows is little.
_multiply_12, _multiply_4, _multiply_1 = map(_scaled, (ROWS, 4, 1))
_fold_12, _fold_4, _fold_1 = map(_folded, (ROWS, 4, 1))
_fold_8_rows, _fold_1_row = map(_folded_rows, (_HEADS, 1))
# (a, row_stride, scales, b, n_pairs, ahead, c): 16 rows of multiply(), of 16 lanes and an even number of pairs; AHEAD
# bytes a pair from `ahead` on are brought into L2.
multiply_16 = define(types.void, (types.int64,) * 7, _scaled_16)


@inline
def multiply(n_rows, a, row_stride, scales, b, n_pairs, c, c_stride):
    """c[r] = scales[r] * a[r] . b, rows of 32 float32, c_stride bytes apart; scales float32, of the rows of a."""
    in_12, in_4 = n_rows // ROWS * ROWS, n_rows // 4 * 4
    for r in range(0, in_12, ROWS):
        _multiply_12(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)
    for r in range(in_12, in_4, 4):
        _multiply_4(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)
    for r in range(in_4, n_rows):
        _multiply_1(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)


@inline
def fold_columns(n_columns, a, row_stride, b, n_pairs, factors, c):
    """c[v] = factors[0] * c[v] + factors[1] * sum over pairs k of a[k][v] . b[k]: rows of 32 float32, as factors are.

    a: pairs of rows, their int16 in turn, row_stride bytes from a pair to the next.
    """
    in_12, in_4 = n_columns // ROWS * ROWS, n_columns // 4 * 4
    for v in range(0, in_12, ROWS):
        _fold_12(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)
    for v in range(in_12, in_4, 4):
        _fold_4(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)
    for v in range(in_4, n_columns):
        _fold_1(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)


@inline
def fold_rows(n_heads, weights, rows, row_stride, n_pairs, ahead, factors, c, c_stride, width):
    """c[h] = factors[0][h] * c[h] + factors[1][h] * sum over rows r of weights[r][h] * rows[r], float32.

    Args:
        weights: of two rows, pairs of 16 lanes, of which the first n_heads are used.
        rows: int16, row_stride bytes apart, two for each of n_pairs.
        ahead: an address, from which on memory is brought into L2.
        factors: two rows of 16 float32.
        c: (n_heads, width), c_stride bytes apart.
        width: a multiple of COLUMNS.
    """
    in_8 = n_heads // _HEADS * _HEADS
    for i in range(0, width, COLUMNS):
        at, to = rows + 2 * i, c + 4 * i
        for h in range(0, in_8, _HEADS):
            _fold_8_rows(weights + 4 * h, at, row_stride, n_pairs, ahead, factors + 4 * h, to + c_stride * h, c_stride)
            ahead += AHEAD * n_pairs
        for h in range(in_8, n_heads):
            _fold_1_row(weights + 4 * h, at, row_stride, n_pairs, ahead, factors + 4 * h, to + c_stride * h, c_stride)
            ahead += AHEAD * n_pairs


# ---- rounding --------------------------------------------------------------------------------------------------------


@inline
def paired(first, second):
    """Two columns of integers as pairs."""
    return (first & 0xFFFF) | (second << 16)


@inline
def round_16(rows, stride, depth, length, out, out_stride, scales):
    """16 vectors side by side, float32 rows `stride` bytes apart, a row a column: pairs at out, float32 (16,) scales.

    They may be of any size: what is squared is at most 1. length: to which they are brought, at most.
    """
    largest, squares = zero_f32x16(), zero_f32x16()
    for c in range(depth):
        largest = greater(abs(load_f32x16(rows + stride * c)), largest)
    inverse = 1 / (largest + np.float32(_TINY))
    for c in range(depth):
        v = load_f32x16(rows + stride * c) * inverse
        squares = fma(v, v, squares)
    root = sqrt(squares) + np.float32(_TINY)
    factor = at_most(np.float32(length) / root, splat_f32x16(np.float32(LENGTH)))
    store_f32x16(scales, largest / factor + root * np.float32(0.0) + np.float32(_TINY))  # NaN, if there is one
    factor = inverse * factor
    for k in range(depth // 2):
        a = scaled_to_i16(load_f32x16(rows + 2 * stride * k), factor)
        b = scaled_to_i16(load_f32x16(rows + 2 * stride * k + stride), factor)
        store_i32x16(out + out_stride * k, paired(a, b))
    if depth % 2:
        a = scaled_to_i16(load_f32x16(rows + stride * (depth - 1)), factor)
        store_i32x16(out + out_stride * (depth // 2), a & 0xFFFF)


@inline
def round_lanes(rows, depth, out, scales):
    """The same of 32 vectors."""
    for half in range(2):
        round_16(rows + 64 * half, ROW, depth, LENGTH_OF_LANES, out + 64 * half, ROW, scales + 64 * half)


@inline
def _factor(squares, scale):
    length = np.float32(math.sqrt(hsum(squares))) + np.float32(_TINY)
    store_f32(scale, length * np.float32(1 / LENGTH))
    return splat_f32x16(np.float32(LENGTH) / length)


@inline
def _row_factor(x, n, scale):
    """What takes a row of n float32, a multiple of 16, to LENGTH; stores what takes it back."""
    even, odd = zero_f32x16(), zero_f32x16()  # sums of squares, apart: or each would wait for the one before
    for i in range(0, n // 32 * 32, 32):
        u, v = load_f32x16(x + 4 * i), load_f32x16(x + 4 * i + 64)
        even, odd = fma(u, u, even), fma(v, v, odd)
    if n % 32:
        u = load_f32x16(x + 4 * (n - 16))
        even = fma(u, u, even)
    return _factor(even + odd, scale)


@inline
def round_row(x, n, out, scale):
    """A row of n float32, a multiple of 16, to int16; its float32 scale to an address."""
    factor = _row_factor(x, n, scale)
    for i in range(0, n, 16):
        store_low_i16x16(out + 2 * i, scaled_to_i16(load_f32x16(x + 4 * i), factor))


@inline
def _half_row_factor(row, n, scale):
    """The same of a row of n float16."""
    even, odd = zero_f32x16(), zero_f32x16()
    for i in range(0, n // 32 * 32, 32):
        u, v = load_f16x16(row + 2 * i), load_f16x16(row + 2 * i + 32)
        even, odd = fma(u, u, even), fma(v, v, odd)
    if n % 32:
        u = load_f16x16(row + 2 * (n - 16))
        even = fma(u, u, even)
    return _factor(even + odd, scale)


@inline
def round_two_rows(x, y, n, out, width, pairs, scales):
    """Two rows of n float16, a multiple of 16: each as round_row does, and the first `width` columns as pairs.

    Converting them twice takes less time than keeping them in float32.
    """
    first, second = _half_row_factor(x, n, scales), _half_row_factor(y, n, scales + 4)
    for i in range(0, n // 32 * 32, 32):
        a, b = scaled_to_i16(load_f16x16(x + 2 * i), first), scaled_to_i16(load_f16x16(y + 2 * i), second)
        c, d = scaled_to_i16(load_f16x16(x + 2 * i + 32), first), scaled_to_i16(load_f16x16(y + 2 * i + 32), second)
        store_low_i16x32(out + 2 * i, a, c)
        store_low_i16x32(out + 2 * (n + i), b, d)
        if i < width:
            store_i32x16(pairs + 4 * i, paired(a, b))
            store_i32x16(pairs + 4 * i + 64, paired(c, d))
    if n % 32:
        i = n - 16
        a, b = scaled_to_i16(load_f16x16(x + 2 * i), first), scaled_to_i16(load_f16x16(y + 2 * i), second)
        store_low_i16x16(out + 2 * i, a)
        store_low_i16x16(out + 2 * (n + i), b)
        if i < width:
            store_i32x16(pairs + 4 * i, paired(a, b))


@inline
def _value_scale(x, n, scale):
    """What takes a row of values to MOST_VALUE at most; stores what takes it back."""
    largest, total = zero_f32x16(), zero_f32x16()
    for i in range(0, n, 16):
        v = load_f32x16(x + 4 * i)
        largest, total = greater(abs(v), largest), total + v
    most = hmax(largest) + np.float32(_TINY) + np.float32(0.0) * hsum(total)  # NaN, if there is one
    store_f32(scale, most * np.float32(1 / MOST_VALUE))
    return splat_f32x16(np.float32(MOST_VALUE) / most)


@inline
def round_values(x, stride, n, out, scales):
    """Two rows of n float32 values, a multiple of 16 and `stride` bytes apart: pairs at out, two float32 scales."""
    first, second = _value_scale(x, n, scales), _value_scale(x + stride, n, scales + 4)
    for i in range(0, n, 16):
        a = scaled_to_i16(load_f32x16(x + 4 * i), first)
        b = scaled_to_i16(load_f32x16(x + stride + 4 * i), second)
        store_i32x16(out + 4 * i, paired(a, b))


@inline
def _round_weights(weights, stride, n_rows, largest, total, most_sum, out):
    """Rows of weights, none negative, to pairs at out, as large as sums allow; what takes sums of them back.

    largest, total: of each lane's weights.
    """
    most = np.float32(MOST_WEIGHT) / (largest + np.float32(_TINY))
    factor = at_most(np.float32(most_sum) / (total + np.float32(_TINY)), most)
    for k in range(n_rows // 2):
        at = weights + 2 * stride * k
        a, b = scaled_to_i16(load_f32x16(at), factor), scaled_to_i16(load_f32x16(at + stride), factor)
        store_i32x16(out + stride * k, paired(a, b))
    if n_rows % 2:
        a = scaled_to_i16(load_f32x16(weights + stride * (n_rows - 1)), factor)
        store_i32x16(out + stride * (n_rows // 2), a & 0xFFFF)
    return 1 / factor + total * np.float32(0.0)  # NaN, if there is one


@inline
def weigh(scores, stride, n_rows, row_scales, scale, largest, total, most_sum, weights):
    """Rows of 16 scores to pairs of rounded weights 2^(score - the largest so far) times the rows' scales of values.

    Args:
        scores: float32 rows `stride` bytes apart, to be multiplied by `scale` (a vector); overwritten.
        largest, total: addresses of the largest score so far and of the sum of weights; both are brought up to date.
        most_sum: bound on a lane's sum of rounded weights.

    Returns:
        What takes earlier sums to the same scale, and what takes sums of the rounded weights to it.
    """
    before, even = load_f32x16(largest), splat_f32x16(np.float32(LOWEST))
    odd, in_2 = even, n_rows // 2 * 2  # apart: or each row would wait for the one before
    for at in range(scores, scores + stride * in_2, 2 * stride):
        even, odd = greater(load_f32x16(at), even), greater(load_f32x16(at + stride), odd)
    if in_2 < n_rows:
        even = greater(load_f32x16(scores + stride * in_2), even)
    most = maximum(before, greater(even, odd) * scale)
    store_f32x16(largest, most)
    summed, weighed, heaviest = zero_f32x16(), zero_f32x16(), zero_f32x16()
    for j in range(n_rows):
        weight = exp2(load_f32x16(scores + stride * j) * scale - most)  # fused, the largest would not be 0
        summed += weight
        weight = weight * load_f32(row_scales + 4 * j)
        weighed += weight
        heaviest = greater(weight, heaviest)
        store_f32x16(scores + stride * j, weight)
    factor = exp2(before - most)
    store_f32x16(total, fma(load_f32x16(total), factor, summed))
    return factor, _round_weights(scores, stride, n_rows, heaviest, weighed, most_sum, weights)
