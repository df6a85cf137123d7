"""Quantised activations as the kernels read them: a q8 row a token, float32 and 8 bits side by side.

A q8 row of K columns: x f32[K] @0 | q i8[K] @4K | d f32[K/32] @5K | s f32[K/32] @5K+K/8, s = d * sum(q) of a block of
32 columns | k-blocks. A k-block has 256 columns, 8 blocks of 32, once more, in the orders in which decoded weights lie
in vectors:
    nibbles i8[256] @0: blocks 0 2 1 3 4 6 5 7, as K-quants' low and high nibbles of 64 bytes
    quarters i8[256] @256: first halves of blocks 0 2 4 6, their second halves; the same of 1 3 5 7
    scales f32[16] @512: d and s of each block in turn
    sums f32[16] @576: sum(q) of each block and 0 in turn
    scales_16 f32[16] @640: d of each 16 columns; sub-block i at lane 4*(i%4) + i//4
    sums_16 f32[16] @704: sum(q) of each 16 columns, in the same order
    in order i8[256] @768
    every fourth i8[256] @1024: columns 0 4 8 ..., 1 5 9 ..., 2 6 10 ..., 3 7 11 ...
    starts i32[16] @1280: -128 * sum(q) of each 16 columns
    scales of 16 f32[16] @1344: d of each 16 columns
    eighths i8[4][8][8] @1408: columns 8i..8i+7 of all blocks, for i in 0..3
    crumb scales f32[16] @1664: d of each block in two lanes, divided by 1 4 16 64 1 4 16 64 (ints.CRUMBS_IN_PLACE)
    crumb starts i32[16] @1728: -sum(q) of each block times the same factors, and 0 in turn
    packed scales f32[8] @1792: d of blocks 0 1 4 5 2 3 6 7
    packed sums i16[8][2] @1824: sum(q) of the halves of the same blocks
    split i8[4][2][4][8] @1856: of each 64 columns, the first 8 of each 16, then the others
    split scales f32[16] @2112: d of columns 0-15, 16-31, ...: 0 1 4 5 2 3 6 7 of each 8 of them
    split sums f32[16] @2176: sum(q), in the same order
    every eighth i8[8][2][32] @2240: columns 0 8 16 ..., 1 9 17 ... and so on, each twice, as is what follows:
    starts of 32 i32[2][8] @2752: -128 * sum(q) of each block
    scales of 32 f32[2][8] @2816: d of each block
    ninefold sums i16[2][16] @2880: -9 * sum(q) of each 16 columns
    even sums i16[2][16] @2944: 2 * sum(q) of the first 8 of each 16 columns
    odd sums i16[2][16] @3008: the same of the last 8
The three from 1024 on and the last six only where formats of grid entries read them (simd/permutes.py).
Each 32 columns have a scale of their own in float32; llama.cpp's Q8_0 keeps it in 16 bits and its Q8_K shares one
among 256, so this rounding is at least as fine as either. For integer formats x holds the rounded values, d*q, so
that a matrix product over x and an integer one over q differ in float rounding alone.
"""

import numpy as np

from quant.simd.dots import sum_first_i8, sum_second_i8
from quant.simd.floats import hmax, round_to_i8, to_f32
from quant.simd.ints import CRUMBS_IN_PLACE, first_half, second_half, swapped_eights
from quant.simd.memory import (
    load_f32,
    load_f32x32,
    store_eights,
    store_every_eighth,
    store_every_fourth,
    store_f32,
    store_f32x32,
    store_i8x16,
    store_i8x32,
    store_i32,
)
from quant.simd.permutes import CAN_PERMUTE
from quant.simd.words import twice_sums_of_8
from quant.target.jit import inline

Q8_BLOCK = 32  # columns that share a scale
K_BLOCK_BYTES = 3136  # no multiple of a large power of two: k-blocks would share a few sets of the L1 cache
NIBBLES, QUARTERS, SCALES, SUMS, SCALES_16, SUMS_16, IN_ORDER = 0, 256, 512, 576, 640, 704, 768
EVERY_FOURTH, STARTS, SCALES_OF_16 = 1024, 1280, 1344
EIGHTHS, CRUMB_SCALES, CRUMB_STARTS, PACKED_SCALES, PACKED_SUMS = 1408, 1664, 1728, 1792, 1824
SPLIT, SPLIT_SCALES, SPLIT_SUMS = 1856, 2112, 2176
EVERY_EIGHTH, STARTS_32, SCALES_OF_32 = 2240, 2752, 2816
NINEFOLD_SUMS, EVEN_SUMS, ODD_SUMS = 2880, 2944, 3008


