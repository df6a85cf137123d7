"""Phases of attention: scores and values over the cache, then heads' results.

Both kinds of attention are one: groups of heads that share keys (all heads of MLA, in groups that fit registers; the
heads of one key-value head of GQA) meet pieces of the context. A unit is one token, one group and one piece: cache rows
are read once for all heads of the group, in float32 tiles, with an online softmax (Milakov and Gimelshein, arXiv
1805.02867).
Pieces are combined afterwards, in order, so that results do not depend on the number of workers.
"""

import math
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from quant.decode.linear import multiply as multiply_rows
from quant.decode.linear import set_token, token_tables
from quant.decode.program import (
    ARGUMENTS,
    CACHE,
    LEAST_CHUNK,
    MOST_CHUNKS,
    MOST_TOKENS,
    NOTHING,
    STATE,
    Phase,
    cached_by,
    chunk_length,
    chunks_of,
    padded,
    tokens_of,
)
from quant.gemm.float_tile import LANES, multiply
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import QuantMatrix
from quant.simd.core import F32, I64, define, load, splat, store
from quant.simd.floats import exp, hmax, hsum, maximum, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, load_i64, store_f32, store_f32x16, store_i64
from quant.simd.register_tile import add_products, register_tile
from quant.simd.vectors import expand_f16, scale, scale_add
from quant.target.jit import inline, kernel

_TOKENS = LEAST_CHUNK  # cache rows that are expanded and multiplied at a time
_NEVER = float("-inf")


