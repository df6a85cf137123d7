"""Q6_K with 16 rows interleaved (formats/interleave.py): 16 rows and 256 columns in 3360 bytes.
ql u32[32][16] @0 | qh u32[16][16] @2048 | scales i8[16][16] @3072 | d f16[16] @3328; see q6_k.py."""

from quant.block_format import Format
from quant.formats import q6_k
from quant.formats.interleave import ROWS, unpack
from quant.gemv.interleaved import FLOATS, WORDS, Block, Token, as_bytes, kernels, masked, merged
from quant.simd.core import constant
from quant.simd.floats import emit_fma
from quant.simd.ints import emit_dot_u8

NAME = "Q6_K_R16"
QH, SCALES, D = 2048, 3072, 3328


def _quarters(block: Block, half: int, g: int) -> list:
    """Columns 4g..4g+3 of each quarter of 32 columns of a half, 0..63."""
    builder = block.builder
    low, high = (block.words(64 * (16 * half + 8 * i + g)) for i in range(2))
    bits = block.words(QH + 64 * (8 * half + g))
    return [
        as_bytes(
            builder,
            merged(builder, masked(builder, words, 4 * (k // 2), 0x0F0F0F0F), bits, 2 * k - 4, 0x30303030),
        )
        for k, words in enumerate((low, high, low, high))
    ]


def _add_block(block: Block, tokens: list[Token], totals: list) -> list:
    builder, offset = block.builder, constant(FLOATS, -32.0)
    sums = [constant(FLOATS, 0.0)] * len(tokens)
    for half in range(2):
        for part in range(2):  # of 16 columns of each quarter
            dots = [[constant(WORDS, 0)] * len(tokens) for _ in range(4)]
            for g in range(4 * part, 4 * part + 4):
                for k, weights in enumerate(_quarters(block, half, g)):
                    for t, token in enumerate(tokens):
                        columns = token.columns(128 * half + 32 * k + 4 * g)
                        dots[k][t] = emit_dot_u8(builder, dots[k][t], weights, columns)
            for k in range(4):
                j = 4 * half + k
                scale = block.signed_bytes(SCALES + ROWS * (2 * j + part))
                for t, token in enumerate(tokens):
                    product = builder.sitofp(dots[k][t], FLOATS)
                    product = emit_fma(builder, token.half_sum(2 * j + part), offset, product)
                    sums[t] = emit_fma(builder, product, builder.fmul(scale, token.scale(j)), sums[t])
    d = block.halves(D)
    return [emit_fma(builder, d, total, before) for total, before in zip(sums, totals, strict=True)]


_gemv, _gemv_batch = kernels(NAME, q6_k.BLOCK_BYTES, _add_block)

Q6_K_R16 = Format(NAME, q6_k.BLOCK, q6_k.BLOCK_BYTES, True, unpack(NAME, q6_k.unpack), _gemv, _gemv_batch, None, ROWS)
