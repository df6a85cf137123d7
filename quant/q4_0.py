"""Q4_0: 4-bit weights, x = d*(q-8). 32 weights in 18 bytes, 4.5 bits each.
Block: d f16 @0 | qs u8[16] @2, byte j holds weight j (low nibble) and j+16 (high).
Source: ggml src/ggml-common.h @d99724f, block_q4_0."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.simd import (
    dot_i8,
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
    subtract_i8,
    sum_f32x8,
    zero_f32x8,
    zero_i32x8,
)

BLOCK, BLOCK_BYTES = 32, 18
_AHEAD = 4096  # bytes between the weights in use and those being prefetched


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*18) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = raw[..., :2].copy().view(np.float16).astype(np.float32)
    q = np.concatenate([raw[..., 2:] & 15, raw[..., 2:] >> 4], -1).astype(np.int8) - np.int8(8)
    return (d * q.astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block):
    """i8x32 in -8..7"""
    return subtract_i8(nibbles(load_i8x16(block + 2)), 8)


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    n_blocks = n_cols // BLOCK
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        for b in range(n_blocks):
            prefetch(block + _AHEAD)
            dots = dot_i8(zero_i32x8(), _quants(block), load_i8x32(q8 + 32 * b))
            total = fma_f32x8(splat_f32x8(load_f16(block) * load_f32(d8 + 4 * b)), i32_to_f32(dots), total)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, mul_f32x32(i8_to_f32(_quants(block)), splat_f32x32(load_f16(block))))


Q4_0 = Format("Q4_0", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
