"""Integer dot products of vectors of bytes and of words of 16 bits, and sums over neighbours.

32 bytes are one register of AVX2; 64 are one of AVX-512, two of AVX2.

Signed weights. AVX-512's and AVX2's byte products take unsigned times signed bytes: sums of u*x, with 0 <= u < 256. For
signed weights a, 128 is added beforehand, and taken back afterwards by a product with the sum of x, which the quantised
activations carry (gemv/activations.py):

    sum a*x = sum (a + 128)*x - 128 * sum x
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types

from quant.simd.core import (
    F32,
    I16,
    I32,
    I64,
    by_halves,
    call,
    constant,
    define,
    define_typed,
    i8x32,
    i8x64,
    i32x8,
    i32x16,
    shuffle,
    splat,
)
from quant.target import isa

# What signed weights are raised by before a product of 64 bytes. 0 where the sign is moved to the other operand
# instead: products above 128 * 127 don't fit AVX2's sums in 16 bits.
WEIGHT_BIAS = 128 if isa.has("avx512_vnni") else 0


def emit_pairs_u8(builder, u, x):
    """AVX2, 32 bytes: u*x of neighbours added, in 16 bits, which saturate; u unsigned, x signed."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), u, x)


def emit_pairs_i16(builder, v):
    """AVX2, 16 lanes of 16 bits: neighbours added, in 32 bits."""
    return call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.ir, v, constant(v.type, 1))


def _dots_neon(builder, name: str, total, a, b):
    """total + sum of a*b over each 4 lanes, 16 bytes at a time: sdot of signed bytes, usdot of unsigned and signed."""
    if a.type.count > 16:
        return by_halves(builder, lambda *parts: _dots_neon(builder, name, *parts), total, a, b)
    return call(builder, f"llvm.aarch64.neon.{name}.v4i32.v16i8", total.type, total, a, b)


def _dots_avx2(builder, u, x):
    """Sums of u*x over each 4 of 32 lanes; 2*128*127 = 32512 fits the saturating 16-bit sum."""
    return emit_pairs_i16(builder, emit_pairs_u8(builder, u, x))


