"""Q5_K: 5-bit weights in 8 sub-blocks of 32, x = d*sc*q - dmin*m. 256 weights in 176 bytes, 5.5 bits each.
Block: d f16 @0 | dmin f16 @2 | scales u8[12] @4 as in Q4_K | qh u8[32] @16, bit j of byte l is the fifth bit of weight
l of sub-block j | qs u8[128] @48 as in Q4_K.
Source: ggml src/ggml-common.h @d99724f, block_q5_K."""

import numpy as np

from quant.block_format import EXPAND, Format
from quant.formats.q4_k import add_nibbles, byte, packed_mins, packed_scales, unpack_scales
from quant.gemv import plain
from quant.simd.floats import interleaved_bytes, to_f32
from quant.simd.ints import shifted
from quant.simd.memory import load_f16, load_f16_pair, load_i8x32, load_i8x64, load_twice, store_f32x32
from quant.target.jit import inline, kernel

BLOCK, BLOCK_BYTES = 256, 176
# Bits j and j+2 to bit 4.
_fifth_of_0_2, _fifth_of_1_3, _fifth_of_4_6, _fifth_of_5_7 = (
    shifted(4, 2),
    shifted(3, 1),
    shifted(0, -2),
    shifted(-1, -3),
)


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
    low = load_i8x32(block + 48 + 32 * (j // 2)) >> 4 * (j % 2) & 15
    return low | (load_i8x32(block + 16) >> j & 1) << 4


@inline
def _weights(block):
    """Sub-blocks 0|2, 1|3, 4|6, 5|7 in 0..31; d*sc and dmin*m of each sub-block in turn."""
    low, high, fifth = load_i8x64(block + 48), load_i8x64(block + 112), load_twice(block + 16)
    scales = interleaved_bytes(packed_scales(block), packed_mins(block)) * load_f16_pair(block)
    return (
        low & 15 | _fifth_of_0_2(fifth) & 16,
        low >> 4 | _fifth_of_1_3(fifth) & 16,
        high & 15 | _fifth_of_4_6(fifth) & 16,
        high >> 4 | _fifth_of_5_7(fifth) & 16,
        scales,
    )


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d, dmin = load_f16(block), load_f16(block + 2)
        scales, minima = packed_scales(block), packed_mins(block)
        for j in range(8):
            scaled = to_f32(_quants(block, j)) * (d * byte(scales, j))
            x = scaled - dmin * byte(minima, j)
            store_f32x32(out + 1024 * b + 128 * j, x)


_gemv, _gemv_batch = plain.kernels("Q5_K", BLOCK_BYTES, _weights, add_nibbles)

Q5_K = Format("Q5_K", BLOCK, BLOCK_BYTES, True, unpack, _gemv, _gemv_batch, _expand)
