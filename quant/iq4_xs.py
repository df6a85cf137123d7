"""IQ4_XS: 4-bit weights on IQ4_NL's grid, 8 sub-blocks of 32, x = d*(ls-32)*VALUES[q]. 256 weights in 136 bytes, 4.25
bits each.
Block: d f16 @0 | scales_h u16 @2, 2 bits a sub-block | scales_l u8[4] @4, 4 bits a sub-block | qs u8[128] @8, 16 bytes
a sub-block, byte j holds weight j (low nibble) and j+16 (high).
Source: ggml src/ggml-common.h @d99724f, block_iq4_xs; dequantize_row_iq4_xs in ggml-quants.c."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.iq4_nl import VALUES
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
    load_u8,
    load_u16,
    lookup_in,
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

BLOCK, BLOCK_BYTES = 256, 136
_AHEAD = 4096  # bytes between the weights in use and those being prefetched

_value = lookup_in(VALUES)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*136) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    d = raw[..., :2].copy().view(np.float16).astype(np.float32)
    high = raw[..., 2:4].copy().view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], -1).reshape(*raw.shape[:-1], 8)
    ls = (low | high << 4).astype(np.int8) - np.int8(32)
    qs = raw[..., 8:].reshape(*raw.shape[:-1], 8, 16)
    q = np.concatenate([qs & 15, qs >> 4], -1)
    x = (d * ls.astype(np.float32))[..., None] * VALUES[q].astype(np.float32)
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block, j):
    """Sub-block j, i8x32 in -127..113."""
    return _value(nibbles(load_i8x16(block + 8 + 16 * j)))


@inline
def _scale(block, j):
    """d * (ls - 32) of sub-block j."""
    low = load_u8(block + 4 + j // 2) >> (4 * (j % 2)) & 15
    high = load_u16(block + 2) >> (2 * j) & 3
    return load_f16(block) * np.float32((low | high << 4) - 32)


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        for b in range(n_cols // BLOCK):
            for line in range(3):
                prefetch(block + _AHEAD + 64 * line)
            for j in range(8):
                group = 8 * b + j
                dots = dot_i8(zero_i32x8(), _quants(block, j), load_i8x32(q8 + 32 * group))
                scale = _scale(block, j) * load_f32(d8 + 4 * group)
                total = fma_f32x8(splat_f32x8(scale), i32_to_f32(dots), total)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        for j in range(8):
            x = mul_f32x32(i8_to_f32(_quants(block, j)), splat_f32x32(_scale(block, j)))
            store_f32x32(out + 1024 * b + 128 * j, x)


IQ4_XS = Format("IQ4_XS", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
