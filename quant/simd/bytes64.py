"""The SIMD vocabulary of the decode kernels, beside simd.py's: 64 bytes of weights at a time.

That is one register of AVX-512, two of AVX2, or plain LLVM vectors below. A quarter is 16 bytes of such a vector: most
operations on lanes stay within it. Intrinsics' names and types as of LLVM 22.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils

from quant.simd.core import (
    F16,
    F32,
    I8,
    I16,
    I32,
    I64,
    Vector,
    call,
    constant,
    define,
    f32x8,
    f32x16,
    half_to_float,
    i8x32,
    load,
    shuffle,
    splat,
)
from quant.target import isa

i8x64, i32x16 = Vector(I8, 64, "i8x64"), Vector(I32, 16, "i32x16")

# What signed weights are raised by before a product of 64: AVX-512 multiplies unsigned with signed bytes only.
BIAS = 128 if isa.has("avx512_vnni") else 0


def _by_halves(builder, emit: Callable, *vectors):
    """emit(*halves) for the first and for the second halves of all vectors, joined."""

    def half(v, i):
        return shuffle(builder, v, None, range(i * v.type.count // 2, (i + 1) * v.type.count // 2))

    low, high = (emit(*(half(v, i) for v in vectors)) for i in range(2))
    return shuffle(builder, low, high, range(2 * low.type.count))


def _strided(load_one: Callable, count: int, lanes: int):
    """emit(builder, address, stride): `count` small vectors of `lanes`, `stride` bytes apart, joined."""

    def emit(builder, address, stride):
        parts = [load_one(builder, builder.add(address, builder.mul(stride, I64(i)))) for i in range(count)]
        while len(parts) > 1:
            width = range(2 * parts[0].type.count)
            parts = [shuffle(builder, a, b, width) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    return emit


# ---- memory ----------------------------------------------------------------------------------------------------------


def stack(n_bytes: int):
    """An intrinsic int64(): the address of n_bytes that live as long as the kernel's call, 64-byte aligned."""

    def emit(builder):
        memory = cgutils.alloca_once(builder, ir.VectorType(I8, 64), size=(n_bytes + 63) // 64)
        memory.align = 64
        return builder.ptrtoint(memory, I64)

    return define(types.int64, (), emit)


load_i8x64 = define(i8x64, (types.int64,), lambda b, p: load(b, p, i8x64.ir))
load_twice = define(i8x64, (types.int64,), lambda b, p: shuffle(b, load(b, p, i8x32.ir), None, [*range(32)] * 2))
load_quarters = define(  # of 16 bytes each, `stride` bytes apart
    i8x64, (types.int64, types.int64), _strided(lambda b, p: load(b, p, ir.VectorType(I8, 16)), 4, 16)
)
load_halves = define(  # of 32 bytes each, `stride` bytes apart
    i8x64, (types.int64, types.int64), _strided(lambda b, p: load(b, p, i8x32.ir), 2, 32)
)

# ---- bits of the weights ---------------------------------------------------------------------------------------------


def _mask_bits(builder, v, bits):
    return builder.and_(v, splat(builder, builder.trunc(bits, I8), v.type))


def _set_where(builder, v, mask, value):
    """v | value in the lanes whose bit of the 64-bit mask is set."""
    marks = splat(builder, builder.trunc(value, I8), v.type)
    if isa.has("avx512_vnni"):
        lanes = builder.bitcast(mask, ir.VectorType(ir.IntType(1), 64))
    else:  # LLVM would take the mask apart bit by bit
        copies = builder.bitcast(splat(builder, mask, ir.VectorType(I64, 8)), v.type)
        its_byte = shuffle(builder, copies, None, [i // 16 * 16 + i // 8 for i in range(64)])
        its_bit = ir.Constant(v.type, [1 << i % 8 for i in range(64)])
        lanes = builder.icmp_unsigned("==", builder.and_(its_byte, its_bit), its_bit)
    return builder.or_(v, builder.select(lanes, marks, constant(v.type, 0)))


def shifted(first: int, second: int):
    """An intrinsic i8x64(i8x64): the halves' 32-bit words shifted left by so many bits each (right if negative).

    Bits cross from byte to byte, so a mask must follow. Both counts have one sign.
    """
    words = ir.VectorType(I32, 16)
    counts = ir.Constant(words, [abs(first)] * 8 + [abs(second)] * 8)

    def emit(builder, v):
        shift = builder.lshr if min(first, second) < 0 else builder.shl
        return builder.bitcast(shift(builder.bitcast(v, words), counts), i8x64.ir)

    return define(i8x64, (i8x64,), emit)


def lookup_in_64(table: Sequence[int]):
    """An intrinsic i8x64(i8x64): table[index] per lane, for a table of 16 constants and indices below 16."""
    entries = [int(value) & 0xFF for value in table]

    def emit(builder, index):
        if isa.has("avx512_vnni"):
            return call(builder, "llvm.x86.avx512.pshuf.b.512", i8x64.ir, ir.Constant(i8x64.ir, entries * 4), index)
        if isa.has("avx2"):
            half = ir.Constant(i8x32.ir, entries * 2)
            return _by_halves(builder, lambda v: call(builder, "llvm.x86.avx2.pshuf.b", i8x32.ir, half, v), index)
        found = ir.Constant(i8x64.ir, ir.Undefined)
        for lane in range(64):
            entry = builder.extract_element(index, I32(lane))
            value = builder.extract_element(ir.Constant(ir.VectorType(I8, 16), entries), entry)
            found = builder.insert_element(found, value, I32(lane))
        return found

    return define(i8x64, (i8x64,), emit)


low_nibbles = define(i8x64, (i8x64,), lambda b, v: b.and_(v, constant(v.type, 15)))
high_nibbles = define(i8x64, (i8x64,), lambda b, v: b.lshr(v, constant(v.type, 4)))
or_masked = define(  # v | (w & bits)
    i8x64, (i8x64, i8x64, types.int64), lambda b, v, w, bits: b.or_(v, _mask_bits(b, w, bits))
)
set_where = define(i8x64, (i8x64, types.int64, types.int64), _set_where)
biased = define(i8x64, (i8x64,), lambda b, v: b.xor(v, constant(v.type, 128)) if BIAS else v)
even_quarters = define(  # 0 and 2 of v, then 0 and 2 of w
    i8x64,
    (i8x64, i8x64),
    lambda b, v, w: shuffle(b, v, w, [16 * q + i for q in (0, 2, 4, 6) for i in range(16)]),
)
odd_quarters = define(
    i8x64,
    (i8x64, i8x64),
    lambda b, v, w: shuffle(b, v, w, [16 * q + i for q in (1, 3, 5, 7) for i in range(16)]),
)

# ---- integer dot products --------------------------------------------------------------------------------------------


def _pair_products_avx2(builder, u, x):
    """Sums of u*x over each 4 lanes of 32; 2*128*127 = 32512 fits the saturating 16-bit sum of vpmaddubsw."""
    pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), u, x)
    return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), pairs, constant(pairs.type, 1))


