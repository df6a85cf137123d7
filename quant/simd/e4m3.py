"""FP8 E4M3 to float32 and back: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, NaN is all ones.

Source: OCP 8-bit Floating Point Specification 1.0.
"""

from llvmlite import ir
from numba import types

from quant.simd.core import I8, I32, call, constant, define, f32x16, load, store

LARGEST = 448.0


def _load(builder, address):
    """16 bytes as float32: exponent and mantissa moved to their places, the exponent's bias added.

    Below 2^-6 there is no hidden bit: it is put in with the exponent and subtracted. (A multiplication with 2^120 would
    do for all, but float32 subnormals on the way cost over a hundred cycles each.)
    """
    code = builder.zext(load(builder, address, ir.VectorType(I8, 16)), ir.VectorType(I32, 16))
    size = builder.and_(code, constant(code.type, 0x7F))
    moved = builder.shl(size, constant(code.type, 20))
    value = builder.add(moved, constant(code.type, 120 << 23))
    small = builder.bitcast(builder.add(moved, constant(code.type, 121 << 23)), f32x16.ir)
    small = builder.bitcast(builder.fsub(small, constant(f32x16.ir, 2.0**-6)), code.type)
    value = builder.select(builder.icmp_unsigned("<", size, constant(code.type, 8)), small, value)
    is_nan = builder.icmp_unsigned("==", size, constant(code.type, 0x7F))
    value = builder.select(is_nan, constant(code.type, 0x7FC00000), value)
    sign = builder.shl(builder.and_(code, constant(code.type, 0x80)), constant(code.type, 24))
    return builder.bitcast(builder.or_(value, sign), f32x16.ir)


def _store(builder, address, x):
    """16 floats of up to LARGEST, to nearest, ties to even. What is beyond becomes NaN, as NaN does."""
    bits = builder.bitcast(x, ir.VectorType(I32, 16))
    size = builder.and_(bits, constant(bits.type, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, constant(bits.type, 20)), constant(bits.type, 1))
    rounded = builder.add(builder.add(size, constant(bits.type, 0x7FFFF)), odd)
    normal = builder.sub(builder.lshr(rounded, constant(bits.type, 20)), constant(bits.type, 120 << 3))
    # Below 2^-6 a code is a multiple of 2^-9, the last place of numbers from 2^14 on.
    shifted = builder.fadd(builder.bitcast(size, x.type), constant(x.type, 2.0**14))
    small = builder.sub(builder.bitcast(shifted, bits.type), constant(bits.type, (127 + 14) << 23))
    is_small = builder.icmp_unsigned("<", size, constant(bits.type, 121 << 23))
    code = builder.select(is_small, small, normal)
    code = call(builder, "llvm.umin.v16i32", code.type, code, constant(code.type, 0x7F))
    sign = builder.and_(builder.lshr(bits, constant(bits.type, 24)), constant(bits.type, 0x80))
    store(builder, address, builder.trunc(builder.or_(code, sign), ir.VectorType(I8, 16)))


load_e4m3x16 = define(f32x16, (types.int64,), _load)
store_e4m3x16 = define(types.void, (types.int64, f32x16), _store)
