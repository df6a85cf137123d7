"""Q2_K and Q3_K: 16 sub-blocks of 16 weights, of which 2 bits lie in qs. 256 weights in 84 bytes, 2.625 bits each, or
in 110 bytes, 3.4375 bits each.

Q2_K: x = d*sc*q - dmin*m; a byte of scales has sc in its low 4 bits and m in the others. Q3_K: x = d*(sc-32)*(q-4);
the third bit of q is hmask's, and sc has 6 bits: the low 4 of sub-blocks i and i+8 share byte i of scales, the high 2
of i, i+4, i+8 and i+12 byte 8+i. Each half of 128 weights has 32 bytes of qs; its quarter k of 32 weights takes bits
2k and 2k+1 of them, and bit 4*half+k of all 32 bytes of hmask.
Source: ggml src/ggml-common.h @d99724f, block_q2_K, block_q3_K; dequantize_row_q2_K, dequantize_row_q3_K in
ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.formats.sub_blocks_16 import packed_crumb_dots, packed_dots, scales_in
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, TWO_MINIMA, TWO_SCALES, part_bytes
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks
from quant.gemv import plain
from quant.gemv.activations import PACKED_SCALES, PACKED_SUMS
from quant.quantize.search import mean, sum_squares
from quant.quantize.sixteens import fit_lines, fit_scales, levels, prepare, store_lines
from quant.simd.dots import bytes_twice, dot_i16, products_i16, shifted_i16
from quant.simd.exact import to_i8x16
from quant.simd.floats import even_in_8, fma, halves_f32x32, odd_in_8, to_f32, zero_f32x16
from quant.simd.ints import crumbs, crumbs_in_place, moved_bits, zero_i8x32
from quant.simd.memory import (
    load_16_twice,
    load_eight_everywhere,
    load_f16,
    load_f16_in_8,
    load_f16_pair_in_8,
    load_f32x8,
    load_i8x32,
    load_i64,
    load_u8,
    load_u32,
    store_f32x16,
    store_f32x32,
    store_i8x16,
    store_i8x32,
    store_i32,
    store_i32x16,
    store_i64,
)
from quant.simd.rows16 import gather, half_to_f32, transpose, transpose_8
from quant.target.jit import inline, kernel

BLOCK = 256
LAYOUT_2 = block_layout(84, scales="16u1", qs="64u1", d="<f2", dmin="<f2")
LAYOUT_3 = block_layout(110, hmask="32u1", qs="64u1", scales="12u1", d="<f2")
SCALES_2, QS_2, D_2, DMIN = offsets(LAYOUT_2)
HMASK, QS_3, SCALES_3, D_3 = offsets(LAYOUT_3)
BYTES_2, BYTES_3 = LAYOUT_2.itemsize, LAYOUT_3.itemsize


def low_bits(raw: np.ndarray) -> np.ndarray:
    """uint8 (..., 2 halves, 4 quarters, 32): the 2 bits of qs."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return raw["qs"].reshape(*raw.shape, 2, 1, 32) >> shifts & 3


def unpack_2(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*84) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_2)
    d, dmin = (raw[name].astype(np.float32)[..., None] for name in ("d", "dmin"))
    scale, minimum = d * (raw["scales"] & 15), dmin * (raw["scales"] >> 4)
    q = low_bits(raw).reshape(*raw.shape, 16, 16).astype(np.float32)
    return (scale[..., None] * q - minimum[..., None]).reshape(*blocks.shape[:-1], -1)


