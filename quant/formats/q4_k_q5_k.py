"""Q4_K and Q5_K: 8 sub-blocks of 32 weights, x = d*sc*q - dmin*m. 256 weights in 144 bytes, 4.5 bits each, or in 176
bytes, 5.5 bits each.

scales holds 8 sc and 8 m of 6 bits. 32 bytes of qs hold sub-block 2c in their low nibbles and 2c+1 in their high ones;
bit j of byte l of qh is the fifth bit of weight l of sub-block j.
Source: ggml src/ggml-common.h @d99724f, block_q4_K, block_q5_K; get_scale_min_k4 in ggml-quants.c.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.gemm.microkernel_k_block import AFFINE, K_BLOCK_BYTES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks, store_nibbles, two_nibbles, with_high_bits
from quant.gemv import activations, plain
from quant.gemv.activations import NIBBLES
from quant.gemv.plain import specialize
from quant.quantize.levels import inverse_of
from quant.quantize.lines import fit_lines
from quant.quantize.search import mean
from quant.simd.dots import dot_u8, pair_sums
from quant.simd.exact import round_between
from quant.simd.floats import fma, interleaved_bytes, picked, subtract_odd, to_f32
from quant.simd.ints import shifted, zero_i8x32, zero_i32x16
from quant.simd.memory import (
    load_f16,
    load_f16_pair,
    load_f32x16,
    load_f32x32,
    load_i8x32,
    load_i8x64,
    load_twice,
    load_u32,
    store_f32x16,
    store_f32x32,
    store_i8x32,
    store_i32,
    store_i32x16,
)
from quant.simd.rows16 import half_to_f32, transpose, transpose_8
from quant.target.jit import inline, kernel

BLOCK = 256
LAYOUT_4 = block_layout(144, d="<f2", dmin="<f2", scales="12u1", qs="128u1")
LAYOUT_5 = block_layout(176, d="<f2", dmin="<f2", scales="12u1", qh="32u1", qs="128u1")
D, DMIN, SCALES, QS_4 = offsets(LAYOUT_4)
_, _, _, QH, QS_5 = offsets(LAYOUT_5)
BYTES_4, BYTES_5 = LAYOUT_4.itemsize, LAYOUT_5.itemsize


def _unpack(layout: np.dtype, blocks: np.ndarray) -> np.ndarray:
    raw = blocks.view(layout)
    d, dmin = (raw[name].astype(np.float32)[..., None] for name in ("d", "dmin"))
    low, high, mixed = np.split(raw["scales"], 3, -1)
    sc = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], -1)
    m = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], -1)
    qs = raw["qs"].reshape(*raw.shape, 4, 1, 32)
    q = np.concatenate([qs & 15, qs >> 4], -2).reshape(*raw.shape, 8, 32)
    if "qh" in layout.names:
        q |= (raw["qh"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    x = (d * sc)[..., None] * q.astype(np.float32) - (dmin * m)[..., None]
    return x.reshape(*blocks.shape[:-1], -1)


# ---- products --------------------------------------------------------------------------------------------------------

# pair_sums leaves sub-blocks 0 1 4 5 in quarters 0 and 1, and 2 3 6 7 in the others.
_in_order_of_dots = picked([2 * j for j in (0, 1, 4, 5, 0, 1, 4, 5, 2, 3, 6, 7, 2, 3, 6, 7)])
# Bits j and j+2 to bit 4.
_fifth_of_0_2, _fifth_of_1_3 = shifted(4, 2), shifted(3, 1)
_fifth_of_4_6, _fifth_of_5_7 = shifted(0, -2), shifted(-1, -3)


@inline
def _packed_scales(block):
    """The 8 sc as the bytes of one int64. Four are spread over one 32-bit word with their neighbours' high bits."""
    low, mixed = load_u32(block + SCALES), load_u32(block + SCALES + 8)
    return (low & 0x3F3F3F3F) | ((mixed & 0x0F0F0F0F) | (low >> 2 & 0x30303030)) << 32


@inline
def _packed_mins(block):
    """The 8 m as the bytes of one int64."""
    high, mixed = load_u32(block + SCALES + 4), load_u32(block + SCALES + 8)
    return (high & 0x3F3F3F3F) | ((mixed >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030)) << 32


