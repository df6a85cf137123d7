"""Packed panels: weights and tokens in the order of the micro-kernel's integer products (gemm/microkernel.py).

A weight panel holds 32 rows, repacked from their blocks a few columns at a time into a worker's L1-sized scratch. For
16 of them a k-block, 32 columns, takes 640 bytes: u8[8][16 rows][4 columns] | f32[16] | f32[16]; the other 16 follow. A
weight is scale * (u - offset) - minimum. The vectors by the kind of the format:

    AFFINE        scale, -minimum                           one of each for every 32 weights; offset 0
    SYMMETRIC     scale, nothing                            one for every 32; u below 32
    SIGNED_BYTES  scale, nothing                            one for every 32; u of 8 bits
    TWO_SCALES    scale of columns 0-15, of columns 16-31   one for every 16
    TWO_MINIMA    scale, -minimum of columns 0-15, of 16-31 one minimum for every 16; offset 0; three vectors, 704 bytes

A token panel holds the tokens of one product in blocks of 6 (3 with AVX2, 12 with AMX), but for the last one. A block
of n takes 44*n bytes a k-block: q i8[n][32] | d f32[n] | two words [n]. The words of AFFINE: s f32 = d * sum of q, and
nothing; of TWO_MINIMA the same over each half. Of the others: BIAS - offset * sum of q, i32, over all 32 columns and
nothing, or over each half. Dot products start there, those with minima at BIAS.
"""

import numpy as np

from quant.block_format import Format, PanelFormat
from quant.gemm.microkernel import TILES
from quant.gemm.microkernel_amx import SCRATCH_END, configure, release
from quant.gemm.microkernel_k_block import (
    AFFINE,
    AHEAD,
    BIAS,
    K_BLOCK,
    K_BLOCKS,
    PASSES,
    ROWS,
    TOKEN_BYTES,
    TOKENS,
    TWO_MINIMA,
    TWO_SCALES,
    part_bytes,
)
from quant.gemm.quantize_tokens import SUMS, D, S
from quant.matrix import MATRIX, QuantMatrix, row_address
from quant.simd.floats import zero_f32x16
from quant.simd.memory import (
    load_f32,
    load_i8x32,
    load_i32,
    store_f32,
    store_f32x16,
    store_i8x32,
    store_i32,
    store_i64,
)
from quant.simd.rows16 import VECTOR_ROWS
from quant.simd.struct import address, i64, struct
from quant.target import isa, tuning
from quant.target.jit import inline
from quant.threads.atomics import call_3, call_5
from quant.threads.pool import worker_bytes

_ADDRESSES = SCRATCH_END  # in a worker's scratch, behind what the tile has there: addresses of the panel's rows
SCRATCH_BYTES = worker_bytes(_ADDRESSES + 8 * VECTOR_ROWS)


def find(format_: Format) -> PanelFormat | None:
    """How to make panels of a format; None where float32 tiles are used instead."""
    panels = format_.panels
    return panels if panels and isa.has(panels.repack.level) else None


def tokens_from(*formats: Format) -> int:
    """The number of tokens from which on products with matrices of these formats go through panels."""
    chosen = tuning.current()
    return chosen.packed_from_interleaved if all(format_.rows > 1 for format_ in formats) else chosen.packed_from


PACKED_MATRIX = struct(
    "PackedMatrix", matrix=MATRIX, repack=address, tile=address, kind=i64, offset=i64, part_bytes=i64
)


def packed_matrix(matrix: QuantMatrix, format_: PanelFormat) -> np.ndarray:
    """A matrix as jobs see it that multiply it through panels, a PACKED_MATRIX."""
    return PACKED_MATRIX.pack(
        matrix=matrix.struct, repack=format_.repack.address, tile=TILES[format_.kind].address,
        kind=format_.kind, offset=format_.offset, part_bytes=part_bytes(format_.kind),
    )  # fmt: skip


# ---- token panels ----------------------------------------------------------------------------------------------------


