"""MXFP4: 4-bit floats (E2M1) with a power-of-two scale, x = 2^(e-128) * VALUES[q]. 32 weights in 17
bytes, 4.25 bits each.
Block: e u8 @0 (E8M0) | qs u8[16] @1, nibbles as in Q4_0. VALUES are doubled, hence 128 instead of 127.
Source: ggml src/ggml-common.h @d99724f, block_mxfp4, and ggml_e8m0_to_fp32_half."""

import numpy as np

from quant.formats import EXPAND, GEMV, Format
from quant.jit import inline, kernel
from quant.simd import (
    bits_to_f32,
    dot_i8,
    fma_f32x8,
    i8_to_f32,
    i32_to_f32,
    load_f32,
    load_i8x16,
    load_i8x32,
    load_u8,
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

BLOCK, BLOCK_BYTES = 32, 17
_AHEAD = 4096  # bytes between the weights in use and those being prefetched

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_value = lookup_in(VALUES)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*17) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.reshape(*blocks.shape[:-1], -1, BLOCK_BYTES)
    e = raw[..., :1].astype(np.uint32)
    d = np.where(e < 2, np.uint32(0x00200000) << e, (e - 1) << 23).astype(np.uint32).view(np.float32)
    q = np.concatenate([raw[..., 1:] & 15, raw[..., 1:] >> 4], -1)
    return (d * VALUES[q].astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@inline
def _scale(block):
    """2^(e-128); e below 2 gives a subnormal."""
    e = load_u8(block)
    return bits_to_f32(0x00200000 << e if e < 2 else (e - 1) << 23)


@inline
def _quants(block):
    """i8x32 in -12..12"""
    return _value(nibbles(load_i8x16(block + 1)))


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
            total = fma_f32x8(splat_f32x8(_scale(block) * load_f32(d8 + 4 * b)), i32_to_f32(dots), total)
            block += BLOCK_BYTES
        store_f32(out + 4 * r, sum_f32x8(total))


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, mul_f32x32(i8_to_f32(_quants(block)), splat_f32x32(_scale(block))))


MXFP4 = Format("MXFP4", BLOCK, BLOCK_BYTES, True, unpack, _gemv.address, _expand.address)
