"""Rows of a cache of 16 bits as integers with a scale a row, which products of integers take as they are.

A row is a code a value, int16, and behind them its scale, a float32 and power of two: x = scale * code. It is the least
one by which codes fit 16 bits and their length LENGTH. Values are rounded to float16 first: so codes have 11
significant bits, x is exact in float16, and a row that was expanded to it packs to the same bytes again.
"""

import math

import numpy as np

from quant.simd.exact import rint
from quant.simd.floats import fma, hmax, hsum, maximum, scaled_to_i16, splat_f32x16, to_f32, zero_f32x16
from quant.simd.memory import (
    bits_to_f32,
    load_f16x16,
    load_f32,
    load_f32x16,
    load_i16x16,
    load_u32,
    store_f16x16,
    store_f32,
    store_f32x16,
    store_low_i16x16,
)
from quant.target.jit import inline, kernel

SCALE_BYTES = 4
LENGTH = 65472.0  # of a row's codes: times that of a query's, 2^15 - 1, less than 2^31
_MOST = 32767
_LEAST_SCALE = 2.0**-24  # the least float16


def row_bytes(width: int) -> int:
    """Of a row of `width` values."""
    return 2 * width + SCALE_BYTES


@inline
def _scale_for(row, n):
    """The scale of a row of float16, by way of the 4 bytes behind it; NaN where one is none."""
    largest, squares = zero_f32x16(), zero_f32x16()
    for i in range(0, n, 16):
        v = load_f16x16(row + 2 * i)
        largest, squares = maximum(largest, abs(v)), fma(v, v, squares)
    total = hsum(squares)
    least = max(np.float32(math.sqrt(total)) / np.float32(LENGTH), hmax(largest) / np.float32(_MOST))
    at = row + 2 * n
    store_f32(at, max(least, np.float32(_LEAST_SCALE)))
    up = bits_to_f32((load_u32(at) + 0x7FFFFF) & 0x7F800000)
    store_f32(at, up + np.float32(0.0) * total)
    return load_f32(at)


@inline
def pack_row(x, n, out):
    """n float32, a multiple of 16, as a row.

    Values that are rounded may ask for twice the scale, and those that this one rounds for the first one again, by
    which they are whole, too: so what comes of them is a row whose values ask for its own scale.
    """
    for i in range(0, n, 16):
        store_f16x16(out + 2 * i, load_f32x16(x + 4 * i))
    before, scale = np.float32(0.0), _scale_for(out, n)
    while scale > before:
        for i in range(0, n, 16):
            store_f16x16(out + 2 * i, rint(load_f16x16(out + 2 * i) * (np.float32(1.0) / scale)) * scale)
        before, scale = scale, _scale_for(out, n)
    inverse = splat_f32x16(np.float32(1.0) / scale)
    for i in range(0, n, 16):
        store_low_i16x16(out + 2 * i, scaled_to_i16(load_f16x16(out + 2 * i), inverse))


@inline
def expand_scaled_row(row, n, out):
    """float32 (n,) of a row; n: a multiple of 16."""
    scale = load_f32(row + 2 * n)
    for i in range(0, n, 16):
        store_f32x16(out + 4 * i, to_f32(load_i16x16(row + 2 * i)) * scale)


@kernel("void(int64, int64, int64, int64)")
def pack_scaled_rows(x, n_rows, width, out):
    """float32 (n_rows, width) as rows; width: a multiple of 16."""
    for i in range(n_rows):
        pack_row(x + 4 * width * i, width, out + (2 * width + SCALE_BYTES) * i)


@kernel("void(int64, int64, int64, int64)")
def expand_scaled_rows(rows, n_rows, width, out):
    """float16 (n_rows, width) of rows; width: a multiple of 16."""
    for _ in range(n_rows):
        scale = load_f32(rows + 2 * width)
        for i in range(0, width, 16):
            store_f16x16(out + 2 * i, to_f32(load_i16x16(rows + 2 * i)) * scale)
        rows, out = rows + 2 * width + SCALE_BYTES, out + 2 * width