def _padded_lanes(n: int) -> int:
    """Floats of a row whose width the tiles can take."""
    return -(-n // 16) * 16


# ---- scores and values over pieces of the context --------------------------------------------------------------------

# Groups of heads share the keys of their group; offsets of groups in bytes of a cache row.
(
    A_SLOT, A_N_GROUPS, A_HEADS, A_QUERIES, A_QUERY_WIDTH, A_KEY_WIDTH, A_KEY_ROW, A_KEY_GROUP, A_VALUE_SLOT,
    A_VALUE_WIDTH, A_VALUE_ROW, A_VALUE_GROUP, A_PARTIALS, A_PADDED,
) = range(ARGUMENTS, ARGUMENTS + 14 * 8, 8)  # fmt: skip
# A partial result, of one head over one piece: the scores' maximum, the sum of exp(score - maximum), then the values.
MAXIMUM, SUM, MIXED = 0, 4, 64

_MIX_HEADS = 8
_VECTOR = ir.VectorType(F32, LANES)


def _mix_tile(n_heads: int):
    """An intrinsic void(weights, values, row_bytes, n, out, out_bytes): out[h] += sum over n rows of weights[h][i] *
    values[i], one vector of columns, for n_heads heads; weights float32 (n_heads, _TOKENS)."""

    def emit(builder, weights, values, row_bytes, n, out, out_bytes) -> None:
        outs = [builder.add(out, builder.mul(out_bytes, I64(h))) for h in range(n_heads)]

        def weight(index, h: int):
            at = builder.add(weights, builder.mul(builder.add(index, I64(_TOKENS * h)), I64(4)))
            return splat(builder, load(builder, at, F32), _VECTOR)

        def add(index, totals):
            value = load(builder, builder.add(values, builder.mul(row_bytes, index)), _VECTOR)
            return add_products(builder, totals, (weight(index, h) for h in range(n_heads)), [value])

        totals = register_tile(builder, n, [[load(builder, at, _VECTOR)] for at in outs], add)
        for at, (total,) in zip(outs, totals, strict=True):
            store(builder, at, total)

    return define(types.void, (types.int64,) * 6, emit)


_mix_many, _mix_one = _mix_tile(_MIX_HEADS), _mix_tile(1)


@inline
def _mix(n_heads, weights, values, row_bytes, n_tokens, width, out, out_bytes):
    """out[h][c] += sum over i of weights[h][i] * values[i][c], for the first `width` (a multiple of 16) columns."""
    many = n_heads // _MIX_HEADS * _MIX_HEADS
    for c in range(0, 4 * width, 4 * LANES):
        for h in range(0, many, _MIX_HEADS):
            at = out + out_bytes * h + c
            _mix_many(weights + 4 * _TOKENS * h, values + c, row_bytes, n_tokens, at, out_bytes)
        for h in range(many, n_heads):
            at = out + out_bytes * h + c
            _mix_one(weights + 4 * _TOKENS * h, values + c, row_bytes, n_tokens, at, out_bytes)


@inline
def _soften(scores, n_tokens, partial, width):
    """Scores to weights against the largest so far; what was summed before is scaled to it."""
    whole = (n_tokens + 15) // 16 * 16
    for i in range(n_tokens, whole):
        store_f32(scores + 4 * i, np.float32(_NEVER))
    so_far = splat_f32x16(load_f32(partial + MAXIMUM))
    for i in range(0, whole, 16):
        so_far = maximum(so_far, load_f32x16(scores + 4 * i))
    largest = hmax(so_far)
    total = zero_f32x16()
    for i in range(0, whole, 16):
        weight = exp(load_f32x16(scores + 4 * i) - largest)
        total += weight
        store_f32x16(scores + 4 * i, weight)
    factor = np.float32(math.exp(load_f32(partial + MAXIMUM) - largest))
    store_f32(partial + SUM, load_f32(partial + SUM) * factor + hsum(total))
    if factor != 1:
        scale(factor, width, partial + MIXED)
    store_f32(partial + MAXIMUM, largest)


@inline
def _start_heads(phase, first, partials, scores):
    """Empty results of a group's heads; returns the addresses of their queries, from head `first` on, and of scores."""
    n_heads, query_width, width = load_i64(phase + A_HEADS), load_i64(phase + A_QUERY_WIDTH), load_i64(phase + A_PADDED)
    queries, outs = scores + 4 * _TOKENS * n_heads, scores + 4 * _TOKENS * n_heads + 8 * n_heads
    for h in range(n_heads):
        partial = partials + (MIXED + 4 * width) * h
        store_i64(queries + 8 * h, load_i64(phase + A_QUERIES) + 4 * query_width * (first + h))
        store_i64(outs + 8 * h, scores + 4 * _TOKENS * h)
        store_f32(partial + MAXIMUM, np.float32(_NEVER))
        store_f32(partial + SUM, np.float32(0.0))
        for i in range(0, width, 16):
            store_f32x16(partial + MIXED + 4 * i, zero_f32x16())
    return queries, outs


@kernel("void(int64, int64, int64)")
def _run_attend(phase, unit, work):
    """One group of a token's heads over one piece; work: expanded rows, scores, two tables of addresses."""
    state, n_groups, n_heads = load_i64(phase + STATE), load_i64(phase + A_N_GROUPS), load_i64(phase + A_HEADS)
    group, token, piece = unit % n_groups, unit // n_groups % tokens_of(phase), unit // n_groups // tokens_of(phase)
    n_cached = cached_by(phase, token)
    chunk, query_width = chunk_length(n_cached), load_i64(phase + A_QUERY_WIDTH)
    value_width, padded_value = load_i64(phase + A_VALUE_WIDTH), load_i64(phase + A_PADDED)
    partial_bytes, all_heads = MIXED + 4 * padded_value, n_groups * n_heads
    head = all_heads * (MOST_CHUNKS * token + piece) + n_heads * group
    partials = load_i64(phase + A_PARTIALS) + partial_bytes * head
    scores = work + 4 * _TOKENS * max(query_width, padded_value)
    end = min(n_cached, chunk * (piece + 1))
    if chunk * piece >= end:
        return
    queries, outs = _start_heads(phase, all_heads * token + n_heads * group, partials, scores)
    cache, same_rows = load_i64(state + CACHE), load_i64(phase + A_VALUE_SLOT) == load_i64(phase + A_SLOT)
    keys = load_i64(cache + 8 * load_i64(phase + A_SLOT)) + load_i64(phase + A_KEY_GROUP) * group
    values = load_i64(cache + 8 * load_i64(phase + A_VALUE_SLOT)) + load_i64(phase + A_VALUE_GROUP) * group
    for first in range(chunk * piece, end, _TOKENS):
        n_tokens = min(_TOKENS, end - first)
        for i in range(n_tokens):
            row = keys + load_i64(phase + A_KEY_ROW) * (first + i)
            expand_f16(row, load_i64(phase + A_KEY_WIDTH), query_width, work + 4 * query_width * i)
        multiply(work, n_tokens, query_width, n_heads, queries, outs, 0)
        for h in range(n_heads):
            _soften(scores + 4 * _TOKENS * h, n_tokens, partials + partial_bytes * h, padded_value)
        row_bytes = 4 * query_width
        if not same_rows:
            row_bytes = 4 * padded_value
            for i in range(n_tokens):
                row = values + load_i64(phase + A_VALUE_ROW) * (first + i)
                expand_f16(row, value_width, padded_value, work + row_bytes * i)
        _mix(n_heads, scores, work, row_bytes, n_tokens, padded_value, partials + MIXED, partial_bytes)


# ---- heads' results --------------------------------------------------------------------------------------------------

(
    L_PARTIALS, L_PARTIAL_BYTES, L_HEADS, L_WIDTH, L_OUT, L_OUT_WIDTH, L_RECORD, L_TOKEN_BYTES, L_INTEGER, L_HAS_V_B,
) = range(ARGUMENTS, ARGUMENTS + 10 * 8, 8)  # fmt: skip
V_B = ARGUMENTS + 10 * 8


@inline
def _combine(phase, head, token, out):
    """A head's result float32 (L_WIDTH,): its pieces of the token's context, in order."""
    n_chunks, n_heads = chunks_of(cached_by(phase, token)), load_i64(phase + L_HEADS)
    width, partial_bytes = load_i64(phase + L_WIDTH), load_i64(phase + L_PARTIAL_BYTES)
    first = load_i64(phase + L_PARTIALS) + partial_bytes * (n_heads * MOST_CHUNKS * token + head)
    maximum = np.float32(_NEVER)
    for c in range(n_chunks):
        maximum = max(maximum, load_f32(first + partial_bytes * n_heads * c + MAXIMUM))
    for i in range(width):
        store_f32(out + 4 * i, np.float32(0.0))
    total = np.float32(0.0)
    for c in range(n_chunks):
        partial = first + partial_bytes * n_heads * c
        factor = np.float32(math.exp(load_f32(partial + MAXIMUM) - maximum))
        total += factor * load_f32(partial + SUM)
        scale_add(factor, partial + MIXED, width, out)
    scale(np.float32(1.0) / total, width, out)


@kernel("void(int64, int64, int64)")
def _run_lift(phase, unit, work):
    """Unit h: head h's results and, for MLA, moved out of latent space by v_b."""
    width, out_width, n_heads = load_i64(phase + L_WIDTH), load_i64(phase + L_OUT_WIDTH), load_i64(phase + L_HEADS)
    tables, n_tokens = token_tables(), tokens_of(phase)
    for t in range(n_tokens):
        out = load_i64(phase + L_OUT) + 4 * out_width * (n_heads * t + unit)
        if load_i64(phase + L_HAS_V_B) == 0:
            _combine(phase, unit, t, out)
        else:
            own = work + load_i64(phase + L_TOKEN_BYTES) * t
            record = own + load_i64(phase + L_RECORD)
            _combine(phase, unit, t, own)
            write_q8(own, 0, width, width, load_i64(phase + L_INTEGER) != 0, record)
            set_token(tables, t, record, out)
    if load_i64(phase + L_HAS_V_B) != 0:
        multiply_rows(phase + V_B, unit, 0, out_width, width, tables, n_tokens)


@dataclass(frozen=True)
class Heads:
    """How heads meet the cache.

    Attributes:
        n_groups, per_group: heads are n_groups * per_group.
        key_width, value_width: values of a head's key and of its value.
        key_slot, value_slot: blocks of cache rows; the same where values are the first part of keys.
        key_row, value_row: bytes of a cache row.
        key_group, value_group: bytes from one group's part of a row to the next one's.
    """

    n_groups: int
    per_group: int
    key_width: int
    value_width: int
    key_slot: int
    value_slot: int
    key_row: int
    value_row: int
    key_group: int
    value_group: int

    @property
    def n_heads(self) -> int:
        return self.n_groups * self.per_group

    @property
    def query_width(self) -> int:
        """Floats of a query in memory; those behind key_width are zero."""
        return _padded_lanes(self.key_width)

    @property
    def partial_bytes(self) -> int:
        """Memory of one head's result over one piece of the context."""
        return MIXED + 4 * _padded_lanes(self.value_width)

    @property
    def partials_bytes(self) -> int:
        """Memory of all partial results of a layer for one token."""
        return self.partial_bytes * self.n_heads * MOST_CHUNKS


def attend_phase(heads: Heads, queries: int, partials: int) -> Phase:
    """Partial results of all heads over all pieces of the context.

    Args:
        queries: address of float32 (MOST_TOKENS, H, query_width).
        partials: address of partials_bytes a token.
    """
    value_width = _padded_lanes(heads.value_width)
    words = [
        heads.key_slot, heads.n_groups, heads.per_group, queries, heads.query_width, heads.key_width, heads.key_row,
        heads.key_group, heads.value_slot, heads.value_width, heads.value_row, heads.value_group, partials, value_width,
    ]  # fmt: skip
    work_bytes = 4 * _TOKENS * (max(heads.query_width, value_width) + heads.per_group) + 16 * heads.per_group
    return Phase(NOTHING, _run_attend, heads.n_groups, words, work_bytes, per_token=True, per_chunk=True)


def lift_phase(heads: Heads, partials: int, v_b: QuantMatrix | None, out: int) -> Phase:
    """Heads' results float32 (MOST_TOKENS, H, V) at `out`: pieces combined, times v_b (H, V, C) where there is one."""
    width = heads.value_width
    record, token_bytes = padded(4 * width), padded(4 * width) + q8_bytes(width)
    words = [
        partials, heads.partial_bytes, heads.n_heads, width, out, v_b.n_rows if v_b else width, record, token_bytes,
        bool(v_b and v_b.format.integer), v_b is not None, *(v_b.fields if v_b else []),
    ]  # fmt: skip
    return Phase(NOTHING, _run_lift, heads.n_heads, words, token_bytes * MOST_TOKENS)
