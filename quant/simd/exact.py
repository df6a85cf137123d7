"""The SIMD vocabulary of packing, beside simd.py's: float arithmetic in 16 lanes, choices between lanes, narrow stores.

Nothing here depends on the machine's width: sums over lanes have one order and nothing is fused unless it says so, so
that packed bytes are the same at every ISA level.
"""

import itertools
from collections.abc import Sequence

from llvmlite import ir
from numba import types

from quant.simd.core import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    call,
    constant,
    define,
    f32x16,
    f32x32,
    i8x16,
    i8x32,
    shuffle,
    splat,
    store,
)
from quant.target import isa


def _halves(builder, x):
    """float32 vector -> float16 bits (16-bit integers), to nearest, ties to even; beyond the range -> infinity."""
    narrow = ir.VectorType(I16, x.type.count)
    if isa.target_has("f16c") or not isa.host_features() & {"sse2"}:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(F16, x.type.count)), narrow)
    wide = ir.VectorType(I32, x.type.count)  # without F16C LLVM would call a runtime function that is not there
    bits = builder.bitcast(x, wide)
    magnitude = builder.and_(bits, constant(wide, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(wide, 13)), constant(wide, 1))
    rounded = builder.add(builder.add(magnitude, constant(wide, 0xFFF - (112 << 23))), odd)
    normal = builder.lshr(rounded, constant(wide, 13))
    normal = call(builder, f"llvm.umin.v{wide.count}i32", wide, normal, constant(wide, 0x7C00))
    # A subnormal is a multiple of 2^-24, the last place of numbers from 0.5 on.
    shifted = builder.fadd(builder.bitcast(magnitude, x.type), constant(x.type, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, wide), constant(wide, 0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, constant(wide, 113 << 23))
    sign = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 0x8000))
    return builder.trunc(builder.or_(builder.select(small, subnormal, normal), sign), narrow)


def _bfloats(builder, x):
    """float32 vector -> its upper halves, to nearest, ties to even."""
    wide = ir.VectorType(I32, x.type.count)
    bits = builder.bitcast(x, wide)
    odd = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    rounded = builder.add(builder.add(bits, constant(wide, 0x7FFF)), odd)
    return builder.trunc(builder.lshr(rounded, constant(wide, 16)), ir.VectorType(I16, x.type.count))


def _single(builder, x):
    """A float32 as a vector of one lane."""
    return builder.insert_element(ir.Constant(ir.VectorType(F32, 1), ir.Undefined), x, I32(0))


# ---- stores ----------------------------------------------------------------------------------------------------------

store_u8 = define(types.void, (types.int64, types.int64), lambda b, p, v: store(b, p, b.trunc(v, I8)))
store_u32 = define(types.void, (types.int64, types.int64), lambda b, p, v: store(b, p, b.trunc(v, I32)))
store_i8x16 = define(types.void, (types.int64, i8x16), store)
store_f16 = define(types.void, (types.int64, types.float32), lambda b, p, x: store(b, p, _halves(b, _single(b, x))))
store_bf16 = define(types.void, (types.int64, types.float32), lambda b, p, x: store(b, p, _bfloats(b, _single(b, x))))
store_f16x16 = define(types.void, (types.int64, f32x16), lambda b, p, x: store(b, p, _halves(b, x)))
store_bf16x16 = define(types.void, (types.int64, f32x16), lambda b, p, x: store(b, p, _bfloats(b, x)))

# ---- 16 candidates, or 16 weights ------------------------------------------------------------------------------------


def constants(values: Sequence[float]):
    """An intrinsic f32x16() of 16 constants."""
    return define(f32x16, (), lambda builder: ir.Constant(f32x16.ir, [float(value) for value in values]))


def _unary(name: str):
    return define(f32x16, (f32x16,), lambda b, x: call(b, f"llvm.{name}.v16f32", x.type, x))


def _select_less(builder, a, b, then, otherwise):
    return builder.select(builder.fcmp_ordered("<", a, b), then, otherwise)


def _sum_tree(builder, v):
    """Sum over lanes: halves on halves."""
    count = v.type.count
    while count > 1:
        count //= 2
        low, high = shuffle(builder, v, None, range(count)), shuffle(builder, v, None, range(count, 2 * count))
        v = builder.fadd(low, high)
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
    first = builder.trunc(builder.cttz(bits, ir.IntType(1)(0)), I32)
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
    negative = builder.zext(
        builder.bitcast(builder.fcmp_ordered("<", v, constant(v.type, 0.0)), ir.IntType(lanes)), I64
    )
    is_negative = builder.trunc(builder.lshr(negative, builder.zext(lane_, I64)), ir.IntType(1))
    return builder.select(is_negative, builder.fneg(largest), largest)


