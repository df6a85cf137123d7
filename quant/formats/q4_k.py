"""Q4_K: 4-bit weights in 8 sub-blocks of 32, x = d*sc*q - dmin*m. 256 weights in 144 bytes, 4.5 bits each.
Block: d f16 @0 | dmin f16 @2 | scales u8[12] @4, 8 sc and 8 m of 6 bits | qs u8[128] @16, 32 bytes hold sub-block 2c in
their low nibbles and 2c+1 in their high ones.
Source: ggml src/ggml-common.h @d99724f, block_q4_K; get_scale_min_k4 in ggml-quants.c."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.gemv import plain
from quant.gemv.activations import NIBBLES, SCALES
from quant.simd.floats import fma, interleaved_bytes, picked, subtract_odd, to_f32
from quant.simd.ints import dot_u8, pair_sums, zero_i32x16
from quant.simd.memory import load_f16, load_f16_pair, load_f32x16, load_i8x32, load_i8x64, load_u32, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 256, 144
# pair_sums leaves sub-blocks 0 1 4 5 in quarters 0 and 1, and 2 3 6 7 in the others.
_in_order_of_dots = picked([2 * j for j in (0, 1, 4, 5, 0, 1, 4, 5, 2, 3, 6, 7, 2, 3, 6, 7)])


def unpack_scales(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (..., 12) -> sc, m uint8 (..., 8), each below 64."""
    low, high, mixed = np.split(scales, 3, -1)
    sc = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], -1)
    m = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], -1)
    return sc, m


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*144) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d, dmin = np.split(raw[..., :4].copy().view(np.float16).astype(np.float32), 2, -1)
    sc, m = unpack_scales(raw[..., 4:16])
    qs = raw[..., 16:].reshape(*raw.shape[:-1], 4, 1, 32)
    q = np.concatenate([qs & 15, qs >> 4], -2).reshape(*raw.shape[:-1], 8, 32).astype(np.float32)
    x = (d * sc)[..., None] * q - (dmin * m)[..., None]
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def packed_scales(block):
    """The 8 sc as the bytes of one int64. Four are spread over one 32-bit word with their neighbours' high bits."""
    low, mixed = load_u32(block + 4), load_u32(block + 12)
    return (low & 0x3F3F3F3F) | ((mixed & 0x0F0F0F0F) | (low >> 2 & 0x30303030)) << 32


@inline
def packed_mins(block):
    """The 8 m as the bytes of one int64."""
    high, mixed = load_u32(block + 8), load_u32(block + 12)
    return (high & 0x3F3F3F3F) | ((mixed >> 4 & 0x0F0F0F0F) | (high >> 2 & 0x30303030)) << 32


@inline
def byte(packed, j):
    """Byte j of an int64, as float32."""
    return np.float32(packed >> (8 * j) & 255)


@inline
def _quants(block, j):
    """Sub-block j, i8x32 in 0..15."""
    return load_i8x32(block + 16 + 32 * (j // 2)) >> 4 * (j % 2) & 15


@inline
def _weights(block):
    """Sub-blocks 0|2, 1|3, 4|6, 5|7 in 0..15; d*sc and dmin*m of each sub-block in turn."""
    low, high = load_i8x64(block + 16), load_i8x64(block + 80)
    scales = interleaved_bytes(packed_scales(block), packed_mins(block)) * load_f16_pair(block)
    return low & 15, low >> 4, high & 15, high >> 4, scales


@inline
def add_nibbles(weights, k_block, total):
    """total + the products of 256 weights laid out as _weights has them; the sums of 4 products are below 2^14."""
    q, zero = k_block + NIBBLES, zero_i32x16()
    dots_0 = dot_u8(zero, weights[0], load_i8x64(q))
    dots_1 = dot_u8(zero, weights[1], load_i8x64(q + 64))
    dots_4 = dot_u8(zero, weights[2], load_i8x64(q + 128))
    dots_5 = dot_u8(zero, weights[3], load_i8x64(q + 192))
    dots = to_f32(pair_sums(pair_sums(dots_0, dots_1), pair_sums(dots_4, dots_5)))
    scales = weights[4] * load_f32x16(k_block + SCALES)
    return fma(dots, _in_order_of_dots(scales), subtract_odd(total, scales))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d, dmin = load_f16(block), load_f16(block + 2)
        scales, minima = packed_scales(block), packed_mins(block)
        for j in range(8):
            scaled = to_f32(_quants(block, j)) * (d * byte(scales, j))
            x = scaled - dmin * byte(minima, j)
            store_f32x32(out + 1024 * b + 128 * j, x)


_gemv, _gemv_batch = plain.kernels("Q4_K", BLOCK_BYTES, _weights, add_nibbles)

Q4_K = Format("Q4_K", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