def unpack_3(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*110) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT_3)
    low, high = np.split(raw["scales"], [8], -1)
    low, high = np.concatenate([low & 15, low >> 4], -1), np.concatenate([high >> 2 * k & 3 for k in range(4)], -1)
    scale = raw["d"].astype(np.float32)[..., None] * ((low | high << 4).astype(np.float32) - 32)
    third = raw["hmask"][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q = (low_bits(raw) | third.reshape(*raw.shape, 2, 4, 32) << 2).astype(np.float32) - 4
    return (scale[..., None] * q.reshape(*raw.shape, 16, 16)).reshape(*blocks.shape[:-1], -1)


# ---- products --------------------------------------------------------------------------------------------------------

_scales_of_first, _scales_of_second, _scales_of_both = scales_in("first"), scales_in("second"), scales_in("both")
_signed_of_first, _signed_of_second, _signed_of_both = (
    scales_in(halves, signed=True) for halves in ("first", "second", "both")
)


@inline
def _eight(qs):
    """Bits 0 and 1 of 8 bytes, bits 2 and 3, 4 and 5, 6 and 7."""
    return crumbs(load_eight_everywhere(qs))


@inline
def _eight_in_place(qs):
    """The same; the bits may stay where they are."""
    return crumbs_in_place(load_eight_everywhere(qs))


@inline
def _weights_2(block):
    """Weights by eighths (sub_blocks_16.py), times what follows from their places; scales, twice; d, dmin in turn."""
    qs = block + QS_2
    return (
        _eight_in_place(qs),
        _eight_in_place(qs + 8),
        _eight_in_place(qs + 16),
        _eight_in_place(qs + 24),
        _eight_in_place(qs + 32),
        _eight_in_place(qs + 40),
        _eight_in_place(qs + 48),
        _eight_in_place(qs + 56),
        load_16_twice(block + SCALES_2),
        load_f16_pair_in_8(block + D_2),
    )


@inline
def _add_dots_2(dots, w, k_block, total):
    scales, minima = w[8] & 15, shifted_i16(_scales_of_both(w[8]), 4)
    scaled = to_f32(dot_i16(products_i16(dots[0], _scales_of_first(scales)), dots[1], _scales_of_second(scales)))
    sums = to_f32(products_i16(minima, load_i8x32(k_block + PACKED_SUMS)))
    d, dmin = even_in_8(w[9]), odd_in_8(w[9])
    return fma(fma(-sums, dmin, scaled * d), load_f32x8(k_block + PACKED_SCALES), total)


@inline
def _packed_scales(block, half):
    """The sc of 8 sub-blocks as the bytes of one int64."""
    low, high = load_i64(block + SCALES_3) >> 4 * half & 0x0F0F0F0F0F0F0F0F, load_u32(block + SCALES_3 + 8) >> 4 * half
    return low | (high & 0x03030303 | (high >> 2 & 0x03030303) << 32) << 4


# The third bits of eighths of both halves, to bit 2.
_third_of_first, _third_of_second = moved_bits([-2, -1, 0, 1], 4), moved_bits([2, 3, 4, 5], 4)


@inline
def _eights_3(block, i):
    """Eighth i of the first half, and of the second."""
    third = load_eight_everywhere(block + HMASK + 8 * i)
    return (
        _eight(block + QS_3 + 8 * i) | _third_of_first(third),
        _eight(block + QS_3 + 32 + 8 * i) | _third_of_second(third),
    )


@inline
def _weights_3(block):
    """Weights by eighths in 0..7; the sc - 32, twice; d."""
    w0, w4 = _eights_3(block, 0)
    w1, w5 = _eights_3(block, 1)
    w2, w6 = _eights_3(block, 2)
    w3, w7 = _eights_3(block, 3)
    return (
        *(w0, w1, w2, w3, w4, w5, w6, w7),
        bytes_twice(_packed_scales(block, 0), _packed_scales(block, 1)) - 32,
        load_f16_in_8(block + D_3),
    )


@inline
def _add_dots_3(dots, w, k_block, total):
    """Scales come as 256 times their values."""
    scaled = to_f32(dot_i16(products_i16(dots[0], _signed_of_first(w[8])), dots[1], _signed_of_second(w[8])))
    sums = to_f32(products_i16(_signed_of_both(w[8]), load_i8x32(k_block + PACKED_SUMS)))
    d = w[9] * np.float32(1 / 256)
    return fma(fma(-4, sums, scaled) * d, load_f32x8(k_block + PACKED_SCALES), total)


# ---- expansion -------------------------------------------------------------------------------------------------------


@inline
def quarter(qs, j):
    """The 2 bits of weights 32j..32j+31, i8x32."""
    return load_i8x32(qs + 32 * (j // 4)) >> 2 * (j % 4) & 3


@kernel(EXPAND)
def _expand_2(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BYTES_2 * b
        d, dmin = load_f16(block + D_2), load_f16(block + DMIN)
        for j in range(8):
            first, second = load_u8(block + SCALES_2 + 2 * j), load_u8(block + SCALES_2 + 2 * j + 1)
            scales = halves_f32x32(d * np.float32(first & 15), d * np.float32(second & 15))
            minima = halves_f32x32(dmin * np.float32(first >> 4), dmin * np.float32(second >> 4))
            store_f32x32(out + 1024 * b + 128 * j, to_f32(quarter(block + QS_2, j)) * scales - minima)


@inline
def _scale(packed, i):
    """sc-32 of sub-block i of 8, as float32."""
    return np.float32((packed >> 8 * i & 255) - 32)


@kernel(EXPAND)
def _expand_3(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BYTES_3 * b
        d = load_f16(block + D_3)
        for j in range(8):
            packed, i = _packed_scales(block, j // 4), 2 * (j % 4)
            q = quarter(block + QS_3, j) | (load_i8x32(block + HMASK) >> j & 1) << 2
            scales = halves_f32x32(d * _scale(packed, i), d * _scale(packed, i + 1))
            store_f32x32(out + 1024 * b + 128 * j, to_f32(q - 4) * scales)


# ---- panels ----------------------------------------------------------------------------------------------------------

_STEP_2 = 2 * part_bytes(TWO_MINIMA)


@inline
def _store_minima(packed, dmin, out):
    """-dmin times the upper 4 bits of each of 4 bytes, for the halves of 2 steps."""
    for i in range(4):
        store_f32x16(out + _STEP_2 * (i // 2) + 64 * (i % 2), to_f32(packed >> 8 * i + 4 & 15) * -dmin)


@inline
def _store_scaled(words, scales, i, out):
    """A word of each quarter k of a half to its step, times the sc of its sub-block: byte 2k+i of two words."""
    for k in range(4):
        scale = scales[k // 2] >> 16 * (k % 2) + 8 * i & 15
        store_i32x16(out + _STEP_2 * k, (words >> 2 * k & 0x03030303) * scale)


@repacks
def _repack_2(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_2 * b
        halves = gather(rows, block + D_2)
        d, dmin = half_to_f32(halves), half_to_f32(halves >> 16)
        scales = transpose(rows, block + SCALES_2)
        for j in range(8):
            store_f32x16(out + _STEP_2 * j + K_BLOCK_SCALES, d)
        for pair in range(4):
            _store_minima(scales[pair], dmin, out + 2 * _STEP_2 * pair + K_BLOCK_SCALES + 64)
        for half in range(2):
            for i in range(2):
                w0, w1, w2, w3 = transpose(rows, block + QS_2 + 32 * half + 16 * i)
                of_half, to = (scales[2 * half], scales[2 * half + 1]), out + 4 * _STEP_2 * half + 256 * i
                _store_scaled(w0, of_half, i, to)
                _store_scaled(w1, of_half, i, to + 64)
                _store_scaled(w2, of_half, i, to + 128)
                _store_scaled(w3, of_half, i, to + 192)
        out += 8 * _STEP_2


@inline
def _store_scales(packed, d, out):
    """d times each of 4 bytes less 32, for the halves of 2 steps."""
    for i in range(4):
        scale = to_f32((packed >> 8 * i & 255) - 32)
        store_f32x16(out + K_BLOCK_BYTES * (i // 2) + 64 * (i % 2), scale * d)


@inline
def _repack_scales(rows, block, out):
    low, next_, high = gather(rows, block), gather(rows, block + 4), gather(rows, block + 8)
    d = half_to_f32(gather(rows, block + D_3 - SCALES_3 - 2) >> 16)  # a word that ends where the block does
    _store_scales(low & 0x0F0F0F0F | (high & 0x03030303) << 4, d, out)
    _store_scales(next_ & 0x0F0F0F0F | (high >> 2 & 0x03030303) << 4, d, out + 2 * K_BLOCK_BYTES)
    _store_scales(low >> 4 & 0x0F0F0F0F | (high >> 4 & 0x03030303) << 4, d, out + 4 * K_BLOCK_BYTES)
    _store_scales(next_ >> 4 & 0x0F0F0F0F | (high >> 6 & 0x03030303) << 4, d, out + 6 * K_BLOCK_BYTES)


@inline
def _store_threes(words, third, half, out):
    """A word of each quarter of a half to its step."""
    for k in range(4):
        q = words >> 2 * k & 0x03030303 | (third >> 4 * half + k & 0x01010101) << 2
        store_i32x16(out + K_BLOCK_BYTES * k, q)


@repacks
def _repack_3(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BYTES_3 * b
        _repack_scales(rows, block + SCALES_3, out + K_BLOCK_SCALES)
        thirds = transpose_8(rows, block + HMASK)
        for half in range(2):
            for e, words in enumerate(transpose_8(rows, block + QS_3 + 32 * half)):
                _store_threes(words, thirds[e], half, out + 4 * K_BLOCK_BYTES * half + 64 * e)
        out += 8 * K_BLOCK_BYTES


# ---- quantising ------------------------------------------------------------------------------------------------------


@inline
def _prepare(x, importance, average, variances, by_squares, scratch):
    variance = sum_squares(x, BLOCK) * np.float32(variances / BLOCK)
    prepare(x, importance, variance, average, by_squares, scratch)


@inline
def _store_low_bits(a, b, c, e, out):
    """The 2 lowest bits of levels of the quarters of a half."""
    store_i8x32(out, a & 3 | (b & 3) << 2 | (c & 3) << 4 | (e & 3) << 6)


@kernel(QUANTIZE)
def _quantize_2(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_2 * b
        _prepare(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, 1, False, scratch)
        sc, m = fit_lines(scratch, 3, block + D_2)
        store_lines(sc * load_f16(block + D_2), m * load_f16(block + DMIN), scratch)
        store_i8x16(block + SCALES_2, to_i8x16(sc) | to_i8x16(m) << 4)
        for half in range(2):
            a, b_ = levels(values, scratch, 4 * half, 0, 3), levels(values, scratch, 4 * half + 1, 0, 3)
            c, e = levels(values, scratch, 4 * half + 2, 0, 3), levels(values, scratch, 4 * half + 3, 0, 3)
            _store_low_bits(a, b_, c, e, block + QS_2 + 32 * half)


@inline
def _pack_scales(low, high, out):
    """The 12 bytes of 16 scales in 0..63, the bytes of two int64."""
    store_i64(out, low & 0x0F0F0F0F0F0F0F0F | (high & 0x0F0F0F0F0F0F0F0F) << 4)
    low, high = low >> 4, high >> 4
    upper = low & 0x03030303 | (low >> 32 & 0x03030303) << 2
    store_i32(out + 8, upper | (high & 0x03030303) << 4 | (high >> 32 & 0x03030303) << 6)


@kernel(QUANTIZE)
def _quantize_3(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BYTES_3 * b
        _prepare(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, 2, True, scratch)
        sc = fit_scales(scratch, 4, block + D_3)
        store_lines(sc * load_f16(block + D_3), zero_f32x16(), scratch)
        store_i8x16(scratch, to_i8x16(sc + 32))
        _pack_scales(load_i64(scratch), load_i64(scratch + 8), block + SCALES_3)
        third = zero_i8x32()
        for half in range(2):
            j = 4 * half
            a, b_ = levels(values, scratch, j, -4, 3) + 4, levels(values, scratch, j + 1, -4, 3) + 4
            c, e = levels(values, scratch, j + 2, -4, 3) + 4, levels(values, scratch, j + 3, -4, 3) + 4
            _store_low_bits(a, b_, c, e, block + QS_3 + 32 * half)
            third |= (a >> 2 | b_ >> 2 << 1 | c >> 2 << 2 | e >> 2 << 3) << j
        store_i8x32(block + HMASK, third)


_gemv_2, _gemv_batch_2 = plain.four_rows("Q2_K", BYTES_2, _weights_2, packed_crumb_dots, _add_dots_2)
_gemv_3, _gemv_batch_3 = plain.four_rows("Q3_K", BYTES_3, _weights_3, packed_dots, _add_dots_3)

Q2_K = Format(
    "Q2_K",
    BLOCK,
    LAYOUT_2,
    True,
    unpack_2,
    _gemv_2,
    _gemv_batch_2,
    _expand_2,
    panels=PanelFormat(TWO_MINIMA, 0, _repack_2),
    quantize=_quantize_2,
)
Q3_K = Format(
    "Q3_K",
    BLOCK,
    LAYOUT_3,
    True,
    unpack_3,
    _gemv_3,
    _gemv_batch_3,
    _expand_3,
    panels=PanelFormat(TWO_SCALES, 4, _repack_3),
    quantize=_quantize_3,
)
