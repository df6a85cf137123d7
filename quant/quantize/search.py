"""The least squared errors of a group of weights: 16 candidate scales at once, one a lane.

Every sum runs over the weights in order inside each lane, so results are the same on every machine. x and w are
addresses of float32: the weights of a group and how much an error in each counts.
Method: ggml's make_qx_quants and make_qkx2_quants (ggml-quants.c), which try the candidates one after the other; lines
are fitted twice, the second time to the levels that the first fit rounds to.
"""

import numpy as np

from quant.simd.core import fma_f32x16, load_f32, load_f32x16, mul_f32x16, splat_f32x16, store_f32x16, zero_f32x16
from quant.simd.exact import (
    abs_f32x16,
    add_f32x16,
    best_lane,
    constants,
    div_f32x16,
    lane,
    max_f32x16,
    min_f32x16,
    rint_f32x16,
    select_less,
    sqrt_f32x16,
    sub_f32x16,
    sum_tree,
)
from quant.target.jit import inline

TINY = 1e-10  # groups of weights below it are not searched: their scales vanish in 16 bits (2^-25 rounds to 0)

# The candidates: steps, in tenths, by which the largest weight lands beyond the last level; and for lines where level 0
# begins, as a part of the minimum, since beside a large outlier the other weights are best near one level.
_AROUND = constants([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, -9])
_OUTWARD = constants([0, -12, -9, -6, -4, -2, 2, 4, 6, 9, 0, 4, 0, 4, 0, -6])
_OF_MINIMUM = constants([1] * 10 + [0.75] * 2 + [0.4] * 2 + [0] * 2)
first_wins_ties = constants([1 + 2**-18] + [1] * 15)  # factors: float32 noise must not beat the first candidate


@inline
def sum_squares(x, n):
    """Sum of the squares of n weights, a multiple of 16."""
    total = zero_f32x16()
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        total = fma_f32x16(values, values, total)
    return sum_tree(total)


@inline
def mean(x, n):
    """The mean of n float32, a multiple of 16."""
    total = zero_f32x16()
    for i in range(0, n, 16):
        total = add_f32x16(total, load_f32x16(x + 4 * i))
    return sum_tree(total) / np.float32(n)


@inline
def write_importance(x, importance, n, variance, average, w):
    """w = importance * sqrt(variance + x^2), as ggml weights errors when it has an importance matrix.

    average: the importances' mean, to which they are related so that no product leaves float32's range; a millionth
    of it is added, so that a group of unimportant weights is still packed well.
    """
    factor = splat_f32x16(np.float32(1.0) / average if average > 0 else np.float32(0.0))
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        size = sqrt_f32x16(fma_f32x16(values, values, splat_f32x16(variance)))
        relative = fma_f32x16(load_f32x16(importance + 4 * i), factor, splat_f32x16(np.float32(1e-6)))
        store_f32x16(w + 4 * i, mul_f32x16(relative, size))


@inline
def write_squares(x, n, w):
    """w = x^2 / mean(x^2) + 1: large weights count more than small ones, though less so than by ggml's x^2.

    By x^2 alone a better search than ggml's ends with a worse plain error (1.4% for IQ4_NL on Student's t), by the
    sum with a better one of both kinds.
    """
    unit = splat_f32x16(np.float32(n) / sum_squares(x, n))
    for i in range(0, n, 16):
        values = load_f32x16(x + 4 * i)
        store_f32x16(w + 4 * i, fma_f32x16(mul_f32x16(values, unit), values, splat_f32x16(np.float32(1.0))))


@inline
def write_magnitudes(x, n, w):
    """w = |x| / rms(x) + 1, as ggml weights errors of K-quants without importances."""
    unit = splat_f32x16(np.float32(1.0) / np.sqrt(sum_squares(x, n) / np.float32(n)))
    for i in range(0, n, 16):
        values = abs_f32x16(load_f32x16(x + 4 * i))
        store_f32x16(w + 4 * i, fma_f32x16(values, unit, splat_f32x16(np.float32(1.0))))


@inline
def fit_scale(x, w, n, n_max, largest):
    """The scale s with the least error of s*q, q integers in -n_max..n_max-1; `largest` is of largest magnitude."""
    steps = fma_f32x16(_AROUND(), splat_f32x16(np.float32(0.1)), splat_f32x16(np.float32(n_max)))
    inverse = mul_f32x16(steps, splat_f32x16(np.float32(-1.0) / largest))
    low, high = splat_f32x16(np.float32(-n_max)), splat_f32x16(np.float32(n_max - 1))
    xl, ll = zero_f32x16(), zero_f32x16()
    for i in range(n):
        xi, wi = splat_f32x16(load_f32(x + 4 * i)), splat_f32x16(load_f32(w + 4 * i))
        l = min_f32x16(max_f32x16(rint_f32x16(mul_f32x16(inverse, xi)), low), high)
        wl = mul_f32x16(wi, l)
        xl, ll = fma_f32x16(wl, xi, xl), fma_f32x16(wl, l, ll)
    scale = select_less(zero_f32x16(), ll, div_f32x16(xl, ll), zero_f32x16())
    return lane(scale, best_lane(mul_f32x16(mul_f32x16(scale, xl), first_wins_ties())))


