"""Q4_1 and Q5_1: x = d*q + m, 32 weights of 4 bits in 20 bytes, or of 5 bits in 24 bytes.

Quantising: scale and minimum follow from the extremes, bit-equal to ggml's; with importances they are searched for
(quantize/search.py). Every product and sum is rounded on its own, as in ggml's portable C.
Source: ggml src/ggml-common.h @d99724f, block_q4_1, block_q5_1; quantize_row_q4_1_ref in ggml-quants.c.
"""

from functools import partial

import numpy as np

from quant.block_format import QUANTIZE, Format, block_layout, offsets
from quant.formats.nibbles_32 import BLOCK, affine, stores_codes, unpack_codes
from quant.gemv.plain import specialize
from quant.quantize.levels import averages, inverse_of, levels_towards_zero
from quant.quantize.search import TINY, fit_scale_min, write_importance
from quant.simd.exact import greatest, least
from quant.simd.memory import load_f32x32, store_f16
from quant.target.jit import inline, kernel

LAYOUT_4 = block_layout(20, d="<f2", m="<f2", qs="16u1")
LAYOUT_5 = block_layout(24, d="<f2", m="<f2", qh="4u1", qs="16u1")
D, M, _ = offsets(LAYOUT_4)


def _unpack(layout: np.dtype, blocks: np.ndarray) -> np.ndarray:
    raw = blocks.view(layout)
    d, m = (raw[name].astype(np.float32)[..., None] for name in ("d", "m"))
    return (d * unpack_codes(raw).astype(np.float32) + m).reshape(*blocks.shape[:-1], -1)


# What specialize() gives the template below.
BLOCK_BYTES = N_LEVELS = 0
store_codes = None


@inline
def _quantize_block(x, importance, b, of_row, n_levels, block, scratch):
    """Codes of block b of a row; writes its scale and minimum."""
    x += 128 * b
    values = load_f32x32(x)
    low = least(values)
    d = (greatest(values) - low) / np.float32(n_levels - 1)
    if importance != 0 and d > TINY:
        write_importance(x, importance + 128 * b, BLOCK, of_row[0], of_row[1], scratch)
        d, low = fit_scale_min(x, scratch, BLOCK, n_levels - 1, low, greatest(values), False)
    store_f16(block + D, d)
    store_f16(block + M, low)
    return levels_towards_zero(values - low, inverse_of(d), 0.5, n_levels)


def _quantize(x, importance, n_blocks, out, scratch):
    of_row = averages(x, importance, BLOCK * n_blocks)
    for b in range(n_blocks):
        block = out + BLOCK_BYTES * b
        store_codes(block, _quantize_block(x, importance, b, of_row, N_LEVELS, block, scratch))


def _format(name: str, layout: np.dtype, n_levels: int, together: int) -> Format:
    names = {"BLOCK_BYTES": layout.itemsize, "N_LEVELS": n_levels, "store_codes": stores_codes(layout)}
    quantize = kernel(QUANTIZE)(specialize(_quantize, f"quantize_{name}", **names))
    return affine(name, layout, partial(_unpack, layout), quantize, together)


Q4_1 = _format("Q4_1", LAYOUT_4, 16, together=4)
Q5_1 = _format("Q5_1", LAYOUT_5, 32, together=1)