def tokens_bytes(n_cols: int, n_tokens: int) -> int:
    """Bytes of a token panel."""
    return TOKEN_BYTES * (n_cols // K_BLOCK) * n_tokens


@inline
def token_block(i, n_tokens):
    """(first, size) of the block of token i: the tile is fastest with TOKENS, so all are of that size but the last."""
    first = i // TOKENS * TOKENS
    return first, min(TOKENS, n_tokens - first)


@inline
def write_group(kind, offset, block, g, at, size, i):
    """Group g of a rounded block (gemm/quantize_tokens.py) as token i of the `size` that share the k-block at `at`."""
    store_i8x32(at + K_BLOCK * i, load_i8x32(block + K_BLOCK * g))
    words = at + K_BLOCK * size + 4 * i
    store_f32(words, load_f32(block + D + 4 * g))
    first, second = load_i32(block + SUMS + 4 * g), load_i32(block + SUMS + 64 + 4 * g)
    if kind == AFFINE:
        store_f32(words + 4 * size, load_f32(block + S + 4 * g))
    elif kind == TWO_MINIMA:
        d = load_f32(block + D + 4 * g)
        store_f32(words + 4 * size, d * np.float32(first))
        store_f32(words + 8 * size, d * np.float32(second))
    elif kind == TWO_SCALES:
        store_i32(words + 4 * size, BIAS - offset * first)
        store_i32(words + 8 * size, BIAS - offset * second)
    else:
        store_i32(words + 4 * size, BIAS - offset * (first + second))


# ---- products --------------------------------------------------------------------------------------------------------


@inline
def n_panels(n_rows):
    """Panels that n_rows rows fill."""
    return (n_rows + ROWS - 1) // ROWS


@inline
def _repack(weights, w, n_rows, n_blocks, addresses, panel):
    """A panel of the rows from w on; behind the last of n_rows the last one again. addresses: scratch."""
    interleaved, row_bytes = weights.matrix.interleaved, weights.matrix.row_bytes
    for part in range(2):
        for r in range(VECTOR_ROWS):
            row = min(VECTOR_ROWS * part + r, n_rows - 1) & -interleaved  # a power of 2
            store_i64(addresses + 8 * r, w + row_bytes * row)
        call_3(weights.repack, addresses, n_blocks, panel + weights.part_bytes * part)


@inline
def multiply_panels(weights, group, first, n_rows, n_cols, tokens, n_tokens, sums, scratch, ahead, ahead_bytes):
    """sums[p][t] f32[32] = rows first+32p.. of one group of the matrix . token t, for the panels p of n_rows rows.

    weights: a PACKED_MATRIX. tokens: a token panel. scratch: of SCRATCH_BYTES. ahead: what to prefetch meanwhile.
    """
    row_bytes, block = weights.matrix.row_bytes, weights.matrix.block
    w = row_address(weights.matrix, group, first)
    panels, n_k_blocks = n_panels(n_rows), n_cols // K_BLOCK
    for i in range(0, 4 * ROWS * panels * n_tokens, 64):
        store_f32x16(sums + i, zero_f32x16())
    tile_k_blocks = PASSES * panels * n_k_blocks * ((n_tokens + TOKENS - 1) // TOKENS)
    store_i64(scratch + AHEAD, ahead)
    store_i64(scratch + AHEAD + 8, (ahead_bytes // 64 + tile_k_blocks - 1) // tile_k_blocks)
    configure(weights.kind, n_tokens, scratch)
    for k_block in range(0, n_k_blocks, K_BLOCKS):
        k_blocks = min(K_BLOCKS, n_k_blocks - k_block)
        n_blocks, skipped = k_blocks * K_BLOCK // block, k_block * K_BLOCK // block * (row_bytes * block // n_cols)
        skipped *= weights.matrix.interleaved
        for p in range(panels):
            rows = w + row_bytes * ROWS * p + skipped
            _repack(weights, rows, n_rows - ROWS * p, n_blocks, scratch + _ADDRESSES, scratch)
            t = 0
            while t < n_tokens:
                _, size = token_block(t, n_tokens)
                x = tokens + TOKEN_BYTES * (t * n_k_blocks + size * k_block)
                call_5(weights.tile, scratch, x, sums + 4 * ROWS * (n_tokens * p + t), k_blocks, size)
                t += size
    release(n_tokens, scratch)
