"""Queries and cache rows of DeepSeek-V4's attention: one key a token that is the value too, and rows of whole windows.

A compressor gives each token a vector and a gate. When a window of `ratio` tokens ends, its row is their sum, weighted
by the gates' softmax, each column by itself; then a norm, and the rotation of the window's first position. Where
windows overlap, vectors have two halves: a row pools the first halves of the window before and the second halves of its
own. Until then vectors and gates lie in open windows: rows of the cache in float32, in which positions go round. The
token that ends a window sees its row.
Source: transformers 5.24, models/deepseek_v4, classes DeepseekV4CSACompressor and DeepseekV4HCACompressor.
"""

import math
from dataclasses import dataclass

import numpy as np

from quant.decode.indexer import INDEXER, Indexer, has_to_choose, pack_queries
from quant.decode.program import HEADER, MOST_TOKENS, NOTHING, PHASE, Phase, cache_block, padded, program_of, tokens_of
from quant.decode.queries import cache_row_of, rotations_of, store_row_f16, turn
from quant.errors import QuantError
from quant.gemm.lanes import ADDRESSES
from quant.simd.floats import exp, fma, maximum, zero_f32x16
from quant.simd.memory import load_f32x16, stack, store_f32, store_f32x16
from quant.simd.struct import address, boolean, f32, i64, struct
from quant.simd.vectors import copy, rms_factor, rms_norm
from quant.target.jit import inline, kernel

_MOST_ROPE = 256  # values of a row that are rotated, at most

COMPRESSOR = struct(
    "Compressor",
    ratio=i64,  # tokens of a window; 0 for none
    width=i64,  # of a pooled row
    overlaps=boolean,
    vectors=address,  # float32 (MOST_TOKENS, width), or 2 width where windows overlap
    gates=address,
    bias=address,  # float32 (ratio, as wide): added to the gates
    norm=address,
    open_slot=i64,  # blocks of cache rows
    pooled_slot=i64,
)
QUERIES = struct(
    "SharedKeyQueries",
    phase=PHASE,
    projected=address,  # float32 (MOST_TOKENS, n_heads, width)
    n_heads=i64,
    width=i64,
    queries=address,  # the same, normed, rotated and scaled
    scale=f32,
    n_rope=i64,  # the last values
    first_frequency=i64,
    epsilon=f32,
    kv=address,  # float32 (MOST_TOKENS, width)
    kv_norm=address,
    slot=i64,  # which block of cache rows
    compressor=COMPRESSOR,
    index_compressor=COMPRESSOR,
    indexer=INDEXER,
)
_rotations = stack(4 * _MOST_ROPE)


@inline
def _rotate_last(a, x, width, rotations):
    """The last n_rope of x, float32 (width,), by these cosines and sines."""
    x += 4 * (width - a.n_rope)
    turn(x, rotations, a.n_rope, np.float32(1.0), x, 2, 1)


