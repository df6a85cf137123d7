"""Q5_1: 5-bit weights with a minimum, x = d*q + m. 32 weights in 24 bytes, 6 bits each.
Block: d f16 @0 | m f16 @2 | qh u32 @4, bit j is the fifth bit of weight j | qs u8[16] @8, nibbles as in Q4_0.
Source: ggml src/ggml-common.h @d99724f, block_q5_1."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.formats.blocks_32 import add_minimum, add_single, add_single_minimum, dots_of_quarters, eight_pairs, four_u16
from quant.gemv import plain
from quant.simd.floats import to_f32
from quant.simd.ints import dot_u8, nibbles, set_where, spread_bits, zero_i32x8
from quant.simd.memory import load_f16, load_i8x16, load_i8x32, load_quarters, load_u32, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 32, 24


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*24) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d, m = np.split(raw[..., :4].copy().view(np.float16).astype(np.float32), 2, -1)
    high = np.unpackbits(raw[..., 4:8], axis=-1, bitorder="little")
    q = np.concatenate([raw[..., 8:] & 15, raw[..., 8:] >> 4], -1) | high << 4
    return (d * q.astype(np.float32) + m).reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block):
    """i8x32 in 0..31"""
    return nibbles(load_i8x16(block + 8)) | spread_bits(load_u32(block + 4), 16)


@inline
def _even_blocks(block):
    """Weights 0..15 of blocks 0 2 4 6 from `block` on, then weights 16..31 of the same, in 0..31."""
    qs, stride = load_quarters(block + 8, 2 * BLOCK_BYTES), 2 * BLOCK_BYTES
    low = set_where(qs & 15, four_u16(block + 4, stride), 16)
    return low, set_where(qs >> 4, four_u16(block + 6, stride), 16)


@inline
def _weights(block):
    """Both halves of blocks 0 2 4 6, of blocks 1 3 5 7; the blocks' d and m in turn."""
    even_low, even_high = _even_blocks(block)
    odd_low, odd_high = _even_blocks(block + BLOCK_BYTES)
    return even_low, even_high, odd_low, odd_high, eight_pairs(block, BLOCK_BYTES)


@inline
def _add_k_block(weights, k_block, total):
    return add_minimum(dots_of_quarters(weights, k_block), weights[4], k_block, total)


@inline
def _add_block(block, q8, n_cols, i, total):
    dots = dot_u8(zero_i32x8(), _quants(block), load_i8x32(q8 + 4 * n_cols + 32 * i))
    total = add_single(dots, load_f16(block), q8, n_cols, i, total)
    return add_single_minimum(load_f16(block + 2), q8, n_cols, i, total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, to_f32(_quants(block)) * load_f16(block) + load_f16(block + 2))


_gemv, _gemv_batch = plain.kernels("Q5_1", 8 * BLOCK_BYTES, _weights, _add_k_block, _add_block, together=1)

Q5_1 = Format("Q5_1", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
