"""Attention of many tokens over rows that all heads share, values being the first part of keys, in one job.

A token sees rows of the whole context, those that were chosen for it or all there are by then, and behind them the last
rows of a window. Rows of the context stand for one token (latent attention) or for several (DeepSeek-V4), the window's
for one. A work item is one token and some of its heads, which are the lanes of all vectors; the rows are gathered a
chunk at a time, in float32. The rest is ops/attention.py's, with heads in the place of tokens, and without a future to
hide. Where a machine has products of 16-bit integers, rows of float16 are rounded to such when they are gathered, and
queries and weights too (gemm/rounding_i16.py): twice as many products an instruction.

Queries may come as they are projected: then each is normed without a weight, and its last values are rotated. What
comes out is turned back by the token's position then, as values carry their own (DeepSeek-V4).
"""

import math
from collections.abc import Sequence

import numpy as np

from quant.gemm.lanes import ADDRESSES, LANES, ROW, add_matmul, clear
from quant.gemm.lanes_i16 import fold_columns, multiply
from quant.gemm.rounding_i16 import MOST_SUM_OF_ROWS, round_lanes, round_two_rows, weigh
from quant.ops.attention import MAXIMUM, MIXED, PART, ROWS, SUM, Rows, begin_block, end_block, fold_in, state_rows
from quant.simd.exact import sqrt
from quant.simd.floats import fma, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, load_i32, prefetch_near, store_f32, store_f32x16
from quant.simd.struct import address, array, atomic, boolean, f32, i64, struct
from quant.simd.vectors import copy, expand_f16
from quant.target import isa
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

_CHUNK = 96  # rows at a time: in L2 with the blocks of a work item
_MOST_BLOCKS = 4  # of LANES heads of a work item
_AHEAD = 4  # rows that are asked for before they are read
ALL = 1 << 40  # rows
_ROUNDS = isa.has("avx512_vnni")  # else there is nothing to gain

ATTEND = struct(
    "AttendToChosen",
    counter=atomic,
    n_queries=i64,
    n_before=i64,  # tokens in the context before them
    n_tokens=i64,  # heads: what attention of a prompt calls tokens
    item_heads=i64,
    scale=f32,
    sinks=address,  # none: heads are lanes here, and have their own
    head_sinks=address,  # float32 (heads,), or 0
    sink_scale=f32,
    depth=i64,  # of keys
    width=i64,  # of values
    out=ROWS,
    row_bytes=i64,
    is_f16=boolean,
    is_rounded=boolean,
    keys=address,  # of the context's first row
    ratio=i64,  # tokens of one; 0 where there are none
    chosen=address,  # int32 (queries, top_k), or 0 for the first ones
    top_k=i64,  # that a query sees, at most
    window_rows=address,
    window_before=i64,  # rows before that of the first query
    window=i64,  # that a query sees, at most, its own included
    norm_epsilon=f32,
    rotations=address,  # float32 (queries, n_rope), cosines and sines in turn; 0 for queries that are ready
    n_rope=i64,
    state_bytes=i64,
    # A worker's: addresses of 16 rows, scores f32[_CHUNK][32], rows f32[_CHUNK][depth], states. Rounded, rows are
    # i16[_CHUNK][depth], pairs of values, scales f32[_CHUNK], weights i16[_CHUNK][32], two rows of factors.
    scratch=address,
    scratch_bytes=i64,
    rows_bytes=i64,
    pair_bytes=i64,  # of two rows of values
    n_parts=i64,
    parts=array(PART, 2),
)


