"""Vectors and softmax weights as 16-bit integers with a scale each: what products of lanes_i16.py take.

A vector has a scale of its own and is rounded to a length of at most LENGTH. So a product of two is below 2^31 in
magnitude (Cauchy-Schwarz), whatever their number of columns, and sums in int32 are exact. Of vectors of about equal
columns that keeps some 12 bits of each: a 16-bit float has 11 (bfloat16 8).
"""

import math

import numpy as np

from quant.gemm.lanes import LOWEST, ROW
from quant.simd.exact import at_most, sqrt
from quant.simd.floats import (
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
    load_f16x16,
    load_f32,
    load_f32x16,
    store_f32,
    store_f32x16,
    store_i32x16,
    store_low_i16x16,
    store_low_i16x32,
)
from quant.target.jit import inline

# Of rows, whose largest column is not looked for, and of lanes; the other way round for gemv/rows_i16.py's.
LENGTH, LENGTH_OF_LANES = 32767.0, 65472.0  # whose products fit int32
# Of values, of a sum of weights, and of one: the first two have a product of less than 2^31. Rows of LENGTH as values
# leave less for sums.
MOST_VALUE, MOST_SUM, MOST_WEIGHT, MOST_SUM_OF_ROWS = 2.0**13 - 1, 2.0**18 - 256, 2.0**15 - 1, 2.0**16 - 64
_TINY = 1e-30  # added to what is divided by; unlike a maximum it lets NaN through


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
def _columns(row, i, is_f16):
    """16 columns of a row of float16 or float32, from the i-th on."""
    return load_f16x16(row + 2 * i) if is_f16 else load_f32x16(row + 4 * i)


@inline
def _row_factor(row, n, is_f16, scale):
    """What takes a row of n columns, a multiple of 16, to LENGTH; stores what takes it back."""
    even, odd = zero_f32x16(), zero_f32x16()  # sums of squares, apart: or each would wait for the one before
    for i in range(0, n // 32 * 32, 32):
        u, v = _columns(row, i, is_f16), _columns(row, i + 16, is_f16)
        even, odd = fma(u, u, even), fma(v, v, odd)
    if n % 32:
        u = _columns(row, n - 16, is_f16)
        even = fma(u, u, even)
    length = np.float32(math.sqrt(hsum(even + odd))) + np.float32(_TINY)
    store_f32(scale, length * np.float32(1 / LENGTH))
    return splat_f32x16(np.float32(LENGTH) / length)


@inline
def round_row(x, n, out, scale):
    """A row of n float32, a multiple of 16, to int16; its float32 scale to an address."""
    factor = _row_factor(x, n, False, scale)
    for i in range(0, n, 16):
        store_low_i16x16(out + 2 * i, scaled_to_i16(load_f32x16(x + 4 * i), factor))


@inline
def round_two_rows(x, y, n, out, width, pairs, scales):
    """Two rows of n float16, a multiple of 16: each as round_row does, and the first `width` columns as pairs.

    Converting them twice takes less time than keeping them in float32.
    """
    first, second = _row_factor(x, n, True, scales), _row_factor(y, n, True, scales + 4)
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


# ---- softmax ---------------------------------------------------------------------------------------------------------


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
