"""Panels of the formats with blocks of 256 weights: 16 rows' words side by side, then the same arithmetic as in unpack.

Layouts of the blocks: q4_k.py, q5_k.py, q6_k.py, iq4_xs.py.
"""

from quant.jit import inline, kernel
from quant.panel import REPACK, PanelFormat
from quant.panel_tile import MINIMUM, STEP, STEP_BYTES
from quant.simd import mul_f32x16, store_f32x16
from quant.simd_panel import (
    and_i32,
    half_to_f32x16,
    i32_to_f32x16,
    negate_f32x16,
    or_i32,
    shift_right_i32,
    store_i32x16,
    transpose,
)

_SCALES = 16 * STEP  # where a step's scales begin


@inline
def _store_scaled(packed, d, out):
    """d times each of the 4 bytes in a word, to 4 steps."""
    for j in range(4):
        byte = i32_to_f32x16(and_i32(shift_right_i32(packed, 8 * j), 255))
        store_f32x16(out + STEP_BYTES * j, mul_f32x16(byte, d))


@inline
def _scales_and_minima(rows, at, out):
    """The 16 bytes before the weights of Q4_K and Q5_K, for 8 steps. Six-bit numbers: see q4_k.packed_scales."""
    halves, low, high, mixed = transpose(rows, at)
    d, dmin = half_to_f32x16(halves), negate_f32x16(half_to_f32x16(shift_right_i32(halves, 16)))
    low_rest, high_rest = and_i32(shift_right_i32(low, 2), 0x30303030), and_i32(shift_right_i32(high, 2), 0x30303030)
    _store_scaled(and_i32(low, 0x3F3F3F3F), d, out)
    _store_scaled(or_i32(and_i32(mixed, 0x0F0F0F0F), low_rest), d, out + 4 * STEP_BYTES)
    _store_scaled(and_i32(high, 0x3F3F3F3F), dmin, out + 64)
    mixed = and_i32(shift_right_i32(mixed, 4), 0x0F0F0F0F)
    _store_scaled(or_i32(mixed, high_rest), dmin, out + 4 * STEP_BYTES + 64)


@inline
def _store_nibbles(words, out):
    """Low nibbles to one step, high ones to the next."""
    store_i32x16(out, and_i32(words, 0x0F0F0F0F))
    store_i32x16(out + STEP_BYTES, and_i32(shift_right_i32(words, 4), 0x0F0F0F0F))


@kernel(REPACK)
def _q4_k(rows, n_blocks, out):
    for b in range(n_blocks):
        _scales_and_minima(rows, 144 * b, out + _SCALES)
        for quarter in range(4):
            for half in range(2):
                w0, w1, w2, w3 = transpose(rows, 144 * b + 16 + 32 * quarter + 16 * half)
                _store_nibbles(w0, out + 256 * half)
                _store_nibbles(w1, out + 256 * half + 64)
                _store_nibbles(w2, out + 256 * half + 128)
                _store_nibbles(w3, out + 256 * half + 192)
            out += 2 * STEP_BYTES


Q4_K = PanelFormat(MINIMUM, 0, _q4_k.address)
