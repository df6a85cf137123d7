"""Operations on float vectors: fused products, sums and maxima over lanes, e^x, conversions, orders of lanes.

Arithmetic that is rounded step by step is operators' (core.py). Sums over lanes are in any order here; exact.py has one
that is the same on every machine.
"""

from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant.simd.core import (
    F32,
    FLOATS_BY_LANES,
    I8,
    I16,
    I32,
    I64,
    Vector,
    call,
    constant,
    define,
    define_for_all,
    f32x8,
    f32x16,
    f32x32,
    half,
    i8x16,
    i8x32,
    i32x16,
    shuffle,
    splat,
)
from quant.simd.halves import half_to_float
from quant.target import isa

# ---- constants -------------------------------------------------------------------------------------------------------


def _zero(vector: Vector):
    return define(vector, (), lambda builder: constant(vector.ir, 0.0))


def _splat(vector: Vector):
    return define(vector, (types.float32,), lambda builder, x: splat(builder, x, vector.ir))


def _two_halves(vector: Vector):
    """An intrinsic vector(low, high): `low` in the first half of the lanes, `high` in the second."""

    def emit(builder, low, high):
        pair = builder.insert_element(ir.Constant(ir.VectorType(F32, 2), ir.Undefined), low, I32(0))
        lanes = vector.ir.count // 2
        return shuffle(builder, builder.insert_element(pair, high, I32(1)), None, [0] * lanes + [1] * lanes)

    return define(vector, (types.float32, types.float32), emit)


zero_f32x8, zero_f32x16 = _zero(f32x8), _zero(f32x16)
splat_f32x8, splat_f32x16, splat_f32x32 = _splat(f32x8), _splat(f32x16), _splat(f32x32)
halves_f32x8, halves_f32x32 = _two_halves(f32x8), _two_halves(f32x32)

# ---- arithmetic ------------------------------------------------------------------------------------------------------


def emit_fma(builder, a, b, c):
    """a*b + c, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)


def _exact_fma(builder, a, b, c):
    """The same of numbers whose product is a float: where there is no such instruction LLVM calls a function a lane."""
    return emit_fma(builder, a, b, c) if isa.has("avx2") else builder.fadd(builder.fmul(a, b), c)


def emit_maximum(builder, a, b):
    """The greater of two lanes; where one is NaN, the other."""
    return call(builder, f"llvm.maxnum.v{a.type.count}f32", a.type, a, b)


def _greater(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def emit_hsum(builder, v):
    """Sum over lanes, in any order (float rounding of the order is accepted everywhere)."""
    name = f"llvm.vector.reduce.fadd.v{v.type.count}f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(F32, [F32, v.type]), name)
    return builder.call(function, [ir.Constant(F32, 0.0), v], fastmath=("reassoc",))


def _hmax(builder, v):
    """The greatest lane, but for NaN; halves on halves, as LLVM's own reduction goes lane by lane."""
    while v.type.count > 1:
        v = emit_maximum(builder, half(builder, v, 0), half(builder, v, 1))
    return builder.extract_element(v, I32(0))


fma = define_for_all(3, emit_fma)  # a*b + c, rounded once
# The same of two scalars and a third.
fma_f32 = define(types.float32, (types.float32,) * 3, lambda b, *abc: call(b, "llvm.fma.f32", F32, *abc))
exact_fma = define_for_all(3, _exact_fma)  # the same where a*b is a float
maximum = define_for_all(2, emit_maximum)  # of two lanes; where one is NaN, the other
# The same where the second is never NaN: one instruction, not three that a loop's next turn would wait for.
greater = define_for_all(2, _greater)
hsum = define_for_all(1, emit_hsum, lambda vector: types.float32)  # over lanes, in any order
hmax = define_for_all(1, _hmax, lambda vector: types.float32)  # the greatest lane, but for NaN

