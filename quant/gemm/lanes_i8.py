"""Products of bytes with 16 vectors side by side: as lanes_i16.py's, four columns a lane in place of two (vpdpbusd).

Rows are bytes raised by 128, as a cache of 8 bits has them (gemv/rows_i8.py): vpdpbusd wants one side without sign.
Vectors side by side ("lanes") are rows of 16 fours of int8, a row for four columns. A product begins with what takes
the 128 back: -128 times the sum of the lane's columns. Weights of rows are bytes without sign, and rows then int8.
"""

import numpy as np
from llvmlite import ir
from numba import types

from quant.gemm.lanes import LANE_ROW, LOWEST
from quant.gemm.lanes_i16 import emit_tile, emit_unpacked
from quant.simd.core import F32, I32, I64, constant, define, f32x16, i8x64, i32x16, load, shuffle, splat, store
from quant.simd.dots import emit_dot_u8
from quant.simd.exact import rint, where
from quant.simd.floats import emit_fma, exp2, fma, greater, maximum, scaled_to_i16, splat_f32x16, zero_f32x16
from quant.simd.ints import zero_i32x16
from quant.simd.memory import load_f32, load_f32x16, store_f32x16, store_i32x16
from quant.simd.register_tile import register_tile
from quant.target.jit import inline

ROWS = 16  # of scores at a time
HEADS = 4  # of weighted sums at a time
COLUMNS = 64  # that rows have a multiple of
# Weights of a head have one byte where the largest is at most so many times their mean: then one byte's rounding, up to
# 1/510 of the largest, is below a thirtieth of the mean, and either sign.
FLAT = 16.0
_MOST_BYTE, _MOST_WEIGHT, _RAISED = 127, 255 * 256, 128
_TINY = 1e-30
_ONE = 1.0

# ---- rows ------------------------------------------------------------------------------------------------------------


