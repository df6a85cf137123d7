"""Formats with blocks of 32 weights whose codes are nibbles: all that such formats have in common.

Byte j of a block's qs holds the code of weight j in its low nibble and that of weight j+16 in its high one. Bit j of
qh, where a format has it, is the fifth bit of weight j's code. symmetric() makes formats with x = scale * level, where
a level is the code less an offset, or the code's entry in a table; affine() those with x = d * code + m.
"""

from collections.abc import Callable

import numpy as np

from quant.block_format import EXPAND, Format, PanelFormat
from quant.formats.blocks_32 import (
    add_minimum,
    add_offset,
    add_single,
    add_single_minimum,
    dots_of_quarters,
    eight_pairs,
    eight_scales,
    four_u16,
)
from quant.gemm.microkernel_k_block import AFFINE, K_BLOCK_BYTES
from quant.gemm.repack import repacks, store_d, store_d_and_m, store_fives, store_fours, store_halves, two_nibbles
from quant.gemv import plain
from quant.gemv.plain import specialize
from quant.simd.core import i32x16
from quant.simd.dots import dot_i8, dot_u8
from quant.simd.exact import gather_bits, join_nibbles
from quant.simd.floats import to_f32
from quant.simd.ints import lookup_in, nibbles, set_where, spread_bits, zero_i32x8
from quant.simd.memory import (
    load_f16,
    load_i8x16,
    load_i8x32,
    load_quarters,
    load_u32,
    store_f32x32,
    store_i8x16,
    store_i32,
)
from quant.simd.rows16 import transpose
from quant.target.jit import Kernel, inline, kernel

BLOCK = 32


def unpack_codes(blocks: np.ndarray) -> np.ndarray:
    """uint8 (..., n, 32) of blocks, in the layout of their format."""
    codes = np.concatenate([blocks["qs"] & 15, blocks["qs"] >> 4], -1)
    if "qh" in blocks.dtype.names:
        codes |= np.unpackbits(blocks["qh"], axis=-1, bitorder="little") << 4
    return codes


def codes_of(layout: np.dtype) -> tuple[Callable, Callable]:
    """Two inline functions of a block's address: its codes, i8x32; the first and second halves of every other of 8."""
    qs, qh, stride = layout.fields["qs"][1], layout.fields.get("qh", (None, 0))[1], 2 * layout.itemsize

    @inline
    def four_bits(block):
        return nibbles(load_i8x16(block + qs))

    @inline
    def four_bits_of_even(block):
        codes = load_quarters(block + qs, stride)
        return codes & 15, codes >> 4

    @inline
    def five_bits(block):
        return four_bits(block) | spread_bits(load_u32(block + qh), 16)

    @inline
    def five_bits_of_even(block):
        codes = load_quarters(block + qs, stride)
        low = set_where(codes & 15, four_u16(block + qh, stride), 16)
        return low, set_where(codes >> 4, four_u16(block + qh + 2, stride), 16)

    return (five_bits, five_bits_of_even) if "qh" in layout.names else (four_bits, four_bits_of_even)


def stores_codes(layout: np.dtype) -> Callable:
    """An inline function (block, codes i8x32) that writes them."""
    qs, qh = layout.fields["qs"][1], layout.fields.get("qh", (None, 0))[1]

    @inline
    def four_bits(block, codes):
        store_i8x16(block + qs, join_nibbles(codes))

    @inline
    def five_bits(block, codes):
        store_i32(block + qh, gather_bits(codes, 4))
        store_i8x16(block + qs, join_nibbles(codes & 15))

    return five_bits if "qh" in layout.names else four_bits


# What specialize() gives the two templates below.
BLOCK_BYTES = CODES = 0
values = store_scale = store_codes = None


def _expand(w, n_blocks, out):
    for b in range(n_blocks):
        store_f32x32(out + 128 * b, values(w + BLOCK_BYTES * b))


def _repack(rows, n_blocks, out):
    for b in range(n_blocks):
        store_scale(rows, BLOCK_BYTES * b, out)
        store_codes(rows, BLOCK_BYTES * b + CODES, out)
        out += K_BLOCK_BYTES


def _expands(name: str, layout: np.dtype, values: Callable) -> Kernel:
    return kernel(EXPAND)(specialize(_expand, f"expand_{name}", BLOCK_BYTES=layout.itemsize, values=values))


