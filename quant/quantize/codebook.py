"""256 weights as entries of a codebook: sub-blocks with 8 or 16 scales to choose from, groups of 4 or 8 to an entry.

A group is s * entry; where entries are not signed, the signs are kept elsewhere. The error that entry i makes is, up to
what no choice changes,

    s * (s * a_i + b_i),   a_i = sum of w * entry^2,   b_i = -2 * sum of w * x * entry   (|x| where they are not signed)

so a_i and b_i are computed once for every entry, 16 entries at a time; after that a scale costs a multiplication and a
minimum an entry. All entries compete, so the choice is the best. ggml (iq2_find_best_neighbour and its callers in
ggml-quants.c) rounds each weight for itself and compares the entries near that, whose coordinates it takes for 1, 3, 5;
chooses signs first where their number must be even; and rounds a sub-block's scale after its entries are chosen, where
here four scales compete, each with its own best entries, and d is fitted to the outcome.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import types

from quant.quantize.search import TINY, everywhere, first_wins_ties, sum_squares, write_importance, write_squares
from quant.simd.core import define
from quant.simd.exact import (
    at_least,
    at_most,
    best_lane,
    clamp,
    constants,
    greatest,
    lane,
    least_of_four,
    rint,
    sum_tree,
    where,
)
from quant.simd.floats import fma, splat_f32x16, zero_f32x16
from quant.simd.memory import (
    emit_table,
    load_f16,
    load_f32,
    load_f32x16,
    load_i32,
    load_u8,
    store_f16,
    store_f32,
    store_f32x16,
    store_i8,
    store_i32,
)
from quant.target.jit import inline

BLOCK = 256
# Scratch: how much errors count, that times |x|, and what is found: entries i32, signs (a byte for 8 weights), codes of
# scales (a byte each), d f16, fitted scales f32 and how much errors in them count; then a and b of all entries, for the
# groups of a sub-block.
W, WX, ENTRIES, SIGNS, CODES, D, SCALES, COUNTS, ERRORS = 0, 1024, 2048, 2304, 2336, 2352, 2368, 2432, 4096
SCRATCH_BYTES = ERRORS + 128 * 1024

GIVEN_BACK = np.float32(0.5)  # weights keep their norm; measured: docs/lab-notes.md
_LOWEST_OF_4 = 4 / 62  # the lowest coordinate of IQ3_XXS as a part of the highest

# Where the largest weight lands, as a part of the largest coordinate, first where all weights get the lowest one, since
# every codebook has that entry; farther out with signed coordinates, of which there are three; the unit of scales, as a
# part of what makes the largest one the last.
_LANDINGS = constants([0.01] + [0.78 * 1.065**i for i in range(15)])
_SIGNED_LANDINGS = constants([0.9 * 1.08**i for i in range(16)])
_LARGER = constants([1, 0.97, 1.03, 1.06, 1.1, 1.15, 1.2, 1.26, 1.32, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5])
_CODED = constants([1, 3, 5, 7] * 4)


def entries_of(grid: Callable[[], np.ndarray]):
    """An intrinsic int64(): the address of a grid (entries, coordinates) as float32, by 16 entries, by coordinate.

    The grid is asked for when a kernel is compiled.
    """

    def arranged() -> np.ndarray:
        entries = grid().astype(np.float32)
        return entries.reshape(-1, 16, entries.shape[1]).transpose(0, 2, 1)

    return define(types.int64, (), lambda builder: emit_table(builder, arranged()))


class Book(NamedTuple):
    """A codebook, and how a block uses it.

    Attributes:
        entries: their address (entries_of).
        n_entries, n_coordinates: of a codebook.
        n_books: codebooks behind each other, of which a sub-block uses one.
        highest: the largest coordinate.
        is_signed: whether coordinates have signs.
        even_signs: where they have none, whether the number of negative signs of 8 weights must be even.
        sub: weights of a sub-block.
        n_codes: scales that a sub-block may have: d * step times 1, 3, 5 and so on.
        step: see there.
    """

    entries: int
    n_entries: int
    n_coordinates: int
    n_books: int
    highest: float
    is_signed: bool
    even_signs: bool
    sub: int
    n_codes: int
    step: float


@inline
def _coordinate(entries, n_coordinates, entry, i):
    return load_f32(entries + 64 * (n_coordinates * (entry // 16) + i) + 4 * (entry % 16))


# ---- a group ---------------------------------------------------------------------------------------------------------


@inline
def _write_errors(entries, n_entries, n_coordinates, w, wx, is_odd, out):
    """a and b of all entries; is_odd: one sign must turn, that which costs least."""
    for i in range(0, n_entries, 16):
        a, b, least = zero_f32x16(), zero_f32x16(), splat_f32x16(np.float32(np.inf))
        for c in range(n_coordinates):
            values = load_f32x16(entries + 4 * n_coordinates * i + 64 * c)
            product = values * everywhere(wx, c)
            a, b, least = fma(values * everywhere(w, c), values, a), b + product, at_most(product, least)
        if is_odd:
            b -= 2 * least
        store_f32x16(out + 8 * i, a)
        store_f32x16(out + 8 * i + 64, b * -2)


@inline
def _least_errors(errors, n_entries, scales):
    """For each of the 4 scales, which are in all quarters of the lanes, the least a*s + b."""
    s0, s1 = splat_f32x16(lane(scales, 0)), splat_f32x16(lane(scales, 1))
    s2, s3 = splat_f32x16(lane(scales, 2)), splat_f32x16(lane(scales, 3))
    m0 = m1 = m2 = m3 = splat_f32x16(np.float32(np.inf))
    for i in range(0, n_entries, 16):
        a, b = load_f32x16(errors + 8 * i), load_f32x16(errors + 8 * i + 64)
        m0, m1 = at_most(fma(a, s0, b), m0), at_most(fma(a, s1, b), m1)
        m2, m3 = at_most(fma(a, s2, b), m2), at_most(fma(a, s3, b), m3)
    return least_of_four(m0, m1, m2, m3)


@inline
def _best_entry(errors, n_entries, scale):
    """The number of the entry with the least error."""
    best, first = splat_f32x16(np.float32(np.inf)), zero_f32x16()
    for i in range(0, n_entries, 16):
        error = fma(load_f32x16(errors + 8 * i), scale, load_f32x16(errors + 8 * i + 64))
        better = error < best
        best, first = where(better, error, best), where(better, np.float32(i), first)
    found = best_lane(-best)
    return int(lane(first, found)) + found


# ---- a block ---------------------------------------------------------------------------------------------------------


@inline
def _write_signs(x, scratch):
    """A byte for 8 weights, bit i set where weight i is negative; |x| times what errors count."""
    for g in range(BLOCK // 8):
        signs = 0
        for i in range(8):
            value = load_f32(x + 32 * g + 4 * i)
            signs |= (1 if value < 0 else 0) << i
            store_f32(scratch + WX + 32 * g + 4 * i, abs(value) * load_f32(scratch + W + 32 * g + 4 * i))
        store_i8(scratch + SIGNS + g, signs)


@inline
def _is_odd(signs):
    signs ^= signs >> 4
    signs ^= signs >> 2
    return (signs ^ signs >> 1) & 1


@inline
def _even_signs(x, sub, lowest, scratch):
    """Turn one sign of 8 weights where they are odd, that which costs least if its weight gets the lowest coordinate.

    lowest: that coordinate, as a part of the highest.
    """
    for g in range(BLOCK // 8):
        signs = load_u8(scratch + SIGNS + g)
        if _is_odd(signs):
            scale = _largest(x + 4 * (8 * g // sub * sub), sub) * lowest
            turned, least = 0, np.float32(np.inf)
            for i in range(8):
                value = abs(load_f32(x + 32 * g + 4 * i)) + scale
                cost = load_f32(scratch + W + 32 * g + 4 * i) * value * value
                turned, least = (i, cost) if cost < least else (turned, least)
            at = scratch + WX + 32 * g + 4 * turned
            store_f32(at, -load_f32(at))
            store_i8(scratch + SIGNS + g, signs ^ 1 << turned)


@inline
def _largest(x, n):
    """The greatest magnitude of n weights, a multiple of 16."""
    found = abs(load_f32x16(x))
    for i in range(16, n, 16):
        found = at_least(abs(load_f32x16(x + 4 * i)), found)
    return greatest(found)


@inline
def _fit_scales(x, book, nearest, scratch):
    """A good scale for each sub-block, and how much an error in it counts; returns the greatest scale.

    Of 16 scales that with the least error if every weight had the nearest coordinate, whatever the entries.
    """
    top = np.float32(0.0)
    for j in range(BLOCK // book.sub):
        of_sub, w = x + 4 * book.sub * j, scratch + W + 4 * book.sub * j
        landings = _SIGNED_LANDINGS() if book.is_signed else _LANDINGS()
        inverse = landings * (np.float32(book.highest) / _largest(of_sub, book.sub))
        xl, ll = zero_f32x16(), zero_f32x16()
        for i in range(book.sub):
            xi = everywhere(of_sub, i) if book.is_signed else abs(everywhere(of_sub, i))
            coordinate = nearest(xi * inverse)
            wl = everywhere(w, i) * coordinate
            xl, ll = fma(wl, xi, xl), fma(wl, coordinate, ll)
        scales = where(ll > 0, xl / ll, 0)
        best = best_lane(scales * xl * first_wins_ties())
        scale = lane(scales, best)
        store_f32(scratch + SCALES + 4 * j, scale)
        store_f32(scratch + COUNTS + 4 * j, lane(ll, best))
        top = max(top, scale)
    return top


@inline
def _choose_unit(top, book, scratch):
    """What, times 1, 3, 5 and so on, is nearest to the fitted scales."""
    unit = _LARGER() * (top / np.float32(2 * book.n_codes - 1))
    inverse, error = 1 / unit, zero_f32x16()
    for j in range(BLOCK // book.sub):
        scale = everywhere(scratch + SCALES, j)
        k = clamp(rint((scale * inverse - 1) * np.float32(0.5)), 0, book.n_codes - 1)
        rest = scale - unit * (2 * k + 1)
        error += everywhere(scratch + COUNTS, j) * rest * rest
    return lane(unit, best_lane(-error))


@inline
def _measure_entries(j, book, scratch):
    """Write the errors of all entries for the groups of sub-block j."""
    n_entries = book.n_books * book.n_entries
    for g in range(book.sub // book.n_coordinates):
        first = book.sub * j + book.n_coordinates * g
        w, out = scratch + W + 4 * first, scratch + ERRORS + 8 * n_entries * g
        if book.even_signs and book.n_coordinates == 8 and _is_odd(load_u8(scratch + SIGNS + first // 8)):
            _write_errors(book.entries, n_entries, book.n_coordinates, w, w + WX - W, True, out)
        else:  # apart: without the least of the coordinates' costs it is faster
            _write_errors(book.entries, n_entries, book.n_coordinates, w, w + WX - W, False, out)


@inline
def _best_code(j, unit, book, scratch):
    """Sub-block j's codebook and the code of its scale: of four around the fitted scale the best one."""
    fitted = load_f32(scratch + SCALES + 4 * j) / unit
    first = min(max(int(fitted * np.float32(0.5) + np.float32(0.5)) - 2, 0), book.n_codes - 4)
    scales, chosen, code, most = (_CODED() + 2 * first) * unit, 0, 0, np.float32(-np.inf)
    for b in range(book.n_books):
        total = zero_f32x16()
        for g in range(book.sub // book.n_coordinates):
            errors = scratch + ERRORS + 8 * book.n_entries * (book.n_books * g + b)
            total += _least_errors(errors, book.n_entries, scales)
        gain = -(total * scales)
        best = best_lane(gain)
        if lane(gain, best) > most:
            chosen, code, most = b, first + best, lane(gain, best)
    return chosen, code


@inline
def _assign(x, unit, book, scratch):
    """Write the scales' codes and the entries with the least error; returns a unit for them.

    That with the least error makes weights smaller by the part of their square that is lost, which brings a network's
    logits nearer to each other: GIVEN_BACK of it is given back.
    """
    squares, products, groups = np.float32(0.0), np.float32(0.0), book.sub // book.n_coordinates
    for j in range(BLOCK // book.sub):
        _measure_entries(j, book, scratch)
        b, code = _best_code(j, unit, book, scratch)
        store_i8(scratch + CODES + j, code)
        coded = np.float32(2 * code + 1)
        for g in range(groups):
            errors = scratch + ERRORS + 8 * book.n_entries * (book.n_books * g + b)
            entry = _best_entry(errors, book.n_entries, coded * unit)
            store_i32(scratch + ENTRIES + 4 * (groups * j + g), book.n_entries * b + entry)
            a = errors + 128 * (entry // 16) + 4 * (entry % 16)
            squares += coded * coded * load_f32(a)
            products += coded * load_f32(a + 64)
    if not squares > 0:
        return unit
    total = zero_f32x16()
    for i in range(0, 4 * BLOCK, 64):
        total = fma(load_f32x16(scratch + W + i) * load_f32x16(x + i), load_f32x16(x + i), total)
    best = np.float32(-0.5) * products / squares
    lost = max(np.float32(1.0) - best * best * squares / sum_tree(total), np.float32(0.0))
    return best * (1 + GIVEN_BACK * lost)


@inline
def _turn_signs(book, scratch):
    """Turn the sign that costs least with the entries that have been chosen, where 8 weights have odd signs."""
    for g in range(BLOCK // 8):
        signs = load_u8(scratch + SIGNS + g)
        if _is_odd(signs):
            entry = load_i32(scratch + ENTRIES + 4 * g)
            turned, least = 0, np.float32(np.inf)
            for i in range(8):
                cost = _coordinate(book.entries, 8, entry, i) * load_f32(scratch + WX + 32 * g + 4 * i)
                turned, least = (i, cost) if cost < least else (turned, least)
            store_i8(scratch + SIGNS + g, signs ^ 1 << turned)


@inline
def _weigh(x, importance, average, variances, mean_square, book, scratch):
    """Write how much errors count, that times the weights, and their signs."""
    if importance != 0:
        write_importance(x, importance, BLOCK, mean_square * np.float32(variances), average, scratch + W)
    else:
        write_squares(x, BLOCK, scratch + W)
    if book.is_signed:
        for i in range(0, 4 * BLOCK, 64):
            store_f32x16(scratch + WX + i, load_f32x16(x + i) * load_f32x16(scratch + W + i))
        return
    _write_signs(x, scratch)
    if book.even_signs and book.n_coordinates == 4:
        _even_signs(x, book.sub, np.float32(_LOWEST_OF_4), scratch)


@inline
def fit(x, importance, average, variances, book, nearest, scratch):
    """Write d, entries, signs and codes to scratch.

    A weight is d * step * (2*code + 1) * coordinate, and its sign.

    Args:
        importance, average: of the columns, or 0; their mean over the row.
        variances: by how many times the mean square the importance of a weight is raised (write_importance).
        nearest: inline (16 magnitudes, or weights) -> the coordinates nearest to them.
    """
    step, mean_square = np.float32(book.step), sum_squares(x, BLOCK) / np.float32(BLOCK)
    store_f16(scratch + D, np.float32(0.0))
    if mean_square > np.float32(TINY * TINY):
        _weigh(x, importance, average, variances, mean_square, book, scratch)
        store_f16(scratch + D, _choose_unit(_fit_scales(x, book, nearest, scratch), book, scratch) / step)
    if load_f16(scratch + D) == 0:
        for i in range(0, SCALES - ENTRIES, 64):
            store_f32x16(scratch + ENTRIES + i, zero_f32x16())
        return
    store_f16(scratch + D, _assign(x, load_f16(scratch + D) * step, book, scratch) / step)
    if book.even_signs and book.n_coordinates == 8:
        _turn_signs(book, scratch)