_LOG2_E = 1.44269504088896341
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # their sum is ln 2; the first has 9 bits, so n * high is exact
# exp(r) = 1 + r + r^2 * p(r) on |r| <= ln(2)/2, relative error 2e-8: the polynomial of Cephes' expf (S. Moshier).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _exp(builder, x):
    """e^x to float32 rounding; -infinity gives 0, above 88 the value at 88, NaN stays NaN."""
    vector = x.type
    low = builder.fcmp_ordered("<", x, constant(vector, -87.0))
    bounded = builder.select(builder.fcmp_ordered(">", x, constant(vector, 88.0)), constant(vector, 88.0), x)
    bounded = builder.select(low, constant(vector, -87.0), bounded)
    n = call(builder, f"llvm.rint.v{vector.count}f32", vector, builder.fmul(bounded, constant(vector, _LOG2_E)))
    r = emit_fma(builder, n, constant(vector, -_LN2_LOW), emit_fma(builder, n, constant(vector, -_LN2_HIGH), bounded))
    p = constant(vector, _EXP[0])
    for coefficient in _EXP[1:]:
        p = emit_fma(builder, p, r, constant(vector, coefficient))
    y = builder.fadd(emit_fma(builder, p, builder.fmul(r, r), r), constant(vector, 1.0))
    integers = ir.VectorType(I32, vector.count)
    # NaN has no integer: 0 then, and the sum below brings it back.
    n = builder.select(builder.fcmp_ordered("ord", n, n), n, constant(vector, 0.0))
    power = builder.shl(builder.add(builder.fptosi(n, integers), constant(integers, 127)), constant(integers, 23))
    return builder.select(low, constant(vector, 0.0), builder.fmul(y, builder.bitcast(power, vector)))


exp = define_for_all(1, _exp)

# 2^r = 1 + r * p(r) for 0 <= r <= 1, relative error 3e-6: a fit of our own to the least largest error.
_EXP2 = (1.3426648e-2, 5.2242533e-2, 2.4128018e-1, 6.9304485e-1)


def _exp2(builder, x):
    """2^x, relative error 3e-6; -infinity gives 0, NaN stays NaN. AVX-512: what is too large or small needs no care."""
    mask, now, fraction = ir.Constant(ir.IntType(16), -1), I32(4), I32(9)  # 9: what is left of rounding down
    r = call(builder, "llvm.x86.avx512.mask.reduce.ps.512", x.type, x, fraction, x, mask, now)
    p = constant(x.type, _EXP2[0])
    for coefficient in (*_EXP2[1:], 1.0):
        p = emit_fma(builder, p, r, constant(x.type, coefficient))
    return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", x.type, p, x, p, mask, now)  # times 2^floor(x)


exp2 = define(f32x16, (f32x16,), _exp2)

# ---- integers to floats and back -------------------------------------------------------------------------------------


def emit_clamp_to_i8(builder, v, low, high):
    """Towards zero; out of low..high, or NaN -> a limit. LLVM's fptosi.sat goes lane by lane (3x slower)."""
    v = builder.select(builder.fcmp_ordered(">", v, low), v, low)
    v = builder.select(builder.fcmp_ordered("<", v, high), v, high)
    return builder.trunc(builder.fptosi(v, ir.VectorType(I32, v.type.count)), ir.VectorType(I8, v.type.count))


def _round_to_i8(builder, v):
    """Nearest, ties to even; NaN -> 0, out of range -> the nearest limit."""
    v = call(builder, "llvm.rint.v32f32", v.type, v)
    v = builder.select(builder.fcmp_ordered("ord", v, v), v, constant(v.type, 0.0))
    return emit_clamp_to_i8(builder, v, constant(v.type, -128.0), constant(v.type, 127.0))


def _of_lanes(vector: Vector) -> Vector:
    return FLOATS_BY_LANES[vector.ir.count]


_WHOLE = 1.5 * 2.0**23  # what is added to it loses its fraction, and is the lower bits of the sum


def _scaled_to_i16(builder, v, factor):
    """v * factor, within 16 bits, to nearest: in the lower 16 bits of each lane, and nothing said of the upper ones."""
    return builder.bitcast(emit_fma(builder, v, factor, constant(v.type, _WHOLE)), i32x16.ir)


round_to_i8 = define(i8x32, (f32x32,), _round_to_i8)
scaled_to_i16 = define(i32x16, (f32x16, f32x16), _scaled_to_i16)
to_f32 = define_for_all(
    1, lambda b, v: b.sitofp(v, FLOATS_BY_LANES[v.type.count].ir), _of_lanes
)  # signed lanes' values
as_f32 = define_for_all(
    1, lambda b, v: b.bitcast(v, FLOATS_BY_LANES[v.type.count].ir), _of_lanes
)  # lanes' bits, of 32 each

# ---- orders of lanes -------------------------------------------------------------------------------------------------


def picked(lanes: Sequence[int]):
    """An intrinsic f32x16(f32x16): the vector's lanes in this order."""
    return define(f32x16, (f32x16,), lambda b, v: shuffle(b, v, None, lanes))


