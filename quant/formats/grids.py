"""What the formats share whose weights are entries of a grid (codebooks.py): IQ1, IQ2 and IQ3.

A block has 256 weights in 32 groups of 8, each an entry of the grid or two of four weights. One bit a weight goes with
them: its sign, or in IQ1 that of an offset. A weight is scale * w with integers w, one scale for every 16 or 32:
scale = unit * d * (2*ls + 1), ls of 3 or 4 bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
from llvmlite import ir
from numba import types

from quant.block_format import EXPAND, REPACK, Format, PanelFormat
from quant.formats import codebooks
from quant.formats.grids_quantize import quantizer
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, LEVEL, SIGNED_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemv import pairs, plain
from quant.gemv.activations import (
    EVERY_EIGHTH,
    EVERY_FOURTH,
    IN_ORDER,
    SCALES_16,
    SCALES_OF_16,
    SCALES_OF_32,
    STARTS,
    STARTS_32,
    SUMS_16,
)
from quant.gemv.plain import specialize
from quant.simd.core import I32, I64, constant, define, f32x16, i8x64, i32x16, load, shuffle
from quant.simd.dots import WEIGHT_BIAS, dot_biased, dot_u8, pair_sums_wide
from quant.simd.floats import fma, halves_f32x32, lookup_f32, picked, to_f32
from quant.simd.ints import where_bits, zero_i32x16
from quant.simd.memory import (
    emit_table,
    load_f32,
    load_f32x16,
    load_i8x32,
    load_i8x64,
    load_i32x16,
    load_i64,
    stack,
    store_f32x16,
    store_f32x32,
    store_i8x64,
    store_i32x16,
)
from quant.simd.permutes import CAN_PERMUTE, turn_bytes
from quant.simd.rows16 import VECTOR_ROWS, transpose_strided
from quant.target import isa
from quant.target.jit import Kernel, inline, kernel

BLOCK = 256
GROUPS = 32

# ---- what formats are made of ----------------------------------------------------------------------------------------


def entry_of(values: np.ndarray) -> Callable:
    """An intrinsic int64(int64 i): entry i of int8 (entries, 8), its bytes + WEIGHT_BIAS."""
    load_entry = _entries(values)
    return define(types.int64, (types.int64,), load_entry)


def two_entries_of(values: np.ndarray) -> Callable:
    """An intrinsic int64(int64 i, int64 j): entries i and j of int8 (entries, 4), their bytes + WEIGHT_BIAS.

    They meet in a vector, where a load and an insertion are one instruction; shifts and ors of words take more.
    """
    load_entry, pair = _entries(values), ir.VectorType(I32, 2)

    def emit(builder, i, j):
        both = builder.insert_element(ir.Constant(pair, ir.Undefined), load_entry(builder, i), I32(0))
        return builder.bitcast(builder.insert_element(both, load_entry(builder, j), I32(1)), I64)

    return define(types.int64, (types.int64, types.int64), emit)


def _entries(values: np.ndarray) -> Callable:
    """emit(builder, i): entry i of the table as one integer."""
    raised = np.ascontiguousarray(values.astype(np.int16) + WEIGHT_BIAS).astype(np.uint8)
    size = raised.shape[1]
    return lambda builder, i: load(
        builder, builder.add(emit_table(builder, raised), builder.mul(i, I64(size))), ir.IntType(8 * size)
    )


def load_fields(element: int, words: Sequence[int], shifts: Sequence[int]) -> Callable:
    """An intrinsic i32x16(address): in lane i, of word[i] of integers of `element` bits, what lies from shift[i] on."""
    kind = ir.VectorType(ir.IntType(element), max(words) + 1)

    def emit(builder, address):
        lanes = shuffle(builder, load(builder, address, kind), None, words)
        lanes = builder.zext(lanes, i32x16.ir) if element < 32 else lanes
        return builder.lshr(lanes, ir.Constant(i32x16.ir, list(shifts)))

    return define(i32x16, (types.int64,), emit)


def odd_numbers(n_bits: int, unit: float) -> Callable:
    """An intrinsic f32x16(i32x16): unit * (2*ls + 1), ls the lowest n_bits; by a table of 16 where there is one."""
    if isa.has("avx512_vnni"):
        return lookup_f32([unit * (2 * (i % 2**n_bits) + 1) for i in range(16)])

    def emit(builder, v):
        doubled = builder.shl(builder.and_(v, constant(v.type, 2**n_bits - 1)), constant(v.type, 1))
        odd = builder.sitofp(builder.or_(doubled, constant(v.type, 1)), f32x16.ir)
        return builder.fmul(odd, constant(f32x16.ir, unit))

    return define(f32x16, (i32x16,), emit)


def _from_words(builder, *words):
    vector = ir.Constant(ir.VectorType(I64, 8), ir.Undefined)
    for i, word in enumerate(words):
        vector = builder.insert_element(vector, word, I32(i))
    return builder.bitcast(vector, i8x64.ir)


_from_words = define(i8x64, (types.int64,) * 8, _from_words)


@inline
def with_eighth_bits(v):
    """7 bits in each byte of an int64, and the bit that makes the number of set ones even."""
    parity = v ^ v >> 4
    parity ^= parity >> 2
    return v | ((parity ^ parity >> 1) & 0x0101010101010101) << 7


@inline
def four_sevens(word):
    """The lowest 28 bits of a word as 4 bytes of 7."""
    return word & 0x7F | (word & 0x3F80) << 1 | (word & 0x1FC000) << 2 | (word & 0xFE00000) << 3


@inline
def negative(v):
    """What the weights of v + WEIGHT_BIAS become where a bit is a sign."""
    return 0 - v


# A sub-block of 16 fills a quarter of a vector; pair_sums, twice, leaves sub-block i in lane 4*(i%4) + i//4.
_in_order_of_dots = picked([4 * (lane % 4) + lane // 4 for lane in range(16)])
_memory = stack(VECTOR_ROWS * BLOCK)
_scales_memory = stack(VECTOR_ROWS * 64)


@inline
def _dots(weights, k_block):
    q, zero = k_block + IN_ORDER, zero_i32x16()
    dots_0 = dot_biased(zero, weights[0], load_i8x64(q))
    dots_4 = dot_biased(zero, weights[1], load_i8x64(q + 64))
    dots_8 = dot_biased(zero, weights[2], load_i8x64(q + 128))
    dots_12 = dot_biased(zero, weights[3], load_i8x64(q + 192))
    return to_f32(pair_sums_wide(pair_sums_wide(dots_0, dots_4), pair_sums_wide(dots_8, dots_12)))


@inline
def _add_k_block(weights, k_block, total):
    dots = fma(-WEIGHT_BIAS, load_f32x16(k_block + SUMS_16), _dots(weights, k_block))
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


# What specialize() gives the two templates below.
BLOCK_BYTES = RAISED = STEP_BYTES = 0
write_weights = scales = None


def _expand(w, n_blocks, out):
    memory, of_sub_blocks = _memory(), _scales_memory()
    for b in range(n_blocks):
        write_weights(w + BLOCK_BYTES * b, 0, memory)
        store_f32x16(of_sub_blocks, scales(w + BLOCK_BYTES * b))
        for j in range(8):
            pair = halves_f32x32(load_f32(of_sub_blocks + 8 * j), load_f32(of_sub_blocks + 8 * j + 4))
            store_f32x32(out + 1024 * b + 128 * j, to_f32(load_i8x32(memory + 32 * j)) * pair)


def _repack(rows, n_blocks, out):
    memory, of_sub_blocks = _memory(), _scales_memory()
    for b in range(n_blocks):
        for r in range(VECTOR_ROWS):
            block = load_i64(rows + 8 * r) + BLOCK_BYTES * b
            write_weights(block, RAISED, memory + BLOCK * r)
            store_f32x16(of_sub_blocks + 64 * r, scales(block))
        for j in range(8):
            for i in range(2):
                for e, words in enumerate(transpose_strided(memory + 32 * j + 16 * i, BLOCK)):
                    store_i32x16(out + K_BLOCK_BYTES * j + 256 * i + 64 * e, words)
        for i in range(4):
            first, second, third, fourth = transpose_strided(of_sub_blocks + 16 * i, 64)
            to = out + K_BLOCK_BYTES * 2 * i + K_BLOCK_SCALES
            store_i32x16(to, first)
            store_i32x16(to + 64, second)
            store_i32x16(to + K_BLOCK_BYTES, third)
            store_i32x16(to + K_BLOCK_BYTES + 64, fourth)
        out += 8 * K_BLOCK_BYTES


# ---- where bytes can be permuted -------------------------------------------------------------------------------------


@inline
def _add_row(weights, k_block, total):
    q = k_block + EVERY_FOURTH
    dots = dot_u8(load_i32x16(k_block + STARTS), weights[0], load_i8x64(q))
    dots = dot_u8(dots, weights[1], load_i8x64(q + 64))
    dots = dot_u8(dots, weights[2], load_i8x64(q + 128))
    dots = dot_u8(dots, weights[3], load_i8x64(q + 192))
    return fma(to_f32(dots), weights[4] * load_f32x16(k_block + SCALES_OF_16), total)


@inline
def _add_fourths(weights, k_block, total):
    """weights: a tuple a row, of columns 0 4 8 ..., 1 5 9 ... and so on, raised by 128; a lane adds up 16 columns."""
    return _add_row(weights[0], k_block, total[0]), _add_row(weights[1], k_block, total[1])


@inline
def dots_of_eighths(weights, k_block, start):
    """start + products of columns 0 8 16 ..., 1 9 17 ... and so on of two rows; a lane adds up 32 columns of one."""
    q, zero = k_block + EVERY_EIGHTH, zero_i32x16()
    first = dot_u8(dot_u8(start, weights[0], load_i8x64(q)), weights[1], load_i8x64(q + 64))
    first = dot_u8(dot_u8(first, weights[2], load_i8x64(q + 128)), weights[3], load_i8x64(q + 192))
    last = dot_u8(dot_u8(zero, weights[4], load_i8x64(q + 256)), weights[5], load_i8x64(q + 320))
    return first + dot_u8(dot_u8(last, weights[6], load_i8x64(q + 384)), weights[7], load_i8x64(q + 448))


@inline
def add_eighths(weights, k_block, total):
    """The weights raised by 128."""
    dots = dots_of_eighths(weights, k_block, load_i32x16(k_block + STARTS_32))
    return fma(to_f32(dots), weights[8] * load_f32x16(k_block + SCALES_OF_32), total)


def signed_values(
    values: Sequence[int], shift: int, n_bits: int, sign: int, others: Sequence[int] | None = None
) -> np.ndarray:
    """uint8 (64,): the table of an index whose bits from `shift` on are a value's number, and bit `sign` its sign.

    Values + 128; negative ones where the bit is set, or others instead.
    """
    index, values = np.arange(64), np.asarray(values, np.int16)
    number = (index >> shift) % 2**n_bits % len(values)
    others = -values if others is None else np.asarray(others)
    return (128 + np.where(index >> sign & 1, others[number], values[number])).astype(np.uint8)


def fields_of(name: str, places: Sequence[int], n_bits: int) -> np.ndarray:
    """uint8 (entries,): of each entry the numbers of the weights w of places[i] = w, `n_bits` each from bit 0 on.

    A weight's number is its place among the values in the grid.
    """
    grid = codebooks.grid(name)
    number = np.searchsorted(np.unique(grid), grid)
    fields = [number[:, w] << n_bits * i for i, w in enumerate(places)]
    return np.bitwise_or.reduce(fields).astype(np.uint8)


@inline
def store_turned(vectors, stride, out):
    """16 columns of 16 rows, 4 at a time to places `stride` apart: of vectors of a row's columns i, i+4, i+8 and i+12.

    Byte 4r+i of vector c is row r's column 4i+c.
    """
    words = turn_bytes(vectors[0], vectors[1], vectors[2], vectors[3])
    store_i32x16(out, words[0])
    store_i32x16(out + stride, words[1])
    store_i32x16(out + 2 * stride, words[2])
    store_i32x16(out + 3 * stride, words[3])


def grid_format(
    name: str,
    layout: np.dtype,
    unpack: Callable[[np.ndarray], np.ndarray],
    *,
    group: Callable,
    bits: Callable,
    marked: Callable,
    d: Callable,
    fields: Callable,
    n_bits: int,
    unit: float,
    kind: int,
    offset: int,
    level: str = LEVEL,
    four_rows: Callable,
    add: Callable | None = None,
    repack: Kernel,
) -> Format:
    """A format of grid entries.

    Args:
        group: inline (block, g) -> the 8 bytes of group g of 32, raised by WEIGHT_BIAS, as an int64.
        bits: inline (block, k) -> the bits of weights 64k..64k+63, an int64.
        marked: inline (v i8x64) -> what v is where a weight's bit is set.
        d: inline (block) -> f32x16, the same in every lane.
        fields: inline (block) -> i32x16, whose lowest bits are ls of each 16 weights.
        n_bits: of ls.
        unit: see the module.
        kind, offset: of PanelFormat.
        level: the lowest that has a micro-kernel for it.
        four_rows: where bytes can be permuted, inline (four blocks) -> of each 4 vectors of weights + 128, every
            fourth column in each. With `add`: of two pairs its first argument.
        add: there, inline (of two blocks, address of a k-block, total f32x16) -> total, whose halves are the rows'.
        repack: for there, to panels of bytes.
    """
    block_bytes, odd = layout.itemsize, odd_numbers(n_bits, unit)

    @inline
    def quarter(block, k):
        """Weights 64k..64k+63 + WEIGHT_BIAS."""
        g = 8 * k
        v = _from_words(
            group(block, g), group(block, g + 1), group(block, g + 2), group(block, g + 3),
            group(block, g + 4), group(block, g + 5), group(block, g + 6), group(block, g + 7),
        )  # fmt: skip
        return where_bits(bits(block, k), marked(v), v)

    @inline
    def write_weights(block, raised, out):
        """256 bytes: the weights + raised."""
        for k in range(4):
            store_i8x64(out + 64 * k, quarter(block, k) + (raised - WEIGHT_BIAS))

    @inline
    def scales(block):
        return odd(fields(block)) * d(block)

    @inline
    def weights(block):
        quarters = quarter(block, 0), quarter(block, 1), quarter(block, 2), quarter(block, 3)
        return *quarters, _in_order_of_dots(scales(block))

    @inline
    def with_scales(a, b, c, d):
        first, second, third, fourth = four_rows(a, b, c, d)
        pair = (*first, scales(a)), (*second, scales(b))
        return pair, ((*third, scales(c)), (*fourth, scales(d)))

    names = {"BLOCK_BYTES": block_bytes, "RAISED": offset, "write_weights": write_weights, "scales": scales}
    expand = kernel(EXPAND)(specialize(_expand, f"expand_{name}", **names))
    quantize = quantizer(name, layout)
    if CAN_PERMUTE:
        gemv, gemv_batch = pairs.kernels(
            name,
            block_bytes,
            four_rows if add else with_scales,
            add or _add_fourths,
            pairs.HALVES if add else pairs.TWO,
        )
        panels = PanelFormat(TWO_SCALES if kind == TWO_SCALES else SIGNED_BYTES, 128, repack)
    else:
        gemv, gemv_batch = plain.kernels(name, block_bytes, weights, _add_k_block, together=1)
        panels = PanelFormat(kind, offset, kernel(REPACK, level)(specialize(_repack, f"repack_{name}", **names)))
    return Format(name, BLOCK, layout, True, unpack, gemv, gemv_batch, expand, panels=panels, quantize=quantize)
