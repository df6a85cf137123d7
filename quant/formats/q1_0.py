"""Q1_0: one bit a weight, x = d or -d. 128 weights in 18 bytes, 1.125 bits each.

Bit j of qs says whether weight j is positive. There is no quantising to it.
Source: ggml src/ggml-common.h @3f545becc, block_q1_0; dequantize_row_q1_0 in ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, Format, PanelFormat, block_layout, offsets
from quant.formats.blocks_32 import add_single
from quant.formats.sub_blocks_16 import dots_in_order
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SYMMETRIC
from quant.gemm.repack import SCALES, repacks
from quant.gemv import plain
from quant.gemv.activations import SCALES_16, SUMS_16
from quant.simd.dots import dot_i8
from quant.simd.floats import f16_lanes_doubled, fma, to_f32
from quant.simd.ints import set_where, spread_bits, zero_i8x64, zero_i32x8, zero_i32x16
from quant.simd.memory import (
    load_f16,
    load_f32x16,
    load_i8x32,
    load_i64,
    load_u16,
    load_u32,
    store_f32x16,
    store_f32x32,
    store_i32x16,
)
from quant.simd.rows16 import gather, half_to_f32, with_fifth_bits
from quant.target.jit import inline, kernel

BLOCK = 128
LAYOUT = block_layout(18, d="<f2", qs="16u1")
D, QS = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*18) -> float32 (..., n*128), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    sign = np.unpackbits(raw["qs"], axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    return (raw["d"].astype(np.float32)[..., None] * sign).reshape(*blocks.shape[:-1], -1)


# ---- products --------------------------------------------------------------------------------------------------------


@inline
def _raised(bits):
    """Sign + 1 of 64 weights, i8x64."""
    return set_where(zero_i8x64(), load_i64(bits), 2)


@inline
def _weights(block):
    """Two blocks; d of each 16 weights, in sub_blocks_16.ORDER: of both blocks twice in turn."""
    following = block + BLOCK_BYTES
    both = load_u16(block + D) | load_u16(following + D) << 16
    scales = f16_lanes_doubled(both | both << 32, both | both << 32)
    return _raised(block + QS), _raised(block + QS + 8), _raised(following + QS), _raised(following + QS + 8), scales


@inline
def _add_k_block(weights, k_block, total):
    dots = dots_in_order(weights, k_block) - load_f32x16(k_block + SUMS_16)
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


@inline
def _signs(block, j):
    """Weights 32j..32j+31 of a block, i8x32 of 1 and -1."""
    return spread_bits(load_u32(block + QS + 4 * j), 2) - 1


@inline
def _add_block(block, q8, n_cols, i, total):
    for j in range(4):
        dots = dot_i8(zero_i32x8(), _signs(block, j), load_i8x32(q8 + 4 * n_cols + 128 * i + 32 * j))
        total = add_single(dots, load_f16(block + D), q8, n_cols, 4 * i + j, total)
    return total


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        for j in range(4):
            store_f32x32(out + 512 * b + 128 * j, to_f32(_signs(block, j)) * load_f16(block + D))


# ---- panels ----------------------------------------------------------------------------------------------------------

_OFFSET = 8  # with_fifth_bits sets a byte to 16


@repacks
def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BLOCK_BYTES * b
        d = half_to_f32(gather(rows, block + D)) * np.float32(1 / _OFFSET)
        for j in range(4):
            store_f32x16(out + SCALES, d)
            bits = gather(rows, block + QS + 4 * j)
            for e in range(8):
                store_i32x16(out + 64 * e, with_fifth_bits(zero_i32x16(), bits, e))
            out += K_BLOCK_BYTES


_gemv, _gemv_batch = plain.kernels("Q1_0", 2 * BLOCK_BYTES, _weights, _add_k_block, _add_block, single=BLOCK)

Q1_0 = Format(
    "Q1_0",
    BLOCK,
    LAYOUT,
    True,
    unpack,
    _gemv,
    _gemv_batch,
    _expand,
    panels=PanelFormat(SYMMETRIC, _OFFSET, _repack),
)
