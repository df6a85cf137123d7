"""The least squared errors of a group of weights: 16 candidate scales at once, one a lane.

Every sum runs over the weights in order inside each lane, so results are the same on every machine. x and w are
addresses of float32: the weights of a group and how much an error in each counts. Where groups are short, 16 of them
take the lanes instead (sixteens.py); what both do says how it reads: `at` is everywhere or side_by_side.
Method: ggml's make_qx_quants and make_qkx2_quants (ggml-quants.c), which try the candidates one after the other; lines
are fitted twice, the second time to the levels that the first fit rounds to.
"""

import numpy as np

from quant.simd.exact import at_most, best_lane, clamp, constants, lane, rint, sqrt, sum_tree, where
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, store_f32x16
from quant.target.jit import inline

TINY = 1e-10  # groups of weights below it are not searched: their scales vanish in 16 bits (2^-25 rounds to 0)

# The candidates: where the largest weight lands, as a multiple of the last level, far beyond it as well, since a weight
# that counts may be a small one of its group; and for lines where level 0 begins, as a part of the minimum, since
# beside a large outlier the other weights are best near one level.
_LANDINGS = constants([1.08**k for k in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -8)])
_OUTWARD = constants([1, 0.92, 0.95, 0.97, 0.985, 1.015, 1.03, 1.06, 1.1, 1.17, 1, 1.04, 1, 1.04, 1, 1.2])
_OF_MINIMUM = constants([1] * 10 + [0.75] * 2 + [0.4] * 2 + [0] * 2)
_LEAST, _TEN_THOUSANDTH = np.float32(3e-4), np.float32(1e-4)
first_wins_ties = constants([1 + 2**-18] + [1] * 15)  # factors: float32 noise must not beat the first candidate


@inline
def everywhere(x, i):
    """Weight i of a group, in every lane."""
    return splat_f32x16(load_f32(x + 4 * i))


@inline
def side_by_side(x, i):
    """Weight i of each of 16 groups that lie side by side."""
    return load_f32x16(x + 64 * i)


@inline
def sum_squares(x, n):
    """Sum of the squares of n weights, a multiple of 16."""
    total = zero_f32x16()
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        total = fma(values, values, total)
    return sum_tree(total)


@inline
def mean(x, n):
    """The mean of n float32, a multiple of 16."""
    total = zero_f32x16()
    for i in range(0, n, 16):
        total += load_f32x16(x + 4 * i)
    return sum_tree(total) / np.float32(n)


@inline
def write_importance(x, importance, n, variance, average, w):
    """w = importance * sqrt(variance + x^2), as ggml weights errors when it has an importance matrix.

    average: the importances' mean, to which they are related so that no product leaves float32's range; 3e-4 of
    it (_LEAST) is added, so that a group of unimportant weights is still packed well.
    """
    factor = np.float32(1.0) / average if average > 0 else np.float32(0.0)
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        relative = fma(load_f32x16(importance + 4 * i), factor, _LEAST)
        store_f32x16(w + 4 * i, relative * sqrt(fma(values, values, variance)))


@inline
def write_squares(x, n, w):
    """w = x^2 / mean(x^2) + 1: large weights count more than small ones, though less so than by ggml's x^2.

    By x^2 alone a better search than ggml's ends with a worse plain error (1.4% for IQ4_NL on Student's t), by the
    sum with a better one of both kinds.
    """
    unit = np.float32(n) / sum_squares(x, n)
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        store_f32x16(w + 4 * i, fma(values * unit, values, 1))


@inline
def write_magnitudes(x, n, w):
    """w = |x| / rms(x) + 1, as ggml weights errors of K-quants without importances."""
    unit = np.float32(1.0) / np.sqrt(sum_squares(x, n) / np.float32(n))
    for i in range(0, n, 16):
        store_f32x16(w + 4 * i, fma(abs(load_f32x16(x + 4 * i)), unit, 1))


@inline
def fit_scale(x, w, n, n_max, largest):
    """The scale s with the least error of s*q, q integers in -n_max..n_max-1; `largest` is of largest magnitude."""
    inverse = _LANDINGS() * (np.float32(-n_max) / largest)
    scale, _, gain = refit_scale(everywhere, x, w, n, n_max, inverse)
    return lane(scale, best_lane(gain * first_wins_ties()))


@inline
def refit_scale(at, x, w, n, n_max, inverse):
    """The best scale for the integers in -n_max..n_max-1 that x * inverse rounds to.

    With it the sum of w*q^2, by which an error in the scale counts, and by how much it lowers the error.
    """
    xl, ll = zero_f32x16(), zero_f32x16()
    for i in range(n):
        xi = at(x, i)
        l = clamp(rint(inverse * xi), -n_max, n_max - 1)
        wl = at(w, i) * l
        xl, ll = fma(wl, xi, xl), fma(wl, l, ll)
    scale = where(ll > 0, xl / ll, 0)
    return scale, ll, scale * xl


@inline
def fit_scale_min(x, w, n, n_max, low, high, at_zero):
    """The scale s > 0 and minimum m with the least error of s*q + m, q integers in 0..n_max.

    low, high: the extremes, low < high. at_zero: whether m may not be positive (formats that store -m unsigned).
    """
    part = _OF_MINIMUM() * low
    offset = where(part < high, part, low)
    inverse = _OUTWARD() * np.float32(n_max) / (high - offset)
    scale, minimum, _ = refit_line(everywhere, x, w, n, n_max, inverse, offset, at_zero)
    scale, minimum, gain = refit_line(everywhere, x, w, n, n_max, 1 / scale, minimum, at_zero)
    best = best_lane(gain * first_wins_ties())
    return lane(scale, best), lane(minimum, best)


@inline
def refit_line(at, x, w, n, n_max, inverse, offset, at_zero):
    """The best s and m for the integers that (x - offset) * inverse rounds to, and by how much they lower the error.

    The error is sum(w * (s*q + m - x)^2), from sums over w, w*x, w*q, w*q^2 and w*x*q.
    """
    zero = zero_f32x16()
    sw, sx, sl, sll, sxl = zero, zero, zero, zero, zero
    for i in range(n):
        xi, wi = at(x, i), at(w, i)
        l = clamp(rint((xi - offset) * inverse), 0, n_max)
        wl = wi * l
        sw, sx = sw + wi, fma(wi, xi, sx)
        sl, sll, sxl = sl + wl, fma(wl, l, sll), fma(wl, xi, sxl)
    spread = sw * sll - sl * sl
    s = (sw * sxl - sx * sl) / spread
    m = (sll * sx - sl * sxl) / spread
    # Where nearly all that counts is on one level, two unknowns are too many: the slope stays.
    is_line = spread > sw * sll * _TEN_THOUSANDTH
    given = 1 / inverse
    s = where(is_line, s, given)
    m = where(is_line, m, (sx - given * sl) / sw)
    if at_zero:
        s, m = where(m > 0, sxl / sll, s), at_most(m, 0)
    gain = fma(s, 2 * sxl - s * sll - 2 * m * sl, m * (2 * sx - m * sw))
    return s, m, gain


@inline
def errors(at, x, w, n, scale, offset, low, high):
    """Sum of w * (scale*q + offset - x)^2 for each candidate, q the best integers in low..high."""
    inverse = where(abs(scale) > 0, 1 / scale, 0)
    total = zero_f32x16()
    for i in range(n):
        xi, wi = at(x, i), at(w, i)
        rest = xi - offset
        error = rest - scale * clamp(rint(rest * inverse), low, high)
        total = fma(wi * error, error, total)
    return total