@inline
def _n_chosen(a, query):
    """Rows of the context that it sees."""
    return min(a.top_k, (a.n_before + query + 1) // a.ratio) if a.ratio > 0 else 0


@inline
def _row(a, query, n_chosen, i):
    """Address of the i-th row that a query sees."""
    if i < n_chosen:
        return a.keys + a.row_bytes * (load_i32(a.chosen + 4 * (a.top_k * query + i)) if a.chosen != 0 else i)
    end = a.window_before + query + 1
    return a.window_rows + a.row_bytes * (end - min(a.window, end) + i - n_chosen)


@inline
def _gather(a, query, n_chosen, first, n, n_seen, rows):
    """float32 (n, depth): the rows first.. that a query sees."""
    depth = a.depth
    for i in range(first, first + n):
        _prefetch(a, query, n_chosen, i + _AHEAD, n_seen)
        if a.is_f16:
            expand_f16(_row(a, query, n_chosen, i), depth, depth, rows + 4 * depth * (i - first))
        else:
            copy(_row(a, query, n_chosen, i), depth, rows + 4 * depth * (i - first))


@inline
def _prefetch(a, query, n_chosen, i, n_seen):
    """Ask for the i-th row."""
    if i < n_seen:
        row = _row(a, query, n_chosen, i)
        for line in range(row, row + a.row_bytes, 64):
            prefetch_near(line)


@inline
def _gather_rounded(a, query, n_chosen, first, n, n_seen, rows):
    """The same rows in 16-bit integers, by twos."""
    depth, width = a.depth, a.width
    pairs, scales = rows + 2 * depth * _CHUNK, _scales_of(a, rows)
    for i in range(0, n, 2):
        for e in range(2):
            _prefetch(a, query, n_chosen, first + i + _AHEAD + e, n_seen)
        x = _row(a, query, n_chosen, first + i)
        y = _row(a, query, n_chosen, first + i + 1) if i + 1 < n else x
        round_two_rows(x, y, depth, rows + 2 * depth * i, width, pairs + a.pair_bytes * (i // 2), scales + 4 * i)


@inline
def _scales_of(a, rows):
    """Address of rounded rows' scales, behind pairs of values."""
    return rows + (2 * a.depth + a.pair_bytes // 2) * _CHUNK


@inline
def _norm(rows, n_rows, scale, epsilon):
    """Each lane of n_rows of 32 float32, scaled already, divided by the root of its mean square before."""
    for half in range(rows, rows + ROW, 64):
        squares = zero_f32x16()
        for at in range(half, half + ROW * n_rows, ROW):
            squares = fma(load_f32x16(at), load_f32x16(at), squares)
        factor = 1 / sqrt(squares / (np.float32(n_rows) * scale * scale) + epsilon)
        for at in range(half, half + ROW * n_rows, ROW):
            store_f32x16(at, load_f32x16(at) * factor)


@inline
def _turn(rows, rotations, n_rope, direction):
    """Neighbours among n_rope rows of 32 float32 rotated, by 1 forwards or by -1 back."""
    for i in range(n_rope // 2):
        cos, sin = load_f32(rotations + 8 * i), load_f32(rotations + 8 * i + 4) * direction
        pair = rows + 2 * ROW * i
        for at in range(pair, pair + ROW, 64):
            u, v = load_f32x16(at), load_f32x16(at + ROW)
            store_f32x16(at, u * cos - v * sin)
            store_f32x16(at + ROW, u * sin + v * cos)


@inline
def _begin(a, query, head, addresses, state):
    """The state of a block of heads: their sinks, and their queries as attention takes them."""
    begin_block(a, query, head, addresses, state)
    for lane in range(LANES if a.head_sinks != 0 else 0):
        store_f32(state + 4 * lane, load_f32(a.head_sinks + 4 * min(head + lane, a.n_tokens - 1)) * a.sink_scale)
        store_f32(state + ROW + 4 * lane, np.float32(1.0))
    if a.rotations != 0:
        packed = state + MIXED + ROW * a.width
        _norm(packed, a.depth, a.scale, a.norm_epsilon)
        last = packed + ROW * (a.depth - a.n_rope)
        _turn(last, a.rotations + 4 * a.n_rope * query, a.n_rope, np.float32(1.0))
    if _ROUNDS and a.is_rounded:  # in place: a row of pairs is made of two rows that are not before it
        packed = state + MIXED + ROW * a.width
        round_lanes(packed, a.depth, packed, packed + ROW * a.depth)


@inline
def _add_rows(a, n, rows, state, scores):
    """n gathered rows, to one block of heads."""
    depth, width = a.depth, a.width
    clear(scores, n)
    add_matmul(n, rows, 4 * depth, 4, state + MIXED + ROW * width, depth, scores)
    fold_in(scores, n, state, width)
    add_matmul(width, rows, 4, 4 * depth, scores, n, state + MIXED)


@inline
def _add_rounded_rows(a, n, rows, state, scores):
    """The same of rounded rows."""
    depth, width, scales = a.depth, a.width, _scales_of(a, rows)
    packed, weights = state + MIXED + ROW * width, scales + 4 * _CHUNK
    factors = weights + ROW // 2 * _CHUNK
    multiply(n, rows, 2 * depth, scales, packed, depth // 2, scores, ROW)
    for at in range(0, ROW, 64):
        largest, total, scale = state + MAXIMUM + at, state + SUM + at, load_f32x16(packed + ROW * depth + at)
        old, new = weigh(scores + at, ROW, n, scales, scale, largest, total, MOST_SUM_OF_ROWS, weights + at)
        store_f32x16(factors + at, old)
        store_f32x16(factors + ROW + at, new)
    fold_columns(width, rows + 2 * depth * _CHUNK, a.pair_bytes, weights, (n + 1) // 2, factors, state + MIXED)


@inline
def _add_chunk(a, query, n_chosen, i, n_seen, heads, rows, states, scores):
    """A chunk of rows, to all blocks of an item's heads, `heads` of them."""
    n, state_bytes = min(_CHUNK, n_seen - i), a.state_bytes
    if _ROUNDS and a.is_rounded:
        _gather_rounded(a, query, n_chosen, i, n, n_seen, rows)
        for block in range((heads + LANES - 1) // LANES):
            _add_rounded_rows(a, n, rows, states + state_bytes * block, scores)
        return
    _gather(a, query, n_chosen, i, n, n_seen, rows)
    for block in range((heads + LANES - 1) // LANES):
        _add_rows(a, n, rows, states + state_bytes * block, scores)


@inline
def _end(a, query, head, state):
    """What the block's heads have mixed, to where it belongs."""
    if a.rotations != 0:
        last = state + MIXED + ROW * (a.width - a.n_rope)
        _turn(last, a.rotations + 4 * a.n_rope * query, a.n_rope, np.float32(-1.0))
    end_block(a, query, head, state)


@inline
def _run_item(a, query, first, last, scratch):
    """Heads first..last of one token, in blocks."""
    scores, state_bytes, n_chosen = scratch + ADDRESSES, a.state_bytes, _n_chosen(a, query)
    rows = scores + ROW * _CHUNK
    states, n_seen = rows + a.rows_bytes, n_chosen + min(a.window, a.window_before + query + 1)
    for head in range(first, last, LANES):
        _begin(a, query, head, scratch, states + state_bytes * ((head - first) // LANES))
    for i in range(0, n_seen, _CHUNK):
        _add_chunk(a, query, n_chosen, i, n_seen, last - first, rows, states, scores)
    for head in range(first, last, LANES):
        _end(a, query, head, states + state_bytes * ((head - first) // LANES))


@kernel("void(int64, int64)")
def _attend(arguments, worker):
    """The job of attend()."""
    a = ATTEND(arguments)
    n_heads, item_heads = a.n_tokens, a.item_heads
    items = (n_heads + item_heads - 1) // item_heads
    for item in work_items(a.counter, items * a.n_queries):
        first = item_heads * (item % items)
        last = min(first + item_heads, n_heads)
        _run_item(a, item // items, first, last, a.scratch + a.scratch_bytes * worker)


def attend(
    pool: Pool,
    parts: Sequence[tuple[Rows, int]],
    out: Rows,
    *,
    row_bytes: int,
    is_f16: bool,
    width: int,
    n_heads: int,
    n_queries: int,
    n_before: int,
    scale: float,
    keys: int = 0,
    ratio: int = 0,
    chosen: int = 0,
    top_k: int = ALL,
    window_rows: int = 0,
    window_before: int = 0,
    window: int = 0,
    sinks: int = 0,
    rotations: int = 0,
    n_rope: int = 0,
    norm_epsilon: float = 0.0,
) -> None:
    """out[t, h] = softmax(scale * q[t, h] . k[s]) v[s] over the rows s that t sees; values are the start of keys.

    Args:
        parts: queries, one or two parts that lie behind each other in keys, with their widths. `head` and `row` of
            Rows are bytes from token to token and from head to head.
        out: float32 (n_queries, n_heads, width); strides as of parts. It may be where the queries are.
        row_bytes, is_f16: of all rows, float16 or float32.
        n_before: tokens before the first query's.
        keys: address of the context's rows, `ratio` tokens each; of none if that is 0. A query sees those whose tokens
            are its own or before: the first ones, at most top_k, or those that are chosen, if it sees more.
        chosen: address of int32 (n_queries, top_k), or 0; of a query that sees fewer rows, as many as it sees count.
        window_rows: address of rows of single tokens, window_before of them before the first query's; it sees `window`,
            its own included.
        sinks: address of float32 (n_heads,), a logit more in each head's softmax, without a value; or 0.
        rotations: address of float32 (n_queries, n_rope), cosines and sines in turn; or 0. With them queries are
            divided by the root of their mean square, norm_epsilon added, and their last n_rope values rotated; those
            of the result are turned back.
    """
    depth = sum(part_width for _, part_width in parts)
    item_blocks = min(_MOST_BLOCKS, -(-n_heads // LANES))
    state_bytes = ROW * (state_rows(width, depth) + 1)  # one for scales of rounded queries
    pair_bytes = 4 * -(-width // 32) * 32  # rounding writes 32 columns at a time
    rows_bytes = max(4 * depth * _CHUNK, (2 * depth + pair_bytes // 2 + 4 + ROW // 2) * _CHUNK + 2 * ROW)
    scratch_bytes = worker_bytes(ADDRESSES + ROW * _CHUNK + rows_bytes + item_blocks * state_bytes)
    nowhere, is_rounded = Rows(0, 0, 0).struct, _ROUNDS and is_f16 and depth % 16 == width % 16 == 0
    unit = math.log2(math.e) if is_rounded else 1.0  # weights are powers of two then
    arguments = ATTEND.pack(
        counter=0, n_queries=n_queries, n_before=n_before, n_tokens=n_heads, item_heads=LANES * item_blocks,
        scale=scale * unit, sinks=0, head_sinks=sinks, sink_scale=unit, depth=depth, width=width, out=out.struct,
        row_bytes=row_bytes, is_f16=is_f16, is_rounded=is_rounded, keys=keys, ratio=ratio, chosen=chosen, top_k=top_k,
        window_rows=window_rows, window_before=window_before, window=window, norm_epsilon=norm_epsilon,
        rotations=rotations, n_rope=n_rope, state_bytes=state_bytes,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        rows_bytes=rows_bytes, pair_bytes=pair_bytes, n_parts=len(parts),
        parts=[PART.pack(q=q.struct, k=nowhere, depth=depth) for q, depth in parts],
    )  # fmt: skip
    pool.run(_attend.address, arguments)
