"""256 weights in 16 sub-blocks of 16, one a lane: lines and scales of few bits with the least error (Q2_K, Q3_K).

Candidates come one after the other, each for all sub-blocks, and each keeps the best that it has met: nothing goes over
lanes but the sums for what the block shares.
Method: ggml's quantize_row_q2_K_impl and quantize_row_q3_K_impl (ggml-quants.c) up to the candidates. What differs:
levels are fitted twice; the rounded scales of a sub-block are chosen by the error they cause, among neighbours; and the
block's d is fitted anew to the levels then.
"""

import numpy as np

from quant.quantize.levels import inverse_of
from quant.quantize.search import TINY, errors, refit_line, refit_scale, side_by_side, write_importance
from quant.simd.exact import (
    at_least,
    at_most,
    clamp,
    greatest,
    rint,
    round_between,
    signed_largest,
    sqrt,
    sum_tree,
    where,
)
from quant.simd.floats import as_f32, fma, halves_f32x32, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f16, load_f32, load_f32x32, store_f16, store_f32x16
from quant.simd.rows16 import transpose_strided
from quant.target.jit import inline

BLOCK, N = 256, 16
LAST_LINE, LAST_SCALE = 15, 32  # of the integer scales

# Scratch: the weights side by side, how much an error in each counts, the same before it is side by side, which in the
# end are what levels() reads.
W, INVERSES, MINIMA = 4 * BLOCK, 8 * BLOCK, 8 * BLOCK + 4 * N


def _floats(*values: float) -> tuple[np.float32, ...]:
    return tuple(np.float32(value) for value in values)


_MORE = np.float32(1 + 2**-18)  # float32 noise must not beat an earlier candidate


# ---- reading ---------------------------------------------------------------------------------------------------------


@inline
def _put_side_by_side(x, out):
    for i in range(4):
        for e, words in enumerate(transpose_strided(x + 16 * i, 4 * N)):
            store_f32x16(out + 256 * i + 64 * e, as_f32(words))


@inline
def prepare(x, importance, variance, average, by_squares, scratch):
    """Put the weights and how much errors in them count side by side, into scratch.

    With importances as search.write_importance has it; without them (0) as write_squares or write_magnitudes.
    """
    _put_side_by_side(x, scratch)
    if importance != 0:
        write_importance(x, importance, BLOCK, variance, average, scratch + 8 * BLOCK)
        _put_side_by_side(scratch + 8 * BLOCK, scratch + W)
        return
    total = zero_f32x16()
    for i in range(N):
        xi = side_by_side(scratch, i)
        total = fma(xi, xi, total)
    unit = where(total > np.float32(TINY * TINY), N / total, 0)
    root = sqrt(unit)
    for i in range(N):
        xi = side_by_side(scratch, i)
        store_f32x16(scratch + W + 64 * i, fma(xi * unit, xi, 1) if by_squares else fma(abs(xi), root, 1))


@inline
def _extremes(x):
    """The least and the greatest weight of each sub-block."""
    low = high = side_by_side(x, 0)
    for i in range(1, N):
        low, high = at_most(side_by_side(x, i), low), at_least(side_by_side(x, i), high)
    return low, high


# ---- a block's d -----------------------------------------------------------------------------------------------------

_LARGER = _floats(1, 0.97, 0.985, 1.015, 1.03, 1.05, 1.08, 1.12, 1.17, 1.25, 1.36)


@inline
def _store_shared(values, counts, top, low, high, d_at):
    """Write a d, an f16, such that integers in low..high times it are near to `values`.

    counts: how much errors in each of them count.
    top: the value of largest magnitude; it becomes the integer of largest magnitude, or a smaller one.
    """
    best, least_error = np.float32(0.0), np.float32(np.inf)
    last = np.float32(high if high > -low else low)
    for k in range(len(_LARGER)):
        store_f16(d_at, top / last * _LARGER[k])
        d = load_f16(d_at)
        rest = values - d * clamp(rint(values * inverse_of(d)), low, high)
        error = sum_tree(counts * rest * rest)
        if error < least_error:
            best, least_error = d, error
    store_f16(d_at, best)


# ---- lines: d*sc*q - dmin*m ------------------------------------------------------------------------------------------

# The candidates: levels by which the largest weight lands beyond the last one (search.py's are multiples of the last);
# where level 0 begins, as a part of the minimum.
_OUTWARD = _floats(0, -0.9, -0.6, -0.3, 0.3, 0.7, 0, 0.4, 0, 1.2, 2)
_OF_MINIMUM = _floats(1, 1, 1, 1, 1, 1, 0.7, 0.4, 0, 1, 0.7)

