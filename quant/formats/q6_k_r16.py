"""Q6_K with 16 rows interleaved (formats/interleave.py): 16 rows and 256 columns in 3360 bytes.

Every field begins 16 times as far from a block's start as in q6_k.py. ql and qh are words of 4 of the plain block's
bytes: u32[32][16] and u32[16][16]; then come scales i8[16][16] and d f16[16].
"""

from quant.block_format import ROWS, PanelFormat
from quant.formats import q6_k
from quant.formats.interleave import interleaved
from quant.formats.q6_k import store_sixes
from quant.gemm.microkernel_k_block import K_BLOCK_BYTES, TWO_SCALES
from quant.gemm.repack import SCALES as K_BLOCK_SCALES
from quant.gemm.repack import repacks
from quant.gemv.interleaved import FLOATS, WORDS, Block, Token, as_bytes, masked, merged
from quant.simd.core import constant
from quant.simd.dots import emit_dot_u8
from quant.simd.floats import emit_fma
from quant.simd.memory import load_f16x16, load_i8x16_picked, load_i32x16, load_i64, store_f32x16

QL, QH, SCALES, D = ROWS * q6_k.QL, ROWS * q6_k.QH, ROWS * q6_k.SCALES, ROWS * q6_k.D


def _quarters(block: Block, half: int, g: int) -> list:
    """Columns 4g..4g+3 of each quarter of 32 columns of a half, 0..63."""
    builder = block.builder
    low, high = (block.words(QL + 64 * (16 * half + 8 * i + g)) for i in range(2))
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


_load_i8x16 = load_i8x16_picked(range(16))


@repacks
def _repack(rows, n_blocks, out):
    block = load_i64(rows)
    for _ in range(n_blocks):
        d = load_f16x16(block + D)
        for i in range(16):
            scale = _load_i8x16(block + SCALES + 16 * i) * d
            store_f32x16(out + K_BLOCK_SCALES + K_BLOCK_BYTES * (i // 2) + 64 * (i % 2), scale)
        for half in range(2):
            for g in range(8):
                bits = load_i32x16(block + QH + 64 * (8 * half + g))
                to = out + 4 * K_BLOCK_BYTES * half + 64 * g
                store_sixes(load_i32x16(block + QL + 64 * (16 * half + g)), bits, 0, to)
                store_sixes(load_i32x16(block + QL + 64 * (16 * half + 8 + g)), bits, 1, to)
        out += 8 * K_BLOCK_BYTES
        block += ROWS * q6_k.BLOCK_BYTES


Q6_K_R16 = interleaved(q6_k.Q6_K, _add_block, PanelFormat(TWO_SCALES, 32, _repack))