def _take_four(builder, first, second, third, fourth, codes, stride, fours) -> None:
    rows = [load(builder, at, i8x64.ir) for at in (first, second, third, fourth)]
    for i, row in enumerate(rows):
        store(builder, builder.add(codes, builder.mul(stride, I64(i))), row)
    order = [4 * (i % 4) + i // 4 for i in range(16)]  # so that unpacking leaves columns in order
    signed = (builder.bitcast(builder.xor(row, constant(row.type, _RAISED)), i32x16.ir) for row in rows)
    a, b, c, d = (builder.bitcast(shuffle(builder, row, None, order), i8x64.ir) for row in signed)
    for half in range(2):
        low, high = emit_unpacked(builder, a, b, 1, half), emit_unpacked(builder, c, d, 1, half)
        for i in range(2):
            store(builder, builder.add(fours, I64(64 * (2 * half + i))), emit_unpacked(builder, low, high, 2, i))


_take_four_by_64 = define(types.void, (types.int64,) * 7, _take_four)


@inline
def take_four_rows(first, second, third, fourth, width, codes, stride, fours):
    """Copies of four rows at `codes`, `stride` bytes apart; their columns as fours of int8 at `fours`."""
    for i in range(0, width, COLUMNS):
        _take_four_by_64(first + i, second + i, third + i, fourth + i, codes + i, stride, fours + 4 * i)


# ---- products --------------------------------------------------------------------------------------------------------


def _bytes_at(builder, address):
    """Four bytes in all lanes."""
    return builder.bitcast(splat(builder, load(builder, address, I32), i32x16.ir), i8x64.ir)


def _add_scores(builder, codes, stride, lanes, n_fours, start, scale, scores) -> None:
    first = load(builder, start, i32x16.ir)
    rows = [builder.add(codes, builder.mul(stride, I64(r))) for r in range(ROWS)]

    def add(index, totals):
        lane = load(builder, builder.add(lanes, builder.mul(index, I64(LANE_ROW))), i8x64.ir)
        column = builder.mul(index, I64(4))
        return [
            [emit_dot_u8(builder, total, _bytes_at(builder, builder.add(row, column)), lane)]
            for row, (total,) in zip(rows, totals, strict=True)
        ]

    totals = register_tile(builder, n_fours, [[first]] * ROWS, add)
    factor = load(builder, scale, f32x16.ir)
    for r, (total,) in enumerate(totals):
        at = builder.add(scores, I64(LANE_ROW * r))
        summed = emit_fma(builder, builder.sitofp(total, f32x16.ir), factor, load(builder, at, f32x16.ir))
        store(builder, at, summed)


def _add_pairs(builder, rows, stride, row_scales, lanes, n_pairs, scale, code_scales, scores) -> None:
    factor = load(builder, scale, f32x16.ir)

    def finish(r, totals):
        at = builder.add(scores, I64(LANE_ROW * r))
        of_row, of_codes = (
            splat(builder, load(builder, builder.add(scales, I64(4 * r)), F32), f32x16.ir)
            for scales in (row_scales, code_scales)
        )
        kept = builder.fmul(load(builder, at, f32x16.ir), of_codes)
        store(builder, at, emit_fma(builder, totals[0], builder.fmul(of_row, factor), kept))

    emit_tile(builder, (ROWS, 1), rows, stride, I64(4), lanes, I64(LANE_ROW), n_pairs, finish)


# (codes, stride, lanes, n_fours, start, scale, scores): scores[r] += scale * (start + codes[r] . lanes), ROWS of them.
add_scores = define(types.void, (types.int64,) * 7, _add_scores)
# (rows, stride, row_scales, lanes, n_pairs, scale, code_scales, scores): scores[r] = code_scales[r] * scores[r] +
# row_scales[r] * scale * rows[r] . lanes, in int16.
add_pairs = define(types.void, (types.int64,) * 8, _add_pairs)


def _folded(n_heads: int, n_bytes: int, n_vectors: int):
    """An intrinsic of fold_bytes()'s arguments for so many heads and vectors of columns; weights of n_bytes."""

    def emit(builder, weights, fours, stride, n_fours, factors, c, c_stride) -> None:
        zero = constant(i32x16.ir, 0)

        def add(index, totals):
            row = builder.add(fours, builder.mul(index, stride))
            columns = [load(builder, builder.add(row, I64(64 * i)), i8x64.ir) for i in range(n_vectors)]
            at = builder.add(weights, builder.mul(index, I64(2 * LANE_ROW)))
            sums = []
            for r, row_totals in enumerate(totals):
                byte, head = divmod(r, n_heads)
                weight = _bytes_at(builder, builder.add(at, I64(LANE_ROW * byte + 4 * head)))
                each = zip(row_totals, columns, strict=True)
                sums.append([emit_dot_u8(builder, total, weight, column) for total, column in each])
            return sums

        totals = register_tile(builder, n_fours, [[zero] * n_vectors for _ in range(n_bytes * n_heads)], add)
        high = ir.Constant(f32x16.ir, [256.0] * 16)
        for head in range(n_heads):
            old, new = (
                splat(builder, load(builder, builder.add(factors, I64(LANE_ROW * i + 4 * head)), F32), f32x16.ir)
                for i in range(2)
            )
            to = builder.add(c, builder.mul(c_stride, I64(head)))
            for i in range(n_vectors):
                parts = [builder.sitofp(totals[n_heads * byte + head][i], f32x16.ir) for byte in range(n_bytes)]
                total = builder.fmul(parts[0], high) if n_bytes == 1 else emit_fma(builder, parts[0], high, parts[1])
                at = builder.add(to, I64(64 * i))
                kept = builder.fmul(load(builder, at, f32x16.ir), old)
                store(builder, at, emit_fma(builder, total, new, kept))

    return define(types.void, (types.int64,) * 7, emit)


_fold_4_by_byte, _fold_4_by_two, _fold_1_by_byte, _fold_1_by_two = (
    _folded(n_heads, n_bytes, 4 // n_bytes) for n_heads in (HEADS, 1) for n_bytes in (1, 2)
)


@inline
def fold_bytes(n_heads, weights, steps, fours, stride, n_fours, factors, c, c_stride, width):
    """c[h] = factors[0][h] * c[h] + factors[1][h] * sum over fours of rows k of weights[k][h] . fours[k], float32.

    Args:
        weights, steps: of weigh_bytes().
        fours: of take_four_rows(), `stride` bytes apart.
        factors: two rows of 16 float32.
        width: a multiple of COLUMNS.
    """
    in_4 = n_heads // HEADS * HEADS
    for i in range(0, width, COLUMNS):
        at = fours + 4 * i
        for h in range(0, in_4, HEADS):
            lane, to = weights + 4 * h, c + 4 * i + c_stride * h
            if _are_bytes(steps + 4 * h):
                _fold_4_by_byte(lane, at, stride, n_fours, factors + 4 * h, to, c_stride)
            else:
                _fold_4_by_two(lane, at, stride, n_fours, factors + 4 * h, to, c_stride)
                _fold_4_by_two(lane, at + 128, stride, n_fours, factors + 4 * h, to + 128, c_stride)
        for h in range(in_4, n_heads):
            lane, to = weights + 4 * h, c + 4 * i + c_stride * h
            if load_f32(steps + 4 * h) > _ONE:
                _fold_1_by_byte(lane, at, stride, n_fours, factors + 4 * h, to, c_stride)
            else:
                _fold_1_by_two(lane, at, stride, n_fours, factors + 4 * h, to, c_stride)
                _fold_1_by_two(lane, at + 128, stride, n_fours, factors + 4 * h, to + 128, c_stride)


@inline
def _are_bytes(steps):
    """Whether the weights of HEADS heads have one byte."""
    first, second = min(load_f32(steps), load_f32(steps + 4)), min(load_f32(steps + 8), load_f32(steps + 12))
    return min(first, second) > _ONE


# ---- rounding --------------------------------------------------------------------------------------------------------


@inline
def round_bytes(rows, depth, out, start, scale):
    """16 vectors side by side, `depth` rows of float32 (a multiple of 4), as fours of int8 at `out`.

    start, scale: addresses of what products begin with, int32 (16,), and of float32 (16,) scales.
    """
    largest, total = zero_f32x16(), zero_f32x16()
    for c in range(depth):
        v = load_f32x16(rows + LANE_ROW * c)
        largest, total = greater(abs(v), largest), total + v
    factor = np.float32(_MOST_BYTE) / (largest + np.float32(_TINY))
    store_f32x16(scale, largest * np.float32(1 / _MOST_BYTE) + total * np.float32(0.0))  # NaN, if there is one
    sums = zero_i32x16()
    for k in range(0, depth, 4):
        at = rows + LANE_ROW * k
        a, b = scaled_to_i16(load_f32x16(at), factor), scaled_to_i16(load_f32x16(at + 64), factor)
        c, d = scaled_to_i16(load_f32x16(at + 128), factor), scaled_to_i16(load_f32x16(at + 192), factor)
        sums = sums + a + b + c + d
        store_i32x16(out + 16 * k, (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24)
    # What scaled_to_i16 leaves in the upper bits is the same each time.
    sums = sums - scaled_to_i16(zero_f32x16(), factor) * depth
    store_i32x16(start, sums * -_RAISED)


@inline
def weigh_bytes(scores, n_rows, row_scales, largest, total, weights, steps):
    """Rows of 16 scores to fours of rounded weights 2^(score - the largest so far) times the rows' scales of values.

    Args:
        scores: float32; overwritten, as are rows behind them to a multiple of four.
        largest, total: addresses of the largest score so far and of the sum of weights; both are brought up to date.
        weights: of four rows the upper bytes, 16 fours, then the lower ones.
        steps: address of float32 (16,): 256 where the lower bytes are 0.

    Returns:
        What takes earlier sums to the same scale, and what takes sums of the rounded weights to it.
    """
    before, most = load_f32x16(largest), splat_f32x16(np.float32(LOWEST))
    for at in range(scores, scores + LANE_ROW * n_rows, LANE_ROW):
        most = greater(load_f32x16(at), most)
    most = maximum(before, most)
    store_f32x16(largest, most)
    summed, weighed, heaviest = zero_f32x16(), zero_f32x16(), zero_f32x16()
    for j in range(n_rows):
        weight = exp2(load_f32x16(scores + LANE_ROW * j) - most)
        summed += weight
        weight = weight * load_f32(row_scales + 4 * j)
        weighed += weight
        heaviest = greater(weight, heaviest)
        store_f32x16(scores + LANE_ROW * j, weight)
    padded = (n_rows + 3) // 4 * 4
    for j in range(n_rows, padded):
        store_f32x16(scores + LANE_ROW * j, zero_f32x16())
    decay = exp2(before - most)
    store_f32x16(total, fma(load_f32x16(total), decay, summed))
    step = where(heaviest * np.float32(n_rows) < weighed * np.float32(FLAT), splat_f32x16(np.float32(256.0)), _ONE)
    store_f32x16(steps, step)
    factor = np.float32(_MOST_WEIGHT) / (heaviest + np.float32(_TINY))
    of_step = factor / step
    for k in range(0, padded, 4):
        at, to = scores + LANE_ROW * k, weights + LANE_ROW // 2 * k
        a, b = _whole(at, of_step, step), _whole(at + LANE_ROW, of_step, step)
        c, d = _whole(at + 2 * LANE_ROW, of_step, step), _whole(at + 3 * LANE_ROW, of_step, step)
        store_i32x16(to, (a >> 8 & 255) | (b & 0xFF00) | (c & 0xFF00) << 8 | (d & 0xFF00) << 16)
        store_i32x16(to + LANE_ROW, (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24)
    return decay, 1 / factor + weighed * np.float32(0.0)  # NaN, if there is one


@inline
def _whole(weights, factor, step):
    """A row of weights in whole steps: their lowest 16 bits."""
    return scaled_to_i16(rint(load_f32x16(weights) * factor) * step, splat_f32x16(np.float32(1.0)))
