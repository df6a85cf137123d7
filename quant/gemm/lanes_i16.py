"""Products with 32 vectors side by side in 16-bit integers: those of lanes.py, twice as many at a time.

Vectors are rounded so that a product of two is below 2^31 in magnitude (rounding_i16.py): sums in int32 are exact.
vpdpwssd multiplies pairs of columns, as many at a time as vdpbf16ps does, which fewer CPUs have and some run at half
the rate.

Vectors side by side ("lanes") are rows of 32 pairs of int16, a row for two columns. Vectors one after the other
("rows") are rows of int16, whose columns behind the last one are zero.
"""

from collections.abc import Callable

from numba import types
from numba.core import cgutils

from quant.gemm.lanes import ROW
from quant.simd.core import F32, I32, I64, constant, define, f32x16, i8x64, i32x16, load, shuffle, splat, store
from quant.simd.dots import emit_dot_i16
from quant.simd.floats import emit_fma
from quant.simd.memory import emit_prefetch
from quant.simd.register_tile import register_tile
from quant.target.jit import inline

ROWS = 12  # of a product at a time: their totals fill 24 of 32 registers
AHEAD = 32  # bytes brought into L2 for each pair of a step's products: as many as may be needed soon
_HEADS, COLUMNS = 8, 32  # of weights where they are rows, and of what they weigh, at a time


