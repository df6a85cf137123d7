"""Lookups of 64 bytes in tables that lie in registers, and other moves of bytes: AVX-512 VBMI, at level avx512_vnni.

Formats whose weights are entries of a grid decode this way where CAN_PERMUTE says so: Intel from Ice Lake, AMD from
Zen 4 on.
"""

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from quant.simd.core import I32, I64, call, constant, define, i8x16, i8x32, i8x64, i32x16, shuffle
from quant.target import isa

CAN_PERMUTE = isa.has("avx512_vnni") and isa.target_has("avx512vbmi")

_WORDS = i32x16.ir
_QWORDS = ir.VectorType(I64, 8)


def _constant(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(i8x64.ir, [int(value) & 0xFF for value in values])


def _lookup(builder, table: np.ndarray, indices: Sequence, masks: Sequence[Sequence]) -> list[ir.Value]:
    """For each index 64 bytes of a table of 64, 128 or, by bit 7 and then by its masks, of more.

    Each part of the table serves all indices before the next: larger ones have more parts than there are registers.
    """
    if len(table) == 64:
        name = "llvm.x86.avx512.permvar.qi.512"
        return [call(builder, name, i8x64.ir, _constant(table), index) for index in indices]
    if len(table) == 128:
        low, high = _constant(table[:64]), _constant(table[64:])
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        return [call(builder, name, i8x64.ir, low, index, high) for index in indices]
    half, rest = len(table) // 2, [bits[:-1] for bits in masks]
    halves = _lookup(builder, table[:half], indices, rest), _lookup(builder, table[half:], indices, rest)
    return [builder.select(bits[-1], high, low) for bits, low, high in zip(masks, *halves, strict=True)]


def _lookups(builder, table: np.ndarray, indices: Sequence, masks: Sequence[Sequence]) -> list[ir.Value]:
    """The same; masks int64, without bit 7."""
    lanes = [[builder.bitcast(mask, ir.VectorType(ir.IntType(1), 64)) for mask in bits] for bits in masks]
    if len(table) > 128:
        for index, bits in zip(indices, lanes, strict=True):
            bits.insert(0, builder.icmp_signed("<", index, constant(index.type, 0)))
    return _lookup(builder, table, indices, lanes)


def table_of(values: np.ndarray) -> Callable:
    """An intrinsic i8x64(i8x64 index, int64 masks ...): entries of a table of bytes.

    The index has 6, 7 or 8 bits for tables of 64, 128 or 256 (and bits above that do nothing). Of larger ones each mask
    holds one more bit for all 64, lowest first.
    """

    def emit(builder, index, *masks):
        return _lookups(builder, np.asarray(values), [index], [masks])[0]

    return define(i8x64, (i8x64,) + (types.int64,) * _n_masks(values), emit)


def _n_masks(values: np.ndarray) -> int:
    return max(0, len(values).bit_length() - 9)


def both_of_table(values: np.ndarray) -> Callable:
    """An intrinsic of two indices and two tuples of masks: table_of's result for each, as a tuple."""
    n_masks, pair = _n_masks(values), types.UniTuple(i8x64, 2)
    masks = types.UniTuple(types.int64, n_masks)

    @intrinsic
    def lookups(context, first, second, first_masks, second_masks):
        def codegen(context, builder, _, arguments):
            bits = [cgutils.unpack_tuple(builder, bits, n_masks) for bits in arguments[2:]]
            return context.make_tuple(builder, pair, _lookups(builder, np.asarray(values), arguments[:2], bits))

        return pair(i8x64, i8x64, masks, masks), codegen

    return lookups


def bits_from(offsets: Sequence[int]) -> Callable:
    """An intrinsic i8x64(i8x64): byte i of each 8 becomes the 8 bits that begin at bit offsets[i] of these 64."""
    shifts = _constant([offset % 64 for offset in offsets] * 8)
    name = "llvm.x86.avx512.pmultishift.qb.512"
    return define(i8x64, (i8x64,), lambda builder, v: call(builder, name, v.type, shifts, v))


def mask_of(bits: Sequence[int]) -> Callable:
    """An intrinsic int64(i8x64): where a byte has one of these bits, which repeat."""
    wanted = _constant([*bits] * (64 // len(bits)))

    def emit(builder, v):
        return builder.bitcast(builder.icmp_unsigned("!=", builder.and_(v, wanted), constant(v.type, 0)), I64)

    return define(types.int64, (i8x64,), emit)


def _in_quarters(a: Sequence[int], b: Sequence[int], width: int) -> Callable:
    """emit(builder, v, w): in each quarter these elements of v's quarter, then those of w's; `width` bits each."""
    kind, n = ir.VectorType(ir.IntType(width), 512 // width), 128 // width
    lanes = [n * q + i + half * 4 * n for q in range(4) for half, chosen in enumerate((a, b)) for i in chosen]

    def emit(builder, v, w):
        found = shuffle(builder, builder.bitcast(v, kind), builder.bitcast(w, kind), lanes)
        return builder.bitcast(found, i8x64.ir)

    return emit


def _interleaved(first: int) -> Callable:
    lanes = [16 * q + first + i + 64 * side for q in range(4) for i in range(8) for side in range(2)]
    return lambda builder, v, w: shuffle(builder, v, w, lanes)


def _alternate(first: int) -> Callable:
    return lambda builder, v, w: shuffle(builder, v, w, range(first, 32, 2))


def _in_turn(builder, a, b):
    """Eights of a and of b in turn."""
    a, b = (builder.bitcast(v, ir.VectorType(I64, 4)) for v in (a, b))
    return builder.bitcast(shuffle(builder, a, b, [0, 4, 1, 5, 2, 6, 3, 7]), i8x64.ir)


def _spread_bytes(builder, a, b):
    """Two int64: byte i of a and of b, four times each, by pairs in turn."""
    both = builder.insert_element(ir.Constant(ir.VectorType(I64, 2), ir.Undefined), a, I32(0))
    both = builder.bitcast(builder.insert_element(both, b, I32(1)), i8x16.ir)
    lanes = [8 * side + 2 * q + i for q in range(4) for side in range(2) for i in range(2) for _ in range(4)]
    return shuffle(builder, both, None, lanes)


def with_bits(bits: int) -> Callable:
    """An intrinsic i8x64(v, w): each byte of v, but for these bits, which are those of w."""

    def emit(builder, v, w):
        mask, v, w = (builder.bitcast(x, _QWORDS) for x in (_constant([bits] * 64), v, w))
        # One instruction: where the mask is set the second operand, else the third. LLVM makes two of the operators'.
        found = call(builder, "llvm.x86.avx512.pternlog.q.512", _QWORDS, mask, w, v, I32(0xCA))
        return builder.bitcast(found, i8x64.ir)

    return define(i8x64, (i8x64, i8x64), emit)


def _of_words(builder, v):
    return builder.bitcast(v, i8x64.ir)


def _chosen_bytes(lanes: Sequence[int]) -> Callable:
    """An intrinsic i8x64(i32x16, i32x16): of each pair of words these 4 of 8 bytes."""
    chosen = [4 * r + lane % 4 + 64 * (lane // 4) for r in range(16) for lane in lanes]
    return define(i8x64, (i32x16, i32x16), lambda b, v, w: shuffle(b, _of_words(b, v), _of_words(b, w), chosen))


def _turn_bytes(builder, vectors):
    """In 32 bits of four vectors, 4 bytes each as a 4x4 matrix, transposed: pairs of bytes, then pairs of pairs."""
    lanes = [4 * r + i + 64 * side for r in range(16) for i in (0, 1) for side in range(2)]
    low, high = (shuffle(builder, vectors[i], vectors[i + 1], lanes) for i in (0, 2))
    low_2, high_2 = (shuffle(builder, vectors[i], vectors[i + 1], [lane + 2 for lane in lanes]) for i in (0, 2))
    found = []
    for first, second in (low, high), (low_2, high_2):
        first, second = (builder.bitcast(v, _WORDS) for v in (first, second))
        lower, sixteen = constant(_WORDS, 0xFFFF), constant(_WORDS, 16)
        found.append(builder.or_(builder.and_(first, lower), builder.shl(second, sixteen)))
        upper = builder.xor(lower, constant(_WORDS, 0xFFFFFFFF))
        found.append(builder.or_(builder.lshr(first, sixteen), builder.and_(second, upper)))
    return found


@intrinsic
def turn_bytes(context, first, second, third, fourth):
    """Four i8x64 -> four i32x16: word r of vector i has byte i of word r of each of them, in order."""
    result = types.UniTuple(i32x16, 4)

    def codegen(context, builder, _, values):
        return context.make_tuple(builder, result, _turn_bytes(builder, values))

    return result(i8x64, i8x64, i8x64, i8x64), codegen


def _at_least(builder, v, w):
    return builder.bitcast(builder.icmp_unsigned(">=", v, w), I64)


# Of two vectors: every other word; in each quarter even bytes, odd bytes; of v, then of w.
even_words, odd_words = (define(i32x16, (i32x16, i32x16), _alternate(first)) for first in (0, 1))
even_bytes = define(i8x64, (i8x64, i8x64), _in_quarters(range(0, 16, 2), range(0, 16, 2), 8))
odd_bytes = define(i8x64, (i8x64, i8x64), _in_quarters(range(1, 16, 2), range(1, 16, 2), 8))
interleave_low = define(i8x64, (i8x64, i8x64), _interleaved(0))  # bytes 0..7 of v's and w's quarters in turn
interleave_high = define(i8x64, (i8x64, i8x64), _interleaved(8))
eights_in_turn = define(i8x64, (i8x32, i8x32), _in_turn)
fours_apart = define(  # 4 bytes to the start of each 8, nothing behind them
    i8x64, (i8x32,), lambda b, v: b.bitcast(b.zext(b.bitcast(v, ir.VectorType(I32, 8)), _QWORDS), i8x64.ir)
)
widened_words = define(  # of 16 bits
    i32x16, (i8x32,), lambda b, v: b.zext(b.bitcast(v, ir.VectorType(ir.IntType(16), 16)), _WORDS)
)
bytes_of = define(i8x64, (i32x16,), _of_words)
even_of_8, odd_of_8 = _chosen_bytes((0, 2, 4, 6)), _chosen_bytes((1, 3, 5, 7))
first_of_4 = define(  # the first byte of each 4, four times
    i8x64, (i32x16,), lambda b, v: shuffle(b, _of_words(b, v), None, [i // 4 * 4 for i in range(64)])
)
spread_bytes = define(i8x64, (types.int64, types.int64), _spread_bytes)
at_least_mask = define(types.int64, (i8x64, i8x64), _at_least)  # where v >= w, unsigned