def q8_bytes(n_cols: int) -> int:
    """Bytes of one q8 row, a multiple of 64."""
    return (5 * n_cols + 8 * (n_cols // Q8_BLOCK) + 63) // 64 * 64 + K_BLOCK_BYTES * (n_cols // 256)


@inline
def k_blocks_at(n_cols):
    """Where a q8 row's k-blocks begin."""
    return (5 * n_cols + 8 * (n_cols // 32) + 63) // 64 * 64


@inline
def _write_for_packed_dots(k_block, j, q, d, first, second):
    """The same, from the eighths on: what formats with 2 bits a weight read (formats/sub_blocks_16.py)."""
    store_eights(k_block + EIGHTHS + 8 * j, 64, q)
    bits = 2 * (j & 3) if CRUMBS_IN_PLACE else 0
    store_f32(k_block + CRUMB_SCALES + 8 * j, d / np.float32(1 << bits))
    store_f32(k_block + CRUMB_SCALES + 8 * j + 4, d / np.float32(1 << bits))
    store_i32(k_block + CRUMB_STARTS + 8 * j, -(first + second) << bits)
    store_i32(k_block + CRUMB_STARTS + 8 * j + 4, 0)
    lane = j & 1 | (j >> 2 & 1) << 1 | (j >> 1 & 1) << 2
    store_f32(k_block + PACKED_SCALES + 4 * lane, d)
    store_i32(k_block + PACKED_SUMS + 4 * lane, first & 0xFFFF | second << 16)


@inline
def _write_split(k_block, j, q, d, first, second):
    """The same, for formats with nibbles in blocks of 16."""
    split, to = swapped_eights(q), k_block + SPLIT + 64 * (j >> 1) + 16 * (j & 1)
    store_i8x16(to, first_half(split))
    store_i8x16(to + 32, second_half(split))
    lane = 4 * (2 * j & 8 | (j & 1) << 2 | j & 2)
    store_f32(k_block + SPLIT_SCALES + lane, d)
    store_f32(k_block + SPLIT_SCALES + lane + 4, d)
    store_f32(k_block + SPLIT_SUMS + lane, first)
    store_f32(k_block + SPLIT_SUMS + lane + 4, second)


@inline
def _write_in_k_block(k_block, j, q, d, first, second):
    """Block j of a k-block: q i8x32, its scale, and the sums of its halves."""
    store_i8x32(k_block + IN_ORDER + 32 * j, q)
    store_i8x32(k_block + NIBBLES + 32 * (j & 4 | (j & 1) << 1 | (j >> 1) & 1), q)
    quarter = k_block + QUARTERS + 128 * (j & 1) + 16 * (j >> 1)
    store_i8x16(quarter, first_half(q))
    store_i8x16(quarter + 64, second_half(q))
    store_f32(k_block + SCALES + 8 * j, d)
    store_f32(k_block + SCALES + 8 * j + 4, d * (first + second))
    store_f32(k_block + SUMS + 8 * j, first + second)
    store_f32(k_block + SUMS + 8 * j + 4, np.float32(0.0))
    lane = 4 * (4 * (2 * j & 3) + (j >> 1))
    store_f32(k_block + SCALES_16 + lane, d)
    store_f32(k_block + SCALES_16 + lane + 16, d)
    store_f32(k_block + SUMS_16 + lane, first)
    store_f32(k_block + SUMS_16 + lane + 16, second)
    if CAN_PERMUTE:
        store_every_fourth(k_block + EVERY_FOURTH + 8 * j, q)
        store_i32(k_block + STARTS + 8 * j, np.int64(first) * -128)
        store_i32(k_block + STARTS + 8 * j + 4, np.int64(second) * -128)
        store_f32(k_block + SCALES_OF_16 + 8 * j, d)
        store_f32(k_block + SCALES_OF_16 + 8 * j + 4, d)
        for twice in range(0, 64, 32):  # for two rows' blocks: to double a vector takes the place of a lookup
            store_every_eighth(k_block + EVERY_EIGHTH + twice + 4 * j, q)
            store_i32(k_block + STARTS_32 + twice + 4 * j, np.int64(first + second) * -128)
            store_f32(k_block + SCALES_OF_32 + twice + 4 * j, d)
            at = k_block + twice + 4 * j
            store_i32(at + NINEFOLD_SUMS, (np.int64(first) * -9 & 0xFFFF) | np.int64(second) * -9 << 16)
            store_i32(at + EVEN_SUMS, twice_sums_of_8(q))
            store_i32(at + ODD_SUMS, twice_sums_of_8(q) >> 32)
    _write_for_packed_dots(k_block, j, q, d, int(first), int(second))
    _write_split(k_block, j, q, d, first, second)


def q8_ref(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The reference: float32 (..., K) -> q int8 (..., K), d float32 (..., K/32)."""
    blocks = x.reshape(*x.shape[:-1], -1, Q8_BLOCK).astype(np.float32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    q = np.rint(blocks * inverse).astype(np.int8)
    return q.reshape(x.shape), (largest * np.float32(1 / 127))[..., 0]


@inline
def write_q8(x, first, last, n_cols, integer, q8):
    """Fill columns first..last of a q8 row from float32 at x; both multiples of 32 if the format is integer."""
    if not integer:
        for i in range(first, last):
            store_f32(q8 + 4 * i, load_f32(x + 4 * i))
        return
    scales = q8 + 5 * n_cols
    sums = scales + 4 * (n_cols // 32)
    for block in range(first // 32, last // 32):
        values = load_f32x32(x + 128 * block)
        largest = hmax(abs(values))
        inverse = np.float32(127.0) / largest if largest > 0 else np.float32(0.0)
        d = largest * np.float32(1 / 127)
        q = round_to_i8(values * inverse)
        store_f32x32(q8 + 128 * block, to_f32(q) * d)
        store_i8x32(q8 + 4 * n_cols + 32 * block, q)
        store_f32(scales + 4 * block, d)
        first_sum, second_sum = sum_first_i8(q), sum_second_i8(q)
        store_f32(sums + 4 * block, d * (first_sum + second_sum))
        if block < n_cols // 256 * 8:
            k_block = q8 + k_blocks_at(n_cols) + K_BLOCK_BYTES * (block // 8)
            _write_in_k_block(k_block, block % 8, q, d, first_sum, second_sum)
