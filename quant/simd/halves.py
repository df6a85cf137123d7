"""16-bit floats: IEEE halves and bfloat16 to float32 and back, exact or rounded to nearest, ties to even. Emits code.

Without F16C LLVM would call runtime functions for halves that are not there (measured: a crash), so they are spelt out.
"""

from llvmlite import ir

from quant.simd.core import F16, F32, I16, I32, call, constant
from quant.target import isa


def _is_native() -> bool:
    """Whether LLVM's own conversions can be used: with F16C, or where there is no x86."""
    return isa.target_has("f16c") or not isa.host_features() & {"sse2"}


def half_to_float(builder, bits):
    """IEEE half (i16 bits, one or a vector) -> float, exact, subnormals, infinities and NaN included."""
    if not isinstance(bits.type, ir.VectorType):
        single = builder.insert_element(ir.Constant(ir.VectorType(I16, 1), ir.Undefined), bits, I32(0))
        return builder.extract_element(half_to_float(builder, single), I32(0))
    floats, wide = (ir.VectorType(element, bits.type.count) for element in (F32, I32))
    if _is_native():
        return builder.fpext(builder.bitcast(bits, ir.VectorType(F16, bits.type.count)), floats)
    # The exponent is moved by a multiplication with 2^112, as in ggml's portable fp16 code.
    bits = builder.zext(bits, wide)
    sign = builder.shl(builder.and_(bits, constant(wide, 0x8000)), constant(wide, 16))
    magnitude = builder.shl(builder.and_(bits, constant(wide, 0x7FFF)), constant(wide, 13))
    value = builder.fmul(builder.bitcast(magnitude, floats), constant(floats, 2.0**112))
    # All bits where it is infinite or NaN, without a comparison: LLVM would narrow and widen its lanes.
    special = builder.ashr(builder.sub(constant(wide, (0x7C00 << 13) - 1), magnitude), constant(wide, 31))
    value = builder.or_(builder.bitcast(value, wide), builder.and_(special, constant(wide, 0x7F800000)))
    return builder.bitcast(builder.or_(value, sign), floats)


def float_to_half(builder, x):
    """float32 vector -> IEEE halves' bits, to nearest, ties to even; beyond the range -> infinity; NaN -> NaN."""
    narrow = ir.VectorType(I16, x.type.count)
    if _is_native():
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(F16, x.type.count)), narrow)
    wide = ir.VectorType(I32, x.type.count)
    bits = builder.bitcast(x, wide)
    magnitude = builder.and_(bits, constant(wide, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, constant(wide, 13)), constant(wide, 1))
    rounded = builder.add(builder.add(magnitude, constant(wide, 0xFFF - (112 << 23))), odd)
    normal = builder.lshr(rounded, constant(wide, 13))
    nan = builder.icmp_unsigned(">", magnitude, constant(wide, 0x7F800000))
    most = builder.select(nan, constant(wide, 0x7E00), constant(wide, 0x7C00))
    normal = call(builder, f"llvm.umin.v{wide.count}i32", wide, normal, most)
    # A subnormal is a multiple of 2^-24, the last place of numbers from 0.5 on.
    shifted = builder.fadd(builder.bitcast(magnitude, x.type), constant(x.type, 0.5))
    subnormal = builder.sub(builder.bitcast(shifted, wide), constant(wide, 0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, constant(wide, 113 << 23))
    sign = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 0x8000))
    return builder.trunc(builder.or_(builder.select(small, subnormal, normal), sign), narrow)


def bfloat_to_float(builder, bits):
    """bfloat16 vector (i16 bits) -> float32: its upper half."""
    wide = builder.zext(bits, ir.VectorType(I32, bits.type.count))
    return builder.bitcast(builder.shl(wide, constant(wide.type, 16)), ir.VectorType(F32, bits.type.count))


def float_to_bfloat(builder, x):
    """float32 vector -> its upper halves' bits, to nearest, ties to even; NaN -> NaN."""
    wide = ir.VectorType(I32, x.type.count)
    bits = builder.bitcast(x, wide)
    odd = builder.and_(builder.lshr(bits, constant(wide, 16)), constant(wide, 1))
    rounded = builder.add(builder.add(bits, constant(wide, 0x7FFF)), odd)
    quiet = builder.or_(bits, constant(wide, 1 << 22))  # the lower half may have been all that told it from infinity
    rounded = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(rounded, constant(wide, 16)), ir.VectorType(I16, x.type.count))
