"""What formats with a scale for every 16 weights share: the dot products of 256 weights with a k-block, 16 at a time.

A sub-block of 16 fills a quarter of a vector of 64. Three pair_sums leave the sum of sub-block i in lane
4*(i%4) + i//4, beside the activations' scales and sums (gemv/activations.py).
"""

from quant.gemv.activations import IN_ORDER
from quant.simd.floats import to_f32
from quant.simd.ints import dot_u8, pair_sums, zero_i32x16
from quant.simd.memory import load_i8x64
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
