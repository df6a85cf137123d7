"""Attention of many tokens over a 16-bit cache, in 16-bit integers: about twice as fast as attention.py's float32.

Keys and values are rounded first (gemm/rounding_i16.py): those of the cache, or, of latent attention, those of each
head, rebuilt from the cache by products of the same kind. A row of keys and a query each have a scale; so does a row of
values, which goes into the weights of the softmax before these are rounded, for every chunk of keys anew. Softmax and
sums are in float32; sums of products are exact. What is rounded is so by itself, whatever comes with it: a token's
result depends neither on the other tokens nor on the number of workers.

The rest is attention.py's. The state of a block of tokens has, behind the weighted sums, the scales of the queries and
then the queries, a row for two columns. Scores are to the base of 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quant.batch import ATTENTION_TOKENS
from quant.gemm.lanes import ADDRESSES, LOWEST, ROW, clear, pack_lanes
from quant.gemm.lanes_i16 import fold_columns, multiply, pad16
from quant.gemm.rounding_i16 import MOST_SUM, round_lanes, round_row, round_values, weigh
from quant.ops.attention import (
    CHUNK,
    ITEMS_PER_WORKER,
    MAXIMUM,
    MIXED,
    PART,
    ROWS,
    SUM,
    Rows,
    end_block,
    first_seen,
    hide_future,
    hide_past,
)
from quant.simd.floats import splat_f32x16
from quant.simd.memory import load_f32, load_f32x16, prefetch, store_f32x16
from quant.simd.struct import address, array, atomic, f32, i64, struct
from quant.simd.vectors import expand_f16
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

LEVEL = "avx512_vnni"  # below it there are no products to gain by
_MOST_BLOCKS = 8  # of a work item: their states and two chunks of keys and values fit into 1 MB
_LOG2_E = math.log2(math.e)

ROUNDED = struct(
    "RoundedRows",
    address=address,
    head_bytes=i64,
    key_row=i64,  # bytes
    value_pair=i64,  # bytes of two rows of values
    values=i64,  # where a head's begin
    key_scales=i64,  # float32, and where they begin
    value_scales=i64,
)


@dataclass(frozen=True)
class Rounded:
    """Rounded keys and values of some heads in memory: `depth` and `width` columns of n_rows rows each."""

    address: int
    n_rows: int
    depth: int
    width: int

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of keys, of values, of scales of either."""
        return (
            2 * pad16(self.depth) * self.n_rows,
            4 * pad16(self.width) * (-(-self.n_rows // 2)),
            4 * pad16(self.n_rows),
        )

    @property
    def head_bytes(self) -> int:
        """Of one head, whole cache lines."""
        keys, values, scales = self._sizes
        return -(-(keys + values + 2 * scales) // 64) * 64

    @property
    def struct(self) -> np.ndarray:
        """As jobs see it."""
        keys, values, scales = self._sizes
        return ROUNDED.pack(
            address=self.address, head_bytes=self.head_bytes, key_row=2 * pad16(self.depth),
            value_pair=4 * pad16(self.width), values=keys, key_scales=keys + values,
            value_scales=keys + values + scales,
        )  # fmt: skip


@inline
def keep_rows(rounded, head, row, n, keys, depth, values, width, stride):
    """Round n float32 rows of keys and of values, `row` (even) and those behind; the row behind them is written to."""
    at = rounded.address + rounded.head_bytes * head
    for i in range(n):
        scale = at + rounded.key_scales + 4 * (row + i)
        round_row(keys + stride * i, depth, at + rounded.key_row * (row + i), scale)
    for i in range(0, n, 2):
        to = at + rounded.values + rounded.value_pair * ((row + i) // 2)
        round_values(values + stride * i, stride, width, to, at + rounded.value_scales + 4 * (row + i))


# ---- keys and values of the cache ------------------------------------------------------------------------------------

ROUND = struct(
    "RoundCache",
    counter=atomic,
    n_heads=i64,
    n_rows=i64,
    keys=ROWS,  # float16
    depth=i64,
    values=ROWS,
    width=i64,
    rounded=ROUNDED,
    scratch=address,  # a worker's: two rows of keys and of values in float32
    scratch_bytes=i64,
)


@kernel("void(int64, int64)", LEVEL)
def _round(arguments, worker):
    """The job of round_cache()."""
    a = ROUND(arguments)
    chunks = (a.n_rows + CHUNK - 1) // CHUNK
    depth, width = (a.depth + 15) // 16 * 16, (a.width + 15) // 16 * 16
    keys = a.scratch + a.scratch_bytes * worker
    values, stride = keys + 4 * depth, 4 * (depth + width)
    for item in work_items(a.counter, a.n_heads * chunks):
        head, begin = item // chunks, CHUNK * (item % chunks)
        for row in range(begin, min(begin + CHUNK, a.n_rows), 2):
            n = min(2, a.n_rows - row)
            for i in range(2):
                at = row + min(i, n - 1)
                k = a.keys.address + a.keys.head * head + a.keys.row * at
                v = a.values.address + a.values.head * head + a.values.row * at
                expand_f16(k, a.depth, depth, keys + stride * i)
                expand_f16(v, a.width, width, values + stride * i)
            keep_rows(a.rounded, head, row, n, keys, depth, values, width, stride)


def round_cache(pool: Pool, keys: Rows, values: Rows, n_heads: int, out: Rounded) -> None:
    """Round rows of float16: keys and values of n_heads heads that share neither."""
    scratch_bytes = worker_bytes(2 * 4 * (pad16(out.depth) + pad16(out.width)))
    arguments = ROUND.pack(
        counter=0, n_heads=n_heads, n_rows=out.n_rows, keys=keys.struct, depth=out.depth, values=values.struct,
        width=out.width, rounded=out.struct,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
    )  # fmt: skip
    pool.run(_round.address, arguments)


# ---- attention -------------------------------------------------------------------------------------------------------

ATTEND = struct(
    "AttendRounded",
    counter=atomic,
    n_heads=i64,
    n_tokens=i64,
    n_before=i64,  # tokens in the context before them
    shared=i64,  # heads that have the same keys and values
    scale=f32,
    window=i64,  # keys that a token sees, at most; 0 for all
    sinks=address,  # float32 (n_heads,), or 0
    rounded=ROUNDED,
    depth=i64,
    width=i64,  # of values
    out=ROWS,
    item_tokens=i64,
    state_bytes=i64,
    scratch=address,  # a worker's: scores, rounded weights, two rows of factors, states
    scratch_bytes=i64,
    n_parts=i64,
    parts=array(PART, 2),  # of queries, one behind the other
)


@inline
def _begin_block(a, head, first, scratch, state):
    """A block's state: nothing summed yet, and its queries. scratch: addresses, then depth rows of float32."""
    width, largest, total = a.width, np.float32(LOWEST), np.float32(0.0)
    if a.sinks != 0:
        largest, total = load_f32(a.sinks + 4 * head) * np.float32(_LOG2_E), np.float32(1.0)
    clear(state, 2 + width)
    for half in range(2):
        store_f32x16(state + MAXIMUM + 64 * half, splat_f32x16(largest))
        store_f32x16(state + SUM + 64 * half, splat_f32x16(total))
    floats = scratch + ADDRESSES
    for i in range(a.n_parts):
        q, depth = a.parts[i].q, a.parts[i].depth
        pack_lanes(q.address + q.head * head, q.row, first, a.n_tokens, depth, a.scale, scratch, floats)
        floats += ROW * depth
    scales = state + MIXED + ROW * width
    round_lanes(scratch + ADDRESSES, a.depth, scales + ROW, scales)


@inline
def _add_keys(a, head, first, begin, state, scores):
    """Keys and values begin.. of a chunk (even), as far as the block of tokens first.. sees them."""
    n_before, width = a.n_before, a.width
    end = min(begin + CHUNK, n_before + min(first + ATTENTION_TOKENS, a.n_tokens))
    n_rows = end - begin
    if n_rows <= 0:
        return
    rounded = a.rounded
    keys = rounded.address + rounded.head_bytes * (head // a.shared)
    scales, weights = state + MIXED + ROW * width, scores + ROW * CHUNK
    factors = weights + ROW * CHUNK // 2
    row_scales = keys + rounded.key_scales + 4 * begin
    n_pairs = (a.depth + 1) // 2
    multiply(n_rows, keys + rounded.key_row * begin, rounded.key_row, row_scales, scales + ROW, n_pairs, scores, ROW)
    hide_future(scores, n_before + first + 1 - begin, n_rows)
    if a.window > 0:
        hide_past(scores, n_before + first + 1 - a.window - begin, n_rows)
    value_scales = keys + rounded.value_scales + 4 * begin
    for at in range(0, ROW, 64):
        largest, total, scale = state + MAXIMUM + at, state + SUM + at, load_f32x16(scales + at)
        old, new = weigh(scores + at, ROW, n_rows, value_scales, scale, largest, total, MOST_SUM, weights + at)
        store_f32x16(factors + at, old)
        store_f32x16(factors + ROW + at, new)
    values = keys + rounded.values + rounded.value_pair * (begin // 2)
    fold_columns(width, values, rounded.value_pair, weights, (n_rows + 1) // 2, factors, state + MIXED)


@inline
def _fetch(a, head, begin, end, part, n_parts):
    """Bring a part of the keys and values begin..end into L2."""
    rounded, n_pairs = a.rounded, (end - begin) // 2
    keys = rounded.address + rounded.head_bytes * (head // a.shared)
    values = keys + rounded.values + rounded.value_pair * (begin // 2)
    for first, row in ((keys + rounded.key_row * begin, 2 * rounded.key_row), (values, rounded.value_pair)):
        for at in range(first + row * (n_pairs * part // n_parts), first + row * (n_pairs * (part + 1) // n_parts), 64):
            prefetch(at)


@inline
def _run_item(a, head, first, last, scratch):
    """Tokens first..last of one head, in blocks: a chunk of keys and values serves all of them while it is in L2.

    A block's chunks begin as in ops/attention.py, at even rows.
    """
    state_bytes = a.state_bytes
    states = scratch + ROW * (CHUNK + CHUNK // 2 + 2)
    for token in range(first, last, ATTENTION_TOKENS):
        state = states + state_bytes * ((token - first) // ATTENTION_TOKENS)
        _begin_block(a, head, token, states + state_bytes * _MOST_BLOCKS, state)
    n_blocks, end = (last - first + ATTENTION_TOKENS - 1) // ATTENTION_TOKENS, a.n_before + last
    from_first = first_seen(a, first) // 2 * 2
    for ahead in range(0, end - from_first, CHUNK):
        following = min(from_first + ahead + CHUNK, end)
        for block in range(n_blocks):
            _fetch(a, head, following, min(following + CHUNK, end), block, n_blocks)
            token = first + ATTENTION_TOKENS * block
            begin = first_seen(a, token) // 2 * 2 + ahead
            _add_keys(a, head, token, begin, states + state_bytes * block, scratch)
    for token in range(first, last, ATTENTION_TOKENS):
        end_block(a, head, token, states + state_bytes * ((token - first) // ATTENTION_TOKENS))


@kernel("void(int64, int64)", LEVEL)
def _attend(arguments, worker):
    """The job of attend(): heads one after the other, in each the tokens that see most first."""
    a = ATTEND(arguments)
    n_tokens, item_tokens = a.n_tokens, a.item_tokens
    items = (n_tokens + item_tokens - 1) // item_tokens
    scratch = a.scratch + a.scratch_bytes * worker
    for item in work_items(a.counter, items * a.n_heads):
        first = item_tokens * (items - 1 - item % items)
        _run_item(a, item // items, first, min(first + item_tokens, n_tokens), scratch)


def attend(
    pool: Pool,
    queries: Sequence[tuple[Rows, int]],
    rounded: Rounded,
    out: Rows,
    *,
    n_heads: int,
    shared: int,
    n_tokens: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
) -> None:
    """out[t, h] = softmax(scale * q[t, h] . k[s, h // shared]) v[s, h // shared] of the last tokens of a context.

    Args:
        queries: float32, one or two parts with their widths, that lie behind each other in keys.
        rounded: keys and values of all tokens of the context, of n_heads / shared heads.
        out: float32.
        window, sinks: as attention.attend.
    """
    blocks = -(-n_tokens // ATTENTION_TOKENS)
    item_blocks = max(1, min(_MOST_BLOCKS, blocks * n_heads // (ITEMS_PER_WORKER * pool.n_workers)))
    depth, width = rounded.depth, rounded.width
    state_bytes = ROW * (2 + width + 1 + -(-depth // 2))
    states = _MOST_BLOCKS * state_bytes + ADDRESSES + ROW * depth
    scratch_bytes = worker_bytes(ROW * (CHUNK + CHUNK // 2 + 2) + states)
    nowhere = Rows(0, 0, 0).struct
    arguments = ATTEND.pack(
        counter=0, n_heads=n_heads, n_tokens=n_tokens, n_before=rounded.n_rows - n_tokens, shared=shared,
        scale=scale * _LOG2_E, window=window, sinks=sinks, rounded=rounded.struct, depth=depth, width=width,
        out=out.struct, item_tokens=ATTENTION_TOKENS * item_blocks, state_bytes=state_bytes,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        n_parts=len(queries),
        parts=[PART.pack(q=q.struct, k=nowhere, depth=part_depth) for q, part_depth in queries],
    )  # fmt: skip
    pool.run(_attend.address, arguments)
