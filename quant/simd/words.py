"""Operations on 64 bytes as 32 lanes of 16 bits, where bytes can be permuted (permutes.py)."""

from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types

from quant.simd.core import I1, I16, I32, I64, call, constant, define, i8x32, i8x64, i32x8, i32x16, shuffle
from quant.simd.dots import emit_dot_i16, emit_dot_u8

_WORDS = ir.VectorType(I16, 32)


def _of_words(emit: Callable) -> Callable:
    """emit(builder, 64 bytes ...) of one of lanes of 16 bits."""

    def emit_bytes(builder, *vectors):
        vectors = (builder.bitcast(v, _WORDS) if v.type == i8x64.ir else v for v in vectors)
        return builder.bitcast(emit(builder, *vectors), i8x64.ir)

    return emit_bytes


def _add_where(builder, v, w, mask):
    lanes = builder.bitcast(builder.trunc(mask, I32), ir.VectorType(I1, 32))
    return builder.select(lanes, builder.add(v, w), v)


def words_without(bit: int) -> Callable:
    """An intrinsic int64(i8x64): the lanes that have not this bit."""

    def emit(builder, v):
        v = builder.bitcast(v, _WORDS)
        missing = builder.icmp_unsigned("==", builder.and_(v, constant(_WORDS, bit)), constant(_WORDS, 0))
        return builder.zext(builder.bitcast(missing, I32), I64)

    return define(types.int64, (i8x64,), emit)


def fields_of_words(words: Sequence[int], shifts: Sequence[int]) -> Callable:
    """An intrinsic i8x64(int64 a, int64 b): of the 8 words of both, word[i] >> shift[i] in lane i."""
    pair = ir.VectorType(I64, 2)

    def emit(builder, a, b):
        both = ir.Constant(pair, ir.Undefined)
        for i, v in enumerate((a, b)):
            both = builder.insert_element(both, v, I32(i))
        lanes = shuffle(builder, builder.bitcast(both, ir.VectorType(I16, 8)), None, words)
        return builder.bitcast(builder.lshr(lanes, ir.Constant(_WORDS, list(shifts))), i8x64.ir)

    return define(i8x64, (types.int64, types.int64), emit)


def _pair_products(builder, u, x):
    return builder.bitcast(call(builder, "llvm.x86.avx512.pmaddubs.w.512", _WORDS, u, x), i8x64.ir)


def _twice_sums_of_8(builder, v):
    sums = emit_dot_u8(builder, constant(i32x8.ir, 0), constant(v.type, 1), v)
    even, odd = (shuffle(builder, sums, None, range(first, 8, 2)) for first in (0, 1))
    total = builder.add(even, odd)
    twice = builder.trunc(builder.add(total, total), ir.VectorType(I16, 4))
    return builder.bitcast(shuffle(builder, twice, None, [0, 2, 1, 3]), I64)


twice_sums_of_8 = define(types.int64, (i8x32,), _twice_sums_of_8)  # of signed bytes: as words the sums 0, 2, 1 and 3
pair_products = define(i8x64, (i8x64, i8x64), _pair_products)  # u*x of neighbours added; u unsigned, x signed bytes
add_words = define(i8x64, (i8x64, i8x64), _of_words(lambda b, v, w: b.add(v, w)))
add_words_where = define(
    i8x64, (i8x64, i8x64, types.int64), _of_words(_add_where)
)  # v + w in lanes of the mask, else v
odd_of_twice = define(  # of 2*n, n's lowest 3 bits: 2*n + 1
    i8x64, (i8x64,), _of_words(lambda b, v: b.or_(b.and_(v, constant(v.type, 14)), constant(v.type, 1)))
)
dot_words = define(  # sums of v*w over each 2 lanes
    i32x16, (i8x64, i8x64), lambda b, v, w: emit_dot_i16(b, constant(i32x16.ir, 0), v, w)
)
widened_bytes = define(  # to 16 bits
    i8x64, (i8x32,), lambda b, v: b.bitcast(b.zext(v, _WORDS), i8x64.ir)
)
