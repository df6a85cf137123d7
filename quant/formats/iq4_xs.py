"""IQ4_XS: 4-bit weights on IQ4_NL's grid, 8 sub-blocks of 32, x = d*(ls-32)*VALUES[q]. 256 weights in 136 bytes, 4.25
bits each.

A sub-block has 2 bits of its ls in scales_h and 4 in scales_l, and 16 bytes of qs, byte j of which holds weight j (low
nibble) and j+16 (high).
Quantising: IQ4_NL's search; of the rounded scales the one with the least error once the block's d is known.
Source: ggml src/ggml-common.h @d99724f, block_iq4_xs; dequantize_row_iq4_xs in ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.formats.blocks_32 import add_offset, biased_dots_of_quarters
from quant.formats.iq4_nl import VALUES, fit_scale, indices, nearest_level, raised_values
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SIGNED_BYTES
from quant.gemm.repack import SCALES, repacks, two_nibbles
from quant.gemv import plain
from quant.quantize.search import TINY, everywhere, mean, sum_squares, write_importance, write_squares
from quant.simd.core import i8x32, i32x16
from quant.simd.dots import WEIGHT_BIAS
from quant.simd.exact import best_lane, clamp, constants, greatest, join_nibbles, lane, where
from quant.simd.floats import fma, interleaved_bytes, to_f32, zero_f32x16
from quant.simd.ints import even_quarters, lookup_in, nibbles, odd_quarters
from quant.simd.memory import (
    load_f16,
    load_f16_everywhere,
    load_f32,
    load_f32x32,
    load_i8x16,
    load_i8x64,
    load_u8,
    load_u16,
    load_u32,
    store_f16,
    store_f32,
    store_f32x16,
    store_f32x32,
    store_i8x16,
    store_i16,
    store_i32,
    store_i32x16,
)
from quant.simd.rows16 import gather, half_to_f32, transpose
from quant.target.jit import inline, kernel

BLOCK = 256
LAYOUT = block_layout(136, d="<f2", scales_h="<u2", scales_l="4u1", qs="128u1")
D, SCALES_H, SCALES_L, QS = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

_value = lookup_in(VALUES, i8x32)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*136) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    d = raw["d"].astype(np.float32)[..., None]
    high = raw["scales_h"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw["scales_l"] & 15, raw["scales_l"] >> 4], -1).reshape(*raw.shape, 8)
    ls = (low | high << 4).astype(np.int8) - np.int8(32)
    qs = raw["qs"].reshape(*raw.shape, 8, 16)
    q = np.concatenate([qs & 15, qs >> 4], -1)
    x = (d * ls.astype(np.float32))[..., None] * VALUES[q].astype(np.float32)
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block, j):
    """Sub-block j, i8x32 in -127..113."""
    return _value(nibbles(load_i8x16(block + QS + 16 * j)))


@inline
def _scale(block, j):
    """d * (ls - 32) of sub-block j."""
    low = load_u8(block + SCALES_L + j // 2) >> (4 * (j % 2)) & 15
    high = load_u16(block + SCALES_H) >> (2 * j) & 3
    return load_f16(block + D) * np.float32((low | high << 4) - 32)


@inline
def _packed_scales(block):
    """The 8 ls, each below 64, as the bytes of one int64: 2 bits of scales_h above 4 of scales_l."""
    low, high = load_u32(block + SCALES_L), load_u16(block + SCALES_H)
    low = (low | low << 16) & 0x0000FFFF0000FFFF
    low = (low | low << 8) & 0x00FF00FF00FF00FF
    low = (low | low << 4) & 0x0F0F0F0F0F0F0F0F
    high = (high | high << 24) & 0x000000FF000000FF
    high = (high | high << 12) & 0x000F000F000F000F
    high = (high | high << 6) & 0x0303030303030303
    return low | high << 4


@inline
def _weights(block):
    """Raised values of low and high nibbles of sub-blocks 0 2 4 6, of 1 3 5 7; d * (ls - 32) in two lanes each."""
    low, high = load_i8x64(block + QS), load_i8x64(block + QS + 64)
    packed = _packed_scales(block)
    scales = (interleaved_bytes(packed, packed) - 32) * load_f16_everywhere(block + D)
    return *raised_values(even_quarters(low, high)), *raised_values(odd_quarters(low, high)), scales


@inline
def _add_k_block(weights, k_block, total):
    return add_offset(biased_dots_of_quarters(weights, k_block), WEIGHT_BIAS, weights[4], k_block, total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        for j in range(8):
            x = to_f32(_quants(block, j)) * _scale(block, j)
            store_f32x32(out + 1024 * b + 128 * j, x)


_byte_value = lookup_in(VALUES.astype(int) + 128, i32x16)


@inline
def _store_values(words, out):
    """Low nibbles to the step's first half, high ones to its second, both through the table."""
    low, high = two_nibbles(words)
    store_i32x16(out, _byte_value(low))
    store_i32x16(out + 256, _byte_value(high))


