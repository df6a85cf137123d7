"""Operations for quantising: choices between lanes, sums and extremes, and roundings, the same on every machine.

Sums over lanes have one order and nothing is fused unless it says so, so that quantised bytes are the same at every ISA
level, and those of formats without a search are ggml's.
"""

import itertools
from collections.abc import Sequence

from llvmlite import ir
from numba import types

from quant.simd.core import (
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    Vector,
    call,
    constant,
    define,
    define_for_all,
    define_typed,
    f32x16,
    f32x32,
    half,
    i8x16,
    i8x32,
    shuffle,
    splat,
    spread,
)
from quant.simd.floats import emit_clamp_to_i8

# ---- lane by lane ----------------------------------------------------------------------------------------------------


def constants(values: Sequence[float]):
    """An intrinsic f32x16() of 16 constants."""
    return define(f32x16, (), lambda builder: ir.Constant(f32x16.ir, [float(value) for value in values]))


def _rounding(name: str):
    return define_for_all(1, lambda builder, v: call(builder, f"llvm.{name}.v{v.type.count}f32", v.type, v))


def _at_least(builder, v, low):
    return builder.select(builder.fcmp_ordered(">", v, low), v, low)


def _at_most(builder, v, high):
    return builder.select(builder.fcmp_ordered("<", v, high), v, high)


def _typed_where(mask, then, otherwise):
    """Vectors of one type, or one of them a scalar to be put in every lane."""
    vector = then if isinstance(then, Vector) else otherwise

    def emit(builder, mask, then, otherwise):
        return builder.select(mask, spread(builder, then, vector.ir), spread(builder, otherwise, vector.ir))

    vectors = (value if isinstance(value, Vector) else vector.scalar for value in (then, otherwise))
    return vector(mask, *vectors), emit


sqrt, rint = _rounding("sqrt"), _rounding("rint")
at_least = define_for_all(2, _at_least)  # (v, low): low where v is below it, or NaN
at_most = define_for_all(2, _at_most)  # (v, high): high where v is above it, or NaN
clamp = define_for_all(3, lambda b, v, low, high: _at_most(b, _at_least(b, v, low), high))
where = define_typed(3, _typed_where)  # (mask, then, otherwise); a mask is what a comparison gives

# ---- over lanes ------------------------------------------------------------------------------------------------------


def _sum_tree(builder, v):
    """Sum over lanes: halves on halves."""
    while v.type.count > 1:
        v = builder.fadd(half(builder, v, 0), half(builder, v, 1))
    return builder.extract_element(v, I32(0))


def _extreme(builder, v, comparison: str):
    """The least ("<") or greatest (">") lane, of equal ones (0.0 and -0.0) the first: neighbours first, then pairs.

    LLVM's own reductions go lane by lane (measured: 2x slower kernels).
    """
    while v.type.count > 1:
        left, right = (shuffle(builder, v, None, range(start, v.type.count, 2)) for start in (0, 1))
        v = builder.select(builder.fcmp_ordered(comparison, right, left), right, left)
    return builder.extract_element(v, I32(0))


def _first(builder, mask):
    """int32: the first lane where `mask` (1-bit lanes) is set; 0 if none is."""
    lanes = mask.type.count
    bits = builder.zext(builder.bitcast(mask, ir.IntType(lanes)), I64)
    first = builder.trunc(builder.cttz(bits, I1(0)), I32)
    return builder.and_(first, I32(lanes - 1))


def _best_lane(builder, v):
    """The first of the lanes with the greatest value."""
    greatest = _extreme(builder, v, ">")
    return builder.zext(_first(builder, builder.fcmp_ordered("==", v, splat(builder, greatest, v.type))), I64)


def _signed_largest(builder, v):
    """The first of the values with the largest magnitude; 0.0 if all are zero of either sign."""
    lanes = v.type.count
    magnitude = call(builder, f"llvm.fabs.v{lanes}f32", v.type, v)
    largest = _extreme(builder, magnitude, ">")
    lane_ = _first(builder, builder.fcmp_ordered("==", magnitude, splat(builder, largest, v.type)))
    below = builder.fcmp_ordered("<", v, constant(v.type, 0.0))
    negative = builder.zext(builder.bitcast(below, ir.IntType(lanes)), I64)
    is_negative = builder.trunc(builder.lshr(negative, builder.zext(lane_, I64)), I1)
    return builder.select(is_negative, builder.fneg(largest), largest)


def _all_within(builder, v, limit):
    """Whether no lane is NaN or of a magnitude above `limit`."""
    magnitude = call(builder, "llvm.fabs.v16f32", v.type, v)
    within = builder.bitcast(builder.fcmp_ordered("<=", magnitude, splat(builder, limit, v.type)), I16)
    return builder.icmp_unsigned("==", within, I16(0xFFFF))


