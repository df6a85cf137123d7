"""Q5_0: 5-bit weights, x = d*(q-16). 32 weights in 22 bytes, 5.5 bits each.
Block: d f16 @0 | qh u32 @2, bit j is the fifth bit of weight j | qs u8[16] @6, nibbles as in Q4_0.
Source: ggml src/ggml-common.h @d99724f, block_q5_0."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.formats.blocks_32 import add_offset, add_single, dots_of_quarters, eight_scales, four_u16
from quant.gemv import plain
from quant.simd.floats import to_f32
from quant.simd.ints import dot_i8, nibbles, set_where, spread_bits, zero_i32x8
from quant.simd.memory import load_f16, load_i8x16, load_i8x32, load_quarters, load_u32, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 32, 22


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*22) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = raw[..., :2].copy().view(np.float16).astype(np.float32)
    high = np.unpackbits(raw[..., 2:6], axis=-1, bitorder="little")
    q = np.concatenate([raw[..., 6:] & 15, raw[..., 6:] >> 4], -1) | high << 4
    return (d * (q.astype(np.int8) - np.int8(16)).astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block):
    """i8x32 in -16..15"""
    return (nibbles(load_i8x16(block + 6)) | spread_bits(load_u32(block + 2), 16)) - 16


@inline
def _even_blocks(block):
    """Weights 0..15 of blocks 0 2 4 6 from `block` on, then weights 16..31 of the same, in 0..31."""
    qs, stride = load_quarters(block + 6, 2 * BLOCK_BYTES), 2 * BLOCK_BYTES
    low = set_where(qs & 15, four_u16(block + 2, stride), 16)
    return low, set_where(qs >> 4, four_u16(block + 4, stride), 16)


@inline
def _weights(block):
    """Both halves of blocks 0 2 4 6, of blocks 1 3 5 7; the blocks' scales."""
    even_low, even_high = _even_blocks(block)
    odd_low, odd_high = _even_blocks(block + BLOCK_BYTES)
    return even_low, even_high, odd_low, odd_high, eight_scales(block, BLOCK_BYTES)


@inline
def _add_k_block(weights, k_block, total):
    return add_offset(dots_of_quarters(weights, k_block), 16, weights[4], k_block, total)


@inline
def _add_block(block, q8, n_cols, i, total):
    dots = dot_i8(zero_i32x8(), _quants(block), load_i8x32(q8 + 4 * n_cols + 32 * i))
    return add_single(dots, load_f16(block), q8, n_cols, i, total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, to_f32(_quants(block)) * load_f16(block))


_gemv, _gemv_batch = plain.kernels("Q5_0", 8 * BLOCK_BYTES, _weights, _add_k_block, _add_block, together=1)

Q5_0 = Format("Q5_0", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