def _add_dots(builder, total, w, x, widen: Callable):
    """total + sum of w*x over each 4 lanes, plain LLVM: 16 at a time, which fit the registers of any CPU."""
    count = x.type.count
    if count > 16:
        return by_halves(builder, lambda total, w, x: _add_dots(builder, total, w, x, widen), total, w, x)
    wide = ir.VectorType(I16, count)
    pairs = emit_dot_i16(builder, constant(ir.VectorType(I32, count // 2), 0), widen(w, wide), builder.sext(x, wide))
    even, odd = (shuffle(builder, pairs, None, range(first, count // 2, 2)) for first in (0, 1))
    return builder.add(total, builder.add(even, odd))


def emit_dot_u8(builder, total, u, x):
    """total + sum of u*x over each 4 lanes; u unsigned, below 128 but for AVX-512, x signed, not below -127."""
    count = x.type.count
    if isa.has(isa.NEON):
        return _dots_neon(builder, "usdot" if isa.target_has("i8mm") else "sdot", total, u, x)
    if isa.has("avx512_vnni"):
        return call(builder, f"llvm.x86.avx512.vpdpbusd.{8 * count}", total.type, total, u, x)
    if isa.has("avx2"):
        dots = _dots_avx2 if count == 32 else lambda b, u, x: by_halves(b, lambda u, x: _dots_avx2(b, u, x), u, x)
        return builder.add(total, dots(builder, u, x))
    return _add_dots(builder, total, u, x, builder.zext)


def _dots_of_two(builder, u, x, v, y):
    """Sums of u*x and of v*y over each 4 lanes, as emit_dot_u8's; 8 such products must add up to less than 2^15."""
    if isa.has("avx2") and not isa.has("avx512_vnni"):

        def half(u, x, v, y):
            return emit_pairs_i16(builder, builder.add(emit_pairs_u8(builder, u, x), emit_pairs_u8(builder, v, y)))

        return half(u, x, v, y) if u.type.count == 32 else by_halves(builder, half, u, x, v, y)
    zero = constant(ir.VectorType(I32, u.type.count // 4), 0)
    return emit_dot_u8(builder, emit_dot_u8(builder, zero, u, x), v, y)


def emit_dot_i8(builder, total, w, x):
    """total + sum of w*x over each 4 lanes, both signed, x not below -127: |w| times x with w's sign."""
    if isa.has(isa.NEON):
        return _dots_neon(builder, "sdot", total, w, x)
    negative = builder.icmp_signed("<", w, constant(w.type, 0))
    magnitude = builder.select(negative, builder.neg(w), w)
    return emit_dot_u8(builder, total, magnitude, builder.select(negative, builder.neg(x), x))


def _dot_biased(builder, total, w, x):
    """total + sum of w*x over each 4 lanes; w = the weight + WEIGHT_BIAS, x signed, not below -127."""
    if WEIGHT_BIAS:
        return emit_dot_u8(builder, total, w, x)
    if isa.has(isa.NEON):
        return _dots_neon(builder, "sdot", total, w, x)
    if isa.has("avx2"):

        def half(w, x):
            sign = "llvm.x86.avx2.psign.b"
            return _dots_avx2(builder, call(builder, sign, w.type, w, w), call(builder, sign, x.type, x, w))

        return builder.add(total, by_halves(builder, half, w, x))
    return _add_dots(builder, total, w, x, builder.sext)


def _packed_i16(builder, a, b):
    """Two i32x8 as 16 lanes of 16 bits, which they fit: 4 of a and 4 of b in each half."""
    if isa.has("avx2"):
        return builder.bitcast(call(builder, "llvm.x86.avx2.packssdw", ir.VectorType(I16, 16), a, b), i8x32.ir)
    low, high = (builder.trunc(v, ir.VectorType(I16, 8)) for v in (a, b))
    both = shuffle(builder, low, high, [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)])
    return builder.bitcast(both, i8x32.ir)


def emit_dot_i16(builder, total, a, b):
    """total + sum of a*b over each 2 lanes of 16 bits."""
    lanes = 2 * total.type.count
    a, b = (builder.bitcast(v, ir.VectorType(I16, lanes)) for v in (a, b))
    if isa.has("avx512_vnni"):
        return call(builder, f"llvm.x86.avx512.vpdpwssd.{16 * lanes}", total.type, total, a, b)
    if isa.has("avx2") and lanes == 16:
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", total.type, a, b))
    wide = ir.VectorType(I32, lanes)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (shuffle(builder, products, None, range(first, lanes, 2)) for first in (0, 1))
    return builder.add(total, builder.add(even, odd))


def _products_i16(builder, a, b):
    """Sums of a*b over each 2 lanes of 16 bits."""
    if isa.has("avx2"):
        a, b = (builder.bitcast(v, ir.VectorType(I16, 16)) for v in (a, b))
        return call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.ir, a, b)
    return emit_dot_i16(builder, constant(i32x8.ir, 0), a, b)


def pairs_of(first: int, second: int):
    """An intrinsic i8x32(): two numbers of 16 bits in turn."""
    return define(i8x32, (), lambda b: b.bitcast(ir.Constant(ir.VectorType(I16, 16), [first, second] * 8), i8x32.ir))


def _bytes_twice(builder, low, high):
    words = ir.Constant(ir.VectorType(I64, 2), ir.Undefined)
    words = builder.insert_element(builder.insert_element(words, low, I32(0)), high, I32(1))
    return builder.bitcast(shuffle(builder, words, None, [0, 1, 0, 1]), i8x32.ir)


bytes_twice = define(i8x32, (types.int64, types.int64), _bytes_twice)  # two int64, twice
packed_i16 = define(i8x32, (i32x8, i32x8), _packed_i16)
dot_i16 = define(i32x8, (i32x8, i8x32, i8x32), emit_dot_i16)
products_i16 = define(i32x8, (i8x32, i8x32), _products_i16)
shifted_i16 = define(  # lanes of 16 bits, without sign, to the right
    i8x32,
    (i8x32, types.int64),
    lambda b, v, n: b.bitcast(
        b.lshr(b.bitcast(v, ir.VectorType(I16, 16)), splat(b, b.trunc(n, I16), ir.VectorType(I16, 16))), v.type
    ),
)


def _define_dot(emit: Callable):
    """An intrinsic total(total, w, x): i32x8 of i8x32, i32x16 of i8x64."""

    def typed(total, w, x):
        fits = w == x and (total, w) in ((i32x8, i8x32), (i32x16, i8x64))
        return (total(total, w, x), emit) if fits else None

    return define_typed(3, typed)


def _pair_sums_wide(builder, a, b):
    """Sums of neighbours: a01 a23 b01 b23 in each quarter."""
    even = [4 * quarter + lane for quarter in range(4) for lane in (0, 2, 16, 18)]
    return builder.add(shuffle(builder, a, b, even), shuffle(builder, a, b, [lane + 1 for lane in even]))


def _pair_sums(builder, a, b):
    """The same for lanes that fit 16 bits: one instruction less, on the port that is busiest."""
    if isa.has("avx512_vnni"):
        packed = call(builder, "llvm.x86.avx512.packssdw.512", ir.VectorType(I16, 32), a, b)
        return call(builder, "llvm.x86.avx512.pmaddw.d.512", i32x16.ir, packed, constant(packed.type, 1))
    if isa.has("avx2"):

        def half(a, b):
            return emit_pairs_i16(builder, call(builder, "llvm.x86.avx2.packssdw", ir.VectorType(I16, 16), a, b))

        return by_halves(builder, half, a, b)
    return _pair_sums_wide(builder, a, b)


def _half_sum(half: int):
    """An intrinsic float32(i8x32): the sum of 16 signed lanes."""

    def emit(builder, v):
        dots = emit_dot_u8(builder, constant(i32x8.ir, 0), constant(v.type, 1), v)
        dots = shuffle(builder, dots, None, range(4 * half, 4 * half + 4))
        return builder.sitofp(call(builder, "llvm.vector.reduce.add.v4i32", I32, dots), F32)

    return define(types.float32, (i8x32,), emit)


dot_u8 = _define_dot(emit_dot_u8)
dot_i8 = _define_dot(emit_dot_i8)
dot_biased = _define_dot(_dot_biased)
dots_of_two = define_typed(
    4, lambda *args: ({i8x32: i32x8, i8x64: i32x16}[args[0]](*args), _dots_of_two) if len({*args}) == 1 else None
)
pair_sums = define(i32x16, (i32x16, i32x16), _pair_sums)
pair_sums_wide = define(i32x16, (i32x16, i32x16), _pair_sums_wide)
# Signed lanes + WEIGHT_BIAS:
biased = define(i8x64, (i8x64,), lambda b, v: b.xor(v, constant(v.type, 128)) if WEIGHT_BIAS else v)
sum_first_i8, sum_second_i8 = _half_sum(0), _half_sum(1)
