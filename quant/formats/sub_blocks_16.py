"""What formats with a scale for every 16 weights share: the dot products of 256 weights with a k-block, 16 at a time.

Weights in order: a sub-block of 16 fills a quarter of a vector of 64. Three pair_sums leave the sum of sub-block i in
lane 4*(i%4) + i//4, beside the activations' scales and sums (gemv/activations.py).

Weights by eighths: weights 8i..8i+7 of the blocks 4h..4h+3 of 32 are one vector of 32, so that the products with i of 0
and 1, or 2 and 3, add up in the same lanes. Both halves h pack into 16 bits, which scales of 16 bits multiply at once:
fewer operations where a scale of 4 or 6 bits is a number of its own.
"""

from quant.gemv.activations import EIGHTHS, IN_ORDER
from quant.simd.dots import dot_u8, packed_i16, pair_sums
from quant.simd.floats import to_f32
from quant.simd.ints import crumb_sums, picked_with_zeros, zero_i32x8, zero_i32x16
from quant.simd.memory import load_i8x32, load_i8x64
from quant.target.jit import inline

ORDER = [4 * (lane % 4) + lane // 4 for lane in range(16)]  # the sub-block of each lane


@inline
def dots_in_order(weights, k_block):
    """f32x16: the products of weights 0..63, 64..127, ... in ORDER. The sums of 8 must be below 2^15."""
    q, zero = k_block + IN_ORDER, zero_i32x16()
    dots_0 = dot_u8(zero, weights[0], load_i8x64(q))
    dots_4 = dot_u8(zero, weights[1], load_i8x64(q + 64))
    dots_8 = dot_u8(zero, weights[2], load_i8x64(q + 128))
    dots_12 = dot_u8(zero, weights[3], load_i8x64(q + 192))
    return to_f32(pair_sums(pair_sums(dots_0, dots_4), pair_sums(dots_8, dots_12)))


_BLOCKS = (0, 1, 4, 5, 2, 3, 6, 7)  # the block of 32 of each pair of packed lanes
_HALVES = {"first": (0, 0), "second": (1, 1), "both": (0, 1)}


def scales_in(halves: str, signed: bool = False):
    """An intrinsic i8x32(the bytes of 16 sub-blocks, twice): two lanes of 16 bits for each block, in _BLOCKS' order.

    halves: those of its first half, of its second one, or of both in turn. signed: as 256 times a signed byte.
    """
    pairs = [2 * block + half for block in _BLOCKS for half in _HALVES[halves]]
    return picked_with_zeros([byte for scale in pairs for byte in ((None, scale) if signed else (scale, None))])


@inline
def _dots_of_halves(weights, k_block):
    """Of the first halves of the first four blocks and of the others, then of the second halves: lanes of 32 bits."""
    q, zero = k_block + EIGHTHS, zero_i32x8()
    return (
        dot_u8(dot_u8(zero, weights[0], load_i8x32(q)), weights[1], load_i8x32(q + 64)),
        dot_u8(dot_u8(zero, weights[4], load_i8x32(q + 32)), weights[5], load_i8x32(q + 96)),
        dot_u8(dot_u8(zero, weights[2], load_i8x32(q + 128)), weights[3], load_i8x32(q + 192)),
        dot_u8(dot_u8(zero, weights[6], load_i8x32(q + 160)), weights[7], load_i8x32(q + 224)),
    )


@inline
def packed_dots(weights, k_block):
    """The products of the first halves of all blocks in _BLOCKS' order, two lanes of 16 bits each; of the second ones.

    weights: by eighths, i = 0..3 of h = 0, then of h = 1. The sums of 8 must be below 2^15.
    """
    a, b, c, d = _dots_of_halves(weights, k_block)
    return packed_i16(a, b), packed_i16(c, d)


@inline
def packed_crumb_dots(weights, k_block):
    """The same of crumbs_in_place."""
    a, b, c, d = _dots_of_halves(weights, k_block)
    return packed_i16(crumb_sums(a), crumb_sums(b)), packed_i16(crumb_sums(c), crumb_sums(d))
