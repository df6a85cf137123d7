"""Packing Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1: blocks of 32 whose scale follows from the extremes, bit-equal to ggml's.

With importances the scale of the 4- and 5-bit types is searched for instead (search.py). Every product and sum is
rounded on its own, as in ggml's portable C.
Source: ggml src/ggml-quants.c, quantize_row_q4_0_ref and its siblings.
"""

import numpy as np

from quant.block_format import PACK
from quant.quantize.search import TINY, fit_scale, fit_scale_min, mean, sum_squares, write_importance
from quant.simd.exact import (
    clamp_levels,
    gather_bits,
    greatest,
    join_nibbles,
    least,
    round_away_to_i8,
    signed_largest,
    truncate_to_i8,
)
from quant.simd.memory import load_f16, load_f32x32, store_f16, store_i8x16, store_i8x32, store_i32
from quant.target.jit import inline, kernel

_BLOCK = 32


@inline
def _inverse(d):
    return np.float32(1.0) / d if d != 0 else np.float32(0.0)


@inline
def _levels(values, inverse, offset, n_levels):
    """values * inverse + offset, towards zero, in 0..n_levels-1: i8x32."""
    return clamp_levels(truncate_to_i8(values * inverse + np.float32(offset)), n_levels - 1)


@inline
def _of_row(x, importance, n):
    """The mean square of a row and its importances' mean; without importances both 0."""
    if importance == 0:
        return np.float32(0.0), np.float32(0.0)
    return sum_squares(x, n) / np.float32(n), mean(importance, n)


@inline
def _symmetric(x, importance, b, of_row, n_levels, out, scratch):
    """Levels of block b of a row of Q4_0 or Q5_0; writes its scale."""
    x += 128 * b
    values = load_f32x32(x)
    largest = signed_largest(values)
    d = largest / np.float32(-(n_levels // 2))
    if importance != 0 and abs(largest) > TINY:
        write_importance(x, importance + 128 * b, _BLOCK, of_row[0], of_row[1], scratch)
        store_f16(out, fit_scale(x, scratch, _BLOCK, n_levels // 2, largest))
        d = load_f16(out)
    store_f16(out, d)
    return _levels(values, _inverse(d), n_levels // 2 + 0.5, n_levels)


@inline
def _asymmetric(x, importance, b, of_row, n_levels, out, scratch):
    """Levels of block b of a row of Q4_1 or Q5_1; writes its scale and minimum."""
    x += 128 * b
    values = load_f32x32(x)
    low = least(values)
    d = (greatest(values) - low) / np.float32(n_levels - 1)
    if importance != 0 and d > TINY:
        write_importance(x, importance + 128 * b, _BLOCK, of_row[0], of_row[1], scratch)
        d, low = fit_scale_min(x, scratch, _BLOCK, n_levels - 1, low, greatest(values), False)
    store_f16(out, d)
    store_f16(out + 2, low)
    return _levels(values - low, _inverse(d), 0.5, n_levels)


@kernel(PACK)
def _q8_0_pack(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = load_f32x32(x + 128 * b), out + 34 * b
        d = greatest(abs(values)) / np.float32(127.0)
        store_f16(block, d)
        store_i8x32(block + 2, round_away_to_i8(values * _inverse(d)))


@kernel(PACK)
def _q4_0_pack(x, importance, n_blocks, out, scratch):
    of_row = _of_row(x, importance, _BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + 18 * b
        q = _symmetric(x, importance, b, of_row, 16, block, scratch)
        store_i8x16(block + 2, join_nibbles(q))


@kernel(PACK)
def _q5_0_pack(x, importance, n_blocks, out, scratch):
    of_row = _of_row(x, importance, _BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + 22 * b
        q = _symmetric(x, importance, b, of_row, 32, block, scratch)
        store_i32(block + 2, gather_bits(q, 4))
        store_i8x16(block + 6, join_nibbles(q & 15))


@kernel(PACK)
def _q4_1_pack(x, importance, n_blocks, out, scratch):
    of_row = _of_row(x, importance, _BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + 20 * b
        q = _asymmetric(x, importance, b, of_row, 16, block, scratch)
        store_i8x16(block + 4, join_nibbles(q))


@kernel(PACK)
def _q5_1_pack(x, importance, n_blocks, out, scratch):
    of_row = _of_row(x, importance, _BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + 24 * b
        q = _asymmetric(x, importance, b, of_row, 32, block, scratch)
        store_i32(block + 4, gather_bits(q, 4))
        store_i8x16(block + 8, join_nibbles(q & 15))


Q8_0, Q4_0, Q4_1 = _q8_0_pack, _q4_0_pack, _q4_1_pack
Q5_0, Q5_1 = _q5_0_pack, _q5_1_pack