def pad16(n: int) -> int:
    """The next multiple of 16."""
    return -(-n // 16) * 16


def emit_tile(
    builder, size: tuple[int, int], a, row_stride, column_stride, b, b_stride, n_pairs, finish: Callable
) -> None:
    """Emits finish(r, totals): the vectors sum over pairs k of a[r][k] . b[k], float32, for `size` rows and vectors.

    Strides in bytes: of a's rows, and from one pair of columns to the next.
    """
    n, n_vectors = size
    zero = constant(i32x16.ir, 0)
    # A pointer for every four rows: their addresses are sums that a load can make, with few registers.
    places = [
        cgutils.alloca_once_value(builder, builder.add(a, builder.mul(row_stride, I64(r)))) for r in range(0, n, 4)
    ]
    offsets = [builder.mul(row_stride, I64(r)) for r in range(4)]

    def add(index, totals):
        row = builder.add(b, builder.mul(index, b_stride))
        columns = [load(builder, builder.add(row, I64(64 * i)), i32x16.ir) for i in range(n_vectors)]
        firsts = [builder.load(place) for place in places]
        sums = []
        for r, row_totals in enumerate(totals):
            pair = splat(builder, load(builder, builder.add(firsts[r // 4], offsets[r % 4]), I32), i32x16.ir)
            sums.append(
                [emit_dot_i16(builder, total, column, pair) for total, column in zip(row_totals, columns, strict=True)]
            )
        for place, first in zip(places, firsts, strict=True):
            builder.store(builder.add(first, column_stride), place)
        return sums

    totals = register_tile(builder, n_pairs, [[zero] * n_vectors for _ in range(n)], add)
    for r, row in enumerate(totals):
        finish(r, [builder.sitofp(total, f32x16.ir) for total in row])


def _scaled(n: int):
    """An intrinsic of multiply()'s arguments but the first, for n rows."""

    def emit(builder, a, row_stride, scales, b, n_pairs, c, c_stride) -> None:
        def finish(r, totals):
            scale = splat(builder, load(builder, builder.add(scales, I64(4 * r)), F32), f32x16.ir)
            to = builder.add(c, builder.mul(c_stride, I64(r)))
            for half, total in enumerate(totals):
                store(builder, builder.add(to, I64(64 * half)), builder.fmul(total, scale))

        emit_tile(builder, (n, 2), a, row_stride, I64(4), b, I64(ROW), n_pairs, finish)

    return define(types.void, (types.int64,) * 7, emit)


def _folded(n: int):
    """The same of fold_columns()."""

    def emit(builder, a, row_stride, b, n_pairs, factors, c) -> None:
        old, new = (
            [load(builder, builder.add(factors, I64(ROW * i + 64 * half)), f32x16.ir) for half in range(2)]
            for i in range(2)
        )

        def finish(r, totals):
            for half, total in enumerate(totals):
                at = builder.add(c, I64(ROW * r + 64 * half))
                kept = builder.fmul(load(builder, at, f32x16.ir), old[half])
                store(builder, at, emit_fma(builder, total, new[half], kept))

        emit_tile(builder, (n, 2), a, I64(4), row_stride, b, I64(ROW), n_pairs, finish)

    return define(types.void, (types.int64,) * 6, emit)


def emit_unpacked(builder, a, b, size: int, half: int):
    """Of each quarter of two vectors of bytes its lower or upper half, `size` bytes of either in turn."""
    firsts = [16 * quarter + 8 * half + unit for quarter in range(4) for unit in range(0, 8, size)]
    return shuffle(builder, a, b, [side + first + i for first in firsts for side in (0, 64) for i in range(size)])


def _folded_rows(n: int):
    """The same of fold_rows(), for so many heads and COLUMNS."""

    def emit(builder, weights, rows, row_stride, n_pairs, ahead, factors, c, c_stride) -> None:
        zero = constant(i32x16.ir, 0)

        def add(index, totals):
            emit_prefetch(builder, builder.add(ahead, builder.mul(index, I64(AHEAD))), 2)
            at = builder.add(rows, builder.mul(row_stride, builder.mul(index, I64(2))))
            both = [load(builder, each, i8x64.ir) for each in (at, builder.add(at, row_stride))]
            columns = [emit_unpacked(builder, *both, 2, half) for half in range(2)]
            at, sums = builder.add(weights, builder.mul(index, I64(64))), []
            for r, row_totals in enumerate(totals):
                pair = splat(builder, load(builder, builder.add(at, I64(4 * r)), I32), i32x16.ir)
                each = zip(row_totals, columns, strict=True)
                sums.append([emit_dot_i16(builder, total, pair, column) for total, column in each])
            return sums

        totals = register_tile(builder, n_pairs, [[zero] * 2 for _ in range(n)], add)
        for r, (low, high) in enumerate(totals):
            old, new = (
                splat(builder, load(builder, builder.add(factors, I64(64 * i + 4 * r)), F32), f32x16.ir)
                for i in range(2)
            )
            to = builder.add(c, builder.mul(c_stride, I64(r)))
            for i in range(2):  # as unpacking left them: quarters of `low` and of `high` in turn are in order
                quarters = [16 * side + 4 * quarter for quarter in (2 * i, 2 * i + 1) for side in (0, 1)]
                lanes = [first + j for first in quarters for j in range(4)]
                total = builder.sitofp(shuffle(builder, low, high, lanes), f32x16.ir)
                at = builder.add(to, I64(64 * i))
                store(builder, at, emit_fma(builder, total, new, builder.fmul(load(builder, at, f32x16.ir), old)))

    return define(types.void, (types.int64,) * 8, emit)


def _scaled_16(builder, a, row_stride, scales, b, n_pairs, ahead, c) -> None:
    """Two pairs at a time."""
    zero, n = constant(i32x16.ir, 0), range(16)
    firsts = [builder.add(a, builder.mul(row_stride, I64(r))) for r in n]

    def add(index, totals):
        emit_prefetch(builder, builder.add(ahead, builder.mul(index, I64(2 * AHEAD))), 2)
        for pair in range(2):
            lanes = load(builder, builder.add(b, builder.add(builder.mul(index, I64(128)), I64(64 * pair))), i32x16.ir)
            column = builder.add(builder.mul(index, I64(8)), I64(4 * pair))
            rows = (load(builder, builder.add(first, column), I32) for first in firsts)
            each = zip(totals, rows, strict=True)
            totals = [[emit_dot_i16(builder, total, lanes, splat(builder, row, i32x16.ir))] for (total,), row in each]
        return totals

    totals = register_tile(builder, builder.lshr(n_pairs, I64(1)), [[zero]] * 16, add)
    for r, (total,) in enumerate(totals):
        scale = splat(builder, load(builder, builder.add(scales, I64(4 * r)), F32), f32x16.ir)
        store(builder, builder.add(c, I64(64 * r)), builder.fmul(builder.sitofp(total, f32x16.ir), scale))


# Few sizes: each is compiled, and what is left of a block of rows is little.
_multiply_12, _multiply_4, _multiply_1 = map(_scaled, (ROWS, 4, 1))
_fold_12, _fold_4, _fold_1 = map(_folded, (ROWS, 4, 1))
_fold_8_rows, _fold_1_row = map(_folded_rows, (_HEADS, 1))
# (a, row_stride, scales, b, n_pairs, ahead, c): 16 rows of multiply(), of 16 lanes and an even number of pairs; AHEAD
# bytes a pair from `ahead` on are brought into L2.
multiply_16 = define(types.void, (types.int64,) * 7, _scaled_16)


@inline
def multiply(n_rows, a, row_stride, scales, b, n_pairs, c, c_stride):
    """c[r] = scales[r] * a[r] . b, rows of 32 float32, c_stride bytes apart; scales float32, of the rows of a."""
    in_12, in_4 = n_rows // ROWS * ROWS, n_rows // 4 * 4
    for r in range(0, in_12, ROWS):
        _multiply_12(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)
    for r in range(in_12, in_4, 4):
        _multiply_4(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)
    for r in range(in_4, n_rows):
        _multiply_1(a + row_stride * r, row_stride, scales + 4 * r, b, n_pairs, c + c_stride * r, c_stride)


@inline
def fold_columns(n_columns, a, row_stride, b, n_pairs, factors, c):
    """c[v] = factors[0] * c[v] + factors[1] * sum over pairs k of a[k][v] . b[k]: rows of 32 float32, as factors are.

    a: pairs of rows, their int16 in turn, row_stride bytes from a pair to the next.
    """
    in_12, in_4 = n_columns // ROWS * ROWS, n_columns // 4 * 4
    for v in range(0, in_12, ROWS):
        _fold_12(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)
    for v in range(in_12, in_4, 4):
        _fold_4(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)
    for v in range(in_4, n_columns):
        _fold_1(a + 4 * v, row_stride, b, n_pairs, factors, c + ROW * v)


@inline
def fold_rows(n_heads, weights, rows, row_stride, n_pairs, ahead, factors, c, c_stride, width):
    """c[h] = factors[0][h] * c[h] + factors[1][h] * sum over rows r of weights[r][h] * rows[r], float32.

    Args:
        weights: of two rows, pairs of 16 lanes, of which the first n_heads are used.
        rows: int16, row_stride bytes apart, two for each of n_pairs.
        ahead: an address, from which on memory is brought into L2.
        factors: two rows of 16 float32.
        c: (n_heads, width), c_stride bytes apart.
        width: a multiple of COLUMNS.
    """
    in_8 = n_heads // _HEADS * _HEADS
    for i in range(0, width, COLUMNS):
        at, to = rows + 2 * i, c + 4 * i
        for h in range(0, in_8, _HEADS):
            _fold_8_rows(weights + 4 * h, at, row_stride, n_pairs, ahead, factors + 4 * h, to + c_stride * h, c_stride)
            ahead += AHEAD * n_pairs
        for h in range(in_8, n_heads):
            _fold_1_row(weights + 4 * h, at, row_stride, n_pairs, ahead, factors + 4 * h, to + c_stride * h, c_stride)
            ahead += AHEAD * n_pairs
