"""TQ1_0 and TQ2_0: ternary weights, x = d*(q-1). 256 weights in 54 bytes, 1.6875 bits each, or in 66 bytes, 2.0625 bits
each.

TQ2_0: qs lie as Q2_K's. TQ1_0: a byte is a fraction in 256ths, of which q are the first 5 digits in base 3 (4 in qh).
Digit n of the first 32 bytes is of weights 32n.., of the other 16 of weights 160+16n.., of qh's 4 of weights 240+4n...
Quantising is bit-equal to ggml's: d is the largest magnitude, the others are rounded to it, to its negative or to 0.
Source: ggml src/ggml-common.h @3f545becc, block_tq1_0, block_tq2_0; dequantize_row_tq1_0,
quantize_row_tq1_0_ref and so on in ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.formats.q2_k_q3_k import low_bits, quarter
from quant.formats.sub_blocks_16 import dots_in_order
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, SYMMETRIC
from quant.gemm.repack import SCALES, repacks
from quant.gemv import plain
from quant.gemv.activations import CRUMB_SCALES, CRUMB_STARTS, EIGHTHS, SCALES_16, SUMS_16
from quant.quantize.levels import inverse_of
from quant.simd.dots import dot_u8
from quant.simd.exact import greatest, round_away_to_i8
from quant.simd.floats import fma, maximum, to_f32
from quant.simd.ints import crumbs_in_place, join, ternary_digit, ternary_rest, zero_i8x32
from quant.simd.memory import (
    load_eight_everywhere,
    load_f16,
    load_f16_everywhere,
    load_f16_in_8,
    load_f32x8,
    load_f32x16,
    load_f32x32,
    load_i8x16,
    load_i8x32,
    load_i32x8,
    load_u8,
    load_word_times,
    store_f16,
    store_f32x16,
    store_f32x32,
    store_i8,
    store_i8x32,
    store_i32x16,
)
from quant.simd.rows16 import gather, half_to_f32, transpose
from quant.target.jit import inline, kernel

BLOCK = 256
LAYOUT_1 = block_layout(54, qs="48u1", qh="4u1", d="<f2")
LAYOUT_2 = block_layout(66, qs="64u1", d="<f2")
QS_1, QH, D_1 = offsets(LAYOUT_1)
QS_2, D_2 = offsets(LAYOUT_2)
BYTES_1, BYTES_2 = LAYOUT_1.itemsize, LAYOUT_2.itemsize


def _digits(fractions: np.ndarray, count: int) -> np.ndarray:
    """uint8 (..., n) -> (..., count, n)."""
    shifted = fractions[..., None, :] * np.array([1, 3, 9, 27, 81][:count], np.uint8)[:, None]
    return (shifted.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def _scaled(q: np.ndarray, raw: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    x = raw["d"].astype(np.float32)[..., None] * (q.reshape(*raw.shape, BLOCK).astype(np.float32) - 1)
    return x.reshape(*blocks.shape[:-1], -1)


def unpack_1(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*54) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_1)
    parts = _digits(raw["qs"][..., :32], 5), _digits(raw["qs"][..., 32:], 5), _digits(raw["qh"], 4)
    return _scaled(np.concatenate([part.reshape(*raw.shape, -1) for part in parts], -1), raw, blocks)


def unpack_2(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*66) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_2)
    return _scaled(low_bits(raw), raw, blocks)


# ---- products --------------------------------------------------------------------------------------------------------

_digits_of_qh = load_word_times([1, 3, 9, 27])


@inline
def _codes_1(block):
    """The q of weights 32j..32j+31 for j in 0..7, each i8x32."""
    v0, w0 = load_i8x32(block + QS_1), load_i8x16(block + QS_1 + 32)
    v1, w1 = ternary_rest(v0), ternary_rest(w0)
    v2, w2 = ternary_rest(v1), ternary_rest(w1)
    v3, w3 = ternary_rest(v2), ternary_rest(w2)
    v4, w4 = ternary_rest(v3), ternary_rest(w3)
    return (
        ternary_digit(v0),
        ternary_digit(v1),
        ternary_digit(v2),
        ternary_digit(v3),
        ternary_digit(v4),
        ternary_digit(join(w0, w1)),
        ternary_digit(join(w2, w3)),
        ternary_digit(join(w4, _digits_of_qh(block + QH))),
    )


@inline
def _weights_1(block):
    """Weights 0..63, 64..127, ... in 0..2; d."""
    q = _codes_1(block)
    return join(q[0], q[1]), join(q[2], q[3]), join(q[4], q[5]), join(q[6], q[7]), load_f16_everywhere(block + D_1)


@inline
def _add_k_block(weights, k_block, total):
    dots = dots_in_order(weights, k_block) - load_f32x16(k_block + SUMS_16)
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


@inline
def _eight(qs):
    """Bits 0 and 1 of 8 bytes, bits 2 and 3, 4 and 5, 6 and 7; the bits may stay where they are."""
    return crumbs_in_place(load_eight_everywhere(qs))


@inline
def _weights_2(block):
    """Weights by eighths (sub_blocks_16.py), times what follows from their places; d."""
    qs = block + QS_2
    return (
        _eight(qs),
        _eight(qs + 8),
        _eight(qs + 16),
        _eight(qs + 24),
        _eight(qs + 32),
        _eight(qs + 40),
        _eight(qs + 48),
        _eight(qs + 56),
        load_f16_in_8(block + D_2),
    )


@inline
def _dots_2(w, k_block):
    """The products of both halves, each block's in two lanes; they start at what the 1 in q - 1 takes away."""
    q = k_block + EIGHTHS
    first, second = load_i32x8(k_block + CRUMB_STARTS), load_i32x8(k_block + CRUMB_STARTS + 32)
    first = dot_u8(dot_u8(first, w[0], load_i8x32(q)), w[1], load_i8x32(q + 64))
    second = dot_u8(dot_u8(second, w[4], load_i8x32(q + 32)), w[5], load_i8x32(q + 96))
    first = dot_u8(dot_u8(first, w[2], load_i8x32(q + 128)), w[3], load_i8x32(q + 192))
    second = dot_u8(dot_u8(second, w[6], load_i8x32(q + 160)), w[7], load_i8x32(q + 224))
    return first, second