def _dot(builder, total, w, x, widen: Callable):
    """total + sum of w*x over each 4 lanes, plain LLVM."""
    wide = ir.VectorType(I32, 64)
    products = builder.mul(widen(w, wide), builder.sext(x, wide))
    for lane in range(4):
        total = builder.add(total, shuffle(builder, products, None, range(lane, 64, 4)))
    return total


def emit_dot_u8(builder, total, u, x):
    """total + sum of u*x over each 4 lanes; u unsigned, and at most 128 below AVX-512, x signed, not below -127."""
    if isa.has("avx512_vnni"):
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", i32x16.ir, total, u, x)
    if isa.has("avx2"):
        products = _by_halves(builder, lambda u, x: _pair_products_avx2(builder, u, x), u, x)
        return builder.add(total, products)
    return _dot(builder, total, u, x, builder.zext)


def _dot_biased(builder, total, w, x):
    """total + sum of w*x over each 4 lanes; w = the weight + BIAS, x signed, not below -127."""
    if BIAS:
        return emit_dot_u8(builder, total, w, x)
    if isa.has("avx2"):

        def half(w, x):
            sign = "llvm.x86.avx2.psign.b"
            return _pair_products_avx2(builder, call(builder, sign, w.type, w, w), call(builder, sign, x.type, x, w))

        return builder.add(total, _by_halves(builder, half, w, x))
    return _dot(builder, total, w, x, builder.sext)


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
            packed = call(builder, "llvm.x86.avx2.packssdw", ir.VectorType(I16, 16), a, b)
            return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), packed, constant(packed.type, 1))

        return _by_halves(builder, half, a, b)
    return _pair_sums_wide(builder, a, b)


zero_i32x16 = define(i32x16, (), lambda b: constant(i32x16.ir, 0))
dot_u8x64 = define(i32x16, (i32x16, i8x64, i8x64), emit_dot_u8)
dot_biased = define(i32x16, (i32x16, i8x64, i8x64), _dot_biased)
pair_sums = define(i32x16, (i32x16, i32x16), _pair_sums)
pair_sums_wide = define(i32x16, (i32x16, i32x16), _pair_sums_wide)

# ---- floats ----------------------------------------------------------------------------------------------------------


