"""Q6_K: 6-bit weights in 16 sub-blocks of 16, x = d*sc*(q-32). 256 weights in 210 bytes, 6.5625 bits each.
Block: ql u8[128] @0, low 4 bits | qh u8[64] @128, high 2 bits | scales i8[16] @192 | d f16 @208. Each half of 128
weights has 64 bytes of ql and 32 of qh; its quarter k of 32 weights takes ql[32*(k%2)..], nibble k//2, and bits 2k
of qh.
Source: ggml src/ggml-common.h @d99724f, block_q6_K; dequantize_row_q6_K in ggml-quants.c."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.simd import (
    dot_i8,
    either,
    fma_f32x8,
    halves_f32x8,
    halves_f32x32,
    i8_to_f32,
    i32_to_f32,
    load_f16,
    load_f32,
    load_i8,
    load_i8x32,
    mask,
    mul_f32x32,
    prefetch,
    shift_left,
    shift_right,
    store_f32,
    store_f32x32,
    subtract_i8,
    sum_f32x8,
    zero_f32x8,
    zero_i32x8,
)

BLOCK, BLOCK_BYTES = 256, 210
_AHEAD = 4096  # bytes between the weights in use and those being prefetched


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
    low = mask(shift_right(load_i8x32(block + 64 * half + 32 * (k % 2)), 4 * (k // 2)), 15)
    high = mask(shift_right(load_i8x32(block + 128 + 32 * half), 2 * k), 3)
    return subtract_i8(either(low, shift_left(high, 4)), 32)


@inline
def _scale(block, i):
    """sc of sub-block i, as float32."""
    return np.float32(load_i8(block + 192 + i))


@kernel(GEMV)
def _gemv(w, n_rows, n_cols, record, out):
    q8, d8 = record + 4 * n_cols, record + 5 * n_cols
    block = w
    for r in range(n_rows):
        total = zero_f32x8()
        for b in range(n_cols // BLOCK):
            for line in range(4):
                prefetch(block + _AHEAD + 64 * line)
            d = load_f16(block + 208)
            for j in range(8):
                group = 8 * b + j
                dots = dot_i8(zero_i32x8(), _quants(block, j), load_i8x32(q8 + 32 * group))
                scale = d * load_f32(d8 + 4 * group)
                scales = halves_f32x8(scale * _scale(block, 2 * j), scale * _scale(block, 2 * j + 1))
                total = fma_f32x8(scales, i32_to_f32(dots), total)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d = load_f16(block + 208)
        for j in range(8):
            scales = halves_f32x32(d * _scale(block, 2 * j), d * _scale(block, 2 * j + 1))
            store_f32x32(out + 1024 * b + 128 * j, mul_f32x32(i8_to_f32(_quants(block, j)), scales))


Q6_K = Format("Q6_K", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
