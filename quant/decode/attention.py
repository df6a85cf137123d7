"""The phase of attention: scores and values over the cache (split-KV), whose parts values.py combines.

Both kinds of attention are one. Groups of heads share keys: all heads of MLA, in groups that fit registers; the heads
of one key-value head of GQA. A work item is one token, one group and one split of the context. Cache rows are read once
for all heads of the group, in float32 tiles, with an online softmax (Milakov and Gimelshein, arXiv 1805.02867). Splits
are combined afterwards, in order, so that results do not depend on the number of workers.

With a window a token sees the last rows only, its own included; the block of rows may be no longer than that, and
positions go round in it (program.cache_block). A sink is one more logit of a head's softmax, without a value.
With a choice (decode/indexer.py) the window is how many rows a token attends to, which lie anywhere. With pooled rows
(decode/compressor.py) a token sees them first, all of them or those that are chosen, then its window.
"""

import math
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from quant.decode.program import (
    HEADER,
    MAX_SPLITS,
    NOTHING,
    PHASE,
    Phase,
    cache_block,
    cached_by,
    chunk_length,
    most_splits,
    program_of,
    split_begin,
    splits_of,
    tokens_of,
)
from quant.gemm.float_tile import LANES, multiply
from quant.gemv.rows_i8 import expand_row
from quant.gemv.rows_i16 import expand_scaled_row
from quant.simd.core import F32, I64, define, load, splat, store
from quant.simd.floats import exp, hmax, hsum, maximum, splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32x16, load_i32, load_i64, store_f32, store_f32x16, store_i64
from quant.simd.register_tile import add_products, register_tile
from quant.simd.struct import address, boolean, f32, i64, struct
from quant.simd.vectors import expand_f16, scale
from quant.target.jit import inline, kernel

_TOKENS = 64  # cache rows that are expanded and multiplied at a time
_NEVER = float("-inf")
NO_LIMIT = 1 << 40
SPLIT_UNIT = 4  # rows: of bytes, products take four


