"""Packing the formats whose levels are a table: MXFP4, bit-equal to ggml's, and IQ4_NL.

Source: ggml src/ggml-quants.c, quantize_row_mxfp4_ref, quantize_row_iq4_nl_impl. For IQ4_NL ggml tries 15 scales that
bring the largest weight near the lowest level; here 16 compete with 16 that bring it near the highest.
"""

import math

import numpy as np

from quant.block_format import PACK
from quant.formats import iq4_nl, mxfp4
from quant.quantize.search import TINY, first_wins_ties, mean, sum_squares, write_importance, write_squares
from quant.simd.core import i8x32
from quant.simd.exact import (
    best_lane,
    constants,
    count_below,
    greatest,
    join_nibbles,
    lane,
    mark_negative,
    signed_largest,
    step_function,
    sum_tree,
    where,
)
from quant.simd.floats import fma, splat_f32x16, to_f32, zero_f32x16
from quant.simd.ints import lookup_in
from quant.simd.memory import bits_to_f32, load_f16, load_f32, load_f32x32, store_f16, store_i8, store_i8x16
from quant.target.jit import inline, kernel


def _midpoints(values: np.ndarray) -> np.ndarray:
    """Where the nearest of rising values changes."""
    return (values[:-1].astype(np.float64) + values[1:]) / 2


# ---- MXFP4 -----------------------------------------------------------------------------------------------------------

_magnitude_index = count_below(_midpoints(mxfp4.VALUES[:8]))


@inline
def _exponent(largest):
    """E8M0 of the power of two in whose units `largest` is in 4..8, where the largest level, 6, is."""
    if largest == 0:
        return 0
    # Rounded to float32 first: just below a power of two ggml's log2f gives the next integer.
    return max(0, math.floor(np.float32(math.log2(np.float64(largest)))) + 125)


@kernel(PACK)
def _mxfp4_pack(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = load_f32x32(x + 128 * b), out + 17 * b
        e = _exponent(greatest(abs(values)))
        scale = bits_to_f32(0x00200000 << e if e < 2 else (e - 1) << 23)
        q = mark_negative(_magnitude_index(abs(values), scale), values, 8)
        store_i8(block, e)
        store_i8x16(block + 1, join_nibbles(q))


# ---- IQ4_NL ----------------------------------------------------------------------------------------------------------

_index = count_below(_midpoints(iq4_nl.VALUES))
_value = lookup_in(iq4_nl.VALUES, i8x32)
_nearest = step_function(iq4_nl.VALUES.astype(np.float64))
_LOWEST, _HIGHEST = int(iq4_nl.VALUES[0]), int(iq4_nl.VALUES[-1])
_TO_HIGHEST = constants([_HIGHEST + step for step in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -9)])
_TO_LOWEST = constants([_LOWEST + step for step in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, 9)])


@inline
def _best_scale(x, w, inverse):
    """The best of the scales for the levels that x * inverse rounds to."""
    xl, ll = zero_f32x16(), zero_f32x16()
    for i in range(32):
        xi, wi = splat_f32x16(load_f32(x + 4 * i)), splat_f32x16(load_f32(w + 4 * i))
        level = _nearest(inverse * xi)
        wl = wi * level
        xl, ll = fma(wl, xi, xl), fma(wl, level, ll)
    scale = where(ll > 0, xl / ll, 0)
    return lane(scale, best_lane(scale * xl * first_wins_ties()))


@inline
def _indices(values, d):
    """The table's entries nearest to values / d."""
    inverse = np.float32(1.0) / d if d != 0 else np.float32(0.0)
    return _index(values * inverse, np.float32(1.0))


@inline
def _error(values, w, d):
    """Sum of w * (d * level - x)^2."""
    rest = to_f32(_value(_indices(values, d))) * d - values
    return sum_tree(load_f32x32(w) * rest * rest)


@kernel(PACK)
def _iq4_nl_pack(x, importance, n_blocks, out, scratch):
    n = 32 * n_blocks
    variance, average = np.float32(0.0), np.float32(0.0)
    if importance != 0:
        variance, average = sum_squares(x, n) / np.float32(n), mean(importance, n)
    for b in range(n_blocks):
        row, block = x + 128 * b, out + 18 * b
        values = load_f32x32(row)
        largest = signed_largest(values)
        d = np.float32(0.0)
        if abs(largest) > TINY:
            if importance != 0:
                write_importance(row, importance + 128 * b, 32, variance, average, scratch)
            else:
                write_squares(row, 32, scratch)
            unit = np.float32(1.0) / largest
            store_f16(block, _best_scale(row, scratch, _TO_HIGHEST() * unit))
            d = load_f16(block)
            store_f16(block, _best_scale(row, scratch, _TO_LOWEST() * unit))
            if _error(values, scratch, load_f16(block)) < _error(values, scratch, d):
                d = load_f16(block)
        store_f16(block, d)
        store_i8x16(block + 2, join_nibbles(_indices(values, d)))


MXFP4, IQ4_NL = _mxfp4_pack, _iq4_nl_pack
