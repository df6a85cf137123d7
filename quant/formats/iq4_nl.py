"""IQ4_NL: 4-bit weights on a non-linear grid, x = d*VALUES[q]. 32 weights in 18 bytes, 4.5 bits each.

Quantising: ggml tries 15 scales that bring the largest weight near the lowest level; here 16, farther apart, compete
with 16 that bring it near the highest.
Source: ggml src/ggml-common.h @d99724f, block_iq4_nl and kvalues_iq4nl; quantize_row_iq4_nl_impl in ggml-quants.c.
"""

import numpy as np

from quant.block_format import QUANTIZE, block_layout, offsets
from quant.formats.blocks_32 import biased_dots_of_quarters
from quant.formats.nibbles_32 import BLOCK, codes_of, panel_format, stores_codes, symmetric, unpack_codes
from quant.gemm.microkernel_k_block import SIGNED_BYTES
from quant.quantize.levels import averages, inverse_of, midpoints
from quant.quantize.search import TINY, first_wins_ties, write_importance, write_squares
from quant.simd.core import i8x32, i8x64
from quant.simd.dots import WEIGHT_BIAS
from quant.simd.exact import best_lane, constants, count_below, lane, signed_largest, step_function, sum_tree, where
from quant.simd.floats import fma, splat_f32x16, to_f32, zero_f32x16
from quant.simd.ints import lookup_in
from quant.simd.memory import load_f16, load_f32, load_f32x32, store_f16
from quant.target.jit import inline, kernel

LAYOUT = block_layout(18, d="<f2", qs="16u1")
D, _ = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
_value = lookup_in(VALUES, i8x32)
_raised_value = lookup_in(VALUES.astype(np.int16) + WEIGHT_BIAS, i8x64)
_codes, _codes_of_even = codes_of(LAYOUT)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*18) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    d, values = raw["d"].astype(np.float32)[..., None], VALUES[unpack_codes(raw)]
    return (d * values.astype(np.float32)).reshape(*blocks.shape[:-1], -1)


# ---- products --------------------------------------------------------------------------------------------------------


@inline
def raised_values(qs):
    """The grid's values + WEIGHT_BIAS of 64 bytes' low nibbles, of their high ones."""
    return _raised_value(qs & 15), _raised_value(qs >> 4)


@inline
def _levels(block):
    """i8x32 in -127..113"""
    return _value(_codes(block))


@inline
def _raised_of_even(block):
    low, high = _codes_of_even(block)
    return _raised_value(low), _raised_value(high)


# ---- quantising ------------------------------------------------------------------------------------------------------

_index = count_below(midpoints(VALUES))
nearest_level = step_function(VALUES.astype(np.float64))
_LOWEST, _HIGHEST = int(VALUES[0]), int(VALUES[-1])
_FARTHER = [1.05**k for k in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8)]
_TO_HIGHEST = constants([_HIGHEST * factor for factor in _FARTHER])
_TO_LOWEST = constants([_LOWEST * factor for factor in _FARTHER])
_store_codes = stores_codes(LAYOUT)


@inline
def _best_scale(x, w, inverse):
    """The best of the scales for the levels that x * inverse rounds to."""
    xl, ll = zero_f32x16(), zero_f32x16()
    for i in range(BLOCK):
        xi, wi = splat_f32x16(load_f32(x + 4 * i)), splat_f32x16(load_f32(w + 4 * i))
        level = nearest_level(inverse * xi)
        wl = wi * level
        xl, ll = fma(wl, xi, xl), fma(wl, level, ll)
    scale = where(ll > 0, xl / ll, 0)
    return lane(scale, best_lane(scale * xl * first_wins_ties()))


@inline
def fit_scale(x, w):
    """The best of all scales that are tried for 32 weights, not all 0."""
    values = load_f32x32(x)
    unit = np.float32(1.0) / signed_largest(values)
    to_highest, to_lowest = _best_scale(x, w, _TO_HIGHEST() * unit), _best_scale(x, w, _TO_LOWEST() * unit)
    return to_lowest if _error(values, w, to_lowest) < _error(values, w, to_highest) else to_highest


@inline
def indices(values, d):
    """The table's entries nearest to values / d."""
    return _index(values * inverse_of(d), np.float32(1.0))


@inline
def _error(values, w, d):
    """Sum of w * (d * level - x)^2."""
    rest = to_f32(_value(indices(values, d))) * d - values
    return sum_tree(load_f32x32(w) * rest * rest)


@kernel(QUANTIZE)
def _quantize(x, importance, n_blocks, out, scratch):
    variance, average = averages(x, importance, BLOCK * n_blocks)
    for b in range(n_blocks):
        row, block = x + 128 * b, out + BLOCK_BYTES * b
        values = load_f32x32(row)
        store_f16(block + D, np.float32(0.0))
        if abs(signed_largest(values)) > TINY:
            if importance != 0:
                write_importance(row, importance + 128 * b, BLOCK, variance, average, scratch)
            else:
                write_squares(row, BLOCK, scratch)
            store_f16(block + D, fit_scale(row, scratch))
        _store_codes(block, indices(values, load_f16(block + D)))


IQ4_NL = symmetric(
    "IQ4_NL",
    LAYOUT,
    unpack,
    levels=_levels,
    raised_of_even=_raised_of_even,
    offset=WEIGHT_BIAS,
    dots=biased_dots_of_quarters,
    panels=panel_format("IQ4_NL", LAYOUT, SIGNED_BYTES, 128, table=VALUES.astype(int) + 128),
    quantize=_quantize,
)
