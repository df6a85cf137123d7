"""Packing Q6_K: a scale for each 16 weights, then the 8-bit scales with the least error once the block's d is known.

Method: ggml's quantize_row_q6_K (ggml-quants.c) up to the rounding of the scales, where ggml takes the nearest.
"""

import numpy as np

from quant.block_format import PACK
from quant.quantize.search import TINY, errors, fit_scale, mean, sum_squares, write_importance, write_squares
from quant.simd.exact import best_lane, clamp, constants, lane, round_between, signed_largest
from quant.simd.floats import halves_f32x32, zero_f32x16
from quant.simd.memory import load_f16, load_f32, load_f32x16, load_f32x32, store_f16, store_f32, store_i8, store_i8x32
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
        largest = signed_largest(load_f32x16(sub))
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
    error = np.float32(0.0)
    for j in range(16):
        scale = load_f32(scratch + _SCALES + 4 * j)
        best = np.float32(0.0)
        if scale != 0:
            near = clamp(np.rint(scale / d) + _AROUND(), -128, 127)
            total = errors(x + 64 * j, scratch + 64 * j, 16, near * d, zero_f32x16(), -32, 31)
            lane_ = best_lane(-total)
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
    scaled = load_f32x32(x + 128 * j) * halves_f32x32(_inverse(d, low), _inverse(d, high))
    return round_between(scaled, -32, 31) + 32


@inline
def _store_levels(x, d, scales, half, block):
    """Write the ql and qh of one half of a block."""
    a, b = _levels(x, d, scales, 4 * half), _levels(x, d, scales, 4 * half + 1)
    c, e = _levels(x, d, scales, 4 * half + 2), _levels(x, d, scales, 4 * half + 3)
    store_i8x32(block + 64 * half, a & 15 | c << 4)
    store_i8x32(block + 64 * half + 32, b & 15 | e << 4)
    store_i8x32(block + 128 + 32 * half, a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6)


@kernel(PACK)
def _q6_k_pack(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BLOCK_BYTES * b
        top = _fit_scales(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, scratch)
        scales = _choose_scales(values, top, scratch, block)
        d = load_f16(block + 208)
        for j in range(16):
            store_i8(block + 192 + j, int(load_f32(scales + 4 * j)))
        _store_levels(values, d, scales, 0, block)
        _store_levels(values, d, scales, 1, block)


Q6_K = _q6_k_pack
