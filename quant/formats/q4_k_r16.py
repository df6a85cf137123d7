"""Q4_K with 16 rows interleaved (formats/interleave.py): 16 rows and 256 columns in 2304 bytes.
d f16[16] @0 | dmin f16[16] @32 | scales u32[3][16] @64 | qs u32[32][16] @256, each word 4 bytes of q4_k.py's."""

from itertools import product

from quant.block_format import Format
from quant.formats import q4_k
from quant.formats.interleave import ROWS, unpack
from quant.gemv.interleaved import FLOATS, WORDS, Block, Token, as_bytes, kernels, masked, merged
from quant.simd.core import constant
from quant.simd.floats import emit_fma
from quant.simd.ints import emit_dot_u8
from quant.target import isa

NAME = "Q4_K_R16"
SCALES, QS = 64, 256
# vpdpbusd multiplies high nibbles where they are, 16 times too large; vpmaddubsw has no room for that.
RAISED = 4 if isa.has("avx512_vnni") else 0


def six_bits(block: Block) -> tuple[list, list]:
    """sc and m of the 8 sub-blocks as bytes of two vectors of words each; bits 6 and 7 are to be ignored."""
    builder, (low, high, mixed) = block.builder, (block.words(SCALES + 64 * i) for i in range(3))
    sc = merged(builder, masked(builder, mixed, 0, 0x0F0F0F0F), low, 2, 0x30303030)
    m = merged(builder, masked(builder, mixed, 4, 0x0F0F0F0F), high, 2, 0x30303030)
    return [low, sc], [high, m]


def field(builder, words: list, j: int, raised: int):
    """Byte j's lower 6 bits times 2^raised, as float32."""
    return builder.sitofp(masked(builder, words[j // 4], 8 * (j % 4) - raised, 63 << raised), FLOATS)


def add_sub_blocks(block: Block, tokens: list[Token], totals: list, quants, raised: int) -> list:
    """add_block of Q4_K and Q5_K.

    quants: (c, g) -> columns 64c + 4g.. and 64c + 32 + 4g.., the latter times 2^raised.
    """
    builder = block.builder
    d, dmin = block.halves(0), block.halves(2 * ROWS)
    sc, m = six_bits(block)
    sums, minima = ([constant(FLOATS, 0.0)] * len(tokens) for _ in range(2))
    together = max(1, 4 // len(tokens))  # pairs of sub-blocks: as many sums under way as hide the latency of dot
    for first in range(0, 4, together):
        dots = [[constant(WORDS, 0)] * len(tokens) for _ in range(8)]
        for g, c in product(range(8), range(first, min(4, first + together))):
            for i, weights in enumerate(quants(c, g)):
                for t, token in enumerate(tokens):
                    columns = token.columns(64 * c + 32 * i + 4 * g)
                    dots[2 * c + i][t] = emit_dot_u8(builder, dots[2 * c + i][t], weights, columns)
        for j in range(2 * first, min(8, 2 * (first + together))):
            scale, minimum = field(builder, sc, j, raised * (j % 2 == 0)), field(builder, m, j, 0)
            for t, token in enumerate(tokens):
                terms = builder.sitofp(dots[j][t], FLOATS)
                sums[t] = emit_fma(builder, terms, builder.fmul(scale, token.scale(j)), sums[t])
                minima[t] = emit_fma(builder, minimum, token.scaled_sum(j), minima[t])
    d, minus_dmin = builder.fmul(d, constant(FLOATS, 2.0**-raised)), builder.fneg(dmin)
    totals = [emit_fma(builder, d, total, before) for total, before in zip(sums, totals, strict=True)]
    return [emit_fma(builder, minus_dmin, total, before) for total, before in zip(minima, totals, strict=True)]


def _add_block(block: Block, tokens: list[Token], totals: list) -> list:
    def quants(c: int, g: int):
        words = block.words(QS + 64 * (8 * c + g))
        high = masked(block.builder, words, 4 - RAISED, 0x0F0F0F0F << RAISED)
        return as_bytes(block.builder, masked(block.builder, words, 0, 0x0F0F0F0F)), as_bytes(block.builder, high)

    return add_sub_blocks(block, tokens, totals, quants, RAISED)


_gemv, _gemv_batch = kernels(NAME, q4_k.BLOCK_BYTES, _add_block)

Q4_K_R16 = Format(NAME, q4_k.BLOCK, q4_k.BLOCK_BYTES, True, unpack(NAME, q4_k.unpack), _gemv, _gemv_batch, None, ROWS)
