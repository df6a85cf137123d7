"""Q5_K with 16 rows interleaved (formats/interleave.py): 16 rows and 256 columns in 2816 bytes.
d f16[16] @0 | dmin f16[16] @32 | scales u32[3][16] @64 | qh u32[8][16] @256 | qs u32[32][16] @768; see q5_k.py."""

from quant.block_format import Format
from quant.formats import q5_k
from quant.formats.interleave import ROWS, unpack
from quant.formats.q4_k_r16 import add_sub_blocks
from quant.gemv.interleaved import Block, Token, as_bytes, kernels, masked, merged

NAME = "Q5_K_R16"
QH, QS = 256, 768


def _add_block(block: Block, tokens: list[Token], totals: list) -> list:
    builder = block.builder

    def quants(c: int, g: int):
        words, fifth = block.words(QS + 64 * (8 * c + g)), block.words(QH + 64 * g)
        for i in range(2):
            nibbles = masked(builder, words, 4 * i, 0x0F0F0F0F)
            yield as_bytes(builder, merged(builder, nibbles, fifth, 2 * c + i - 4, 0x10101010))

    return add_sub_blocks(block, tokens, totals, quants, 0)


_gemv, _gemv_batch = kernels(NAME, q5_k.BLOCK_BYTES, _add_block)

Q5_K_R16 = Format(NAME, q5_k.BLOCK, q5_k.BLOCK_BYTES, True, unpack(NAME, q5_k.unpack), _gemv, _gemv_batch, None, ROWS)