def _all_within(builder, v, limit):
    """Whether no lane is NaN or of a magnitude above `limit`."""
    magnitude = call(builder, "llvm.fabs.v16f32", v.type, v)
    within = builder.bitcast(builder.fcmp_ordered("<=", magnitude, splat(builder, limit, v.type)), I16)
    return builder.icmp_unsigned("==", within, I16(0xFFFF))


add_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fadd(x, y))
sub_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fsub(x, y))
div_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fdiv(x, y))
min_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.select(b.fcmp_ordered("<", x, y), x, y))
max_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.select(b.fcmp_ordered(">", x, y), x, y))
abs_f32x16, sqrt_f32x16, rint_f32x16 = _unary("fabs"), _unary("sqrt"), _unary("rint")
select_less = define(f32x16, (f32x16, f32x16, f32x16, f32x16), _select_less)  # a < b ? c : d
signed_largest_f32x16 = define(types.float32, (f32x16,), _signed_largest)
sum_tree = define(types.float32, (f32x16,), _sum_tree)
all_within = define(types.boolean, (f32x16, types.float32), _all_within)
best_lane = define(types.int64, (f32x16,), _best_lane)
lane = define(types.float32, (f32x16, types.int64), lambda b, v, i: b.extract_element(v, i))

# ---- 32 weights ------------------------------------------------------------------------------------------------------


def _clamp_to_i8(builder, v, low, high):
    """Towards zero; out of low..high -> the nearest limit. LLVM's fptosi.sat goes lane by lane (3x slower)."""
    v = builder.select(builder.fcmp_ordered(">", v, low), v, low)
    v = builder.select(builder.fcmp_ordered("<", v, high), v, high)
    return builder.trunc(builder.fptosi(v, ir.VectorType(I32, 32)), i8x32.ir)


def _truncate_to_i8(builder, v):
    """Towards zero; out of range -> the nearest limit."""
    return _clamp_to_i8(builder, v, constant(v.type, -128.0), constant(v.type, 127.0))


def _round_between(builder, v, low, high):
    """Nearest, ties to even; out of low..high -> the nearest limit."""
    rounded = call(builder, "llvm.rint.v32f32", v.type, v)
    return _clamp_to_i8(builder, rounded, splat(builder, low, v.type), splat(builder, high, v.type))


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
    return builder.zext(builder.bitcast(builder.trunc(shifted, ir.VectorType(ir.IntType(1), 32)), I32), I64)


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


zero_i8x32 = define(i8x32, (), lambda b: constant(i8x32.ir, 0))
signed_largest = define(types.float32, (f32x32,), _signed_largest)
sum_tree_f32x32 = define(types.float32, (f32x32,), _sum_tree)
round_between = define(i8x32, (f32x32, types.float32, types.float32), _round_between)
least = define(types.float32, (f32x32,), lambda b, v: _extreme(b, v, "<"))
greatest_magnitude = define(
    types.float32, (f32x32,), lambda b, v: _extreme(b, call(b, "llvm.fabs.v32f32", v.type, v), ">")
)
greatest = define(types.float32, (f32x32,), lambda b, v: _extreme(b, v, ">"))
abs_f32x32 = define(f32x32, (f32x32,), lambda b, v: call(b, "llvm.fabs.v32f32", v.type, v))
truncate_to_i8 = define(i8x32, (f32x32,), _truncate_to_i8)
round_away_to_i8 = define(i8x32, (f32x32,), _round_away_to_i8)
clamp_levels = define(i8x32, (i8x32, types.int64), _clamp_levels)
join_nibbles = define(i8x16, (i8x32,), _join_nibbles)
gather_bits = define(types.int64, (i8x32, types.int64), _gather_bits)
mark_negative = define(  # index | bits where v is negative and index is not 0
    i8x32,
    (i8x32, f32x32, types.int64),
    lambda b, index, v, bits: b.select(
        b.and_(
            b.fcmp_ordered("<", v, constant(v.type, 0.0)),
            b.icmp_unsigned("!=", index, constant(index.type, 0)),
        ),
        b.or_(index, splat(b, b.trunc(bits, I8), index.type)),
        index,
    ),
)
