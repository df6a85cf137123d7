"""Panels of the formats with blocks of 256 weights: 16 rows' words side by side, then the same arithmetic as in unpack.

Layouts of the blocks: q4_k.py, q5_k.py, q6_k.py, iq4_xs.py.
"""

from quant.formats.iq4_nl import VALUES
from quant.gemm.microkernel_step import BYTES, HALVES, MINIMUM, STEP, STEP_BYTES
from quant.gemm.packed import REPACK, PanelFormat
from quant.simd.core import i32x16
from quant.simd.floats import to_f32
from quant.simd.ints import lookup_in
from quant.simd.memory import store_f32x16, store_i32x16
from quant.simd.rows16 import gather, half_to_f32, high_nibbles, sign_extend_i8, transpose, transpose_8
from quant.target.jit import inline, kernel

SCALES = 16 * STEP  # where a step's scales begin


@inline
def _store_scaled(packed, d, out):
    """d times each of the 4 bytes in a word, to 4 steps."""
    for j in range(4):
        byte = to_f32(packed >> 8 * j & 255)
        store_f32x16(out + STEP_BYTES * j, byte * d)


@inline
def store_scales_and_minima(d, dmin, low, high, mixed, out):
    """What is before the weights of Q4_K and Q5_K, for 8 steps. Numbers of 6 bits: see q4_k.packed_scales."""
    low_rest, high_rest = low >> 2 & 0x30303030, high >> 2 & 0x30303030
    _store_scaled(low & 0x3F3F3F3F, d, out)
    _store_scaled(mixed & 0x0F0F0F0F | low_rest, d, out + 4 * STEP_BYTES)
    minus_dmin = -dmin
    _store_scaled(high & 0x3F3F3F3F, minus_dmin, out + 64)
    mixed = mixed >> 4 & 0x0F0F0F0F
    _store_scaled(mixed | high_rest, minus_dmin, out + 4 * STEP_BYTES + 64)


@inline
def _scales_and_minima(rows, at, out):
    """The same from the 16 bytes at `at` behind each row's address."""
    halves, low, high, mixed = transpose(rows, at)
    d, dmin = half_to_f32(halves), half_to_f32(halves >> 16)
    store_scales_and_minima(d, dmin, low, high, mixed, out)


@inline
def store_nibbles(words, out):
    """Low nibbles to one step, high ones to the next."""
    store_i32x16(out, words & 0x0F0F0F0F)
    store_i32x16(out + STEP_BYTES, high_nibbles(words))


@kernel(REPACK)
def _q4_k(rows, n_blocks, out):
    for b in range(n_blocks):
        _scales_and_minima(rows, 144 * b, out + SCALES)
        for quarter in range(4):
            for i, words in enumerate(transpose_8(rows, 144 * b + 16 + 32 * quarter)):
                store_nibbles(words, out + 64 * i)
            out += 2 * STEP_BYTES


@inline
def _with_high_bits(nibbles, high, shift, mask):
    """The bits of `high` under `mask`, after a shift to the right, become bits 4 and up of each byte."""
    return nibbles | (high >> shift & mask) << 4


@inline
def store_fives(words, high, quarter, out):
    """As store_nibbles, with fifth bits from bits 2*quarter and 2*quarter+1 of each byte of `high`."""
    first, second = words & 0x0F0F0F0F, high_nibbles(words)
    store_i32x16(out, _with_high_bits(first, high, 2 * quarter, 0x01010101))
    store_i32x16(out + STEP_BYTES, _with_high_bits(second, high, 2 * quarter + 1, 0x01010101))


@kernel(REPACK)
def _q5_k(rows, n_blocks, out):
    for b in range(n_blocks):
        _scales_and_minima(rows, 176 * b, out + SCALES)
        for half in range(2):
            h0, h1, h2, h3 = transpose(rows, 176 * b + 16 + 16 * half)
            for quarter in range(4):
                w0, w1, w2, w3 = transpose(rows, 176 * b + 48 + 32 * quarter + 16 * half)
                to = out + 2 * STEP_BYTES * quarter + 256 * half
                store_fives(w0, h0, quarter, to)
                store_fives(w1, h1, quarter, to + 64)
                store_fives(w2, h2, quarter, to + 128)
                store_fives(w3, h3, quarter, to + 192)
        out += 8 * STEP_BYTES


@inline
def store_sixes(words, high, k, out):
    """Low nibbles to step k, high ones to step k+2, with bits 2k and 2k+4 of each byte of `high`, and the next ones."""
    first, second = words & 0x0F0F0F0F, high_nibbles(words)
    store_i32x16(out + STEP_BYTES * k, _with_high_bits(first, high, 2 * k, 0x03030303))
    store_i32x16(out + STEP_BYTES * (k + 2), _with_high_bits(second, high, 2 * k + 4, 0x03030303))


@inline
def _store_signed(scales, d, out):
    """d times each of 4 signed bytes, for the halves of 2 steps."""
    for i in range(4):
        scale = to_f32(sign_extend_i8(scales >> 8 * i))
        store_f32x16(out + STEP_BYTES * (i // 2) + 64 * (i % 2), scale * d)


@kernel(REPACK)
def _q6_k(rows, n_blocks, out):
    for b in range(n_blocks):
        block = 210 * b
        d = half_to_f32(gather(rows, block + 206) >> 16)
        s0, s1, s2, s3 = transpose(rows, block + 192)
        _store_signed(s0, d, out + SCALES)
        _store_signed(s1, d, out + SCALES + 2 * STEP_BYTES)
        _store_signed(s2, d, out + SCALES + 4 * STEP_BYTES)
        _store_signed(s3, d, out + SCALES + 6 * STEP_BYTES)
        for half in range(2):
            for i in range(2):
                h0, h1, h2, h3 = transpose(rows, block + 128 + 32 * half + 16 * i)
                for k in range(2):
                    w0, w1, w2, w3 = transpose(rows, block + 64 * half + 32 * k + 16 * i)
                    store_sixes(w0, h0, k, out + 256 * i)
                    store_sixes(w1, h1, k, out + 256 * i + 64)
                    store_sixes(w2, h2, k, out + 256 * i + 128)
                    store_sixes(w3, h3, k, out + 256 * i + 192)
            out += 4 * STEP_BYTES


_value = lookup_in(VALUES.astype(int) + 128, i32x16)


@inline
def _store_values(words, out):
    """Low nibbles to the step's first half, high ones to its second, both through the table."""
    store_i32x16(out, _value(words & 0x0F0F0F0F))
    store_i32x16(out + 256, _value(high_nibbles(words)))


@kernel(REPACK)
def _iq4_xs(rows, n_blocks, out):
    for b in range(n_blocks):
        high, low = gather(rows, 136 * b), gather(rows, 136 * b + 4)  # high: d, then 2 bits of each scale
        d = half_to_f32(high)
        for j in range(8):
            w0, w1, w2, w3 = transpose(rows, 136 * b + 8 + 16 * j)
            _store_values(w0, out)
            _store_values(w1, out + 64)
            _store_values(w2, out + 128)
            _store_values(w3, out + 192)
            upper = (high >> 16 + 2 * j & 3) << 4
            scale = (low >> 4 * j & 15 | upper) - 32
            store_f32x16(out + SCALES, to_f32(scale) * d)
            out += STEP_BYTES


Q4_K = PanelFormat(MINIMUM, 0, _q4_k)
Q5_K = PanelFormat(MINIMUM, 0, _q5_k)
Q6_K = PanelFormat(HALVES, 32, _q6_k)
IQ4_XS = PanelFormat(BYTES, 128, _iq4_xs)