def panel_format(
    name: str,
    layout: np.dtype,
    kind: int,
    offset: int,
    store_scale: Callable = store_d,
    table: np.ndarray | None = None,
) -> PanelFormat:
    """How blocks become panels.

    Args:
        kind, offset: see PanelFormat.
        store_scale: inline (rows, at, out), at: where a block begins.
        table: what lies in a panel for each code of 4 bits, if not the code.
    """
    names = {"BLOCK_BYTES": layout.itemsize, "CODES": layout.fields["qh" if "qh" in layout.names else "qs"][1]}
    names["store_codes"] = store_fives if "qh" in layout.names else store_fours if table is None else _stores(table)
    return PanelFormat(kind, offset, repacks(specialize(_repack, f"repack_{name}", store_scale=store_scale, **names)))


def _stores(table: np.ndarray) -> Callable:
    """store_fours through a table."""
    entry = lookup_in(table, i32x16)

    @inline
    def store_entries(rows, at, out):
        for e, words in enumerate(transpose(rows, at)):
            low, high = two_nibbles(words)
            store_halves(entry(low), entry(high), e, out)

    return store_entries


def symmetric(
    name: str,
    layout: np.dtype,
    unpack: Callable[[np.ndarray], np.ndarray],
    *,
    levels: Callable,
    raised_of_even: Callable,
    offset: int,
    panels: PanelFormat,
    quantize: Kernel,
    scale: Callable = load_f16,
    scales: Callable | None = None,
    dots: Callable = dots_of_quarters,
    together: int = 4,
    **rest: float,
) -> Format:
    """A format with x = scale * level.

    Args:
        unpack, panels, quantize, rest: see Format.
        levels: inline (block) -> i8x32.
        raised_of_even: inline (block) -> the levels + offset of the first and second halves of every other of 8 blocks.
        scale, scales: inline (block) -> its scale; the scales of 8 blocks, in two lanes each.
        dots: of blocks_32, for raised levels of that range.
        together: see plain.kernels.
    """
    block_bytes = layout.itemsize

    @inline
    def half_scales(block):
        return eight_scales(block, block_bytes)

    scales = scales or half_scales

    @inline
    def weights(block):
        even, odd = raised_of_even(block), raised_of_even(block + block_bytes)
        return even[0], even[1], odd[0], odd[1], scales(block)

    @inline
    def add_k_block(weights, k_block, total):
        return add_offset(dots(weights, k_block), offset, weights[4], k_block, total)

    @inline
    def add_block(block, q8, n_cols, i, total):
        products = dot_i8(zero_i32x8(), levels(block), load_i8x32(q8 + 4 * n_cols + 32 * i))
        return add_single(products, scale(block), q8, n_cols, i, total)

    @inline
    def values(block):
        return to_f32(levels(block)) * scale(block)

    gemv, gemv_batch = plain.kernels(name, 8 * block_bytes, weights, add_k_block, add_block, together)
    expand = _expands(name, layout, values)
    return Format(
        name, BLOCK, layout, True, unpack, gemv, gemv_batch, expand, panels=panels, quantize=quantize, **rest
    )  # fmt: skip


def affine(
    name: str, layout: np.dtype, unpack: Callable[[np.ndarray], np.ndarray], quantize: Kernel, together: int = 4
) -> Format:
    """A format with x = d * code + m: d and m are f16 at the start of a block. Arguments as symmetric()'s."""
    block_bytes, m = layout.itemsize, layout.fields["m"][1]
    codes, codes_of_even = codes_of(layout)

    @inline
    def weights(block):
        even, odd = codes_of_even(block), codes_of_even(block + block_bytes)
        return even[0], even[1], odd[0], odd[1], eight_pairs(block, block_bytes)

    @inline
    def add_k_block(weights, k_block, total):
        return add_minimum(dots_of_quarters(weights, k_block), weights[4], k_block, total)

    @inline
    def add_block(block, q8, n_cols, i, total):
        products = dot_u8(zero_i32x8(), codes(block), load_i8x32(q8 + 4 * n_cols + 32 * i))
        total = add_single(products, load_f16(block), q8, n_cols, i, total)
        return add_single_minimum(load_f16(block + m), q8, n_cols, i, total)

    @inline
    def values(block):
        return to_f32(codes(block)) * load_f16(block) + load_f16(block + m)

    gemv, gemv_batch = plain.kernels(name, 8 * block_bytes, weights, add_k_block, add_block, together)
    panels = panel_format(name, layout, AFFINE, 0, store_d_and_m)
    expand = _expands(name, layout, values)
    return Format(name, BLOCK, layout, True, unpack, gemv, gemv_batch, expand, panels=panels, quantize=quantize)
