"""Q8_0: 8-bit weights, x = d*q. 32 weights in 34 bytes, 8.5 bits each.

Quantising is bit-equal to ggml's: the scale follows from the largest magnitude.
Source: ggml src/ggml-common.h @d99724f, block_q8_0; quantize_row_q8_0_ref in ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.formats.blocks_32 import add_single, eight_scales
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SIGNED_BYTES
from quant.gemm.repack import repacks, store_d
from quant.gemv import plain
from quant.gemv.activations import IN_ORDER, SCALES, SUMS
from quant.quantize.levels import inverse_of
from quant.simd.dots import WEIGHT_BIAS, biased, dot_biased, dot_i8, pair_sums_wide
from quant.simd.exact import greatest, round_away_to_i8
from quant.simd.floats import fma, picked, to_f32
from quant.simd.ints import zero_i32x8, zero_i32x16
from quant.simd.memory import (
    load_f16,
    load_f32x16,
    load_f32x32,
    load_halves,
    load_i8x32,
    load_i8x64,
    store_f16,
    store_f32x32,
    store_i8x32,
    store_i32x16,
)
from quant.simd.rows16 import transpose_8
from quant.target.jit import inline, kernel

BLOCK = 32
LAYOUT = block_layout(34, d="<f2", qs="32i1")
D, QS = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize
# pair_sums_wide leaves blocks 0 2 4 6 in quarters 0 and 1, and 1 3 5 7 in the others: half a sum in each of two lanes.
_in_order_of_dots = picked([2 * j for j in (0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7, 1, 3, 5, 7)])


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*34) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    d = raw["d"].astype(np.float32)[..., None]
    return (d * raw["qs"].astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@inline
def _weights(block):
    """Blocks 0|1, 2|3, 4|5, 6|7, each + WEIGHT_BIAS; the blocks' scales."""
    qs = block + QS
    blocks_0 = biased(load_halves(qs, BLOCK_BYTES))
    blocks_2 = biased(load_halves(qs + 2 * BLOCK_BYTES, BLOCK_BYTES))
    blocks_4 = biased(load_halves(qs + 4 * BLOCK_BYTES, BLOCK_BYTES))
    blocks_6 = biased(load_halves(qs + 6 * BLOCK_BYTES, BLOCK_BYTES))
    return blocks_0, blocks_2, blocks_4, blocks_6, eight_scales(block + D, BLOCK_BYTES)


@inline
def _add_k_block(weights, k_block, total):
    q, zero = k_block + IN_ORDER, zero_i32x16()
    dots_0 = dot_biased(zero, weights[0], load_i8x64(q))
    dots_2 = dot_biased(zero, weights[1], load_i8x64(q + 64))
    dots_4 = dot_biased(zero, weights[2], load_i8x64(q + 128))
    dots_6 = dot_biased(zero, weights[3], load_i8x64(q + 192))
    dots = to_f32(pair_sums_wide(pair_sums_wide(dots_0, dots_2), pair_sums_wide(dots_4, dots_6)))
    dots = fma(np.float32(-WEIGHT_BIAS / 2), _in_order_of_dots(load_f32x16(k_block + SUMS)), dots)
    scales = _in_order_of_dots(weights[4] * load_f32x16(k_block + SCALES))
    return fma(dots, scales, total)


@inline
def _add_block(block, q8, n_cols, i, total):
    dots = dot_i8(zero_i32x8(), load_i8x32(block + QS), load_i8x32(q8 + 4 * n_cols + 32 * i))
    return add_single(dots, load_f16(block + D), q8, n_cols, i, total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        store_f32x32(out + 128 * b, to_f32(load_i8x32(block + QS)) * load_f16(block + D))


@repacks
def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        store_d(rows, BLOCK_BYTES * b + D, out)
        for e, words in enumerate(transpose_8(rows, BLOCK_BYTES * b + QS)):
            store_i32x16(out + 64 * e, words ^ 0x80808080)
        out += K_BLOCK_BYTES


@kernel(QUANTIZE)
def _quantize(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = load_f32x32(x + 128 * b), out + BLOCK_BYTES * b
        d = greatest(abs(values)) / np.float32(127.0)
        store_f16(block + D, d)
        store_i8x32(block + QS, round_away_to_i8(values * inverse_of(d)))


_gemv, _gemv_batch = plain.kernels("Q8_0", 8 * BLOCK_BYTES, _weights, _add_k_block, _add_block)

Q8_0 = Format(
    "Q8_0",
    BLOCK,
    LAYOUT,
    True,
    unpack,
    _gemv,
    _gemv_batch,
    _expand,
    panels=PanelFormat(SIGNED_BYTES, 128, _repack),
    quantize=_quantize,
)
