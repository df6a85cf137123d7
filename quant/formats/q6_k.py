"""Q6_K: 6-bit weights in 16 sub-blocks of 16, x = d*sc*(q-32). 256 weights in 210 bytes, 6.5625 bits each.
Block: ql u8[128] @0, low 4 bits | qh u8[64] @128, high 2 bits | scales i8[16] @192 | d f16 @208. Each half of 128
weights has 64 bytes of ql and 32 of qh; its quarter k of 32 weights takes ql[32*(k%2)..], nibble k//2, and bits 2k
of qh.
Source: ggml src/ggml-common.h @d99724f, block_q6_K; dequantize_row_q6_K in ggml-quants.c."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.gemv import plain
from quant.gemv.activations import IN_ORDER, SCALES_16, SUMS_16
from quant.simd.floats import fma, halves_f32x32, to_f32
from quant.simd.ints import dot_u8, pair_sums, pair_sums_wide, shifted, zero_i32x16
from quant.simd.memory import (
    load_f16,
    load_f16_everywhere,
    load_f32x16,
    load_i8,
    load_i8x16_picked,
    load_i8x32,
    load_i8x64,
    load_twice,
    store_f32x32,
)
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 256, 210
# The upper two bits of quarters 0|1 and 2|3 of a half, at bits 0|2 and 4|6, to bits 4 and 5.
_bits_0_2, _bits_4_6 = shifted(4, 2), shifted(0, -2)
# A sub-block of 16 fills a quarter; pair_sums, twice, leaves sub-block i in lane 4*(i%4) + i//4.
_scales = load_i8x16_picked([4 * (lane % 4) + lane // 4 for lane in range(16)])


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*210) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = raw[..., 208:].copy().view(np.float16).astype(np.float32)
    ql = raw[..., :128].reshape(*raw.shape[:-1], 2, 1, 64)
    low = np.concatenate([ql & 15, ql >> 4], -2).reshape(*raw.shape[:-1], 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = raw[..., 128:192].reshape(*raw.shape[:-1], 2, 1, 32) >> shifts & 3
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    scale = d * raw[..., 192:208].view(np.int8).astype(np.float32)
    x = scale[..., None] * q.reshape(*raw.shape[:-1], 16, 16).astype(np.float32)
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block, j):
    """Weights 32j..32j+31, i8x32 in -32..31."""
    half, k = j // 4, j % 4
    low = load_i8x32(block + 64 * half + 32 * (k % 2)) >> 4 * (k // 2) & 15
    high = load_i8x32(block + 128 + 32 * half) >> 2 * k & 3
    return (low | high << 4) - 32


@inline
def _scale(block, i):
    """sc of sub-block i, as float32."""
    return np.float32(load_i8(block + 192 + i))


@inline
def _weights(block):
    """Weights 0..63, 64..127, ... in 0..63; d*sc of each sub-block."""
    low, low_bits = load_i8x64(block), load_twice(block + 128)
    high, high_bits = load_i8x64(block + 64), load_twice(block + 160)
    return (
        low & 15 | _bits_0_2(low_bits) & 48,
        low >> 4 | _bits_4_6(low_bits) & 48,
        high & 15 | _bits_0_2(high_bits) & 48,
        high >> 4 | _bits_4_6(high_bits) & 48,
        _scales(block + 192) * load_f16_everywhere(block + 208),
    )


@inline
def _add_k_block(weights, k_block, total):
    q, zero = k_block + IN_ORDER, zero_i32x16()
    dots_0 = dot_u8(zero, weights[0], load_i8x64(q))
    dots_4 = dot_u8(zero, weights[1], load_i8x64(q + 64))
    dots_8 = dot_u8(zero, weights[2], load_i8x64(q + 128))
    dots_12 = dot_u8(zero, weights[3], load_i8x64(q + 192))
    dots = to_f32(pair_sums_wide(pair_sums(dots_0, dots_4), pair_sums(dots_8, dots_12)))
    dots = fma(-32, load_f32x16(k_block + SUMS_16), dots)
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d = load_f16(block + 208)
        for j in range(8):
            scales = halves_f32x32(d * _scale(block, 2 * j), d * _scale(block, 2 * j + 1))
            store_f32x32(out + 1024 * b + 128 * j, to_f32(_quants(block, j)) * scales)


_gemv, _gemv_batch = plain.kernels("Q6_K", BLOCK_BYTES, _weights, _add_k_block)

Q6_K = Format("Q6_K", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
