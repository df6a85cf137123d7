"""Q8_0: 8-bit weights, x = d*q. 32 weights in 34 bytes, 8.5 bits each.
Block: d f16 @0 | qs i8[32] @2.
Source: ggml src/ggml-common.h @d99724f, block_q8_0."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import kernel
from quant.simd import (
    dot_i8,
    fma_f32x8,
    i8_to_f32,
    i32_to_f32,
    load_f16,
    load_f32,
    load_i8x32,
    mul_f32x32,
    prefetch,
    splat_f32x8,
    splat_f32x32,
    store_f32,
    store_f32x32,
    sum_f32x8,
    zero_f32x8,
    zero_i32x8,
)

BLOCK, BLOCK_BYTES = 32, 34
_AHEAD = 4096  # bytes between the weights in use and those being prefetched


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*34) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = raw[..., :2].copy().view(np.float16).astype(np.float32)
    return (d * raw[..., 2:].view(np.int8).astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    n_blocks = n_cols // BLOCK
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        for b in range(n_blocks):
            prefetch(block + _AHEAD)
            dots = dot_i8(zero_i32x8(), load_i8x32(block + 2), load_i8x32(q8 + 32 * b))
            total = fma_f32x8(splat_f32x8(load_f16(block) * load_f32(d8 + 4 * b)), i32_to_f32(dots), total)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, mul_f32x32(i8_to_f32(load_i8x32(block + 2)), splat_f32x32(load_f16(block))))


Q8_0 = Format("Q8_0", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