def padded_lanes(n: int) -> int:
    """Floats of a row whose width the tiles can take."""
    return -(-n // 16) * 16


# ---- scores and values over splits of the context --------------------------------------------------------------------

SEEN = struct(
    "Seen",
    window=i64,  # rows of tokens that a token sees, at most; 0 for all
    ratio=i64,  # tokens of a pooled row; 0 where there are none
    pooled_slot=i64,  # which block has these
    most_pooled=i64,  # that a token sees: those that are chosen
)
ATTEND = struct(
    "Attend",
    phase=PHASE,
    n_groups=i64,
    per_group=i64,  # heads
    queries=address,  # float32 (MOST_TOKENS, heads, query_width)
    query_width=i64,
    key_slot=i64,
    key_width=i64,  # values
    key_codes=i64,  # the first of them, which are bytes (gemv/rows_i8.py); 0 for none
    key_row=i64,  # bytes of a cache row
    key_group=i64,  # bytes from one group's part of it to the next one's
    is_scaled=boolean,  # whether rows are integers with a scale (gemv/rows_i16.py), key and value
    value_slot=i64,
    value_width=i64,
    value_codes=i64,
    value_row=i64,
    value_group=i64,
    padded_width=i64,  # of a value, in whole vectors
    seen=SEEN,
    chosen=address,  # int32 rows of the first token, if it sees more; 0 where it sees the last ones
    chosen_bytes=i64,  # from one token's to the next one's
    partials=address,  # by token, split and head
)
# The result of one head over one split. The weighted sum of values begins VALUES_AT bytes behind its address.
PARTIAL = struct("Partial", maximum=f32, sum=f32)  # of the scores; of exp(score - maximum)
VALUES_AT = 64


@inline
def bytes_of_partial(padded_width):
    """Of a PARTIAL with its values, float32 (padded_width,)."""
    return VALUES_AT + 4 * padded_width


@inline
def _own_by(a, t):
    """Rows of tokens that the step's token t sees, itself included: the last ones."""
    n_cached = cached_by(a, t)
    return min(n_cached, a.seen.window) if a.seen.window > 0 else n_cached


@inline
def _pooled_by(a, t):
    """Pooled rows that it sees."""
    return min(cached_by(a, t) // a.seen.ratio, a.seen.most_pooled) if a.seen.ratio > 0 else 0


@inline
def seen_by(a, t):
    """All rows that it sees: first the pooled ones."""
    return _pooled_by(a, t) + _own_by(a, t)


@inline
def find_rows(a, token, slot, row_bytes, group_bytes, first, n_rows, found):
    """Addresses of a group's part of the rows first.. that a token sees, int64 (n_rows,)."""
    n_cached, n_pooled = cached_by(a, token), _pooled_by(a, token)
    n_hidden, chosen = n_cached - _own_by(a, token), a.chosen + a.chosen_bytes * token
    if first < n_pooled:
        rows, _ = cache_block(a, a.seen.pooled_slot, token)
        is_chosen = a.chosen != 0 and n_cached // a.seen.ratio > a.seen.most_pooled
        for i in range(min(n_rows, n_pooled - first)):
            row = load_i32(chosen + 4 * (first + i)) if is_chosen else first + i
            store_i64(found + 8 * i, rows + row_bytes * row)
    begin = max(0, n_pooled - first)
    if begin >= n_rows:  # all are pooled
        return
    block, n_in_block = cache_block(a, slot, token)
    is_chosen, rows = a.chosen != 0 and a.seen.ratio == 0 and n_hidden > 0, block + group_bytes
    in_order = (n_hidden + first + begin - n_pooled) % n_in_block
    for i in range(begin, n_rows):
        row = load_i32(chosen + 4 * (first + i)) if is_chosen else in_order
        store_i64(found + 8 * i, rows + row_bytes * row)
        in_order = in_order + 1 if in_order + 1 < n_in_block else 0


@inline
def _expand_rows(found, n_rows, is_scaled, n_codes, width, padded_width, out):
    """Rows at these addresses, in float32, padded_width apart."""
    for i in range(n_rows):
        row, to = load_i64(found + 8 * i), out + 4 * padded_width * i
        if is_scaled:
            expand_scaled_row(row, width, to)
        elif n_codes > 0:
            expand_row(row, n_codes, width, padded_width, to)
        else:
            expand_f16(row, width, padded_width, to)


_SUM_HEADS = 8
_VECTOR = ir.VectorType(F32, LANES)


def _sum_tile(n_heads: int):
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


_sum_many, _sum_one = _sum_tile(_SUM_HEADS), _sum_tile(1)


@inline
def _add_weighted_sums(n_heads, weights, values, row_bytes, n_tokens, width, out, out_bytes):
    """out[h][c] += sum over i of weights[h][i] * values[i][c], for the first `width` (a multiple of 16) columns."""
    many = n_heads // _SUM_HEADS * _SUM_HEADS
    for c in range(0, 4 * width, 4 * LANES):
        for h in range(0, many, _SUM_HEADS):
            at = out + out_bytes * h + c
            _sum_many(weights + 4 * _TOKENS * h, values + c, row_bytes, n_tokens, at, out_bytes)
        for h in range(many, n_heads):
            at = out + out_bytes * h + c
            _sum_one(weights + 4 * _TOKENS * h, values + c, row_bytes, n_tokens, at, out_bytes)


@inline
def _fold_in(scores, n_tokens, partial, values, width):
    """Scores to weights e^(score - the largest so far), the online softmax; what was summed before is rescaled."""
    whole = (n_tokens + 15) // 16 * 16
    for i in range(n_tokens, whole):
        store_f32(scores + 4 * i, np.float32(_NEVER))
    so_far = splat_f32x16(partial.maximum)
    for i in range(0, whole, 16):
        so_far = maximum(so_far, load_f32x16(scores + 4 * i))
    largest = hmax(so_far)
    total = zero_f32x16()
    for i in range(0, whole, 16):
        weight = exp(load_f32x16(scores + 4 * i) - largest)
        total += weight
        store_f32x16(scores + 4 * i, weight)
    factor = np.float32(math.exp(partial.maximum - largest))
    partial.sum = partial.sum * factor + hsum(total)
    if factor != 1:
        scale(factor, width, values)
    partial.maximum = largest


@inline
def _start_heads(a, first, partials, scores):
    """Empty results of a group's heads; returns the addresses of their queries, from head `first` on, and of scores."""
    n_heads, width = a.per_group, a.padded_width
    queries, outs = scores + 4 * _TOKENS * n_heads, scores + 4 * _TOKENS * n_heads + 8 * n_heads
    for h in range(n_heads):
        at = partials + bytes_of_partial(width) * h
        partial = PARTIAL(at)
        store_i64(queries + 8 * h, a.queries + 4 * a.query_width * (first + h))
        store_i64(outs + 8 * h, scores + 4 * _TOKENS * h)
        partial.maximum = np.float32(_NEVER)
        partial.sum = np.float32(0.0)
        for i in range(0, width, 16):
            store_f32x16(at + VALUES_AT + 4 * i, zero_f32x16())
    return queries, outs


@inline
def _attend_split(a, group, token, split, work):
    """One group of a token's heads over one split; work: expanded rows, scores, two tables of addresses."""
    n_groups, n_heads, query_width, padded_width = a.n_groups, a.per_group, a.query_width, a.padded_width
    n_seen = seen_by(a, token)
    partial_bytes, all_heads = bytes_of_partial(padded_width), n_groups * n_heads
    head = all_heads * (MAX_SPLITS * token + split) + n_heads * group
    partials, scores = a.partials + partial_bytes * head, work + 4 * _TOKENS * max(query_width, padded_width)
    begin, end = split_begin(n_seen, split, SPLIT_UNIT), split_begin(n_seen, split + 1, SPLIT_UNIT)
    length = chunk_length(end - begin, _TOKENS)
    queries, outs = _start_heads(a, all_heads * token + n_heads * group, partials, scores)
    same_rows = a.value_slot == a.key_slot
    found = outs + 8 * n_heads
    for first in range(begin, end, length):
        n_tokens = min(length, end - first)
        find_rows(a, token, a.key_slot, a.key_row, a.key_group * group, first, n_tokens, found)
        _expand_rows(found, n_tokens, a.is_scaled, a.key_codes, a.key_width, query_width, work)
        multiply(work, n_tokens, query_width, n_heads, queries, outs, 0)
        for h in range(n_heads):
            at = partials + partial_bytes * h
            _fold_in(scores + 4 * _TOKENS * h, n_tokens, PARTIAL(at), at + VALUES_AT, padded_width)
        row_bytes = 4 * query_width
        if not same_rows:
            row_bytes = 4 * padded_width
            find_rows(a, token, a.value_slot, a.value_row, a.value_group * group, first, n_tokens, found)
            _expand_rows(found, n_tokens, False, a.value_codes, a.value_width, padded_width, work)
        _add_weighted_sums(
            n_heads, scores, work, row_bytes, n_tokens, padded_width, partials + VALUES_AT, partial_bytes
        )


@inline
def _neighbours(i, n, n_workers):
    """A permutation of 0..n-1: if workers take i in turn, what a worker gets follows each other."""
    worker = i % n_workers
    return worker * (n // n_workers) + min(worker, n % n_workers) + i // n_workers


@inline
def items_of(a, item):
    """An item's group and token, and its splits as a range: one, or more if there are more than items.

    Of one token and group a worker gets splits that follow each other: what it brings into its cache behind one is the
    next one's.
    """
    group, rest, n_tokens = item % a.n_groups, item // a.n_groups, tokens_of(a)
    token, at_once = rest % n_tokens, a.phase.n_items // (a.n_groups * n_tokens)
    first, n_splits = rest // n_tokens, splits_of(seen_by(a, token))
    if a.n_groups * n_tokens == 1 and first < n_splits <= at_once:
        first = _neighbours(first, n_splits, program_of(a).n_workers)
    return group, token, first, n_splits, at_once


@kernel("void(int64, int64, int64)")
def _run_attend(phase, item, work):
    """One group of a token's heads over one split, or more if there are more than items."""
    a = ATTEND(phase)
    group, token, first, end, step = items_of(a, item)
    for split in range(first, end, step):
        _attend_split(a, group, token, split, work)


@dataclass(frozen=True)
class Heads:
    """How heads meet the cache.

    Attributes:
        n_groups, per_group: heads are n_groups * per_group.
        key_width, value_width: values of a head's key and of its value.
        key_slot, value_slot: blocks of cache rows; the same where values are the first part of keys.
        key_row, value_row: bytes of a cache row.
        key_group, value_group: bytes from one group's part of a row to the next one's.
        key_codes, value_codes: first values of a key and of a value that are bytes (gemv/rows_i8.py); 0 for none.
        is_scaled: whether rows, which are key and value, are integers with a scale (gemv/rows_i16.py).
        window: rows that a token sees, at most; 0 for all.
        chosen, chosen_bytes: address of int32 rows of a token that sees more, and bytes to the next token's; or 0.
        sinks: address of float32 (heads,), a logit more in each head's softmax; or 0.
        ratio, pooled_slot: tokens of a pooled row, which a token sees as well, and the block of those; 0 for none.
            chosen are of these rows then.
        most_pooled: pooled rows that a token sees, at most.
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
    key_codes: int = 0
    value_codes: int = 0
    is_scaled: bool = False
    window: int = 0
    chosen: int = 0
    chosen_bytes: int = 0
    sinks: int = 0
    ratio: int = 0
    pooled_slot: int = 0
    most_pooled: int = NO_LIMIT

    @property
    def seen(self) -> np.ndarray:
        """As phases see it."""
        return SEEN.pack(
            window=self.window, ratio=self.ratio, pooled_slot=self.pooled_slot, most_pooled=self.most_pooled
        )

    @property
    def n_heads(self) -> int:
        """Of queries."""
        return self.n_groups * self.per_group

    @property
    def query_width(self) -> int:
        """Floats of a query in memory; those behind key_width are zero."""
        return padded_lanes(self.key_width)

    @property
    def partial_bytes(self) -> int:
        """Memory of one head's result over one split of the context."""
        return VALUES_AT + 4 * padded_lanes(self.value_width)

    @property
    def partials_bytes(self) -> int:
        """Memory of all partial results of a layer for one token."""
        return self.partial_bytes * self.n_heads * MAX_SPLITS


def attend_phase(heads: Heads, queries: int, partials: int) -> Phase:
    """Partial results of all heads over all splits of the context.

    Args:
        queries: address of float32 (MOST_TOKENS, H, query_width).
        partials: address of partials_bytes a token.
    """
    padded_width = padded_lanes(heads.value_width)
    arguments = ATTEND.pack(
        phase=HEADER, n_groups=heads.n_groups, per_group=heads.per_group,
        queries=queries, query_width=heads.query_width,
        key_slot=heads.key_slot, key_width=heads.key_width, key_codes=heads.key_codes, key_row=heads.key_row,
        key_group=heads.key_group, is_scaled=heads.is_scaled,
        value_slot=heads.value_slot, value_width=heads.value_width,
        value_codes=heads.value_codes, value_row=heads.value_row, value_group=heads.value_group,
        padded_width=padded_width, seen=heads.seen,
        chosen=heads.chosen, chosen_bytes=heads.chosen_bytes, partials=partials,
    )  # fmt: skip
    work_bytes = 4 * _TOKENS * (max(heads.query_width, padded_width) + heads.per_group + 2) + 16 * heads.per_group
    n_items, most_seen = heads.n_groups, heads.window + heads.most_pooled * (heads.ratio > 0)
    is_bounded = heads.window > 0 and most_seen < NO_LIMIT
    if is_bounded:  # as many splits as there can be: mostly few
        n_items *= most_splits(most_seen)
    return Phase(NOTHING, _run_attend, n_items, arguments, work_bytes, per_token=True, per_split=not is_bounded)
