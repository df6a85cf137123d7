"""Q6_K: 6-bit weights in 16 sub-blocks of 16, x = d*sc*(q-32). 256 weights in 210 bytes, 6.5625 bits each.

ql has the low 4 bits, qh the high 2. Each half of 128 weights has 64 bytes of ql and 32 of qh; its quarter k of 32
weights takes ql[32*(k%2)..], nibble k//2, and bits 2k of qh. Quantising: ggml's quantize_row_q6_K up to the rounding of
the scales, where ggml takes the nearest, and here the one with the least error once the block's d is known.
Source: ggml src/ggml-common.h @d99724f, block_q6_K; dequantize_row_q6_K in ggml-quants.c.
"""

import numpy as np

from quant.block_format import EXPAND, QUANTIZE, Format, PanelFormat, block_layout, offsets
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks, two_nibbles, with_high_bits
from quant.gemv import plain
from quant.gemv.activations import IN_ORDER, SCALES_16, SUMS_16
from quant.quantize.search import (
    TINY,
    errors,
    everywhere,
    fit_scale,
    mean,
    sum_squares,
    write_importance,
    write_squares,
)
from quant.simd.dots import dot_u8, pair_sums, pair_sums_wide
from quant.simd.exact import best_lane, clamp, constants, lane, round_between, signed_largest
from quant.simd.floats import fma, halves_f32x32, to_f32, zero_f32x16
from quant.simd.ints import shifted, zero_i32x16
from quant.simd.memory import (
    load_f16,
    load_f16_everywhere,
    load_f32,
    load_f32x16,
    load_f32x32,
    load_i8,
    load_i8x16_picked,
    load_i8x32,
    load_i8x64,
    load_twice,
    store_f16,
    store_f32,
    store_f32x16,
    store_f32x32,
    store_i8,
    store_i8x32,
    store_i32x16,
)
from quant.simd.rows16 import gather, half_to_f32, sign_extend_i8, transpose, transpose_8
from quant.target.jit import inline, kernel

BLOCK = 256
LAYOUT = block_layout(210, ql="128u1", qh="64u1", scales="16i1", d="<f2")
QL, QH, SCALES, D = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