@inline
def _rotations_at(a, position):
    """Cosines and sines of another position than a token's."""
    rotations, frequencies = _rotations(), program_of(a).frequencies + a.first_frequency
    for i in range(a.n_rope // 2):
        angle = position * frequencies[i]
        store_f32(rotations + 8 * i, np.float32(math.cos(angle)))
        store_f32(rotations + 8 * i + 4, np.float32(math.sin(angle)))
    return rotations


@inline
def _open_row(a, c, t, position):
    """Address of a position's vector and gate, in the context of token t."""
    block, n_rows = cache_block(a, c.open_slot, t)
    return block + 8 * (2 * c.width if c.overlaps else c.width) * (position % n_rows)


@inline
def _keep(a, c, t):
    """Token t's vector and gate into the open window."""
    position, n = program_of(a).positions[t], 2 * c.width if c.overlaps else c.width
    row, bias = _open_row(a, c, t, position), c.bias + 4 * n * (position % c.ratio)
    copy(c.vectors + 4 * n * t, n, row)
    for i in range(0, n, 16):
        store_f32x16(row + 4 * (n + i), load_f32x16(c.gates + 4 * (n * t + i)) + load_f32x16(bias + 4 * i))


@inline
def _pool(a, c, t, work):
    """The row of the window that token t ends, to the cache. work: three rows in float32."""
    position, width, ratio = program_of(a).positions[t], c.width, c.ratio
    first = position + 1 - ratio
    begin = max(0, first - ratio) if c.overlaps else first
    to_gate, largest, total = 8 * width if c.overlaps else 4 * width, work + 4 * width, work + 8 * width
    for i in range(0, 4 * width, 64):
        store_f32x16(work + i, zero_f32x16())
        store_f32x16(largest + i, zero_f32x16() - np.float32(math.inf))
        store_f32x16(total + i, zero_f32x16())
    for p in range(begin, position + 1):
        gates = _open_row(a, c, t, p) + to_gate + (4 * width if c.overlaps and p >= first else 0)
        for i in range(0, 4 * width, 64):
            store_f32x16(largest + i, maximum(load_f32x16(largest + i), load_f32x16(gates + i)))
    for p in range(begin, position + 1):
        vector = _open_row(a, c, t, p) + (4 * width if c.overlaps and p >= first else 0)
        for i in range(0, 4 * width, 64):
            weight = exp(load_f32x16(vector + to_gate + i) - load_f32x16(largest + i))
            store_f32x16(total + i, load_f32x16(total + i) + weight)
            store_f32x16(work + i, fma(weight, load_f32x16(vector + i), load_f32x16(work + i)))
    for i in range(0, 4 * width, 64):
        store_f32x16(work + i, load_f32x16(work + i) / load_f32x16(total + i))
    rms_norm(work, c.norm, a.epsilon, width, work)
    _rotate_last(a, work, width, _rotations_at(a, first))
    block, n_rows = cache_block(a, c.pooled_slot, t)
    store_row_f16(work, width, block + 2 * width * (first // ratio % n_rows))


@inline
def _compress(a, c, work):
    """All tokens in order: one may need what another of its context has left."""
    for t in range(tokens_of(a)):
        if c.ratio > 0:
            _keep(a, c, t)
            if (program_of(a).positions[t] + 1) % c.ratio == 0:
                _pool(a, c, t, work)


@inline
def _set_query(a, head, t):
    """A head's query of token t: normed without a weight, rotated and scaled."""
    width, at = a.width, 4 * a.width * (a.n_heads * t + head)
    x, out = a.projected + at, a.queries + at
    factor = rms_factor(x, a.epsilon, width) * a.scale
    for i in range(0, 4 * width, 64):
        store_f32x16(out + i, load_f32x16(x + i) * factor)
    _rotate_last(a, out, width, rotations_of(a, t, a.first_frequency))


@inline
def _set_index_queries(a, t, work):
    """The indexer's queries of token t as lanes, if it has to choose."""
    i = a.indexer
    if i.n_heads > 0 and t < tokens_of(a) and has_to_choose(a, t):
        for h in range(i.n_heads):
            query = i.queries + 4 * i.head_dim * (i.n_heads * t + h)
            _rotate_last(a, query, i.head_dim, rotations_of(a, t, a.first_frequency))
        pack_queries(i, t, work)


@kernel("void(int64, int64, int64)")
def _run(phase, item, work):
    """First both compressors and the keys, which take long; then a token's index queries an item; then heads."""
    a = QUERIES(phase)
    if item < 2:
        _compress(a, a.compressor if item == 0 else a.index_compressor, work)
    elif item == 2:
        for t in range(tokens_of(a)):
            rms_norm(a.kv + 4 * a.width * t, a.kv_norm, a.epsilon, a.width, work)
            _rotate_last(a, work, a.width, rotations_of(a, t, a.first_frequency))
            store_row_f16(work, a.width, cache_row_of(a, a.slot, 2 * a.width, t))
    elif item < 3 + MOST_TOKENS:
        _set_index_queries(a, item - 3, work)
    else:
        for t in range(tokens_of(a)):
            _set_query(a, item - 3 - MOST_TOKENS, t)


@dataclass(frozen=True)
class Compressor:
    """What makes rows of whole windows; T is MOST_TOKENS, W width, or 2 width where windows overlap.

    Attributes:
        ratio: tokens of a window.
        width: of a pooled row, a multiple of 16.
        vectors, gates: addresses of float32 (T, W), projected.
        bias, norm: addresses of float32 (ratio, W) and (width,).
        open_slot, pooled_slot: blocks of cache rows: float32, of 2 W values, for all tokens of two windows that overlap
            or of one; 16-bit, of `width`.
    """

    ratio: int
    width: int
    overlaps: bool
    vectors: int
    gates: int
    bias: int
    norm: int
    open_slot: int
    pooled_slot: int

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        return COMPRESSOR.pack(**vars(self))


def shared_key_queries_phase(
    projected: int,
    queries: int,
    kv: int,
    kv_norm: int,
    *,
    n_heads: int,
    width: int,
    n_rope: int,
    first_frequency: int,
    scale: float,
    epsilon: float,
    slot: int,
    compressor: Compressor | None,
    index_compressor: Compressor | None,
    indexer: Indexer | None,
) -> Phase:
    """Queries, cache rows, and rows of windows that end. T: MOST_TOKENS.

    Args:
        projected, queries: addresses of float32 (T, H, width), a multiple of 16; queries are normed, rotated, scaled.
        kv: address of float32 (T, width), projected; kv_norm: of the norm's weight (width,).
        n_rope: the last values of a row, which are rotated, by the program's frequencies from first_frequency on.
        slot: which block of cache rows is the layer's.
        compressor, index_compressor: of rows that attention sees, and of the indexer's keys.

    Raises:
        QuantError: widths that kernels do not take.
    """
    if n_rope > _MOST_ROPE or width % 16:
        raise QuantError(f"rows of {width} values, {n_rope} of them rotated; whole 16s and {_MOST_ROPE} are possible")
    none = COMPRESSOR.zeros()
    arguments = QUERIES.pack(
        phase=HEADER, projected=projected, n_heads=n_heads, width=width, queries=queries, scale=scale, n_rope=n_rope,
        first_frequency=first_frequency, epsilon=epsilon, kv=kv, kv_norm=kv_norm, slot=slot,
        compressor=compressor.struct if compressor else none,
        index_compressor=index_compressor.struct if index_compressor else none,
        indexer=indexer.struct if indexer else INDEXER.zeros(),
    )  # fmt: skip
    return Phase(NOTHING, _run, 3 + MOST_TOKENS + n_heads, arguments, max(3 * padded(4 * width), ADDRESSES))