# Neighbours of the nearest pair: a larger scale goes with a larger minimum.
_SCALE_STEPS = _floats(0, 0, 0, 1, 1, 1, -1, -1, -1, 2)
_MINIMUM_STEPS = _floats(0, 1, -1, 0, 1, 2, 0, -1, 1, 1)


@inline
def _fit_each_line(scratch, n_max):
    """Scales and minima of the sub-blocks, into scratch, and the sum of what errors in a sub-block count."""
    w = scratch + W
    low, high = _extremes(scratch)
    low = at_most(low, 0)
    sw, sx = zero_f32x16(), zero_f32x16()
    for i in range(N):
        sw, sx = sw + side_by_side(w, i), fma(side_by_side(w, i), side_by_side(scratch, i), sx)
    scale, minimum = zero_f32x16(), at_most(sx / sw, 0)
    most = minimum * (2 * sx - minimum * sw)
    for k in range(len(_OUTWARD)):
        offset = low * _OF_MINIMUM[k]
        inverse = (np.float32(n_max) + _OUTWARD[k]) / (high - offset)
        s, m, _ = refit_line(side_by_side, scratch, w, N, n_max, inverse, offset, True)
        s, m, gain = refit_line(side_by_side, scratch, w, N, n_max, 1 / s, m, True)
        better = gain > most * _MORE
        scale, minimum, most = where(better, s, scale), where(better, m, minimum), where(better, gain, most)
    low_enough = at_least(high, -low) > np.float32(TINY)
    return where(low_enough, scale, 0), where(low_enough, -minimum, 0), sw


@inline
def _round_lines(scratch, scale, minimum, d, dmin, n_max):
    """For each sub-block the 4-bit scale and minimum with the least error near the fitted ones; and all their error."""
    near_scale, near_minimum = rint(scale * inverse_of(d)), rint(minimum * inverse_of(dmin))
    sc, m, least = zero_f32x16(), zero_f32x16(), splat_f32x16(np.float32(np.inf))
    for k in range(len(_SCALE_STEPS)):
        sc_k = clamp(near_scale + _SCALE_STEPS[k], 0, LAST_LINE)
        m_k = clamp(near_minimum + _MINIMUM_STEPS[k], 0, LAST_LINE)
        error = errors(side_by_side, scratch, scratch + W, N, sc_k * d, m_k * -dmin, 0, n_max)
        better = error < least
        sc, m, least = where(better, sc_k, sc), where(better, m_k, m), where(better, error, least)
    return sc, m, sum_tree(least)


@inline
def _refit_lines(scratch, sc, m, d, dmin, n_max):
    """The best d and dmin for the levels that these give."""
    scale, minimum, w, zero = sc * d, m * dmin, scratch + W, zero_f32x16()
    inverse = where(scale > 0, 1 / scale, 0)
    sw, sx, sl, sll, sxl = zero, zero, zero, zero, zero
    for i in range(N):
        xi, wi = side_by_side(scratch, i), side_by_side(w, i)
        l = clamp(rint((xi + minimum) * inverse), 0, n_max)
        wl = wi * l
        sw, sx = sw + wi, fma(wi, xi, sx)
        sl, sll, sxl = sl + wl, fma(wl, l, sll), fma(wl, xi, sxl)
    ss, sm, mm = sum_tree(sc * sc * sll), sum_tree(sc * m * sl), sum_tree(m * m * sw)
    xs, xm = sum_tree(sc * sxl), sum_tree(m * sx)
    spread = ss * mm - sm * sm
    if spread > np.float32(1e-4) * ss * mm:
        return (xs * mm - xm * sm) / spread, max((xs * sm - xm * ss) / spread, np.float32(0.0))
    return (xs + dmin * sm) / ss if ss > 0 else d, dmin


