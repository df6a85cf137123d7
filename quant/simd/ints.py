"""Operations on vectors of bytes and words: the bits of quantised weights, and lookups. Their products: dots.py.

32 bytes are one register of AVX2; 64 are one of AVX-512, two of AVX2. A quarter is 16 bytes of 64: most operations on
lanes stay within it. Plain logic and shifts are operators' (core.py).
"""

from collections.abc import Callable, Sequence
from operator import add, sub

from llvmlite import ir
from numba import types

from quant.simd.core import (
    I1,
    I8,
    I32,
    I64,
    Vector,
    by_halves,
    call,
    constant,
    define,
    define_for_all,
    define_typed,
    i8x16,
    i8x32,
    i8x64,
    i32x8,
    i32x16,
    shuffle,
    splat,
)
from quant.target import isa

# Whether the bit pairs ("crumbs") of bytes may stay in their places in products of 32 bytes, as 1, 4, 16 and 64 times
# their values. Below AVX-512 products of bytes above 128 don't fit.
CRUMBS_IN_PLACE = isa.has("avx512_vnni")

# ---- constants -------------------------------------------------------------------------------------------------------

zero_i8x32 = define(i8x32, (), lambda builder: constant(i8x32.ir, 0))
zero_i8x64 = define(i8x64, (), lambda builder: constant(i8x64.ir, 0))
zero_i32x8 = define(i32x8, (), lambda builder: constant(i32x8.ir, 0))
zero_i32x16 = define(i32x16, (), lambda builder: constant(i32x16.ir, 0))
ones_i8x32 = define(i8x32, (), lambda builder: constant(i8x32.ir, 1))

# ---- bits of weights -------------------------------------------------------------------------------------------------


def _nibbles(builder, v):
    low, high = builder.and_(v, constant(v.type, 15)), builder.lshr(v, constant(v.type, 4))
    return shuffle(builder, low, high, range(32))


def _spread_bits(builder, word, value):
    """Bit j of the 32-bit `word` -> `value` in lane j, else 0."""
    bits = builder.bitcast(builder.trunc(word, I32), ir.VectorType(I1, 32))
    return builder.select(bits, splat(builder, builder.trunc(value, I8), i8x32.ir), constant(i8x32.ir, 0))


