"""The SIMD vocabulary of the kernels: opaque Numba vector types and the operations on them.

A vector is a Numba type whose data model is an LLVM vector; an operation is a Numba intrinsic that emits LLVM IR, or a
machine instruction where isa.LEVEL allows one. LLVM splits vectors that are wider than the machine's, so every
operation here is right on any CPU; the instructions only make it fast. Memory is reached by address (int64, unaligned).

Integer vectors have no sign; operations say how they read them. Names: i8x32 is 32 lanes of 8 bits.
Intrinsics' names and types as of LLVM 22.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from quant.target import isa

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class Vector(types.Type):
    """A Numba type standing for an LLVM vector of `lanes` elements."""

    def __init__(self, element: ir.Type, lanes: int, name: str):
        self.ir = ir.VectorType(element, lanes)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector: Vector):
        super().__init__(manager, vector, vector.ir)


i8x16, i8x32 = Vector(I8, 16, "i8x16"), Vector(I8, 32, "i8x32")
i32x8 = Vector(I32, 8, "i32x8")
f32x8, f32x16, f32x32 = (Vector(F32, lanes, f"f32x{lanes}") for lanes in (8, 16, 32))


# ---- building blocks of the definitions below ------------------------------------------------------------------------


def define(result: types.Type, arguments: tuple[types.Type, ...], emit: Callable):
    """An intrinsic `result(*arguments)` whose body is emit(builder, *values) -> value (None for void)."""
    signature = result(*arguments)

    def codegen(context, builder, _, values):
        value = emit(builder, *values)
        return context.get_dummy_value() if value is None else value

    typers = (  # Numba reads an intrinsic's arity from its Python signature
        lambda context: (signature, codegen),
        lambda context, a: (signature, codegen),
        lambda context, a, b: (signature, codegen),
        lambda context, a, b, c: (signature, codegen),
        lambda context, a, b, c, d: (signature, codegen),
        lambda context, a, b, c, d, e: (signature, codegen),
        lambda context, a, b, c, d, e, f: (signature, codegen),
        lambda context, a, b, c, d, e, f, g: (signature, codegen),
        lambda context, a, b, c, d, e, f, g, h: (signature, codegen),
    )
    return intrinsic(typers[len(arguments)])


def call(builder, name: str, result: ir.Type, *values):
    """Call the LLVM function `name`, declared on first use."""
    function_type = ir.FunctionType(result, [v.type for v in values])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), values)


def pointer(builder, address, element: ir.Type):
    """The int64 `address` as a pointer to `element`."""
    return builder.inttoptr(address, element.as_pointer())


def load(builder, address, type_: ir.Type):
    """An unaligned load."""
    value = builder.load(pointer(builder, address, type_))
    value.align = 1
    return value


def store(builder, address, value) -> None:
    """An unaligned store."""
    builder.store(value, pointer(builder, address, value.type)).align = 1


def shuffle(builder, a, b, lanes):
    """Pick `lanes` from the concatenation of a and b (b None: from a)."""
    other = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, other, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder, scalar, vector: ir.VectorType):
    """A vector with `scalar` in every lane."""
    undefined = ir.Constant(ir.VectorType(scalar.type, vector.count), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, scalar, I32(0)), None, [0] * vector.count)


def constant(vector: ir.VectorType, value):
    """A constant vector with `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def half_to_float(builder, bits):
    """IEEE half (i16 bits) -> float, exact, subnormals, infinities and NaN included.

    Without F16C LLVM would call a runtime function that is not there (measured: a crash), so the exponent is moved
    by a multiplication with 2^112, as in ggml's portable fp16 code.
    """
    if isa.target_has("f16c") or not isa.host_features() & {"sse2"}:
        return builder.fpext(builder.bitcast(bits, F16), F32)
    wide = builder.zext(bits, I32)
    sign = builder.shl(builder.and_(wide, I32(0x8000)), I32(16))
    magnitude = builder.shl(builder.and_(wide, I32(0x7FFF)), I32(13))
    value = builder.fmul(builder.bitcast(magnitude, F32), ir.Constant(F32, 2.0**112))
    special = builder.icmp_unsigned(">=", magnitude, I32(0x7C00 << 13))
    infinite = builder.or_(magnitude, I32(0x7F800000))
    magnitude = builder.select(special, infinite, builder.bitcast(value, I32))
    return builder.bitcast(builder.or_(magnitude, sign), F32)


# ---- scalars in memory -----------------------------------------------------------------------------------------------

load_u8 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I8), I64))
load_i8 = define(types.int64, (types.int64,), lambda b, p: b.sext(load(b, p, I8), I64))
load_u16 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I16), I64))
load_u32 = define(types.int64, (types.int64,), lambda b, p: b.zext(load(b, p, I32), I64))
load_i64 = define(types.int64, (types.int64,), lambda b, p: load(b, p, I64))
load_f32 = define(types.float32, (types.int64,), lambda b, p: load(b, p, F32))
load_f16 = define(types.float32, (types.int64,), lambda b, p: half_to_float(b, load(b, p, I16)))
bits_to_f32 = define(types.float32, (types.int64,), lambda b, v: b.bitcast(b.trunc(v, I32), F32))
store_i64 = define(types.void, (types.int64, types.int64), store)
store_f32 = define(types.void, (types.int64, types.float32), store)


def emit_prefetch(builder, address, locality: int) -> None:
    """Read; locality 2 is prefetcht1 (into L2), 3 is prefetcht0 (into L1)."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), pointer(builder, address, I8), I32(0), I32(locality), I32(1))


# Streamed weights are first brought into L2: measured 1.4x over prefetcht0.
prefetch = define(types.void, (types.int64,), lambda b, p: emit_prefetch(b, p, 2))
prefetch_near = define(types.void, (types.int64,), lambda b, p: emit_prefetch(b, p, 3))

# ---- vectors in memory -----------------------------------------------------------------------------------------------

load_i8x16 = define(i8x16, (types.int64,), lambda b, p: load(b, p, i8x16.ir))
load_i8x32 = define(i8x32, (types.int64,), lambda b, p: load(b, p, i8x32.ir))
load_f32x16 = define(f32x16, (types.int64,), lambda b, p: load(b, p, f32x16.ir))
load_f32x32 = define(f32x32, (types.int64,), lambda b, p: load(b, p, f32x32.ir))
store_i8x16 = define(types.void, (types.int64, i8x16), store)
store_i8x32 = define(types.void, (types.int64, i8x32), store)
store_f32x16 = define(types.void, (types.int64, f32x16), store)
store_f32x32 = define(types.void, (types.int64, f32x32), store)


def _load_bf16x16(builder, address):
    bits = builder.zext(load(builder, address, ir.VectorType(I16, 16)), ir.VectorType(I32, 16))
    return builder.bitcast(builder.shl(bits, constant(bits.type, 16)), f32x16.ir)


def emit_load_f16x16(builder, address):
    halves = load(builder, address, ir.VectorType(I16, 16))
    if isa.target_has("f16c"):
        return builder.fpext(builder.bitcast(halves, ir.VectorType(F16, 16)), f32x16.ir)
    floats = ir.Constant(f32x16.ir, ir.Undefined)
    for lane in range(16):
        scalar = half_to_float(builder, builder.extract_element(halves, I32(lane)))
        floats = builder.insert_element(floats, scalar, I32(lane))
    return floats


load_bf16x16 = define(f32x16, (types.int64,), _load_bf16x16)
load_f16x16 = define(f32x16, (types.int64,), emit_load_f16x16)

# ---- constants -------------------------------------------------------------------------------------------------------

zero_i32x8 = define(i32x8, (), lambda b: constant(i32x8.ir, 0))
zero_f32x8 = define(f32x8, (), lambda b: constant(f32x8.ir, 0.0))
zero_f32x16 = define(f32x16, (), lambda b: constant(f32x16.ir, 0.0))
splat_f32x8 = define(f32x8, (types.float32,), lambda b, x: splat(b, x, f32x8.ir))
splat_f32x16 = define(f32x16, (types.float32,), lambda b, x: splat(b, x, f32x16.ir))
splat_f32x32 = define(f32x32, (types.float32,), lambda b, x: splat(b, x, f32x32.ir))


def _two_halves(vector: Vector):
    """An intrinsic vector(low, high): `low` in the first half of the lanes, `high` in the second."""

    def emit(builder, low, high):
        pair = builder.insert_element(ir.Constant(ir.VectorType(F32, 2), ir.Undefined), low, I32(0))
        half = vector.ir.count // 2
        return shuffle(builder, builder.insert_element(pair, high, I32(1)), None, [0] * half + [1] * half)

    return define(vector, (types.float32, types.float32), emit)


halves_f32x8, halves_f32x32 = _two_halves(f32x8), _two_halves(f32x32)

# ---- bits ------------------------------------------------------------------------------------------------------------


def _shift_right(builder, v, bits):
    return builder.lshr(v, splat(builder, builder.trunc(bits, I8), v.type))


def _shift_left(builder, v, bits):
    return builder.shl(v, splat(builder, builder.trunc(bits, I8), v.type))


def _mask(builder, v, bits):
    return builder.and_(v, splat(builder, builder.trunc(bits, I8), v.type))


def _spread_bits(builder, word, value):
    """Bit j of the 32-bit `word` -> `value` in lane j, else 0."""
    bits = builder.bitcast(builder.trunc(word, I32), ir.VectorType(ir.IntType(1), 32))
    return builder.select(bits, splat(builder, builder.trunc(value, I8), i8x32.ir), constant(i8x32.ir, 0))


shift_right = define(i8x32, (i8x32, types.int64), _shift_right)
shift_left = define(i8x32, (i8x32, types.int64), _shift_left)
mask = define(i8x32, (i8x32, types.int64), _mask)
either = define(i8x32, (i8x32, i8x32), lambda b, x, y: b.or_(x, y))
subtract_i8 = define(i8x32, (i8x32, types.int64), lambda b, x, y: b.sub(x, splat(b, b.trunc(y, I8), x.type)))
join = define(i8x32, (i8x16, i8x16), lambda b, low, high: shuffle(b, low, high, range(32)))
spread_bits = define(i8x32, (types.int64, types.int64), _spread_bits)
nibbles = define(
    i8x32,
    (i8x16,),
    lambda b, v: shuffle(b, b.and_(v, constant(v.type, 15)), b.lshr(v, constant(v.type, 4)), range(32)),
)


def lookup_in(table: Sequence[int]):
    """An intrinsic i8x32(i8x32): table[index] per lane, for a table of 16 constants and indices below 16."""
    entries = [int(value) & 0xFF for value in table]

    def emit(builder, index):
        if isa.has("avx2"):
            return call(builder, "llvm.x86.avx2.pshuf.b", i8x32.ir, ir.Constant(i8x32.ir, entries * 2), index)
        found = ir.Constant(i8x32.ir, ir.Undefined)
        for lane in range(32):
            entry = builder.extract_element(index, I32(lane))
            value = builder.extract_element(ir.Constant(i8x16.ir, entries), entry)
            found = builder.insert_element(found, value, I32(lane))
        return found

    return define(i8x32, (i8x32,), emit)


# ---- integer dot products --------------------------------------------------------------------------------------------


def _dot_u8(builder, total, u, x):
    """total + sum of u*x over each 4 lanes; u unsigned and at most 128, x signed and not below -127."""
    if isa.has("avx512_vnni"):
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", i32x8.ir, total, u, x)
    if isa.has("avx2"):  # 2*128*127 = 32512 fits the saturating 16-bit sum of vpmaddubsw
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), u, x)
        ones = constant(ir.VectorType(I16, 16), 1)
        return builder.add(total, call(builder, "llvm.x86.avx2.pmadd.wd", i32x8.ir, pairs, ones))
    wide = ir.VectorType(I32, 32)
    products = builder.mul(builder.zext(u, wide), builder.sext(x, wide))
    for lane in range(4):
        total = builder.add(total, shuffle(builder, products, None, range(lane, 32, 4)))
    return total


def _dot_i8(builder, total, w, x):
    """total + sum of w*x over each 4 lanes, both signed, x not below -127: |w| times x with w's sign."""
    negative = builder.icmp_signed("<", w, constant(w.type, 0))
    magnitude = builder.select(negative, builder.neg(w), w)
    return _dot_u8(builder, total, magnitude, builder.select(negative, builder.neg(x), x))


dot_u8 = define(i32x8, (i32x8, i8x32, i8x32), _dot_u8)
dot_i8 = define(i32x8, (i32x8, i8x32, i8x32), _dot_i8)

# ---- float arithmetic ------------------------------------------------------------------------------------------------


def _fma(vector: Vector):
    name = f"llvm.fma.v{vector.ir.count}f32"
    return define(vector, (vector, vector, vector), lambda b, x, y, z: call(b, name, vector.ir, x, y, z))


def _sum(vector: Vector):
    """Sum over lanes, in any order (float rounding of the order is accepted everywhere)."""

    def emit(builder, v):
        name = f"llvm.vector.reduce.fadd.v{v.type.count}f32"
        function_type = ir.FunctionType(F32, [F32, v.type])
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [ir.Constant(F32, 0.0), v], fastmath=("reassoc",))

    return define(types.float32, (vector,), emit)


def _largest_magnitude(builder, v):
    """max |x| over lanes, but for NaN; halves on halves, as LLVM's own reduction goes lane by lane."""
    v = call(builder, "llvm.fabs.v32f32", v.type, v)
    while v.type.count > 1:
        half = v.type.count // 2
        low, high = shuffle(builder, v, None, range(half)), shuffle(builder, v, None, range(half, 2 * half))
        v = call(builder, f"llvm.maxnum.v{half}f32", low.type, low, high)
    return builder.extract_element(v, I32(0))


def _round_to_i8(builder, v):
    """Nearest, ties to even; NaN -> 0, out of range -> the nearest limit. LLVM's fptosi.sat goes lane by lane."""
    v = call(builder, "llvm.rint.v32f32", v.type, v)
    v = builder.select(builder.fcmp_ordered("ord", v, v), v, constant(v.type, 0.0))
    low, high = constant(v.type, -128.0), constant(v.type, 127.0)
    v = builder.select(builder.fcmp_ordered(">", v, low), v, low)
    v = builder.select(builder.fcmp_ordered("<", v, high), v, high)
    return builder.trunc(builder.fptosi(v, ir.VectorType(I32, 32)), i8x32.ir)


fma_f32x8, fma_f32x16 = _fma(f32x8), _fma(f32x16)
sum_f32x8, sum_f32x16 = _sum(f32x8), _sum(f32x16)
largest_magnitude = define(types.float32, (f32x32,), _largest_magnitude)
round_to_i8 = define(i8x32, (f32x32,), _round_to_i8)
i32_to_f32 = define(f32x8, (i32x8,), lambda b, v: b.sitofp(v, f32x8.ir))
i8_to_f32 = define(f32x32, (i8x32,), lambda b, v: b.sitofp(v, f32x32.ir))
mul_f32x32 = define(f32x32, (f32x32, f32x32), lambda b, x, y: b.fmul(x, y))
add_f32x32 = define(f32x32, (f32x32, f32x32), lambda b, x, y: b.fadd(x, y))
sub_f32x32 = define(f32x32, (f32x32, f32x32), lambda b, x, y: b.fsub(x, y))
mul_f32x16 = define(f32x16, (f32x16, f32x16), lambda b, x, y: b.fmul(x, y))


def _half_sum_i8(half: int):
    """An intrinsic float32(i8x32): the sum of 16 lanes."""

    def emit(builder, v):
        dots = _dot_u8(builder, constant(i32x8.ir, 0), constant(v.type, 1), v)
        dots = shuffle(builder, dots, None, range(4 * half, 4 * half + 4))
        return builder.sitofp(call(builder, "llvm.vector.reduce.add.v4i32", I32, dots), F32)

    return define(types.float32, (i8x32,), emit)


sum_first_i8, sum_second_i8 = _half_sum_i8(0), _half_sum_i8(1)
first_half = define(i8x16, (i8x32,), lambda b, v: shuffle(b, v, None, range(16)))
second_half = define(i8x16, (i8x32,), lambda b, v: shuffle(b, v, None, range(16, 32)))
