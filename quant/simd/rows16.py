"""16 rows of weights side by side: a lane of i32x16 is a 32-bit word of one row, or 4 bytes of it."""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from quant.simd.core import I8, I16, I32, I64, constant, define, f32x16, i8x16, i8x64, i32x16, load, shuffle, splat
from quant.simd.halves import half_to_float

VECTOR_ROWS = 16  # side by side: the lanes of i32x16


def _addresses(builder, rows, offset):
    """`offset` behind each of the 16 addresses at `rows`."""
    return [builder.add(load(builder, builder.add(rows, I64(8 * r)), I64), offset) for r in range(VECTOR_ROWS)]


def _gather(builder, rows, offset):
    found = ir.Constant(i32x16.ir, ir.Undefined)
    for r, address in enumerate(_addresses(builder, rows, offset)):
        found = builder.insert_element(found, load(builder, address, I32), I32(r))
    return found


def _interleave(builder, a, b, width):
    """Of each 4 lanes the first 2 of a and of b in turns of `width`, then the same of the last 2."""
    halves = []
    for half in (0, 2):
        lanes = []
        for first in range(half, VECTOR_ROWS, 4):
            for i in range(0, 2, width):
                turn = range(first + i, first + i + width)
                lanes += [*turn, *(VECTOR_ROWS + lane for lane in turn)]
        halves.append(shuffle(builder, a, b, lanes))
    return halves


def _transpose(builder, addresses):
    """In two steps of 2x2 inside 128 bits, after rows r, r+4, r+8, r+12 have been put into one vector."""
    pieces = [load(builder, address, ir.VectorType(I32, 4)) for address in addresses]
    four = []
    for r in range(4):
        low = shuffle(builder, pieces[r], pieces[r + 4], range(8))
        high = shuffle(builder, pieces[r + 8], pieces[r + 12], range(8))
        four.append(shuffle(builder, low, high, range(16)))
    return _transpose_lanes(builder, four)


def _transpose_lanes(builder, four):
    """4 vectors as a 4x4 matrix of words in each 128 bits, transposed."""
    low_01, high_01 = _interleave(builder, four[0], four[1], 1)
    low_23, high_23 = _interleave(builder, four[2], four[3], 1)
    return [*_interleave(builder, low_01, low_23, 2), *_interleave(builder, high_01, high_23, 2)]


def _transpose_8(builder, addresses):
    """Rows r and r+4 are put into one vector, and in the end what is of words 0-3 and of words 4-7 apart again."""
    pieces = [load(builder, address, ir.VectorType(I32, 8)) for address in addresses]
    pairs = [shuffle(builder, pieces[r], pieces[r + 4], range(16)) for r in (0, 1, 2, 3, 8, 9, 10, 11)]
    first, last = _transpose_lanes(builder, pairs[:4]), _transpose_lanes(builder, pairs[4:])
    lanes = [[place + i for place in range(at, 2 * VECTOR_ROWS, 8) for i in range(4)] for at in (0, 4)]
    return [shuffle(builder, a, b, chosen) for chosen in lanes for a, b in zip(first, last, strict=True)]


def _words(count: int, emit: Callable, rows: Callable):
    """The code of an intrinsic that gives `count` vectors of one word a row, from emit(builder, addresses)."""
    result = types.UniTuple(i32x16, count)

    def codegen(context, builder, _, values):
        return context.make_tuple(builder, result, emit(builder, rows(builder, *values)))

    return result(types.int64, types.int64), codegen


def _strided(builder, first, stride):
    return [builder.add(first, builder.mul(stride, I64(r))) for r in range(VECTOR_ROWS)]


@intrinsic
def transpose(context, rows, offset):
    """The 4 words at `offset` behind each of the 16 addresses at `rows`, as 4 vectors of one word a row."""
    return _words(4, _transpose, _addresses)


@intrinsic
def transpose_8(context, rows, offset):
    """The same of 8 words."""
    return _words(8, _transpose_8, _addresses)


@intrinsic
def transpose_strided(context, first, stride):
    """The 4 words at `first` and at 15 more places, each `stride` bytes behind the one before."""
    return _words(4, _transpose, _strided)


gather = define(i32x16, (types.int64, types.int64), _gather)  # the word at `offset` behind each address at `rows`
sign_extend_i8 = define(  # of the lowest 8 bits of each lane
    i32x16, (i32x16,), lambda b, v: b.ashr(b.shl(v, constant(v.type, 24)), constant(v.type, 24))
)


low_bytes = define(i8x16, (i32x16,), lambda b, v: b.trunc(v, i8x16.ir))  # of each lane


def _high_nibbles(builder, v):
    """As a shift of bytes: one instruction where there is GFNI, which LLVM knows."""
    return builder.bitcast(builder.lshr(builder.bitcast(v, i8x64.ir), constant(i8x64.ir, 4)), v.type)


high_nibbles = define(i32x16, (i32x16,), _high_nibbles)  # of every byte


def _with_fifth_bits(builder, words, bits, e):
    """Or 16 into byte i of each lane of `words` where bit 4e + i of `bits` is set, for i in 0..3."""
    bytes_ = i8x64.ir
    count = builder.trunc(builder.shl(builder.lshr(e, I64(1)), I64(3)), I32)
    shifted = builder.bitcast(builder.lshr(bits, splat(builder, count, bits.type)), bytes_)
    copies = shuffle(builder, shifted, None, [lane // 4 * 4 for lane in range(4 * VECTOR_ROWS)])
    nibble = builder.trunc(builder.shl(builder.and_(e, I64(1)), I64(2)), I8)
    chosen = builder.shl(ir.Constant(bytes_, [1, 2, 4, 8] * VECTOR_ROWS), splat(builder, nibble, bytes_))
    is_set = builder.icmp_signed("!=", builder.and_(copies, chosen), constant(bytes_, 0))
    value = builder.select(is_set, constant(bytes_, 16), constant(bytes_, 0))
    return builder.or_(words, builder.bitcast(value, i32x16.ir))


with_fifth_bits = define(i32x16, (i32x16, i32x16, types.int64), _with_fifth_bits)


def _e8m0_half_to_f32(builder, v):
    """2^(v-128) for v in 0..255, which is subnormal below 2."""
    small = builder.shl(constant(v.type, 0x00200000), v)
    normal = builder.shl(builder.sub(v, constant(v.type, 1)), constant(v.type, 23))
    bits = builder.select(builder.icmp_unsigned("<", v, constant(v.type, 2)), small, normal)
    return builder.bitcast(bits, f32x16.ir)


def _half_to_f32(builder, v):
    return half_to_float(builder, builder.trunc(v, ir.VectorType(I16, VECTOR_ROWS)))


e8m0_half_to_f32 = define(f32x16, (i32x16,), _e8m0_half_to_f32)
half_to_f32 = define(f32x16, (i32x16,), _half_to_f32)  # of the lower 16 bits of each lane
