"""MXFP4: 4-bit floats (E2M1) with a power-of-two scale, x = 2^(e-128) * VALUES[q]. 32 weights in 17 bytes, 4.25
bits each.

e is E8M0; VALUES are doubled, hence 128 instead of 127. Quantising is bit-equal to ggml's.
Source: ggml src/ggml-common.h @d99724f, block_mxfp4; ggml_e8m0_to_fp32_half; quantize_row_mxfp4_ref in ggml-quants.c.
"""

import math

import numpy as np

from quant.block_format import LARGEST_BF16, QUANTIZE, block_layout, offsets
from quant.formats.nibbles_32 import codes_of, panel_format, stores_codes, symmetric, unpack_codes
from quant.gemm.microkernel_k_block import SYMMETRIC
from quant.gemm.repack import SCALES
from quant.quantize.levels import midpoints
from quant.simd.core import i8x32, i8x64
from quant.simd.exact import count_below, greatest, mark_negative
from quant.simd.floats import half_powers
from quant.simd.ints import lookup_in
from quant.simd.memory import bits_to_f32, load_f32x32, load_u8, store_f32x16, store_i8
from quant.simd.rows16 import e8m0_half_to_f32, gather
from quant.target.jit import inline, kernel

LAYOUT = block_layout(17, e="u1", qs="16u1")
E, _ = offsets(LAYOUT)
BLOCK_BYTES = LAYOUT.itemsize

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
RAISE = 12  # makes them unsigned
_value = lookup_in(VALUES, i8x32)
_raised_value = lookup_in(VALUES + RAISE, i8x64)
_codes, _codes_of_even = codes_of(LAYOUT)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n*17) -> float32 (..., n*32), bit-equal to ggml's."""
    raw = blocks.view(LAYOUT)
    e = raw["e"].astype(np.uint32)[..., None]
    d = np.where(e < 2, np.uint32(0x00200000) << e, (e - 1) << 23).astype(np.uint32).view(np.float32)
    return (d * VALUES[unpack_codes(raw)].astype(np.float32)).reshape(*blocks.shape[:-1], -1)


@inline
def _power(e):
    """2^(e-128); e below 2 gives a subnormal."""
    return bits_to_f32(0x00200000 << e if e < 2 else (e - 1) << 23)


@inline
def _scale(block):
    return _power(load_u8(block + E))


@inline
def _four_exponents(block):
    """Of four blocks, in the low halves of 16-bit lanes."""
    e = block + E
    low = load_u8(e) | load_u8(e + BLOCK_BYTES) << 16
    return low | (load_u8(e + 2 * BLOCK_BYTES) | load_u8(e + 3 * BLOCK_BYTES) << 16) << 32


@inline
def _scales(block):
    return half_powers(_four_exponents(block), _four_exponents(block + 4 * BLOCK_BYTES))


@inline
def _levels(block):
    """i8x32 in -12..12"""
    return _value(_codes(block))


@inline
def _raised_of_even(block):
    low, high = _codes_of_even(block)
    return _raised_value(low), _raised_value(high)


@inline
def _store_scale(rows, at, out):
    store_f32x16(out + SCALES, e8m0_half_to_f32(gather(rows, at + E) & 255))


# ---- quantising ------------------------------------------------------------------------------------------------------

_magnitude_index = count_below(midpoints(VALUES[:8]))
_store_codes = stores_codes(LAYOUT)


@inline
def _exponent(largest):
    """E8M0 of the power of two in whose units `largest` is in 4..8, where the largest level, 6, is."""
    if largest == 0:
        return 0
    # Rounded to float32 first: just below a power of two ggml's log2f gives the next integer.
    return max(0, math.floor(np.float32(math.log2(np.float64(largest)))) + 125)


@kernel(QUANTIZE)
def _quantize(x, importance, n_blocks, out, scratch):
    for b in range(n_blocks):
        values, block = load_f32x32(x + 128 * b), out + BLOCK_BYTES * b
        e = _exponent(greatest(abs(values)))
        codes = mark_negative(_magnitude_index(abs(values), _power(e)), values, 8)
        store_i8(block + E, e)
        _store_codes(block, codes)


MXFP4 = symmetric(
    "MXFP4",
    LAYOUT,
    unpack,
    levels=_levels,
    raised_of_even=_raised_of_even,
    offset=RAISE,
    scale=_scale,
    scales=_scales,
    panels=panel_format("MXFP4", LAYOUT, SYMMETRIC, RAISE, _store_scale, VALUES.astype(int) + RAISE),
    quantize=_quantize,
    largest=LARGEST_BF16,
)
