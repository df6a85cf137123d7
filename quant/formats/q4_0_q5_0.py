"""Q4_0 and Q5_0: x = d*(q-8), 32 weights of 4 bits in 18 bytes, and x = d*(q-16), of 5 bits in 22 bytes.

Quantising: the scale follows from the weight of largest magnitude, bit-equal to ggml's; with importances it is searched
for (quantize/search.py). Every product and sum is rounded on its own, as in ggml's portable C.
Source: ggml src/ggml-common.h @d99724f, block_q4_0, block_q5_0; quantize_row_q4_0_ref in ggml-quants.c.
"""

from functools import partial

import numpy as np

from quant.block_format import QUANTIZE, Format, block_layout
from quant.formats.nibbles_32 import BLOCK, codes_of, panel_format, stores_codes, symmetric, unpack_codes
from quant.gemm.microkernel_k_block import SYMMETRIC
from quant.gemv.plain import specialize
from quant.quantize.levels import averages, inverse_of, levels_towards_zero
from quant.quantize.search import TINY, fit_scale, write_importance
from quant.simd.exact import signed_largest
from quant.simd.memory import load_f16, load_f32x32, store_f16
from quant.target.jit import inline, kernel


def _unpack(layout: np.dtype, offset: int, blocks: np.ndarray) -> np.ndarray:
    raw = blocks.view(layout)
    levels = unpack_codes(raw).astype(np.int8) - np.int8(offset)
    return (raw["d"].astype(np.float32)[..., None] * levels.astype(np.float32)).reshape(*blocks.shape[:-1], -1)


# What specialize() gives the template below.
BLOCK_BYTES = N_LEVELS = 0
store_codes = None


@inline
def _quantize_block(x, importance, b, of_row, n_levels, block, scratch):
    """Codes of block b of a row; writes its scale."""
    x += 128 * b
    values = load_f32x32(x)
    largest = signed_largest(values)
    d = largest / np.float32(-(n_levels // 2))
    if importance != 0 and abs(largest) > TINY:
        write_importance(x, importance + 128 * b, BLOCK, of_row[0], of_row[1], scratch)
        store_f16(block, fit_scale(x, scratch, BLOCK, n_levels // 2, largest))
        d = load_f16(block)
    store_f16(block, d)
    return levels_towards_zero(values, inverse_of(d), n_levels // 2 + 0.5, n_levels)


def _quantize(x, importance, n_blocks, out, scratch):
    of_row = averages(x, importance, BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + BLOCK_BYTES * b
        store_codes(block, _quantize_block(x, importance, b, of_row, N_LEVELS, block, scratch))


def _format(name: str, layout: np.dtype, n_levels: int, together: int) -> Format:
    offset = n_levels // 2
    codes, codes_of_even = codes_of(layout)

    @inline
    def levels(block):
        return codes(block) - offset

    names = {"BLOCK_BYTES": layout.itemsize, "N_LEVELS": n_levels, "store_codes": stores_codes(layout)}
    return symmetric(
        name,
        layout,
        partial(_unpack, layout, offset),
        levels=levels,
        raised_of_even=codes_of_even,
        offset=offset,
        panels=panel_format(name, layout, SYMMETRIC, offset),
        quantize=kernel(QUANTIZE)(specialize(_quantize, f"quantize_{name}", **names)),
        together=together,
    )


Q4_0 = _format("Q4_0", block_layout(18, d="<f2", qs="16u1"), 16, together=4)
Q5_0 = _format("Q5_0", block_layout(22, d="<f2", qh="4u1", qs="16u1"), 32, together=1)