@inline
def _add_dots_2(dots, w, k_block, total):
    scales = k_block + CRUMB_SCALES
    scaled = fma(to_f32(dots[1]), load_f32x8(scales + 32), to_f32(dots[0]) * load_f32x8(scales))
    return fma(scaled, w[8], total)


# ---- expansion -------------------------------------------------------------------------------------------------------


@kernel(EXPAND)
def _expand_1(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BYTES_1 * b
        d = load_f16(block + D_1)
        for j, q in enumerate(_codes_1(block)):
            store_f32x32(out + 1024 * b + 128 * j, to_f32(q - 1) * d)


@kernel(EXPAND)
def _expand_2(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BYTES_2 * b
        d = load_f16(block + D_2)
        for j in range(8):
            store_f32x32(out + 1024 * b + 128 * j, to_f32(quarter(block + QS_2, j) - 1) * d)


# ---- panels ----------------------------------------------------------------------------------------------------------


@inline
def _store_d(rows, before, out):
    """d for 8 k-blocks; the word ends where the block does."""
    d = half_to_f32(gather(rows, before) >> 16)
    for j in range(8):
        store_f32x16(out + K_BLOCK_BYTES * j + SCALES, d)


@inline
def _store_digits(words, count, first, step, out):
    """The first digits of 4 weights, those of digit n at weight first + step*n."""
    for n in range(count):
        weight = first + step * n
        store_i32x16(out + K_BLOCK_BYTES * (weight // 32) + 16 * (weight % 32), ternary_digit(words))
        words = ternary_rest(words)


@repacks
def _repack_1(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_1 * b
        _store_d(rows, block + D_1 - 2, out)
        for i in range(2):
            for e, words in enumerate(transpose(rows, block + QS_1 + 16 * i)):
                _store_digits(words, 5, 16 * i + 4 * e, 32, out)
        for e, words in enumerate(transpose(rows, block + QS_1 + 32)):
            _store_digits(words, 5, 160 + 4 * e, 16, out)
        _store_digits(gather(rows, block + QH), 4, 240, 4, out)
        out += 8 * K_BLOCK_BYTES


@repacks
def _repack_2(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_2 * b
        _store_d(rows, block + D_2 - 2, out)
        for half in range(2):
            for i in range(2):
                for e, words in enumerate(transpose(rows, block + QS_2 + 32 * half + 16 * i)):
                    for k in range(4):
                        to = out + K_BLOCK_BYTES * (4 * half + k) + 256 * i + 64 * e
                        store_i32x16(to, words >> 2 * k & 0x03030303)
        out += 8 * K_BLOCK_BYTES


# ---- quantising ------------------------------------------------------------------------------------------------------


@inline
def _largest(x):
    """The greatest magnitude of a block."""
    found = abs(load_f32x32(x))
    for j in range(1, 8):
        found = maximum(abs(load_f32x32(x + 128 * j)), found)
    return greatest(found)


@inline
def _levels(x, inverse, j):
    """The q of weights 32j..32j+31, i8x32 in 0..2."""
    return round_away_to_i8(load_f32x32(x + 128 * j) * inverse) + 1


@inline
def _fraction(levels, count, step):
    """The byte whose first digits are `count` levels, `step` bytes apart."""
    q = 0
    for n in range(5):
        q = 3 * q + (load_u8(levels + step * n) if n < count else 0)
    return (256 * q + 242) // 243


@kernel(QUANTIZE)
def _quantize_1(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_1 * b
        d = _largest(values)
        store_f16(block + D_1, d)
        for j in range(8):
            store_i8x32(scratch + 32 * j, _levels(values, inverse_of(d), j))
        for i in range(32):
            store_i8(block + QS_1 + i, _fraction(scratch + i, 5, 32))
        for i in range(16):
            store_i8(block + QS_1 + 32 + i, _fraction(scratch + 160 + i, 5, 16))
        for i in range(4):
            store_i8(block + QH + i, _fraction(scratch + 240 + i, 4, 4))


@kernel(QUANTIZE)
def _quantize_2(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_2 * b
        d = _largest(values)
        inverse = inverse_of(d)
        store_f16(block + D_2, d)
        for half in range(2):
            q = zero_i8x32()
            for k in range(4):
                q |= _levels(values, inverse, 4 * half + k) << 2 * k
            store_i8x32(block + QS_2 + 32 * half, q)


_gemv_1, _gemv_batch_1 = plain.kernels("TQ1_0", BYTES_1, _weights_1, _add_k_block)
_gemv_2, _gemv_batch_2 = plain.four_rows("TQ2_0", BYTES_2, _weights_2, _dots_2, _add_dots_2)

TQ1_0 = Format(
    "TQ1_0",
    BLOCK,
    LAYOUT_1,
    True,
    unpack_1,
    _gemv_1,
    _gemv_batch_1,
    _expand_1,
    panels=PanelFormat(SYMMETRIC, 1, _repack_1),
    quantize=_quantize_1,
)
TQ2_0 = Format(
    "TQ2_0",
    BLOCK,
    LAYOUT_2,
    True,
    unpack_2,
    _gemv_2,
    _gemv_batch_2,
    _expand_2,
    panels=PanelFormat(SYMMETRIC, 1, _repack_2),
    quantize=_quantize_2,
)
