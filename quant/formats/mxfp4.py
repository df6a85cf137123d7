"""MXFP4: 4-bit floats (E2M1) with a power-of-two scale, x = 2^(e-128) * VALUES[q]. 32 weights in 17
bytes, 4.25 bits each.
Block: e u8 @0 (E8M0) | qs u8[16] @1, nibbles as in Q4_0. VALUES are doubled, hence 128 instead of 127.
Source: ggml src/ggml-common.h @d99724f, block_mxfp4, and ggml_e8m0_to_fp32_half."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.formats.blocks_32 import add_offset, add_single, dots_of_quarters
from quant.gemv import plain
from quant.simd.core import i8x32, i8x64
from quant.simd.floats import half_powers, to_f32
from quant.simd.ints import dot_i8, lookup_in, nibbles, zero_i32x8
from quant.simd.memory import bits_to_f32, load_i8x16, load_i8x32, load_quarters, load_u8, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 32, 17

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_value = lookup_in(VALUES, i8x32)
_raised_value = lookup_in(VALUES + 12, i8x64)


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


@inline
def _four_exponents(block):
    """The bytes at the start of four blocks, in the low halves of 16-bit lanes."""
    low = load_u8(block) | load_u8(block + BLOCK_BYTES) << 16
    return low | (load_u8(block + 2 * BLOCK_BYTES) | load_u8(block + 3 * BLOCK_BYTES) << 16) << 32


@inline
def _weights(block):
    """Values + 12 of low and high nibbles of blocks 0 2 4 6, of blocks 1 3 5 7; the blocks' scales."""
    even, odd = load_quarters(block + 1, 2 * BLOCK_BYTES), load_quarters(block + BLOCK_BYTES + 1, 2 * BLOCK_BYTES)
    scales = half_powers(_four_exponents(block), _four_exponents(block + 4 * BLOCK_BYTES))
    low_even, high_even = _raised_value(even & 15), _raised_value(even >> 4)
    low_odd, high_odd = _raised_value(odd & 15), _raised_value(odd >> 4)
    return low_even, high_even, low_odd, high_odd, scales


@inline
def _add_k_block(weights, k_block, total):
    return add_offset(dots_of_quarters(weights, k_block), 12, weights[4], k_block, total)


@inline
def _add_block(block, q8, n_cols, i, total):
    dots = dot_i8(zero_i32x8(), _quants(block), load_i8x32(q8 + 4 * n_cols + 32 * i))
    return add_single(dots, _scale(block), q8, n_cols, i, total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, to_f32(_quants(block)) * _scale(block))


_gemv, _gemv_batch = plain.kernels("MXFP4", 8 * BLOCK_BYTES, _weights, _add_k_block, _add_block)

MXFP4 = Format("MXFP4", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
