"""Q5_K: 5-bit weights in 8 sub-blocks of 32, x = d*sc*q - dmin*m. 256 weights in 176 bytes, 5.5 bits each.
Block: d f16 @0 | dmin f16 @2 | scales u8[12] @4 as in Q4_K | qh u8[32] @16, bit j of byte l is the fifth bit of weight
l of sub-block j | qs u8[128] @48 as in Q4_K.
Source: ggml src/ggml-common.h @d99724f, block_q5_K."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.q4_k import byte, packed_mins, packed_scales, unpack_scales
from quant.simd import (
    dot_u8,
    either,
    fma_f32x8,
    i8_to_f32,
    i32_to_f32,
    load_f16,
    load_f32,
    load_i8x32,
    mask,
    mul_f32x32,
    prefetch,
    shift_left,
    shift_right,
    splat_f32x8,
    splat_f32x32,
    store_f32,
    store_f32x32,
    sub_f32x32,
    sum_f32x8,
    zero_f32x8,
    zero_i32x8,
)

BLOCK, BLOCK_BYTES = 256, 176
_AHEAD = 4096  # bytes between the weights in use and those being prefetched


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*176) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d, dmin = np.split(raw[..., :4].copy().view(np.float16).astype(np.float32), 2, -1)
    sc, m = unpack_scales(raw[..., 4:16])
    high = raw[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    qs = raw[..., 48:].reshape(*raw.shape[:-1], 4, 1, 32)
    q = np.concatenate([qs & 15, qs >> 4], -2).reshape(*raw.shape[:-1], 8, 32) | high << 4
    x = (d * sc)[..., None] * q.astype(np.float32) - (dmin * m)[..., None]
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block, j):
    """Sub-block j, i8x32 in 0..31."""
    low = mask(shift_right(load_i8x32(block + 48 + 32 * (j // 2)), 4 * (j % 2)), 15)
    return either(low, shift_left(mask(shift_right(load_i8x32(block + 16), j), 1), 4))


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    s8 = d8 + n_cols // 8
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        mins = np.float32(0.0)
        for b in range(n_cols // BLOCK):
            for line in range(3):
                prefetch(block + _AHEAD + 64 * line)
            d, dmin = load_f16(block), load_f16(block + 2)
            scales, minima = packed_scales(block), packed_mins(block)
            for j in range(8):
                group = 8 * b + j
                dots = dot_u8(zero_i32x8(), _quants(block, j), load_i8x32(q8 + 32 * group))
                scale = d * byte(scales, j) * load_f32(d8 + 4 * group)
                total = fma_f32x8(splat_f32x8(scale), i32_to_f32(dots), total)
                mins += dmin * byte(minima, j) * load_f32(s8 + 4 * group)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total) - mins)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d, dmin = load_f16(block), load_f16(block + 2)
        scales, minima = packed_scales(block), packed_mins(block)
        for j in range(8):
            scaled = mul_f32x32(i8_to_f32(_quants(block, j)), splat_f32x32(d * byte(scales, j)))
            x = sub_f32x32(scaled, splat_f32x32(dmin * byte(minima, j)))
            store_f32x32(out + 1024 * b + 128 * j, x)


Q5_K = Format("Q5_K", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