@inline
def fit_scale_min(x, w, n, n_max, low, high, at_zero):
    """The scale s > 0 and minimum m with the least error of s*q + m, q integers in 0..n_max.

    low, high: the extremes, low < high. at_zero: whether m may not be positive (formats that store -m unsigned).
    """
    one, top, offset = splat_f32x16(np.float32(1.0)), splat_f32x16(high), splat_f32x16(low)
    part = mul_f32x16(_OF_MINIMUM(), offset)
    offset = select_less(part, top, part, offset)
    steps = fma_f32x16(_OUTWARD(), splat_f32x16(np.float32(0.1)), splat_f32x16(np.float32(n_max)))
    inverse = div_f32x16(steps, sub_f32x16(top, offset))
    scale, minimum, _ = _fit_line(x, w, n, n_max, inverse, offset, at_zero)
    scale, minimum, gain = _fit_line(x, w, n, n_max, div_f32x16(one, scale), minimum, at_zero)
    best = best_lane(mul_f32x16(gain, first_wins_ties()))
    return lane(scale, best), lane(minimum, best)


@inline
def _fit_line(x, w, n, n_max, inverse, offset, at_zero):
    """The best s and m for the integers that (x - offset) * inverse rounds to, and by how much they lower the error.

    The error is sum(w * (s*q + m - x)^2), from sums over w, w*x, w*q, w*q^2 and w*x*q.
    """
    zero, top = zero_f32x16(), splat_f32x16(np.float32(n_max))
    sw, sx, sl, sll, sxl = zero, zero, zero, zero, zero
    for i in range(n):
        xi, wi = splat_f32x16(load_f32(x + 4 * i)), splat_f32x16(load_f32(w + 4 * i))
        l = min_f32x16(max_f32x16(rint_f32x16(mul_f32x16(sub_f32x16(xi, offset), inverse)), zero), top)
        wl = mul_f32x16(wi, l)
        sw, sx = add_f32x16(sw, wi), fma_f32x16(wi, xi, sx)
        sl, sll, sxl = add_f32x16(sl, wl), fma_f32x16(wl, l, sll), fma_f32x16(wl, xi, sxl)
    spread = sub_f32x16(mul_f32x16(sw, sll), mul_f32x16(sl, sl))
    s = div_f32x16(sub_f32x16(mul_f32x16(sw, sxl), mul_f32x16(sx, sl)), spread)
    m = div_f32x16(sub_f32x16(mul_f32x16(sll, sx), mul_f32x16(sl, sxl)), spread)
    # Where nearly all that counts is on one level, two unknowns are too many: the slope stays.
    flat = mul_f32x16(mul_f32x16(sw, sll), splat_f32x16(np.float32(1e-4)))
    given = div_f32x16(splat_f32x16(np.float32(1.0)), inverse)
    s = select_less(flat, spread, s, given)
    m = select_less(flat, spread, m, div_f32x16(sub_f32x16(sx, mul_f32x16(given, sl)), sw))
    if at_zero:
        s, m = select_less(zero, m, div_f32x16(sxl, sll), s), min_f32x16(m, zero)
    two = splat_f32x16(np.float32(2.0))
    of_s = sub_f32x16(sub_f32x16(mul_f32x16(two, sxl), mul_f32x16(s, sll)), mul_f32x16(mul_f32x16(two, m), sl))
    of_m = sub_f32x16(mul_f32x16(two, sx), mul_f32x16(m, sw))
    gain = fma_f32x16(s, of_s, mul_f32x16(m, of_m))
    return s, m, gain


@inline
def errors(x, w, n, scale, offset, low, high):
    """Sum of w * (scale*q + offset - x)^2 for each candidate, q the best integers in low..high."""
    inverse = select_less(
        zero_f32x16(), abs_f32x16(scale), div_f32x16(splat_f32x16(np.float32(1.0)), scale), zero_f32x16()
    )
    least, most, total = splat_f32x16(np.float32(low)), splat_f32x16(np.float32(high)), zero_f32x16()
    for i in range(n):
        xi, wi = splat_f32x16(load_f32(x + 4 * i)), splat_f32x16(load_f32(w + 4 * i))
        rest = sub_f32x16(xi, offset)
        q = min_f32x16(max_f32x16(rint_f32x16(mul_f32x16(rest, inverse)), least), most)
        error = sub_f32x16(rest, mul_f32x16(scale, q))
        total = fma_f32x16(mul_f32x16(wi, error), error, total)
    return total