def lookup_f32(table: Sequence[float]):
    """An intrinsic f32x16(i32x16): of 16 constants the one whose number is in the lowest 4 bits. AVX-512."""
    name, entries = "llvm.x86.avx512.permvar.sf.512", ir.Constant(f32x16.ir, [float(value) for value in table])
    return define(f32x16, (i32x16,), lambda b, v: call(b, name, f32x16.ir, entries, v))


def _add_odd(factor: float):
    """An intrinsic f32x16(total, v): total + factor * v in the odd lanes."""

    def emit(builder, total, v):
        return _exact_fma(builder, v, ir.Constant(v.type, [0.0, factor] * 8), total)

    return define(f32x16, (f32x16, f32x16), emit)


add_odd, subtract_odd = _add_odd(1.0), _add_odd(-1.0)
even_in_8, odd_in_8 = (  # lanes 0 2 4 6, each twice; lanes 1 3 5 7
    define(f32x8, (f32x8,), lambda b, v, i=i: shuffle(b, v, None, [lane // 2 * 2 + i for lane in range(8)]))
    for i in range(2)
)
even_doubled = picked([i // 2 * 2 for i in range(16)])
first_8, last_8 = (define(f32x8, (f32x16,), lambda b, v, i=i: half(b, v, i)) for i in range(2))
widened = define(f32x16, (f32x8,), lambda b, v: shuffle(b, v, constant(v.type, 0.0), range(16)))  # with zeros

# ---- scales of blocks, most of them in int64 --------------------------------------------------------------------


def _halves_in(builder, *words):
    """int64 words as a vector of 16-bit lanes."""
    vector = ir.Constant(ir.VectorType(I64, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, I32(i))
    return builder.bitcast(vector, ir.VectorType(I16, 4 * len(words)))


def _halves_doubled(builder, *words):
    """Each of 8 16-bit lanes in two neighbouring ones."""
    return shuffle(builder, _halves_in(builder, *words), None, [i // 2 for i in range(16)])


def _interleaved_bytes(builder, even, odd):
    """Two int64: their bytes as lanes even0, odd0, even1, ..., float32."""
    bytes_ = ir.VectorType(I8, 8)
    lanes = [i // 2 + 8 * (i % 2) for i in range(16)]
    both = shuffle(builder, builder.bitcast(even, bytes_), builder.bitcast(odd, bytes_), lanes)
    return builder.sitofp(builder.zext(both, i32x16.ir), f32x16.ir)


def _half_powers(builder, *words):
    """2^(e-128) in two lanes each, of 8 exponents in the 16-bit lanes of two int64; e below 2 gives a subnormal."""
    e = builder.zext(_halves_doubled(builder, *words), i32x16.ir)
    one, subnormal, exponent = (constant(e.type, value) for value in (1, 21, 23))
    # (e + 1) * 2^21 is right for 0 and 1, where e - 1 has no exponent; of all others it is the lesser number.
    tiny, normal = builder.shl(builder.add(e, one), subnormal), builder.shl(builder.sub(e, one), exponent)
    return builder.bitcast(call(builder, "llvm.smax.v16i32", e.type, normal, tiny), f32x16.ir)


def _e4m3_halved(builder, code):
    """Half of what E4M3 without a sign says; 0 where it says NaN. Bit 7 means nothing."""
    is_nan = builder.icmp_unsigned("==", code, constant(code.type, 0x7F))
    size = builder.select(is_nan, constant(code.type, 0), builder.and_(code, constant(code.type, 0x7F)))
    # As a half, whose exponent's bias is 8 more.
    bits = builder.shl(builder.zext(size, ir.VectorType(I16, 16)), constant(ir.VectorType(I16, 16), 7))
    return builder.fmul(half_to_float(builder, bits), constant(f32x16.ir, 128.0))


e4m3_halved = define(f32x16, (i8x16,), _e4m3_halved)
interleaved_bytes = define(f32x16, (types.int64, types.int64), _interleaved_bytes)
f16_lanes = define(f32x16, (types.int64,) * 4, lambda b, *words: half_to_float(b, _halves_in(b, *words)))
f16_lanes_doubled = define(f32x16, (types.int64,) * 2, lambda b, *words: half_to_float(b, _halves_doubled(b, *words)))
half_powers = define(f32x16, (types.int64,) * 2, _half_powers)
