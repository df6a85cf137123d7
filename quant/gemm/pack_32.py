"""Panels of the formats with blocks of 32 weights, one block a step. Their layouts: q4_0.py and its siblings."""

from quant.formats.iq4_nl import VALUES as IQ4_VALUES
from quant.formats.mxfp4 import VALUES as MXFP4_VALUES
from quant.gemm.microkernel_step import BYTES, MINIMUM, OFFSET, STEP, STEP_BYTES
from quant.gemm.packed import REPACK, PanelFormat
from quant.simd.core import i32x16
from quant.simd.ints import lookup_in
from quant.simd.memory import store_f32x16, store_i32x16
from quant.simd.rows16 import e8m0_half_to_f32, gather, half_to_f32, high_nibbles, transpose, with_fifth_bits
from quant.target.jit import inline, kernel

_SCALES = 16 * STEP  # where a step's scales begin


@inline
def _store_scale(rows, at, out):
    """A block's d."""
    store_f32x16(out + _SCALES, half_to_f32(gather(rows, at)))


@inline
def _store_scale_and_minimum(rows, at, out):
    """A block's d and m. The panel takes the minimum negative, and m is added: as it is."""
    halves = gather(rows, at)
    store_f32x16(out + _SCALES, half_to_f32(halves))
    store_f32x16(out + _SCALES + 64, half_to_f32(halves >> 16))


@inline
def _nibbles(words):
    return words & 0x0F0F0F0F, high_nibbles(words)


@inline
def _store_nibbles(rows, at, out):
    """16 bytes: their low nibbles are the first 16 weights, the high ones the others."""
    for e, words in enumerate(transpose(rows, at)):
        low, high = _nibbles(words)
        store_i32x16(out + 64 * e, low)
        store_i32x16(out + 64 * e + 256, high)


@kernel(REPACK)
def _q4_0(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale(rows, 18 * b, out)
        _store_nibbles(rows, 18 * b + 2, out)
        out += STEP_BYTES


@kernel(REPACK)
def _q4_1(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale_and_minimum(rows, 20 * b, out)
        _store_nibbles(rows, 20 * b + 4, out)
        out += STEP_BYTES


@inline
def _store_fives(rows, at, out):
    """32 fifth bits in 4 bytes, then 16 bytes of nibbles."""
    bits = gather(rows, at)
    for e, words in enumerate(transpose(rows, at + 4)):
        low, high = _nibbles(words)
        store_i32x16(out + 64 * e, with_fifth_bits(low, bits, e))
        store_i32x16(out + 64 * e + 256, with_fifth_bits(high, bits, e + 4))


@kernel(REPACK)
def _q5_0(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale(rows, 22 * b, out)
        _store_fives(rows, 22 * b + 2, out)
        out += STEP_BYTES


@kernel(REPACK)
def _q5_1(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale_and_minimum(rows, 24 * b, out)
        _store_fives(rows, 24 * b + 4, out)
        out += STEP_BYTES


@kernel(REPACK)
def _q8_0(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale(rows, 34 * b, out)
        for half in range(2):
            for e, words in enumerate(transpose(rows, 34 * b + 2 + 16 * half)):
                store_i32x16(out + 256 * half + 64 * e, words ^ 0x80808080)
        out += STEP_BYTES


_iq4_value = lookup_in(IQ4_VALUES.astype(int) + 128, i32x16)
_mxfp4_value = lookup_in(MXFP4_VALUES.astype(int) + 12, i32x16)


@kernel(REPACK)
def _iq4_nl(rows, n_blocks, out):
    for b in range(n_blocks):
        _store_scale(rows, 18 * b, out)
        for e, words in enumerate(transpose(rows, 18 * b + 2)):
            low, high = _nibbles(words)
            store_i32x16(out + 64 * e, _iq4_value(low))
            store_i32x16(out + 64 * e + 256, _iq4_value(high))
        out += STEP_BYTES


@kernel(REPACK)
def _mxfp4(rows, n_blocks, out):
    for b in range(n_blocks):
        scale = e8m0_half_to_f32(gather(rows, 17 * b) & 255)
        store_f32x16(out + _SCALES, scale)
        for e, words in enumerate(transpose(rows, 17 * b + 1)):
            low, high = _nibbles(words)
            store_i32x16(out + 64 * e, _mxfp4_value(low))
            store_i32x16(out + 64 * e + 256, _mxfp4_value(high))
        out += STEP_BYTES


Q4_0 = PanelFormat(OFFSET, 8, _q4_0)
Q4_1 = PanelFormat(MINIMUM, 0, _q4_1)
Q5_0 = PanelFormat(OFFSET, 16, _q5_0)
Q5_1 = PanelFormat(MINIMUM, 0, _q5_1)
Q8_0 = PanelFormat(BYTES, 128, _q8_0)
IQ4_NL = PanelFormat(BYTES, 128, _iq4_nl)
MXFP4 = PanelFormat(OFFSET, 12, _mxfp4)
