"""NVFP4: 4-bit floats (E2M1) and, for every 16 of them, a scale of 8 bits, x = d*VALUES[q]. 64 weights in 36 bytes, 4.5
bits each.

VALUES are MXFP4's, doubled, so d is half of what its byte says: E4M3 without a sign (OCP 8-bit Floating Point
Specification 1.0), where the byte of NaN is 0, and bit 7 counts for nothing else. A sub-block of 16 has a byte of d and
8 bytes of qs: byte j holds weight j in its low nibble and j+8 in its high one. There is no quantising to it.
Source: ggml src/ggml-common.h @3f545becc, block_nvfp4; ggml_ue4m3_to_fp32 in ggml-impl.h; dequantize_row_nvfp4 in
ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, Format, PanelFormat, block_layout, offsets
from quant.formats.mxfp4 import RAISE, VALUES
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES, repacks, two_nibbles
from quant.gemv import plain
from quant.gemv.activations import SPLIT, SPLIT_SCALES, SPLIT_SUMS
from quant.simd.core import i8x32, i32x16
from quant.simd.dots import dot_i8, dots_of_two, packed_i16, pairs_of, products_i16
from quant.simd.floats import e4m3_halved, exact_fma, first_8, fma, halves_f32x8, halves_f32x32, last_8, to_f32
from quant.simd.ints import lookup_in, nibbles, swapped_eights, zero_i32x8
from quant.simd.memory import (
    load_f32,
    load_f32x8,
    load_f32x16,
    load_i8x16,
    load_i8x32,
    load_u8,
    load_words_picked,
    store_f32x16,
    store_f32x32,
    store_i32x16,
)
from quant.simd.rows16 import gather, low_bytes, transpose
from quant.target.jit import inline, kernel

BLOCK = 64
LAYOUT = block_layout(36, d="4u1", qs="32u1")
D, QS = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

_value = lookup_in(VALUES, i8x32)
_raised_value, _raised_value_of_row = lookup_in(VALUES + RAISE, i8x32), lookup_in(VALUES + RAISE, i32x16)


def _scale_values() -> np.ndarray:
    """float32 (256,): what each byte of d means."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -10), np.ldexp(8.0 + mantissa, exponent - 11))
    return np.where(code == 0x7F, 0, values).astype(np.float32)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*36) -> float32 (..., n*64), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    d = _scale_values()[raw["d"]][..., None]
    qs = raw["qs"].reshape(*raw.shape, 4, 8)
    q = np.concatenate([qs & 15, qs >> 4], -1)
    return (d * VALUES[q].astype(np.float32)).reshape(*blocks.shape[:-1], -1)


# ---- products --------------------------------------------------------------------------------------------------------

# Two blocks' sums of 16 lie as activations.SPLIT_SCALES do, and so do their scales.
_ORDER = [first + i for first in (0, 8) for i in (0, 1, 4, 5, 2, 3, 6, 7)]
_scales_in_order = load_words_picked(_ORDER)
_ones = pairs_of(1, 1)


@inline
def _raised(block):
    """The first 8 of each 16 weights, + RAISE; the others."""
    codes = load_i8x32(block + QS)
    return _raised_value(codes & 15), _raised_value(codes >> 4)


@inline
def _weights(block):
    """Four blocks and their scales."""
    return (
        *_raised(block),
        *_raised(block + BLOCK_BYTES),
        *_raised(block + 2 * BLOCK_BYTES),
        *_raised(block + 3 * BLOCK_BYTES),
        e4m3_halved(_scales_in_order(block + D, BLOCK_BYTES)),
    )


@inline
def _two_blocks(w0, w1, w2, w3, q):
    """Their products, in two lanes of 16 bits for each 16 weights; the sums of 8 are below 2^15."""
    first = dots_of_two(w0, load_i8x32(q), w1, load_i8x32(q + 32))
    return packed_i16(first, dots_of_two(w2, load_i8x32(q + 64), w3, load_i8x32(q + 96)))


@inline
def _dots(w, k_block):
    q = k_block + SPLIT
    return _two_blocks(w[0], w[1], w[2], w[3], q), _two_blocks(w[4], w[5], w[6], w[7], q + 128)


@inline
def _less_raise(dots, sums):
    return exact_fma(-RAISE, load_f32x8(sums), to_f32(products_i16(dots, _ones())))


@inline
def _add_dots(dots, w, k_block, total):
    scales, sums = w[8] * load_f32x16(k_block + SPLIT_SCALES), k_block + SPLIT_SUMS
    total = fma(_less_raise(dots[0], sums), first_8(scales), total)
    return fma(_less_raise(dots[1], sums + 32), last_8(scales), total)


@inline
def _scale(block, i):
    """That of sub-block i, as float32."""
    d = load_u8(block + D + i)
    exponent, mantissa = d >> 3 & 15, d & 7
    if d == 0x7F:
        return np.float32(0.0)
    return np.float32(2.0**-10) * np.float32(mantissa if exponent == 0 else (8 + mantissa) << exponent - 1)


@inline
def _levels(block, half):
    """Weights 32*half.. of a block, i8x32 in -12..12."""
    return _value(swapped_eights(nibbles(load_i8x16(block + QS + 16 * half))))


@inline
def _add_block(block, q8, n_cols, i, total):
    for half in range(2):
        j = 2 * i + half
        dots = to_f32(dot_i8(zero_i32x8(), _levels(block, half), load_i8x32(q8 + 4 * n_cols + 32 * j)))
        scales = halves_f32x8(_scale(block, 2 * half), _scale(block, 2 * half + 1))
        total += dots * (scales * load_f32(q8 + 5 * n_cols + 4 * j))
    return total


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        for half in range(2):
            scales = halves_f32x32(_scale(block, 2 * half), _scale(block, 2 * half + 1))
            store_f32x32(out + 256 * b + 128 * half, to_f32(_levels(block, half)) * scales)


# ---- panels ----------------------------------------------------------------------------------------------------------


@repacks
def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BLOCK_BYTES * b
        scales = gather(rows, block + D)
        for half in range(2):
            store_f32x16(out + SCALES, e4m3_halved(low_bytes(scales >> 16 * half)))
            store_f32x16(out + SCALES + 64, e4m3_halved(low_bytes(scales >> 16 * half + 8)))
            for e, words in enumerate(transpose(rows, block + QS + 16 * half)):
                low, high = two_nibbles(words)
                to = out + 256 * (e // 2) + 64 * (e % 2)
                store_i32x16(to, _raised_value_of_row(low))
                store_i32x16(to + 128, _raised_value_of_row(high))
            out += K_BLOCK_BYTES


_gemv, _gemv_batch = plain.four_rows("NVFP4", 4 * BLOCK_BYTES, _weights, _dots, _add_dots, _add_block, BLOCK)

NVFP4 = Format(
    "NVFP4",
    BLOCK,
    LAYOUT,
    True,
    unpack,
    _gemv,
    _gemv_batch,
    _expand,
    panels=PanelFormat(TWO_SCALES, RAISE, _repack),
)