def _lanes_of(builder, mask):
    """64 lanes of 1 bit: those of the 64-bit mask."""
    if isa.has("avx512_vnni"):
        return builder.bitcast(mask, ir.VectorType(I1, 64))
    # LLVM would take the mask apart bit by bit.
    copies = builder.bitcast(splat(builder, mask, ir.VectorType(I64, 8)), i8x64.ir)
    its_byte = shuffle(builder, copies, None, [i // 16 * 16 + i // 8 for i in range(64)])
    its_bit = ir.Constant(i8x64.ir, [1 << i % 8 for i in range(64)])
    return builder.icmp_unsigned("==", builder.and_(its_byte, its_bit), its_bit)


def _set_where(builder, v, mask, value):
    """v | value in the lanes whose bit of the 64-bit mask is set."""
    marks = splat(builder, builder.trunc(value, I8), v.type)
    return builder.or_(v, builder.select(_lanes_of(builder, mask), marks, constant(v.type, 0)))


def shifted(first: int, second: int):
    """An intrinsic i8x64(i8x64): the halves' 32-bit words shifted left by so many bits each (right if negative).

    Bits cross from byte to byte, so a mask must follow. Both counts have one sign.
    """
    counts = ir.Constant(i32x16.ir, [abs(first)] * 8 + [abs(second)] * 8)

    def emit(builder, v):
        shift = builder.lshr if min(first, second) < 0 else builder.shl
        return builder.bitcast(shift(builder.bitcast(v, i32x16.ir), counts), v.type)

    return define(i8x64, (i8x64,), emit)


def _quarters(chosen: Sequence[int]) -> Callable:
    return lambda builder, v, w: shuffle(builder, v, w, [16 * quarter + i for quarter in chosen for i in range(16)])


def _typed_join(low, high):
    if low == high and low in (i8x16, i8x32):
        joined = {i8x16: i8x32, i8x32: i8x64}[low]
        return joined(low, high), lambda b, low, high: shuffle(b, low, high, range(joined.ir.count))
    return None


def _of_bytes(emit: Callable):
    """An intrinsic vector(vector) of the bytes of any integer vector: emit(builder, bytes) -> bytes."""

    def emit_bytes(builder, v):
        bytes_ = ir.VectorType(I8, v.type.count * v.type.element.width // 8)
        return builder.bitcast(emit(builder, builder.bitcast(v, bytes_)), v.type)

    return define_for_all(1, emit_bytes)


def _ternary_digit(builder, v):
    carries = (builder.icmp_unsigned(">", v, constant(v.type, most)) for most in (85, 170))
    return builder.add(*(builder.zext(carry, v.type) for carry in carries))


nibbles = define(i8x32, (i8x16,), _nibbles)  # the low ones of 16 bytes, then the high ones
join = define_typed(2, _typed_join)
swapped_eights = define(  # the second 8 of 32 bytes and the third change places
    i8x32, (i8x32,), lambda b, v: shuffle(b, v, None, [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)])
)


def moved_bits(counts: Sequence[int], mask: int):
    """An intrinsic i8x32(i8x32): the bytes of each 8 shifted right by counts[0], [1], ... (left if negative), & mask.

    A mask that takes no bits which a shift brings in from a neighbour.
    """
    words, bytes_ = ir.VectorType(I64, 4), i8x32.ir

    def by_shifts(builder, v):
        v = builder.bitcast(v, words)
        if min(counts) >= 0:
            v = builder.lshr(v, ir.Constant(words, counts))
        else:
            v = call(builder, "llvm.fshr.v4i64", words, v, v, ir.Constant(words, [count % 64 for count in counts]))
        return builder.and_(builder.bitcast(v, bytes_), constant(bytes_, mask))

    def by_matrix(builder, v):
        """Row 7 - i of a matrix of bits says which bits make bit i."""
        rows = [sum(1 << (bit + count) << 8 * (7 - bit) for bit in range(8) if mask >> bit & 1) for count in counts]
        matrix = builder.bitcast(ir.Constant(words, rows), bytes_)
        return call(builder, "llvm.x86.vgf2p8affineqb.256", bytes_, v, matrix, I8(0))

    return define(i8x32, (i8x32,), by_matrix if isa.target_has("gfni") else by_shifts)


def _crumbs_in_place(builder, v):
    return builder.and_(v, ir.Constant(v.type, [mask for mask in (3, 12, 48, 192) for _ in range(8)]))


def picked_with_zeros(lanes: Sequence[int | None]):
    """An intrinsic i8x32(i8x32): these bytes of each half, 0 for None; 16 of the first half, then of the second."""
    places = [32 if lane is None else lane + i // 16 * 16 for i, lane in enumerate(lanes)]
    return define(i8x32, (i8x32,), lambda b, v: shuffle(b, v, constant(v.type, 0), places))


# Bits 2i and 2i+1 of the bytes of 8 bytes i in 0..3, in 0..3; or times what follows from their places.
crumbs = moved_bits([0, 2, 4, 6], 3)
crumbs_in_place = define(i8x32, (i8x32,), _crumbs_in_place) if CRUMBS_IN_PLACE else crumbs
crumb_sums = define(  # of products of crumbs_in_place, without what follows from their places
    i32x8,
    (i32x8,),
    lambda b, v: b.ashr(v, ir.Constant(v.type, [0, 0, 2, 2, 4, 4, 6, 6])) if CRUMBS_IN_PLACE else v,
)
# A byte as a fraction in 256ths, in base 3: its first digit, and what is left, times 3.
ternary_digit = _of_bytes(_ternary_digit)
ternary_rest = _of_bytes(lambda b, v: b.add(v, b.add(v, v)))
first_half = define(i8x16, (i8x32,), lambda b, v: shuffle(b, v, None, range(16)))
second_half = define(i8x16, (i8x32,), lambda b, v: shuffle(b, v, None, range(16, 32)))
even_quarters = define(i8x64, (i8x64, i8x64), _quarters((0, 2, 4, 6)))  # 0 and 2 of v, then 0 and 2 of w
odd_quarters = define(i8x64, (i8x64, i8x64), _quarters((1, 3, 5, 7)))
spread_bits = define(i8x32, (types.int64, types.int64), _spread_bits)
set_where = define(i8x64, (i8x64, types.int64, types.int64), _set_where)
where_bits = define(  # (mask, then, otherwise), lane by lane of a 64-bit mask
    i8x64, (types.int64, i8x64, i8x64), lambda b, mask, then, other: b.select(_lanes_of(b, mask), then, other)
)


def lookup_in(table: Sequence[int], vector: Vector):
    """An intrinsic vector(vector): table[byte] for each byte, for a table of 16 constants and bytes below 16."""
    entries = [int(value) & 0xFF for value in table]
    bytes_ = ir.VectorType(I8, vector.ir.count * vector.ir.element.width // 8)

    def emit(builder, v):
        return builder.bitcast(_lookup(builder, entries, builder.bitcast(v, bytes_)), v.type)

    return define(vector, (vector,), emit)


def _lookup(builder, entries: list[int], index):
    count = index.type.count
    if count == 64 and isa.has("avx512_vnni"):
        table = ir.Constant(index.type, entries * 4)
        return call(builder, "llvm.x86.avx512.pshuf.b.512", index.type, table, index)
    if count == 64 and isa.has("avx2"):
        return by_halves(builder, lambda half: _lookup(builder, entries, half), index)
    if isa.has("avx2"):
        return call(builder, "llvm.x86.avx2.pshuf.b", index.type, ir.Constant(index.type, entries * 2), index)
    if count > 16:
        return by_halves(builder, lambda half: _lookup(builder, entries, half), index)
    if isa.has(isa.NEON):
        return call(builder, "llvm.aarch64.neon.tbl1.v16i8", index.type, ir.Constant(index.type, entries), index)
    zero = constant(index.type, 0)
    masks = [
        builder.sext(builder.icmp_unsigned("!=", builder.and_(index, constant(index.type, bit)), zero), index.type)
        for bit in (1, 2, 4, 8)
    ]
    return _entry_by_bits(builder, entries, index.type, masks)


def _entry_by_bits(builder, entries: list[int], vector: ir.VectorType, masks: list):
    """The entry whose number has these bits, lowest first: by logic, as lane by lane would take several times as long.

    A table of numbers and their negatives, raised or not, takes half as much.
    """
    if len(entries) == 1:
        return constant(vector, entries[0])
    (*masks, mask), middle = masks, len(entries) // 2
    first, second = entries[:middle], entries[middle:]
    low = _entry_by_bits(builder, first, vector, masks)
    differences, sums = ({step(b, a) & 0xFF for a, b in zip(first, second, strict=True)} for step in (sub, add))
    if len(differences) == 1:
        return builder.add(low, builder.and_(mask, constant(vector, *differences)))
    if len(sums) == 1:  # sum - low is sum + 1 + ~low
        return builder.add(builder.xor(low, mask), builder.and_(mask, constant(vector, sums.pop() + 1 & 0xFF)))
    high = _entry_by_bits(builder, second, vector, masks)
    return builder.xor(low, builder.and_(mask, builder.xor(low, high)))