@inline
def _scales(block):
    """d*sc and dmin*m of each sub-block in turn."""
    return interleaved_bytes(_packed_scales(block), _packed_mins(block)) * load_f16_pair(block + D)


@inline
def _weights_4(block):
    """Sub-blocks 0|2, 1|3, 4|6, 5|7 in 0..15; their scales."""
    low, high = load_i8x64(block + QS_4), load_i8x64(block + QS_4 + 64)
    scales = _scales(block)
    return low & 15, low >> 4, high & 15, high >> 4, scales


@inline
def _weights_5(block):
    """The same in 0..31."""
    low, high, fifth = load_i8x64(block + QS_5), load_i8x64(block + QS_5 + 64), load_twice(block + QH)
    scales = _scales(block)
    return (
        low & 15 | _fifth_of_0_2(fifth) & 16,
        low >> 4 | _fifth_of_1_3(fifth) & 16,
        high & 15 | _fifth_of_4_6(fifth) & 16,
        high >> 4 | _fifth_of_5_7(fifth) & 16,
        scales,
    )


@inline
def _add_k_block(weights, k_block, total):
    """total + the products of 256 weights; the sums of 4 products are below 2^14."""
    q, zero = k_block + NIBBLES, zero_i32x16()
    dots_0 = dot_u8(zero, weights[0], load_i8x64(q))
    dots_1 = dot_u8(zero, weights[1], load_i8x64(q + 64))
    dots_4 = dot_u8(zero, weights[2], load_i8x64(q + 128))
    dots_5 = dot_u8(zero, weights[3], load_i8x64(q + 192))
    dots = to_f32(pair_sums(pair_sums(dots_0, dots_1), pair_sums(dots_4, dots_5)))
    scales = weights[4] * load_f32x16(k_block + activations.SCALES)
    return fma(dots, _in_order_of_dots(scales), subtract_odd(total, scales))


# ---- expansion -------------------------------------------------------------------------------------------------------