@repacks
def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BLOCK_BYTES * b
        high, low = gather(rows, block + D), gather(rows, block + SCALES_L)  # high: d, then scales_h
        d = half_to_f32(high)
        for j in range(8):
            w0, w1, w2, w3 = transpose(rows, block + QS + 16 * j)
            _store_values(w0, out)
            _store_values(w1, out + 64)
            _store_values(w2, out + 128)
            _store_values(w3, out + 192)
            upper = (high >> 16 + 2 * j & 3) << 4
            scale = (low >> 4 * j & 15 | upper) - 32
            store_f32x16(out + SCALES, to_f32(scale) * d)
            out += K_BLOCK_BYTES


# ---- quantising ------------------------------------------------------------------------------------------------------

_FITTED = 4 * BLOCK  # scratch: the weights of errors f32[256] @0, the scales f32[8], then rounded ones of each attempt
_LARGEST = tuple(np.float32(value) for value in (-32, -31))  # what the largest scale becomes: ggml's, a little less
_AROUND = constants([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, 8])


@inline
def _fit_scales(x, importance, average, scratch):
    """The scales of the 8 sub-blocks, into scratch; returns the one of the largest magnitude."""
    variance, top = np.float32(2.0 / BLOCK) * sum_squares(x, BLOCK), np.float32(0.0)
    for j in range(8):
        sub, w, scale = x + 128 * j, scratch + 128 * j, np.float32(0.0)
        if greatest(abs(load_f32x32(sub))) > TINY:
            if importance != 0:
                write_importance(sub, importance + 128 * j, 32, variance, average, w)
            else:
                write_squares(sub, 32, w)
            scale = fit_scale(sub, w)
        store_f32(scratch + _FITTED + 4 * j, scale)
        top = scale if abs(scale) > abs(top) else top
    return top


@inline
def _errors(x, w, scale):
    """Sum of w * (scale * level - x)^2 for 16 scales."""
    inverse, total = where(abs(scale) > 0, 1 / scale, 0), zero_f32x16()
    for i in range(32):
        xi = everywhere(x, i)
        rest = xi - scale * nearest_level(xi * inverse)
        total = fma(everywhere(w, i) * rest, rest, total)
    return total


@inline
def _round_scales(x, scratch, d, rounded):
    """For each sub-block the 6-bit scale with the least error near the fitted one, as float32; returns their error."""
    error = np.float32(0.0)
    for j in range(8):
        scale, best = load_f32(scratch + _FITTED + 4 * j), np.float32(0.0)
        if scale != 0 and d != 0:
            near = clamp(np.rint(scale / d) + _AROUND(), -32, 31)
            total = _errors(x + 128 * j, scratch + 128 * j, near * d)
            lane_ = best_lane(-total)
            best = lane(near, lane_)
            error += lane(total, lane_)
        store_f32(rounded + 4 * j, best)
    return error


@inline
def _choose_scales(x, top, scratch, block):
    """Write the d with the least error to the block; returns the address of its rounded scales."""
    chosen, least_error, d = scratch + _FITTED + 64, np.float32(np.inf), np.float32(0.0)
    for i in range(len(_LARGEST)):
        store_f16(block + D, top / _LARGEST[i])
        candidate, rounded = load_f16(block + D), scratch + _FITTED + 64 * (i + 1)
        error = _round_scales(x, scratch, candidate, rounded)
        if error < least_error:
            chosen, least_error, d = rounded, error, candidate
    store_f16(block + D, d)
    return chosen


@kernel(QUANTIZE)
def _quantize(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BLOCK_BYTES * b
        top = _fit_scales(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, scratch)
        scales = _choose_scales(values, top, scratch, block)
        d, low, high = load_f16(block + D), 0, 0
        for j in range(8):
            scale = load_f32(scales + 4 * j)
            ls = int(scale) + 32
            low, high = low | (ls & 15) << 4 * j, high | ls >> 4 << 2 * j
            store_i8x16(block + QS + 16 * j, join_nibbles(indices(load_f32x32(values + 128 * j), d * scale)))
        store_i32(block + SCALES_L, low)
        store_i16(block + SCALES_H, high)


_gemv, _gemv_batch = plain.kernels("IQ4_XS", BLOCK_BYTES, _weights, _add_k_block)

IQ4_XS = Format(
    "IQ4_XS",
    BLOCK,
    LAYOUT,
    True,
    unpack,
    _gemv,
    _gemv_batch,
    _expand,
    panels=PanelFormat(SIGNED_BYTES, 128, _repack),
    quantize=_quantize,
)
