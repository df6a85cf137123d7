"""The register tile of the many-token products: 32 rows of a weight panel times a few tokens of a token panel.

Integer dot products of 32 columns, multiplied by the weights' scale and the token's in float32, and float32 sums that
stay in registers over all columns of the panels (gemm/microkernel_k_block.py). Layout of both panels: gemm/packed.py.

With VNNI: 6 tokens, bound by the two vector ports: 8 vpdpbusd and 2 or 3 float operations for 32 columns. With AVX2
3 tokens and 8 rows at a time, the products of 8 bits added in 16 bits as long as they fit (docs/lab-notes.md). With
AMX 12 tokens, whose dot products are AMX tiles' (gemm/microkernel_amx.py): what remains are 3 or 4 vector operations.
On ARM 6 tokens and 8 rows at a time, by sdot or usdot.
"""

from itertools import chain

from numba import types
from numba.core import cgutils

from quant.gemm.microkernel_amx import AmxKBlocks
from quant.gemm.microkernel_k_block import (
    AFFINE,
    AHEAD,
    LANES,
    LEVEL,
    PARTS,
    PASSES,
    ROWS,
    SIGNED_BYTES,
    SYMMETRIC,
    TOKENS,
    TWO_MINIMA,
    TWO_SCALES,
    VECTOR_TOKENS,
    VF32,
    KBlocks,
    part_bytes,
)
from quant.simd.core import I64, define, load, store
from quant.simd.memory import emit_prefetch
from quant.simd.register_tile import register_tile, switch
from quant.target import isa
from quant.target.jit import Kernel, kernel


def _prefetch(builder, address, n_bytes) -> None:
    """The lines from `address` on. A few a k-block: a burst would hold the buffers that the tile's own loads need."""
    with cgutils.for_range_slice(builder, I64(0), n_bytes, I64(64), I64) as (offset, _):
        emit_prefetch(builder, builder.add(address, offset), 2)


def _tile(kind: int):
    """An intrinsic void(weights, tokens, sums, n_k_blocks, n_tokens): sums[t] f32[32] += weights . tokens[t]."""

    def emit_for(builder, n: int, weights, tokens, sums, n_k_blocks, ahead) -> None:
        """For n tokens. ahead: address of the next line to fetch and of how many a k-block takes, int64 each."""
        at = [[builder.add(sums, I64(4 * ROWS * t + 4 * LANES * part)) for t in range(n)] for part in range(PARTS)]
        totals = [[load(builder, a, VF32) for a in row] for row in at]
        stride = builder.mul(load(builder, builder.add(ahead, I64(8)), I64), I64(64))
        first_line = load(builder, ahead, I64)
        k_blocks = (AmxKBlocks if n > VECTOR_TOKENS else KBlocks)(builder, kind, n, weights, tokens, n_k_blocks)

        def add(index, totals):
            _prefetch(builder, builder.add(first_line, builder.mul(index, stride)), stride)
            k_blocks.at(index).add(totals)
            return totals

        totals = register_tile(builder, n_k_blocks, totals, add)
        store(builder, ahead, builder.add(first_line, builder.mul(n_k_blocks, stride)))
        for total, address in zip(chain(*totals), chain(*at), strict=True):
            store(builder, address, total)

    def emit(builder, weights, tokens, sums, n_k_blocks, n_tokens) -> None:
        def emit_block(n: int) -> None:
            with cgutils.for_range(builder, I64(PASSES)) as group:
                part = builder.mul(builder.lshr(group.index, I64(1)), I64(part_bytes(kind)))
                half = builder.mul(builder.and_(group.index, I64(1)), I64(32))
                w = builder.add(weights, builder.add(part, half))
                row_sums = builder.add(sums, builder.mul(group.index, I64(4 * LANES * PARTS)))
                emit_for(builder, n, w, tokens, row_sums, n_k_blocks, builder.add(weights, I64(AHEAD)))

        switch(builder, n_tokens, TOKENS, emit_block)

    return define(types.void, (types.int64,) * 5, emit)


TILE = "void(int64, int64, int64, int64, int64)"
# By kind; none below LEVEL, where their instructions would abort the process. Blocks of more than
# VECTOR_TOKENS are for callers between microkernel_amx.configure() and release().
TILES: dict[int, Kernel] = {}

if isa.has(LEVEL):
    _minimum, _offset, _halves, _bytes = _tile(AFFINE), _tile(SYMMETRIC), _tile(TWO_SCALES), _tile(SIGNED_BYTES)
    _minima = _tile(TWO_MINIMA)

    @kernel(TILE)
    def _minimum_tile(weights, tokens, sums, n_k_blocks, n_tokens):
        _minimum(weights, tokens, sums, n_k_blocks, n_tokens)

    @kernel(TILE)
    def _offset_tile(weights, tokens, sums, n_k_blocks, n_tokens):
        _offset(weights, tokens, sums, n_k_blocks, n_tokens)

    @kernel(TILE)
    def _halves_tile(weights, tokens, sums, n_k_blocks, n_tokens):
        _halves(weights, tokens, sums, n_k_blocks, n_tokens)

    @kernel(TILE)
    def _bytes_tile(weights, tokens, sums, n_k_blocks, n_tokens):
        _bytes(weights, tokens, sums, n_k_blocks, n_tokens)

    @kernel(TILE)
    def _minima_tile(weights, tokens, sums, n_k_blocks, n_tokens):
        _minima(weights, tokens, sums, n_k_blocks, n_tokens)

    TILES[AFFINE], TILES[SYMMETRIC] = _minimum_tile, _offset_tile
    TILES[TWO_SCALES], TILES[SIGNED_BYTES] = _halves_tile, _bytes_tile
    TILES[TWO_MINIMA] = _minima_tile