@inline
def _codes_4(block, j):
    """Sub-block j, i8x32 in 0..15."""
    return load_i8x32(block + QS_4 + 32 * (j // 2)) >> 4 * (j % 2) & 15


@inline
def _codes_5(block, j):
    """Sub-block j, i8x32 in 0..31."""
    low = load_i8x32(block + QS_5 + 32 * (j // 2)) >> 4 * (j % 2) & 15
    return low | (load_i8x32(block + QH) >> j & 1) << 4


@inline
def _byte(packed, j):
    """Byte j of an int64, as float32."""
    return np.float32(packed >> (8 * j) & 255)


BLOCK_BYTES, codes = 0, None  # what specialize() gives the template below


def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d, dmin = load_f16(block + D), load_f16(block + DMIN)
        scales, minima = _packed_scales(block), _packed_mins(block)
        for j in range(8):
            scaled = to_f32(codes(block, j)) * (d * _byte(scales, j))
            store_f32x32(out + 1024 * b + 128 * j, scaled - dmin * _byte(minima, j))


# ---- panels ----------------------------------------------------------------------------------------------------------


@inline
def _store_scaled(packed, d, out):
    """d times each of the 4 bytes in a word, to 4 steps."""
    for j in range(4):
        store_f32x16(out + K_BLOCK_BYTES * j, to_f32(packed >> 8 * j & 255) * d)


@inline
def store_scales_and_minima(d, dmin, low, high, mixed, out):
    """What is before the weights, for 8 steps. Numbers of 6 bits: see _packed_scales."""
    low_rest, high_rest = low >> 2 & 0x30303030, high >> 2 & 0x30303030
    _store_scaled(low & 0x3F3F3F3F, d, out)
    _store_scaled(mixed & 0x0F0F0F0F | low_rest, d, out + 4 * K_BLOCK_BYTES)
    minus_dmin = -dmin
    _store_scaled(high & 0x3F3F3F3F, minus_dmin, out + 64)
    mixed = mixed >> 4 & 0x0F0F0F0F
    _store_scaled(mixed | high_rest, minus_dmin, out + 4 * K_BLOCK_BYTES + 64)


@inline
def _repack_scales(rows, block, out):
    """The same of d, dmin and scales, which are a block's first 16 bytes."""
    halves, low, high, mixed = transpose(rows, block)
    d, dmin = half_to_f32(halves), half_to_f32(halves >> 16)
    store_scales_and_minima(d, dmin, low, high, mixed, out)


@inline
def store_fives(words, high, quarter, out):
    """As store_nibbles, with fifth bits from bits 2*quarter and 2*quarter+1 of each byte of `high`."""
    first, second = two_nibbles(words)
    store_i32x16(out, with_high_bits(first, high, 2 * quarter, 0x01010101))
    store_i32x16(out + K_BLOCK_BYTES, with_high_bits(second, high, 2 * quarter + 1, 0x01010101))


@repacks
def _repack_4(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_4 * b
        _repack_scales(rows, block, out + K_BLOCK_SCALES)
        for quarter in range(4):
            for i, words in enumerate(transpose_8(rows, block + QS_4 + 32 * quarter)):
                store_nibbles(words, out + 64 * i)
            out += 2 * K_BLOCK_BYTES


@repacks
def _repack_5(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_5 * b
        _repack_scales(rows, block, out + K_BLOCK_SCALES)
        fifths = transpose_8(rows, block + QH)
        for quarter in range(4):
            to = out + 2 * K_BLOCK_BYTES * quarter
            for i, words in enumerate(transpose_8(rows, block + QS_5 + 32 * quarter)):
                store_fives(words, fifths[i], quarter, to + 64 * i)
        out += 8 * K_BLOCK_BYTES


# ---- quantising ------------------------------------------------------------------------------------------------------


@inline
def _quantize_scales(x, importance, average, n_max, block, scratch):
    """Write d, dmin and the scales of a block; returns the scales and the minima as the bytes of two int64."""
    scales, minima = fit_lines(x, importance, average, n_max, block + D, scratch)
    store_i32(block + SCALES, (scales & 0x3F3F3F3F) | (scales >> 36 & 0x03030303) << 6)
    store_i32(block + SCALES + 4, (minima & 0x3F3F3F3F) | (minima >> 36 & 0x03030303) << 6)
    store_i32(block + SCALES + 8, (scales >> 32 & 0x0F0F0F0F) | (minima >> 32 & 0x0F0F0F0F) << 4)
    return scales, minima


@inline
def _levels(x, block, scales, minima, j, n_max):
    """Levels of sub-block j, i8x32 in 0..n_max."""
    scale, minimum = load_f16(block + D) * _byte(scales, j), load_f16(block + DMIN) * _byte(minima, j)
    return round_between((load_f32x32(x + 128 * j) + minimum) * inverse_of(scale), 0, n_max)


@kernel(QUANTIZE)
def _quantize_4(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_4 * b
        columns = importance + 4 * BLOCK * b if importance != 0 else 0
        scales, minima = _quantize_scales(values, columns, average, 15, block, scratch)
        for c in range(4):
            low = _levels(values, block, scales, minima, 2 * c, 15)
            high = _levels(values, block, scales, minima, 2 * c + 1, 15)
            store_i8x32(block + QS_4 + 32 * c, low | high << 4)


@kernel(QUANTIZE)
def _quantize_5(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_5 * b
        columns = importance + 4 * BLOCK * b if importance != 0 else 0
        scales, minima = _quantize_scales(values, columns, average, 31, block, scratch)
        fifth = zero_i8x32()
        for c in range(4):
            low = _levels(values, block, scales, minima, 2 * c, 31)
            high = _levels(values, block, scales, minima, 2 * c + 1, 31)
            store_i8x32(block + QS_5 + 32 * c, low & 15 | high << 4)
            fifth |= (low >> 4) << 2 * c | (high >> 4) << 2 * c + 1
        store_i8x32(block + QH, fifth)


def _format(name: str, layout: np.dtype, weights: Callable, codes: Callable, repack, quantize) -> Format:
    gemv, gemv_batch = plain.kernels(name, layout.itemsize, weights, _add_k_block)
    expand = kernel(EXPAND)(specialize(_expand, f"expand_{name}", BLOCK_BYTES=layout.itemsize, codes=codes))
    panels = PanelFormat(AFFINE, 0, repack)
    unpack = partial(_unpack, layout)
    return Format(name, BLOCK, layout, True, unpack, gemv, gemv_batch, expand, panels=panels, quantize=quantize)


Q4_K = _format("Q4_K", LAYOUT_4, _weights_4, _codes_4, _repack_4, _quantize_4)
Q5_K = _format("Q5_K", LAYOUT_5, _weights_5, _codes_5, _repack_5, _quantize_5)
