"""Q4_K and Q5_K with 16 rows interleaved (formats/interleave.py): 16 rows and 256 columns in 2304 and 2816 bytes.

Every field begins 16 times as far from a block's start as in q4_k_q5_k.py. d and dmin are f16[16], the others words of
4 of the plain block's bytes: scales u32[3][16], qh u32[8][16], qs u32[32][16].
"""

from itertools import product

from quant.block_format import ROWS, Format, PanelFormat
from quant.formats import q4_k_q5_k as plain
from quant.formats.interleave import interleaved
from quant.formats.q4_k_q5_k import store_fives, store_scales_and_minima
from quant.gemm.microkernel_k_block import AFFINE, K_BLOCK_BYTES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks, store_nibbles
from quant.gemv.interleaved import FLOATS, WORDS, AddBlock, Block, Token, as_bytes, masked, merged
from quant.simd.core import constant
from quant.simd.dots import emit_dot_u8
from quant.simd.floats import emit_fma
from quant.simd.memory import load_f16x16, load_i32x16, load_i64
from quant.target import isa
from quant.target.jit import Kernel, inline

D, DMIN, SCALES = ROWS * plain.D, ROWS * plain.DMIN, ROWS * plain.SCALES
QS_4, QH, QS_5 = ROWS * plain.QS_4, ROWS * plain.QH, ROWS * plain.QS_5
# vpdpbusd multiplies high nibbles where they are, 16 times too large; vpmaddubsw has no room for that.
RAISED = 4 if isa.has("avx512_vnni") else 0


def _six_bits(block: Block) -> tuple[list, list]:
    """sc and m of the 8 sub-blocks as bytes of two vectors of words each; bits 6 and 7 are to be ignored."""
    builder, (low, high, mixed) = block.builder, (block.words(SCALES + 64 * i) for i in range(3))
    sc = merged(builder, masked(builder, mixed, 0, 0x0F0F0F0F), low, 2, 0x30303030)
    m = merged(builder, masked(builder, mixed, 4, 0x0F0F0F0F), high, 2, 0x30303030)
    return [low, sc], [high, m]


def _field(builder, words: list, j: int, raised: int):
    """Byte j's lower 6 bits times 2^raised, as float32."""
    return builder.sitofp(masked(builder, words[j // 4], 8 * (j % 4) - raised, 63 << raised), FLOATS)


def _add_sub_blocks(block: Block, tokens: list[Token], totals: list, quants, raised: int) -> list:
    """What both formats do with a block.

    quants: (c, g) -> columns 64c + 4g.. and 64c + 32 + 4g.., the latter times 2^raised.
    """
    builder = block.builder
    d, dmin = block.halves(D), block.halves(DMIN)
    sc, m = _six_bits(block)
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
            scale, minimum = _field(builder, sc, j, raised * (j % 2 == 0)), _field(builder, m, j, 0)
            for t, token in enumerate(tokens):
                terms = builder.sitofp(dots[j][t], FLOATS)
                sums[t] = emit_fma(builder, terms, builder.fmul(scale, token.scale(j)), sums[t])
                minima[t] = emit_fma(builder, minimum, token.scaled_sum(j), minima[t])
    d, minus_dmin = builder.fmul(d, constant(FLOATS, 2.0**-raised)), builder.fneg(dmin)
    totals = [emit_fma(builder, d, total, before) for total, before in zip(sums, totals, strict=True)]
    return [emit_fma(builder, minus_dmin, total, before) for total, before in zip(minima, totals, strict=True)]


def _add_block_4(block: Block, tokens: list[Token], totals: list) -> list:
    def quants(c: int, g: int):
        words = block.words(QS_4 + 64 * (8 * c + g))
        high = masked(block.builder, words, 4 - RAISED, 0x0F0F0F0F << RAISED)
        return as_bytes(block.builder, masked(block.builder, words, 0, 0x0F0F0F0F)), as_bytes(block.builder, high)

    return _add_sub_blocks(block, tokens, totals, quants, RAISED)


def _add_block_5(block: Block, tokens: list[Token], totals: list) -> list:
    builder = block.builder

    def quants(c: int, g: int):
        words, fifth = block.words(QS_5 + 64 * (8 * c + g)), block.words(QH + 64 * g)
        for i in range(2):
            nibbles = masked(builder, words, 4 * i, 0x0F0F0F0F)
            yield as_bytes(builder, merged(builder, nibbles, fifth, 2 * c + i - 4, 0x10101010))

    return _add_sub_blocks(block, tokens, totals, quants, 0)


# ---- panels ----------------------------------------------------------------------------------------------------------


@inline
def _repack_scales(block, out):
    """d, dmin and scales, for 8 steps."""
    d, dmin = load_f16x16(block + D), load_f16x16(block + DMIN)
    low, high = load_i32x16(block + SCALES), load_i32x16(block + SCALES + 64)
    store_scales_and_minima(d, dmin, low, high, load_i32x16(block + SCALES + 128), out)


@repacks
def _repack_4(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        _repack_scales(block, out + K_BLOCK_SCALES)
        for c in range(4):
            for g in range(8):
                store_nibbles(load_i32x16(block + QS_4 + 64 * (8 * c + g)), out + 64 * g)
            out += 2 * K_BLOCK_BYTES
        block += ROWS * plain.BYTES_4


@repacks
def _repack_5(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        _repack_scales(block, out + K_BLOCK_SCALES)
        for g in range(8):
            fifth = load_i32x16(block + QH + 64 * g)
            for c in range(4):
                words = load_i32x16(block + QS_5 + 64 * (8 * c + g))
                store_fives(words, fifth, c, out + 2 * K_BLOCK_BYTES * c + 64 * g)
        out += 8 * K_BLOCK_BYTES
        block += ROWS * plain.BYTES_5


def _format(of: Format, add_block: AddBlock, repack: Kernel) -> Format:
    return interleaved(of, add_block, PanelFormat(AFFINE, 0, repack))


Q4_K_R16 = _format(plain.Q4_K, _add_block_4, _repack_4)
Q5_K_R16 = _format(plain.Q5_K, _add_block_5, _repack_5)