@inline
def fit_lines(scratch, n_max, d_at):
    """Write d and dmin, two f16, to d_at; returns scales and minima of the sub-blocks, integers in 0..LAST_LINE.

    A sub-block's line is d*scale * q - dmin*minimum, q in 0..n_max.
    """
    scale, minimum, counts = _fit_each_line(scratch, n_max)
    _store_shared(scale, counts, greatest(scale), 0, LAST_LINE, d_at)
    _store_shared(minimum, counts, greatest(minimum), 0, LAST_LINE, d_at + 2)
    d, dmin = load_f16(d_at), load_f16(d_at + 2)
    sc, m, error = _round_lines(scratch, scale, minimum, d, dmin, n_max)
    d_again, dmin_again = _refit_lines(scratch, sc, m, d, dmin, n_max)
    store_f16(d_at, d_again)
    store_f16(d_at + 2, dmin_again)
    sc_again, m_again, again = _round_lines(scratch, scale, minimum, load_f16(d_at), load_f16(d_at + 2), n_max)
    if again < error:
        return sc_again, m_again
    store_f16(d_at, d)
    store_f16(d_at + 2, dmin)
    return sc, m


# ---- scales: d*sc*q --------------------------------------------------------------------------------------------------

# The candidates: the level on which the weight of largest magnitude lands (search.py has multiples of the last one),
# near the lowest or the highest or beyond, since a weight that counts may be a small one of its sub-block.
_LANDINGS = _floats(-4, -4.4, -3.7, -5, 3, 3.4, -6, 4, -7.2, 4.8, -9, 6)
_NEAR = _floats(0, 1, -1)


@inline
def _fit_each_scale(scratch, n_max):
    """The scales of the sub-blocks and how much errors in them count."""
    low, high = _extremes(scratch)
    largest = where(high > -low, high, low)
    scale, most = zero_f32x16(), zero_f32x16()
    for k in range(len(_LANDINGS)):
        s, _, gain = refit_scale(side_by_side, scratch, scratch + W, N, n_max, _LANDINGS[k] / largest)
        better = gain > most * _MORE
        scale, most = where(better, s, scale), where(better, gain, most)
    scale, counts, _ = refit_scale(side_by_side, scratch, scratch + W, N, n_max, 1 / scale)
    return where(abs(largest) > np.float32(TINY), scale, 0), counts


@inline
def _round_scales(scratch, scale, d, n_max):
    """For each sub-block the 6-bit scale with the least error near the fitted one; and all their error."""
    near, sc, least = rint(scale * inverse_of(d)), zero_f32x16(), splat_f32x16(np.float32(np.inf))
    for k in range(len(_NEAR)):
        sc_k = clamp(near + _NEAR[k], -LAST_SCALE, LAST_SCALE - 1)
        error = errors(side_by_side, scratch, scratch + W, N, sc_k * d, zero_f32x16(), -n_max, n_max - 1)
        better = error < least
        sc, least = where(better, sc_k, sc), where(better, error, least)
    return sc, sum_tree(least)


@inline
def fit_scales(scratch, n_max, d_at):
    """Write d, an f16, to d_at; returns the sub-blocks' scales, integers in -LAST_SCALE..LAST_SCALE-1.

    A sub-block's weights are d*scale * q, q in -n_max..n_max-1.
    """
    scale, counts = _fit_each_scale(scratch, n_max)
    _store_shared(scale, counts, signed_largest(scale), -LAST_SCALE, LAST_SCALE - 1, d_at)
    d = load_f16(d_at)
    sc, error = _round_scales(scratch, scale, d, n_max)
    scaled = sc * d
    best, ll, _ = refit_scale(side_by_side, scratch, scratch + W, N, n_max, where(abs(scaled) > 0, 1 / scaled, 0))
    weight = sum_tree(sc * sc * ll)
    store_f16(d_at, sum_tree(sc * best * ll) / weight if weight > 0 else d)
    sc_again, again = _round_scales(scratch, scale, load_f16(d_at), n_max)
    if again < error:
        return sc_again
    store_f16(d_at, d)
    return sc


# ---- levels ----------------------------------------------------------------------------------------------------------


@inline
def store_lines(scale, minimum, scratch):
    """Keep what levels() reads: the sub-blocks' scales and minima, as numbers."""
    store_f32x16(scratch + INVERSES, where(abs(scale) > 0, 1 / scale, 0))
    store_f32x16(scratch + MINIMA, minimum)


@inline
def levels(x, scratch, j, low, high):
    """Levels of weights 32j..32j+31, i8x32 in low..high."""
    inverse, minimum = scratch + INVERSES + 8 * j, scratch + MINIMA + 8 * j
    scaled = load_f32x32(x + 128 * j) + halves_f32x32(load_f32(minimum), load_f32(minimum + 4))
    return round_between(scaled * halves_f32x32(load_f32(inverse), load_f32(inverse + 4)), low, high)
