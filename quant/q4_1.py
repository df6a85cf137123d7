"""Q4_1: 4-bit weights with a minimum, x = d*q + m. 32 weights in 20 bytes, 5 bits each.
Block: d f16 @0 | m f16 @2 | qs u8[16] @4, byte j holds weight j (low nibble) and j+16 (high).
Source: ggml src/ggml-common.h @d99724f, block_q4_1."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.simd import (
    add_f32x32,
    dot_u8,
    fma_f32x8,
    i8_to_f32,
    i32_to_f32,
    load_f16,
    load_f32,
    load_i8x16,
    load_i8x32,
    mul_f32x32,
    nibbles,
    prefetch,
    splat_f32x8,
    splat_f32x32,
    store_f32,
    store_f32x32,
    sum_f32x8,
    zero_f32x8,
    zero_i32x8,
)

BLOCK, BLOCK_BYTES = 32, 20
_AHEAD = 4096  # bytes between the weights in use and those being prefetched


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


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    n_blocks = n_cols // BLOCK
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    s8 = d8 + 4 * n_blocks
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        mins = np.float32(0.0)
        for b in range(n_blocks):
            prefetch(block + _AHEAD)
            dots = dot_u8(zero_i32x8(), _quants(block), load_i8x32(q8 + 32 * b))
            total = fma_f32x8(splat_f32x8(load_f16(block) * load_f32(d8 + 4 * b)), i32_to_f32(dots), total)
            mins += load_f16(block + 2) * load_f32(s8 + 4 * b)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total) + mins)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(
            out + 128 * b,
            add_f32x32(
                mul_f32x32(i8_to_f32(_quants(block)), splat_f32x32(load_f16(block))), splat_f32x32(load_f16(block + 2))
            ),
        )


Q4_1 = Format("Q4_1", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