def _floats(builder, halves):
    """Vector of IEEE half bits (i16) -> float32."""
    lanes = halves.type.count
    if isa.target_has("f16c"):
        return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, lanes)), ir.VectorType(F32, lanes))
    floats = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    for lane in range(lanes):
        scalar = half_to_float(builder, builder.extract_element(halves, I32(lane)))
        floats = builder.insert_element(floats, scalar, I32(lane))
    return floats


def _halves_in(builder, *words):
    """int64 words as a vector of 16-bit lanes."""
    vector = ir.Constant(ir.VectorType(I64, len(words)), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, I32(i))
    return builder.bitcast(vector, ir.VectorType(I16, 4 * len(words)))


def _f16_pair(builder, address):
    """The two f16 at the address, in turn over all lanes."""
    pair = splat(builder, load(builder, address, I32), ir.VectorType(I32, 8))
    return _floats(builder, builder.bitcast(pair, ir.VectorType(I16, 16)))


def _f16_everywhere(builder, address):
    return _floats(builder, splat(builder, load(builder, address, I16), ir.VectorType(I16, 16)))


def _interleaved_bytes(builder, even, odd):
    """Two int64: their bytes as lanes even0, odd0, even1, ..., float32."""
    bytes_ = ir.VectorType(I8, 8)
    lanes = [i // 2 + 8 * (i % 2) for i in range(16)]
    both = shuffle(builder, builder.bitcast(even, bytes_), builder.bitcast(odd, bytes_), lanes)
    return builder.sitofp(builder.zext(both, i32x16.ir), f32x16.ir)


def _half_powers(builder, *words):
    """2^(e-128) in two lanes each, of 8 exponents in the 16-bit lanes of two int64; e below 2 gives a subnormal."""
    wide = ir.VectorType(I32, 16)
    e = builder.zext(shuffle(builder, _halves_in(builder, *words), None, [i // 2 for i in range(16)]), wide)
    normal = builder.shl(builder.sub(e, constant(wide, 1)), constant(wide, 23))
    tiny = builder.shl(constant(wide, 0x00200000), builder.and_(e, constant(wide, 1)))
    return builder.bitcast(builder.select(builder.icmp_unsigned("<", e, constant(wide, 2)), tiny, normal), f32x16.ir)


def picked(lanes: Sequence[int]):
    """An intrinsic f32x16(f32x16): the vector's lanes in this order."""
    return define(f32x16, (f32x16,), lambda b, v: shuffle(b, v, None, lanes))


def load_i8x16_picked(lanes: Sequence[int]):
    """An intrinsic f32x16(address): 16 signed bytes in this order, as floats."""

    def emit(builder, address):
        lanes_ = shuffle(builder, load(builder, address, ir.VectorType(I8, 16)), None, lanes)
        return builder.sitofp(builder.sext(lanes_, i32x16.ir), f32x16.ir)

    return define(f32x16, (types.int64,), emit)


def _add_odd(factor: float):
    """An intrinsic f32x16(total, v): total + factor * v in the odd lanes."""

    def emit(builder, total, v):
        return call(builder, "llvm.fma.v16f32", v.type, v, ir.Constant(v.type, [0.0, factor] * 8), total)

    return define(f32x16, (f32x16, f32x16), emit)


def _fma_by(builder, factor, v, total):
    return call(builder, "llvm.fma.v16f32", v.type, splat(builder, factor, v.type), v, total)


add_odd, subtract_odd = _add_odd(1.0), _add_odd(-1.0)
even_doubled = picked([i // 2 * 2 for i in range(16)])
to_f32x16 = define(f32x16, (i32x16,), lambda b, v: b.sitofp(v, f32x16.ir))
add_scaled = define(f32x16, (types.float32, f32x16, f32x16), _fma_by)  # factor * v + total
widened = define(f32x16, (f32x8,), lambda b, v: shuffle(b, v, constant(v.type, 0.0), range(16)))
interleaved_bytes = define(f32x16, (types.int64, types.int64), _interleaved_bytes)
load_f16_pair = define(f32x16, (types.int64,), _f16_pair)
load_f16_everywhere = define(f32x16, (types.int64,), _f16_everywhere)
f16_lanes = define(f32x16, (types.int64,) * 4, lambda b, *words: _floats(b, _halves_in(b, *words)))
f16_lanes_doubled = define(  # each of the 8 halves in two neighbouring lanes
    f32x16,
    (types.int64,) * 2,
    lambda b, *words: _floats(b, shuffle(b, _halves_in(b, *words), None, [i // 2 for i in range(16)])),
)
half_powers = define(f32x16, (types.int64,) * 2, _half_powers)
