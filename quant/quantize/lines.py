"""Lines s*q + m for the 8 sub-blocks of 32 of 256 weights, with scales and minima of 6 bits that make the least error.

Method: ggml's quantize_row_q4_K (ggml-quants.c) up to the rounding of scales and minima, where ggml takes the nearest
of each; here 15 neighbours compete with the errors they would cause.
"""

import numpy as np

from quant.quantize.search import (
    TINY,
    errors,
    everywhere,
    fit_scale_min,
    sum_squares,
    write_importance,
    write_magnitudes,
)
from quant.simd.exact import best_lane, clamp, constants, greatest, lane, least
from quant.simd.memory import load_f16, load_f32, load_f32x32, store_f16, store_f32
from quant.target.jit import inline

_BLOCK = 256
_SCALES, _MINIMA = 4 * _BLOCK, 4 * _BLOCK + 32  # scratch: the weights of errors f32[256] @0, then s f32[8], -m f32[8]

# The block's d and dmin are tried such that the largest scale and minimum become 63, as ggml's do, or a little less.
_LARGEST = tuple(np.float32(value) for value in (63, 61))

# Neighbours of the nearest pair: a larger scale goes with a larger minimum.
_SCALE_STEPS = constants([0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, 2])
_MINIMUM_STEPS = constants([0, 1, -1, 2, -2, 1, 2, 0, 3, -1, -1, -2, 0, -3, 1, 2])


@inline
def _fit_each(x, importance, average, n_max, scratch):
    """Scales and minima of the 8 sub-blocks, into scratch; returns the largest of each."""
    variance = np.float32(2.0 / _BLOCK) * sum_squares(x, _BLOCK)
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
        total = errors(everywhere, x + 128 * j, scratch + 128 * j, 32, sc * d, m * -dmin, 0, n_max)
        best = best_lane(-total)
        error += lane(total, best)
        scales, minima = scales | np.int64(lane(sc, best)) << 8 * j, minima | np.int64(lane(m, best)) << 8 * j
    return scales, minima, error


@inline
def fit_lines(x, importance, average, n_max, d_at, scratch):
    """Write d and dmin, two f16, to d_at; returns the 8 scales and minima as the bytes of two int64.

    A sub-block's line is d*scale * q - dmin*minimum, q in 0..n_max. importance: of its columns, or 0; average: their
    mean over the row. scratch: 4 * 256 + 64 bytes.
    """
    top_scale, top_minimum = _fit_each(x, importance, average, n_max, scratch)
    scales, minima, least_error = np.int64(0), np.int64(0), np.float32(np.inf)
    d, dmin = np.float32(0.0), np.float32(0.0)
    for i in range(len(_LARGEST)):
        store_f16(d_at, top_scale / _LARGEST[i])
        store_f16(d_at + 2, top_minimum / _LARGEST[i])
        d_i, dmin_i = load_f16(d_at), load_f16(d_at + 2)
        scales_i, minima_i, error = _round_lines(x, scratch, d_i, dmin_i, n_max)
        if error < least_error:
            scales, minima, least_error, d, dmin = scales_i, minima_i, error, d_i, dmin_i
    store_f16(d_at, d)
    store_f16(d_at + 2, dmin)
    return scales, minima
