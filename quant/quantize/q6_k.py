"""Packing Q6_K: a scale for each 16 weights, then the 8-bit scales with the least error once the block's d is known.

Method: ggml's quantize_row_q6_K (ggml-quants.c) up to the rounding of the scales, where ggml takes the nearest.
"""

import numpy as np

from quant.block_format import PACK
from quant.quantize.search import TINY, errors, fit_scale, mean, sum_squares, write_importance, write_squares
from quant.simd.core import (
    either,
    halves_f32x32,
    load_f16,
    load_f32,
    load_f32x16,
    load_f32x32,
    mask,
    mul_f32x16,
    mul_f32x32,
    shift_left,
    shift_right,
    splat_f32x16,
    store_f32,
    store_i8x32,
    subtract_i8,
    zero_f32x16,
)
from quant.simd.exact import (
    add_f32x16,
    best_lane,
    constants,
    lane,
    max_f32x16,
    min_f32x16,
    round_between,
    signed_largest_f32x16,
    store_f16,
    store_u8,
    sub_f32x16,
)
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 256, 210
_SCALES = 4 * BLOCK  # scratch: the weights of errors f32[256] @0, the scales f32[16], then rounded ones of each attempt

# The block's d is tried such that the largest scale becomes -128, as ggml's does, or a little less.
_LARGEST = tuple(np.float32(value) for value in (-128, -127, -124))

_AROUND = constants([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, 8])


@inline
def _fit_scales(x, importance, average, scratch):
    """The scales of the 16 sub-blocks, into scratch; returns the one of the largest magnitude."""
    variance, top = sum_squares(x, BLOCK) / np.float32(BLOCK), np.float32(0.0)
    for j in range(16):
        sub, w = x + 64 * j, scratch + 64 * j
        scale = np.float32(0.0)
        largest = signed_largest_f32x16(load_f32x16(sub))
        if abs(largest) > TINY:
            if importance != 0:
                write_importance(sub, importance + 64 * j, 16, variance, average, w)
            else:
                write_squares(sub, 16, w)
            scale = fit_scale(sub, w, 16, 32, largest)
        store_f32(scratch + _SCALES + 4 * j, scale)
        if abs(scale) > abs(top):
            top = scale
    return top


@inline
def _round_scales(x, scratch, d, rounded):
    """For each sub-block the 8-bit scale with the least error near the fitted one, as float32; returns their error."""
    low, high = splat_f32x16(np.float32(-128.0)), splat_f32x16(np.float32(127.0))
    error = np.float32(0.0)
    for j in range(16):
        scale = load_f32(scratch + _SCALES + 4 * j)
        best = np.float32(0.0)
        if scale != 0:
            near = add_f32x16(splat_f32x16(np.rint(scale / d)), _AROUND())
            near = min_f32x16(max_f32x16(near, low), high)
            total = errors(x + 64 * j, scratch + 64 * j, 16, mul_f32x16(near, splat_f32x16(d)), zero_f32x16(), -32, 31)
            lane_ = best_lane(sub_f32x16(zero_f32x16(), total))
            best = lane(near, lane_)
            error += lane(total, lane_)
        store_f32(rounded + 4 * j, best)
    return error


@inline
def _choose_scales(x, top, scratch, block):
    """Write the d with the least error to the block; returns the address of its rounded scales."""
    chosen, least_error, d = scratch + _SCALES + 64, np.float32(np.inf), np.float32(0.0)
    for i in range(len(_LARGEST)):
        store_f16(block + 208, top / _LARGEST[i])
        candidate, rounded = load_f16(block + 208), scratch + _SCALES + 64 * (i + 1)
        error = _round_scales(x, scratch, candidate, rounded)
        if error < least_error:
            chosen, least_error, d = rounded, error, candidate
    store_f16(block + 208, d)
    return chosen


@inline
def _inverse(d, scale):
    return np.float32(1.0) / (d * scale) if d * scale != 0 else np.float32(0.0)


@inline
def _levels(x, d, scales, j):
    """Levels of weights 32j..32j+31, i8x32 in 0..63."""
    low, high = load_f32(scales + 8 * j), load_f32(scales + 8 * j + 4)
    scaled = mul_f32x32(load_f32x32(x + 128 * j), halves_f32x32(_inverse(d, low), _inverse(d, high)))
    return subtract_i8(round_between(scaled, np.float32(-32.0), np.float32(31.0)), -32)


@inline
def _store_levels(x, d, scales, half, block):
    """Write the ql and qh of one half of a block."""
    a, b = _levels(x, d, scales, 4 * half), _levels(x, d, scales, 4 * half + 1)
    c, e = _levels(x, d, scales, 4 * half + 2), _levels(x, d, scales, 4 * half + 3)
    store_i8x32(block + 64 * half, either(mask(a, 15), shift_left(mask(c, 15), 4)))
    store_i8x32(block + 64 * half + 32, either(mask(b, 15), shift_left(mask(e, 15), 4)))
    low = either(shift_right(a, 4), shift_left(shift_right(b, 4), 2))
    high = either(shift_left(shift_right(c, 4), 4), shift_left(shift_right(e, 4), 6))
    store_i8x32(block + 128 + 32 * half, either(low, high))


@kernel(PACK)
def _q6_k_pack(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BLOCK_BYTES * b
        top = _fit_scales(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, scratch)
        scales = _choose_scales(values, top, scratch, block)
        d = load_f16(block + 208)
        for j in range(16):
            store_u8(block + 192 + j, int(load_f32(scales + 4 * j)))
        _store_levels(values, d, scales, 0, block)
        _store_levels(values, d, scales, 1, block)


Q6_K = _q6_k_pack
