"""What the kernels share that repack blocks into panels (block_format.PanelFormat): words of 16 rows, and their places.

`rows` is the address of 16 rows' addresses, `at` an offset behind each of them, `out` that of a k-block for these rows.
Layout of a k-block: packed.py.
"""

from quant.block_format import REPACK
from quant.gemm.microkernel_k_block import K_BLOCK, K_BLOCK_BYTES, LEVEL
from quant.simd.memory import store_f32x16, store_i32x16
from quant.simd.rows16 import gather, half_to_f32, high_nibbles, transpose, with_fifth_bits
from quant.target.jit import inline, kernel

SCALES = 16 * K_BLOCK  # where a k-block's scales begin

repacks = kernel(REPACK, LEVEL)  # decorator: what makes panels is for micro-kernels


@inline
def store_d(rows, at, out):
    """A scale, f16."""
    store_f32x16(out + SCALES, half_to_f32(gather(rows, at)))


@inline
def store_d_and_m(rows, at, out):
    """A scale and a minimum, f16. The panel takes the minimum negative, and m is added: as it is."""
    halves = gather(rows, at)
    store_f32x16(out + SCALES, half_to_f32(halves))
    store_f32x16(out + SCALES + 64, half_to_f32(halves >> 16))


@inline
def two_nibbles(words):
    """The low and the high nibbles of every byte."""
    return words & 0x0F0F0F0F, high_nibbles(words)


@inline
def store_nibbles(words, out):
    """Low nibbles to one k-block, high ones to the next."""
    low, high = two_nibbles(words)
    store_i32x16(out, low)
    store_i32x16(out + K_BLOCK_BYTES, high)


@inline
def store_halves(low, high, e, out):
    """Weights 4e..4e+3 of the first half of a k-block, and of the second."""
    store_i32x16(out + 64 * e, low)
    store_i32x16(out + 64 * e + 256, high)


@inline
def store_fours(rows, at, out):
    """16 bytes: their low nibbles are the first 16 weights, the high ones the others."""
    for e, words in enumerate(transpose(rows, at)):
        low, high = two_nibbles(words)
        store_halves(low, high, e, out)


@inline
def store_fives(rows, at, out):
    """32 fifth bits in 4 bytes, then 16 bytes of nibbles."""
    bits = gather(rows, at)
    for e, words in enumerate(transpose(rows, at + 4)):
        low, high = two_nibbles(words)
        store_halves(with_fifth_bits(low, bits, e), with_fifth_bits(high, bits, e + 4), e, out)


@inline
def with_high_bits(nibbles, high, shift, mask):
    """The bits of `high` under `mask`, after a shift to the right, become bits 4 and up of each byte."""
    return nibbles | (high >> shift & mask) << 4
