"""Packing Q4_K and Q5_K: a line s*q + m for each 32 weights, then the 6-bit scales and minima with the least error.

Method: ggml's quantize_row_q4_K (ggml-quants.c) up to the rounding of scales and minima, where ggml takes the nearest
of each; here 15 neighbours compete with the errors they would cause.
"""

import numpy as np

from quant.block_format import PACK
from quant.formats.q4_k import byte
from quant.quantize.search import TINY, errors, fit_scale_min, mean, sum_squares, write_importance, write_magnitudes
from quant.simd.exact import best_lane, clamp, constants, greatest, lane, least, round_between
from quant.simd.ints import zero_i8x32
from quant.simd.memory import load_f16, load_f32, load_f32x32, store_f16, store_f32, store_i8x32, store_i32
from quant.target.jit import inline, kernel

BLOCK = 256
_SCALES, _MINIMA = 4 * BLOCK, 4 * BLOCK + 32  # scratch: the weights of errors f32[256] @0, then s f32[8], -m f32[8]

# The block's d and dmin are tried such that the largest scale and minimum become 63, as ggml's do, or a little less.
_LARGEST = tuple(np.float32(value) for value in (63, 61))

# Neighbours of the nearest pair: a larger scale goes with a larger minimum.
_SCALE_STEPS = constants([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, 2])
_MINIMUM_STEPS = constants([0, 1, -1, 2, -2, 1, 2, 0, 3, -1, -1, -2, 0, -3, 1, 2])


@inline
def _fit_lines(x, importance, average, n_max, scratch):
    """Scales and minima of the 8 sub-blocks, into scratch; returns the largest of each."""
    variance = np.float32(2.0 / BLOCK) * sum_squares(x, BLOCK)
    top_scale, top_minimum = np.float32(0.0), np.float32(0.0)
    for j in range(8):
        sub, w = x + 128 * j, scratch + 128 * j
        values = load_f32x32(sub)
        low, high = least(values), greatest(values)
        scale, minimum = np.float32(0.0), np.float32(0.0)
        if max(high, -low) > TINY:
            if importance != 0:
                write_importance(sub, importance + 128 * j, 32, variance, average, w)
            else:
                write_magnitudes(sub, 32, w)
            minimum = min(low, minimum)
            if high > minimum:
                scale, minimum = fit_scale_min(sub, w, 32, n_max, minimum, high, True)
        store_f32(scratch + _SCALES + 4 * j, scale)
        store_f32(scratch + _MINIMA + 4 * j, -minimum)
        top_scale, top_minimum = max(top_scale, scale), max(top_minimum, -minimum)
    return top_scale, top_minimum


@inline
def _round_lines(x, scratch, d, dmin, n_max):
    """For each sub-block the 6-bit scale and minimum with the least error near the fitted ones.

    Returns them as the bytes of two int64, and their error.
    """
    scales, minima, error = np.int64(0), np.int64(0), np.float32(0.0)
    for j in range(8):
        scale, minimum = load_f32(scratch + _SCALES + 4 * j), load_f32(scratch + _MINIMA + 4 * j)
        if scale == 0 and minimum == 0:
            continue
        near_scale = np.rint(scale / d) if d > 0 else np.float32(0.0)
        near_minimum = np.rint(minimum / dmin) if dmin > 0 else np.float32(0.0)
        sc = clamp(near_scale + _SCALE_STEPS(), 0, 63)
        m = clamp(near_minimum + _MINIMUM_STEPS(), 0, 63)
        total = errors(x + 128 * j, scratch + 128 * j, 32, sc * d, m * -dmin, 0, n_max)
        best = best_lane(-total)
        error += lane(total, best)
        scales, minima = scales | np.int64(lane(sc, best)) << 8 * j, minima | np.int64(lane(m, best)) << 8 * j
    return scales, minima, error


@inline
def _pack_header(x, importance, average, n_max, block, scratch):
    """Write d, dmin and the scales of a block; returns the scales and the minima as the bytes of two int64."""
    top_scale, top_minimum = _fit_lines(x, importance, average, n_max, scratch)
    scales, minima, least_error = np.int64(0), np.int64(0), np.float32(np.inf)
    d, dmin = np.float32(0.0), np.float32(0.0)
    for i in range(len(_LARGEST)):
        store_f16(block, top_scale / _LARGEST[i])
        store_f16(block + 2, top_minimum / _LARGEST[i])
        d_i, dmin_i = load_f16(block), load_f16(block + 2)
        scales_i, minima_i, error = _round_lines(x, scratch, d_i, dmin_i, n_max)
        if error < least_error:
            scales, minima, least_error, d, dmin = scales_i, minima_i, error, d_i, dmin_i
    store_f16(block, d)
    store_f16(block + 2, dmin)
    store_i32(block + 4, (scales & 0x3F3F3F3F) | (scales >> 36 & 0x03030303) << 6)
    store_i32(block + 8, (minima & 0x3F3F3F3F) | (minima >> 36 & 0x03030303) << 6)
    store_i32(block + 12, (scales >> 32 & 0x0F0F0F0F) | (minima >> 32 & 0x0F0F0F0F) << 4)
    return scales, minima


@inline
def _levels(x, block, scales, minima, j, n_max):
    """Levels of sub-block j, i8x32 in 0..n_max."""
    scale, offset = load_f16(block) * byte(scales, j), load_f16(block + 2) * byte(minima, j)
    inverse = np.float32(1.0) / scale if scale != 0 else np.float32(0.0)
    return round_between((load_f32x32(x + 128 * j) + offset) * inverse, 0, n_max)


@kernel(PACK)
def _q4_k_pack(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + 144 * b
        columns = importance + 4 * BLOCK * b if importance != 0 else 0
        scales, minima = _pack_header(values, columns, average, 15, block, scratch)
        for c in range(4):
            low = _levels(values, block, scales, minima, 2 * c, 15)
            high = _levels(values, block, scales, minima, 2 * c + 1, 15)
            store_i8x32(block + 16 + 32 * c, low | high << 4)


@kernel(PACK)
def _q5_k_pack(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + 176 * b
        columns = importance + 4 * BLOCK * b if importance != 0 else 0
        scales, minima = _pack_header(values, columns, average, 31, block, scratch)
        fifth = zero_i8x32()
        for c in range(4):
            low = _levels(values, block, scales, minima, 2 * c, 31)
            high = _levels(values, block, scales, minima, 2 * c + 1, 31)
            store_i8x32(block + 48 + 32 * c, low & 15 | high << 4)
            fifth |= (low >> 4) << 2 * c | (high >> 4) << 2 * c + 1
        store_i8x32(block + 16, fifth)


Q4_K, Q5_K = _q4_k_pack, _q5_k_pack
