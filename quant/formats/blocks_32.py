"""What the formats of 32 weights a block share: eight blocks at a time as vectors, and a single block at a row's end.

Eight blocks with 16 bytes of nibbles each make two vectors of quarters: blocks 0 2 4 6 and blocks 1 3 5 7, whose low
nibbles are the first halves of their blocks. Two products and one pair_sums leave every block's sum in its own two
lanes, in order, beside the activations' scales and sums.
"""

import numpy as np

from quant.gemv.activations import QUARTERS, SCALES, SUMS
from quant.simd.dots import dot_biased, dots_of_two, pair_sums, pair_sums_wide
from quant.simd.floats import (
    add_odd,
    even_doubled,
    exact_fma,
    f16_lanes,
    f16_lanes_doubled,
    fma,
    splat_f32x8,
    to_f32,
    widened,
)
from quant.simd.ints import zero_i32x16
from quant.simd.memory import load_f32, load_f32x16, load_i8x64, load_u16, load_u32
from quant.target.jit import inline


@inline
def four_u16(address, stride):
    """Four 16-bit words, `stride` bytes apart, in one int64."""
    low = load_u16(address) | load_u16(address + stride) << 16
    return low | (load_u16(address + 2 * stride) | load_u16(address + 3 * stride) << 16) << 32


@inline
def two_u32(address, stride):
    """Two 32-bit words, `stride` bytes apart, in one int64."""
    return load_u32(address) | load_u32(address + stride) << 32


@inline
def eight_scales(block, stride):
    """The f16 at the start of each of 8 blocks, each in two lanes."""
    return f16_lanes_doubled(four_u16(block, stride), four_u16(block + 4 * stride, stride))


@inline
def eight_pairs(block, stride):
    """The two f16 at the start of each of 8 blocks, in turn."""
    return f16_lanes(
        two_u32(block, stride),
        two_u32(block + 2 * stride, stride),
        two_u32(block + 4 * stride, stride),
        two_u32(block + 6 * stride, stride),
    )


@inline
def dots_of_quarters(weights, k_block):
    """The blocks' products, two lanes each; weights: low and high nibbles of even, then of odd blocks, unsigned.

    Eight of these products must add up to less than 2^15.
    """
    q = k_block + QUARTERS
    even = dots_of_two(weights[0], load_i8x64(q), weights[1], load_i8x64(q + 64))
    odd = dots_of_two(weights[2], load_i8x64(q + 128), weights[3], load_i8x64(q + 192))
    return to_f32(pair_sums(even, odd))


@inline
def biased_dots_of_quarters(weights, k_block):
    """The same for signed weights raised by simd.ints.WEIGHT_BIAS, which stays in the result."""
    q, zero = k_block + QUARTERS, zero_i32x16()
    even = dot_biased(dot_biased(zero, weights[0], load_i8x64(q)), weights[1], load_i8x64(q + 64))
    odd = dot_biased(dot_biased(zero, weights[2], load_i8x64(q + 128)), weights[3], load_i8x64(q + 192))
    return to_f32(pair_sums_wide(even, odd))


@inline
def add_offset(dots, offset, scales, k_block, total):
    """total + scale * (dots - offset * sum(q)) of each block: weights raised by `offset`; exact but for scales."""
    dots = exact_fma(-offset, load_f32x16(k_block + SUMS), dots)
    return fma(dots, even_doubled(scales * load_f32x16(k_block + SCALES)), total)


@inline
def add_minimum(dots, pairs, k_block, total):
    """total + d * dots + m * sum of the activations; pairs: d and m of each block in turn."""
    pairs = pairs * load_f32x16(k_block + SCALES)
    return fma(dots, even_doubled(pairs), add_odd(total, pairs))


@inline
def add_single(dots, d, q8, n_cols, i, total):
    """total + d * dots, the products (i32x8) of one block with block `i` of a q8 row."""
    scale = d * load_f32(q8 + 5 * n_cols + 4 * i)
    return fma(scale, widened(to_f32(dots)), total)


@inline
def add_single_minimum(m, q8, n_cols, i, total):
    """total + m * sum of the activations of block `i`."""
    s = load_f32(q8 + 5 * n_cols + n_cols // 8 + 4 * i)
    eighth = splat_f32x8(m * s * np.float32(0.125))
    return total + widened(eighth)
