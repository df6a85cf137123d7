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
from quant.formats.sub_blocks_16 import ORDER, dots_in_order
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES, repacks, two_nibbles
from quant.gemv import plain
from quant.gemv.activations import SCALES_16, SUMS_16
from quant.simd.core import i8x32, i8x64, i32x16
from quant.simd.floats import e4m3_halved, fma, halves_f32x8, halves_f32x32, to_f32, widened
from quant.simd.ints import dot_i8, lookup_in, nibbles, swapped_eights, zero_i32x8
from quant.simd.memory import (
    load_eights,
    load_f32,
    load_f32x16,
    load_i8x16,
    load_i8x32,
    load_u8,
    load_words_picked,
    store_f32x16,
    store_f32x32,
    store_i32x16,
)
from quant.simd.rows16 import gather, transpose
from quant.target.jit import inline, kernel

BLOCK = 64
LAYOUT = block_layout(36, d="4u1", qs="32u1")
D, QS = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

_value = lookup_in(VALUES, i8x32)
_raised_value, _raised_value_of_row = lookup_in(VALUES + RAISE, i8x64), lookup_in(VALUES + RAISE, i32x16)


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

_bytes_in_order = load_words_picked(ORDER)


@inline
def _raised(block):
    """VALUES + RAISE of 64 weights, i8x64."""
    return _raised_value(load_eights(block + QS))


@inline
def _weights(block):
    """Four blocks and their scales."""
    return (
        _raised(block),
        _raised(block + BLOCK_BYTES),
        _raised(block + 2 * BLOCK_BYTES),
        _raised(block + 3 * BLOCK_BYTES),
        e4m3_halved(_bytes_in_order(block + D, BLOCK_BYTES)),
    )


@inline
def _add_k_block(weights, k_block, total):
    dots = fma(-RAISE, load_f32x16(k_block + SUMS_16), dots_in_order(weights, k_block))
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


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
        total += widened(dots * (scales * load_f32(q8 + 5 * n_cols + 4 * j)))
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
            store_f32x16(out + SCALES, e4m3_halved(scales >> 16 * half & 255))
            store_f32x16(out + SCALES + 64, e4m3_halved(scales >> 16 * half + 8 & 255))
            for e, words in enumerate(transpose(rows, block + QS + 16 * half)):
                low, high = two_nibbles(words)
                to = out + 256 * (e // 2) + 64 * (e % 2)
                store_i32x16(to, _raised_value_of_row(low))
                store_i32x16(to + 128, _raised_value_of_row(high))
            out += K_BLOCK_BYTES


_gemv, _gemv_batch = plain.kernels("NVFP4", 4 * BLOCK_BYTES, _weights, _add_k_block, _add_block, single=BLOCK)

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
