"""Q4_1: 4-bit weights with a minimum, x = d*q + m. 32 weights in 20 bytes, 5 bits each.
Block: d f16 @0 | m f16 @2 | qs u8[16] @4, byte j holds weight j (low nibble) and j+16 (high).
Source: ggml src/ggml-common.h @d99724f, block_q4_1."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.formats.blocks_32 import add_minimum, add_single, add_single_minimum, dots_of_quarters, eight_pairs
from quant.gemv import plain
from quant.simd.floats import to_f32
from quant.simd.ints import dot_u8, nibbles, zero_i32x8
from quant.simd.memory import load_f16, load_i8x16, load_i8x32, load_quarters, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 32, 20


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*20) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d, m = np.split(raw[..., :4].copy().view(np.float16).astype(np.float32), 2, -1)
    q = np.concatenate([raw[..., 4:] & 15, raw[..., 4:] >> 4], -1).astype(np.float32)
    return (d * q + m).reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block):
    """i8x32 in 0..15"""
    return nibbles(load_i8x16(block + 4))


@inline
def _weights(block):
    """Low and high nibbles of blocks 0 2 4 6, of blocks 1 3 5 7; the blocks' d and m in turn."""
    even, odd = load_quarters(block + 4, 2 * BLOCK_BYTES), load_quarters(block + BLOCK_BYTES + 4, 2 * BLOCK_BYTES)
    scales = eight_pairs(block, BLOCK_BYTES)
    return even & 15, even >> 4, odd & 15, odd >> 4, scales


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


_gemv, _gemv_batch = plain.kernels("Q4_1", 8 * BLOCK_BYTES, _weights, _add_k_block, _add_block)

Q4_1 = Format("Q4_1", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