# The upper two bits of quarters 0|1 and 2|3 of a half, at bits 0|2 and 4|6, to bits 4 and 5.
_bits_0_2, _bits_4_6 = shifted(4, 2), shifted(0, -2)
# A sub-block of 16 fills a quarter; pair_sums, twice, leaves sub-block i in lane 4*(i%4) + i//4.
_scales = load_i8x16_picked([4 * (lane % 4) + lane // 4 for lane in range(16)])


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*210) -> float32 (..., n*256), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    ql = raw["ql"].reshape(*raw.shape, 2, 1, 64)
    low = np.concatenate([ql & 15, ql >> 4], -2).reshape(*raw.shape, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = raw["qh"].reshape(*raw.shape, 2, 1, 32) >> shifts & 3
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    scale = raw["d"].astype(np.float32)[..., None] * raw["scales"].astype(np.float32)
    x = scale[..., None] * q.reshape(*raw.shape, 16, 16).astype(np.float32)
    return x.reshape(*blocks.shape[:-1], -1)


@inline
def _quants(block, j):
    """Weights 32j..32j+31, i8x32 in -32..31."""
    half, k = j // 4, j % 4
    low = load_i8x32(block + QL + 64 * half + 32 * (k % 2)) >> 4 * (k // 2) & 15
    high = load_i8x32(block + QH + 32 * half) >> 2 * k & 3
    return (low | high << 4) - 32


@inline
def _scale(block, i):
    """sc of sub-block i, as float32."""
    return np.float32(load_i8(block + SCALES + i))


@inline
def _weights(block):
    """Weights 0..63, 64..127, ... in 0..63; d*sc of each sub-block."""
    low, low_bits = load_i8x64(block + QL), load_twice(block + QH)
    high, high_bits = load_i8x64(block + QL + 64), load_twice(block + QH + 32)
    return (
        low & 15 | _bits_0_2(low_bits) & 48,
        low >> 4 | _bits_4_6(low_bits) & 48,
        high & 15 | _bits_0_2(high_bits) & 48,
        high >> 4 | _bits_4_6(high_bits) & 48,
        _scales(block + SCALES) * load_f16_everywhere(block + D),
    )


@inline
def _add_k_block(weights, k_block, total):
    q, zero = k_block + IN_ORDER, zero_i32x16()
    dots_0 = dot_u8(zero, weights[0], load_i8x64(q))
    dots_4 = dot_u8(zero, weights[1], load_i8x64(q + 64))
    dots_8 = dot_u8(zero, weights[2], load_i8x64(q + 128))
    dots_12 = dot_u8(zero, weights[3], load_i8x64(q + 192))
    dots = to_f32(pair_sums_wide(pair_sums(dots_0, dots_4), pair_sums(dots_8, dots_12)))
    dots = fma(-32, load_f32x16(k_block + SUMS_16), dots)
    return fma(dots, weights[4] * load_f32x16(k_block + SCALES_16), total)


@kernel(EXPAND)
def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        block = w + BLOCK_BYTES * b
        d = load_f16(block + D)
        for j in range(8):
            scales = halves_f32x32(d * _scale(block, 2 * j), d * _scale(block, 2 * j + 1))
            store_f32x32(out + 1024 * b + 128 * j, to_f32(_quants(block, j)) * scales)


# ---- panels ----------------------------------------------------------------------------------------------------------


@inline
def store_sixes(words, high, k, out):
    """Low nibbles to step k, high ones to step k+2, with bits 2k and 2k+4 of each byte of `high`, and the next ones."""
    first, second = two_nibbles(words)
    store_i32x16(out + K_BLOCK_BYTES * k, with_high_bits(first, high, 2 * k, 0x03030303))
    store_i32x16(out + K_BLOCK_BYTES * (k + 2), with_high_bits(second, high, 2 * k + 4, 0x03030303))


@inline
def _store_signed(scales, d, out):
    """d times each of 4 signed bytes, for the halves of 2 steps."""
    for i in range(4):
        scale = to_f32(sign_extend_i8(scales >> 8 * i))
        store_f32x16(out + K_BLOCK_BYTES * (i // 2) + 64 * (i % 2), scale * d)


@repacks
def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        block = BLOCK_BYTES * b
        d = half_to_f32(gather(rows, block + D - 2) >> 16)  # a word that ends where the block does
        s0, s1, s2, s3 = transpose(rows, block + SCALES)
        _store_signed(s0, d, out + K_BLOCK_SCALES)
        _store_signed(s1, d, out + K_BLOCK_SCALES + 2 * K_BLOCK_BYTES)
        _store_signed(s2, d, out + K_BLOCK_SCALES + 4 * K_BLOCK_BYTES)
        _store_signed(s3, d, out + K_BLOCK_SCALES + 6 * K_BLOCK_BYTES)
        for half in range(2):
            highs = transpose_8(rows, block + QH + 32 * half)
            for k in range(2):
                for i, words in enumerate(transpose_8(rows, block + QL + 64 * half + 32 * k)):
                    store_sixes(words, highs[i], k, out + 64 * i)
            out += 4 * K_BLOCK_BYTES


# ---- quantising ------------------------------------------------------------------------------------------------------

_FITTED = 4 * BLOCK  # scratch: the weights of errors f32[256] @0, the scales f32[16], then rounded ones of each attempt

# The block's d is tried such that the largest scale becomes -128, as ggml's does, or a little less.
_LARGEST = tuple(np.float32(value) for value in (-128, -127, -124))

_AROUND = constants([0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5, -6, 6, -7, 7, 8])


@inline
def _fit_scales(x, importance, average, scratch):
    """The scales of the 16 sub-blocks, into scratch; returns the one of the largest magnitude."""
    variance, top = sum_squares(x, BLOCK) / np.float32(BLOCK), np.float32(0.0)
    for j in range(16):
        sub, w = x + 64 * j, scratch + 64 * j
        scale = np.float32(0.0)
        largest = signed_largest(load_f32x16(sub))
        if abs(largest) > TINY:
            if importance != 0:
                write_importance(sub, importance + 64 * j, 16, variance, average, w)
            else:
                write_squares(sub, 16, w)
            scale = fit_scale(sub, w, 16, 32, largest)
        store_f32(scratch + _FITTED + 4 * j, scale)
        if abs(scale) > abs(top):
            top = scale
    return top


@inline
def _round_scales(x, scratch, d, rounded):
    """For each sub-block the 8-bit scale with the least error near the fitted one, as float32; returns their error."""
    error = np.float32(0.0)
    for j in range(16):
        scale = load_f32(scratch + _FITTED + 4 * j)
        best = np.float32(0.0)
        if scale != 0:
            near = clamp(np.rint(scale / d) + _AROUND(), -128, 127)
            total = errors(everywhere, x + 64 * j, scratch + 64 * j, 16, near * d, zero_f32x16(), -32, 31)
            lane_ = best_lane(-total)
            best = lane(near, lane_)
            error += lane(total, lane_)
        store_f32(rounded + 4 * j, best)
    return error


@inline
def _choose_scales(x, top, scratch, block):
    """Write the d with the least error to the block; returns the address of its rounded scales."""
    chosen, least_error, d = scratch + _FITTED + 64, np.float32(np.inf), np.float32(0.0)
    for i in range(len(_LARGEST)):
        store_f16(block + D, top / _LARGEST[i])
        candidate, rounded = load_f16(block + D), scratch + _FITTED + 64 * (i + 1)
        error = _round_scales(x, scratch, candidate, rounded)
        if error < least_error:
            chosen, least_error, d = rounded, error, candidate
    store_f16(block + D, d)
    return chosen


@inline
def _inverse(d, scale):
    return np.float32(1.0) / (d * scale) if d * scale != 0 else np.float32(0.0)


@inline
def _levels(x, d, scales, j):
    """Levels of weights 32j..32j+31, i8x32 in 0..63."""
    low, high = load_f32(scales + 8 * j), load_f32(scales + 8 * j + 4)
    scaled = load_f32x32(x + 128 * j) * halves_f32x32(_inverse(d, low), _inverse(d, high))
    return round_between(scaled, -32, 31) + 32


@inline
def _store_levels(x, d, scales, half, block):
    """Write the ql and qh of one half of a block."""
    a, b = _levels(x, d, scales, 4 * half), _levels(x, d, scales, 4 * half + 1)
    c, e = _levels(x, d, scales, 4 * half + 2), _levels(x, d, scales, 4 * half + 3)
    store_i8x32(block + QL + 64 * half, a & 15 | c << 4)
    store_i8x32(block + QL + 64 * half + 32, b & 15 | e << 4)
    store_i8x32(block + QH + 32 * half, a >> 4 | (b >> 4) << 2 | (c >> 4) << 4 | (e >> 4) << 6)


@kernel(QUANTIZE)
def _quantize(x, importance, n_blocks, out, scratch):
    average = mean(importance, BLOCK * n_blocks) if importance != 0 else np.float32(0.0)
    for b in range(n_blocks):
        values, block = x + 4 * BLOCK * b, out + BLOCK_BYTES * b
        top = _fit_scales(values, importance + 4 * BLOCK * b if importance != 0 else 0, average, scratch)
        scales = _choose_scales(values, top, scratch, block)
        d = load_f16(block + D)
        for j in range(16):
            store_i8(block + SCALES + j, int(load_f32(scales + 4 * j)))
        _store_levels(values, d, scales, 0, block)
        _store_levels(values, d, scales, 1, block)


_gemv, _gemv_batch = plain.kernels("Q6_K", BLOCK_BYTES, _weights, _add_k_block)

Q6_K = Format(
    "Q6_K",
    BLOCK,
    LAYOUT,
    True,
    unpack,
    _gemv,
    _gemv_batch,
    _expand,
    panels=PanelFormat(TWO_SCALES, 32, _repack),
    quantize=_quantize,
)