def _least_of_four(builder, *vectors):
    """The least lane of each, in every quarter of the result."""

    def least(a, b):
        return builder.select(builder.fcmp_ordered("<", a, b), a, b)

    def interleaved(a, b, width):
        lanes = [
            [16 * (i // width % 2) + i // (2 * width) * width + i % width + at for i in range(16)] for at in (0, 8)
        ]
        return least(*(shuffle(builder, a, b, chosen) for chosen in lanes))

    v = interleaved(interleaved(*vectors[:2], 1), interleaved(*vectors[2:], 1), 2)
    v = least(v, shuffle(builder, v, None, [(i + 8) % 16 for i in range(16)]))
    return least(v, shuffle(builder, v, None, [(i + 4) % 16 for i in range(16)]))


def _to_scalar(emit):
    return define_for_all(1, emit, lambda vector: types.float32)


sum_tree = _to_scalar(_sum_tree)
signed_largest = _to_scalar(_signed_largest)
least = _to_scalar(lambda b, v: _extreme(b, v, "<"))
greatest = _to_scalar(lambda b, v: _extreme(b, v, ">"))
all_within = define(types.boolean, (f32x16, types.float32), _all_within)
least_of_four = define(f32x16, (f32x16,) * 4, _least_of_four)
best_lane = define(types.int64, (f32x16,), _best_lane)
lane = define(types.float32, (f32x16, types.int64), lambda b, v, i: b.extract_element(v, i))

# ---- 32 weights to levels --------------------------------------------------------------------------------------------


def _truncate_to_i8(builder, v):
    """Towards zero; out of range -> the nearest limit."""
    return emit_clamp_to_i8(builder, v, constant(v.type, -128.0), constant(v.type, 127.0))


def _round_between(builder, v, low, high):
    """Nearest, ties to even; out of low..high -> the nearest limit."""
    rounded = call(builder, "llvm.rint.v32f32", v.type, v)
    return emit_clamp_to_i8(builder, rounded, splat(builder, low, v.type), splat(builder, high, v.type))


def _round_away_to_i8(builder, v):
    """Nearest, ties away from zero; out of range -> the nearest limit."""
    return _truncate_to_i8(builder, call(builder, "llvm.round.v32f32", v.type, v))


def _clamp_levels(builder, v, last):
    """Signed lanes below 0 -> 0, above `last` -> last."""
    v = call(builder, "llvm.smax.v32i8", v.type, v, constant(v.type, 0))
    return call(builder, "llvm.smin.v32i8", v.type, v, splat(builder, builder.trunc(last, I8), v.type))


def _join_nibbles(builder, v):
    """Lane j of the first half in the low 4 bits of byte j, lane j of the second in the high ones; all below 16."""
    low, high = shuffle(builder, v, None, range(16)), shuffle(builder, v, None, range(16, 32))
    return builder.or_(low, builder.shl(high, constant(high.type, 4)))


def _gather_bits(builder, v, bit):
    """Bit `bit` of every lane, as the bits of a 32-bit word."""
    shifted = builder.lshr(v, splat(builder, builder.trunc(bit, I8), v.type))
    return builder.zext(builder.bitcast(builder.trunc(shifted, ir.VectorType(I1, 32)), I32), I64)


def count_below(thresholds: Sequence[float]):
    """An intrinsic i8x32(f32x32 v, float32 scale): how many of `thresholds`, times scale, are below each lane."""

    def emit(builder, v, scale):
        total = constant(i8x32.ir, 0)
        for threshold in thresholds:
            scaled = splat(builder, builder.fmul(scale, ir.Constant(F32, float(threshold))), v.type)
            below = builder.fcmp_ordered("<", scaled, v)
            total = builder.sub(total, builder.sext(below, i8x32.ir))
        return total

    return define(i8x32, (f32x32, types.float32), emit)


def step_function(values: Sequence[float]):
    """An intrinsic f32x16(f32x16): the nearest of the rising `values` in each lane, of two equally near the lower."""
    pairs = list(itertools.pairwise(values))

    def emit(builder, v):
        total = constant(v.type, float(values[0]))
        for low, high in pairs:
            beyond = builder.fcmp_ordered("<", constant(v.type, (low + high) / 2), v)
            total = builder.select(beyond, constant(v.type, float(high)), total)
        return total

    return define(f32x16, (f32x16,), emit)


def _mark_negative(builder, index, v, bits):
    """index | bits where v is negative and index is not 0."""
    negative = builder.fcmp_ordered("<", v, constant(v.type, 0.0))
    nonzero = builder.icmp_unsigned("!=", index, constant(index.type, 0))
    marked = builder.or_(index, splat(builder, builder.trunc(bits, I8), index.type))
    return builder.select(builder.and_(negative, nonzero), marked, index)


def _to_i8x16(builder, v):
    """Whole numbers of a byte's range."""
    return builder.trunc(builder.fptosi(v, ir.VectorType(I32, 16)), i8x16.ir)


truncate_to_i8 = define(i8x32, (f32x32,), _truncate_to_i8)
round_away_to_i8 = define(i8x32, (f32x32,), _round_away_to_i8)
round_between = define(i8x32, (f32x32, types.float32, types.float32), _round_between)
to_i8x16 = define(i8x16, (f32x16,), _to_i8x16)
clamp_levels = define(i8x32, (i8x32, types.int64), _clamp_levels)
join_nibbles = define(i8x16, (i8x32,), _join_nibbles)
gather_bits = define(types.int64, (i8x32, types.int64), _gather_bits)
mark_negative = define(i8x32, (i8x32, f32x32, types.int64), _mark_negative)
