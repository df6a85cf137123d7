"""Attention of many tokens over keys and values in float32: softmax(scale * q k^T) v, causal, in one job.

Tokens come in blocks of 32 of one head, which are the lanes of all vectors. Queries are packed column by column, so
that a row of keys gives a row of scores, the softmax goes from row to row, and values add up to a transposed result.
Keys and values are taken a chunk at a time, with the softmax's largest score and sum so far (online softmax, Milakov
and Gimelshein, arXiv 1805.02867). So work memory does not grow with the context. What no token of a block sees is left
out.

The state of a block of tokens is rows of 32 float32, a lane a token: the largest score | the sum of e^(score - largest)
| as many rows as values are wide, the weighted sums | a row for each column of the packed queries.

q k^T may come in two parts, each with keys of its own: those of the head, and those that all heads share.

A window hides all but a token's last keys, itself included. A sink is one more logit of a head's softmax, with no value
(gpt-oss; Xiao et al., arXiv 2309.17453): the softmax begins with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from quant.batch import ATTENTION_TOKENS
from quant.gemm.lanes import ADDRESSES, LOWEST, ROW, add_matmul, clear, pack_lanes
from quant.simd.core import I64, constant, define, f32x16, splat
from quant.simd.floats import as_f32, exp, greater, splat_f32x16
from quant.simd.memory import load_f32, load_f32x16, store_f32, store_f32x16
from quant.simd.rows16 import transpose_strided
from quant.simd.struct import address, array, atomic, f32, i64, struct
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

CHUNK = 256  # keys and values at a time: in L2 with the blocks of a work item
_MOST_BLOCKS, ITEMS_PER_WORKER = 4, 8  # of a work item; at least, so that workers end together

# Where a block's state begins with which row.
MAXIMUM, SUM, MIXED = 0, ROW, 2 * ROW


def state_rows(width: int, depth: int) -> int:
    """Rows of a state, for values and keys of these widths."""
    return 2 + width + depth


# Rows of float32: of head h they begin `head` * h bytes behind the address, and are `row` bytes apart.
ROWS = struct("Rows", address=address, head=i64, row=i64)
PART = struct("ScorePart", q=ROWS, k=ROWS, depth=i64)
ATTEND = struct(
    "PromptAttention",
    counter=atomic,
    n_heads=i64,
    n_tokens=i64,
    n_before=i64,  # tokens in the context before them
    shared=i64,  # heads that have the same keys and values
    scale=f32,
    window=i64,  # keys that a token sees, at most; 0 for all
    sinks=address,  # float32 (n_heads,), or 0
    v=ROWS,
    width=i64,  # of values
    out=ROWS,
    item_tokens=i64,
    state_bytes=i64,
    scratch=address,  # a worker's: addresses of 16 rows, scores f32[CHUNK][32], states
    scratch_bytes=i64,
    n_parts=i64,
    parts=array(PART, 2),
)


def _hide(order: str):
    """Emits -infinity in the lanes whose number compares so with `edge`."""

    def emit(builder, v, edge):
        lanes = ir.Constant(ir.VectorType(I64, 16), list(range(16)))
        hidden = builder.icmp_signed(order, lanes, splat(builder, edge, lanes.type))
        return builder.select(hidden, constant(v.type, float("-inf")), v)

    return emit


_hidden_below = define(f32x16, (f32x16, types.int64), _hide("<"))
_hidden_from = define(f32x16, (f32x16, types.int64), _hide(">="))


@inline
def hide_future(scores, n_common, n_rows):
    """-infinity where a token must not look: all see n_common rows, token i of the block's i more."""
    for j in range(max(0, n_common), n_rows):
        for half in range(2):
            at = scores + ROW * j + 64 * half
            store_f32x16(at, _hidden_below(load_f32x16(at), j - n_common + 1 - 16 * half))


@inline
def hide_past(scores, n_old, n_rows):
    """-infinity where a token no longer looks: n_old rows are too old for token 0 of a block, for token i i more."""
    for j in range(min(n_old + ATTENTION_TOKENS - 1, n_rows)):
        for half in range(2):
            at = scores + ROW * j + 64 * half
            store_f32x16(at, _hidden_from(load_f32x16(at), j - n_old + 1 - 16 * half))


@inline
def first_seen(a, token):
    """The first row that a token sees."""
    return max(0, a.n_before + token + 1 - a.window) if a.window > 0 else 0


@inline
def fold_in(scores, n_rows, state, width):
    """Rows of scores to weights e^(score - the largest so far), and what was summed before to the same scale."""
    low_before, high_before = load_f32x16(state + MAXIMUM), load_f32x16(state + MAXIMUM + 64)
    low_most, high_most = low_before, high_before
    for at in range(scores, scores + ROW * n_rows, ROW):
        low_most = greater(load_f32x16(at), low_most)
        high_most = greater(load_f32x16(at + 64), high_most)
    store_f32x16(state + MAXIMUM, low_most)
    store_f32x16(state + MAXIMUM + 64, high_most)
    low_factor = exp(low_before - low_most)
    high_factor = exp(high_before - high_most)
    for at in range(state + SUM, state + MIXED + ROW * width, ROW):
        store_f32x16(at, load_f32x16(at) * low_factor)
        store_f32x16(at + 64, load_f32x16(at + 64) * high_factor)
    low_sum, high_sum = load_f32x16(state + SUM), load_f32x16(state + SUM + 64)
    for at in range(scores, scores + ROW * n_rows, ROW):
        low = exp(load_f32x16(at) - low_most)
        high = exp(load_f32x16(at + 64) - high_most)
        store_f32x16(at, low)
        store_f32x16(at + 64, high)
        low_sum, high_sum = low_sum + low, high_sum + high
    store_f32x16(state + SUM, low_sum)
    store_f32x16(state + SUM + 64, high_sum)


@inline
def _store_transposed(mixed, width, out, stride, count):
    """out[i][v] = mixed[v][i] for the first `count` tokens."""
    for v in range(0, width // 16 * 16, 16):
        for i in range(0, count, 4):
            for e, row in enumerate(transpose_strided(mixed + ROW * v + 4 * i, ROW)):
                if i + e < count:
                    store_f32x16(out + stride * (i + e) + 4 * v, as_f32(row))
    for v in range(width // 16 * 16, width):
        for i in range(count):
            store_f32(out + stride * i + 4 * v, load_f32(mixed + ROW * v + 4 * i))


@inline
def begin_block(a, head, first, addresses, state):
    """A block's state: nothing summed yet, and its queries."""
    width, largest, total = a.width, np.float32(LOWEST), np.float32(0.0)
    if a.sinks != 0:
        largest, total = load_f32(a.sinks + 4 * head), np.float32(1.0)
    clear(state, 2 + width)
    for half in range(2):
        store_f32x16(state + MAXIMUM + 64 * half, splat_f32x16(largest))
        store_f32x16(state + SUM + 64 * half, splat_f32x16(total))
    packed = state + MIXED + ROW * width
    for i in range(a.n_parts):
        q, depth = a.parts[i].q, a.parts[i].depth
        pack_lanes(q.address + q.head * head, q.row, first, a.n_tokens, depth, a.scale, addresses, packed)
        packed += ROW * depth


@inline
def _add_keys(a, head, first, begin, state, scores):
    """Keys and values begin.. of a chunk, as far as the block of tokens first.. sees them."""
    n_before, width, shared = a.n_before, a.width, head // a.shared
    end = min(begin + CHUNK, n_before + min(first + ATTENTION_TOKENS, a.n_tokens))
    n_rows = end - begin
    if n_rows <= 0:
        return
    clear(scores, n_rows)
    packed = state + MIXED + ROW * width
    for i in range(a.n_parts):
        part = a.parts[i]
        depth, k_row = part.depth, part.k.row
        k = part.k.address + part.k.head * shared + k_row * begin
        add_matmul(n_rows, k, k_row, 4, packed, depth, scores)
        packed += ROW * depth
    hide_future(scores, n_before + first + 1 - begin, n_rows)
    if a.window > 0:
        hide_past(scores, n_before + first + 1 - a.window - begin, n_rows)
    fold_in(scores, n_rows, state, width)
    v = a.v.address + a.v.head * shared + a.v.row * begin
    add_matmul(width, v, 4, a.v.row, scores, n_rows, state + MIXED)


@inline
def end_block(a, head, first, state):
    """Sums of values over sums of weights, to where they belong."""
    width, stride = a.width, a.out.row
    low, high = 1 / load_f32x16(state + SUM), 1 / load_f32x16(state + SUM + 64)
    mixed = state + MIXED
    for at in range(mixed, mixed + ROW * width, ROW):
        store_f32x16(at, load_f32x16(at) * low)
        store_f32x16(at + 64, load_f32x16(at + 64) * high)
    out = a.out.address + a.out.head * head + stride * first
    _store_transposed(mixed, width, out, stride, min(ATTENTION_TOKENS, a.n_tokens - first))


@inline
def _run_item(a, head, first, last, scratch):
    """Tokens first..last of one head, in blocks: a chunk of keys and values serves all of them while it is in L2.

    A block's chunks begin where it looks first, whatever the item, whose length follows from the number of workers.
    Where a window and a block fit a chunk, a token's sums are the same in any piece of a prompt.
    """
    scores, state_bytes = scratch + ADDRESSES, a.state_bytes
    states = scores + ROW * CHUNK
    for token in range(first, last, ATTENTION_TOKENS):
        begin_block(a, head, token, scratch, states + state_bytes * ((token - first) // ATTENTION_TOKENS))
    for ahead in range(0, a.n_before + last - first_seen(a, first), CHUNK):
        for token in range(first, last, ATTENTION_TOKENS):
            state = states + state_bytes * ((token - first) // ATTENTION_TOKENS)
            _add_keys(a, head, token, first_seen(a, token) + ahead, state, scores)
    for token in range(first, last, ATTENTION_TOKENS):
        end_block(a, head, token, states + state_bytes * ((token - first) // ATTENTION_TOKENS))


@kernel("void(int64, int64)")
def _attend(arguments, worker):
    """The job of attend(): heads one after the other, in each the tokens that see most first."""
    a = ATTEND(arguments)
    n_tokens, item_tokens = a.n_tokens, a.item_tokens
    items = (n_tokens + item_tokens - 1) // item_tokens
    scratch = a.scratch + a.scratch_bytes * worker
    for item in work_items(a.counter, items * a.n_heads):
        first = item_tokens * (items - 1 - item % items)
        _run_item(a, item // items, first, min(first + item_tokens, n_tokens), scratch)


@dataclass(frozen=True)
class Rows:
    """Float32 rows of all heads in memory: the address, and bytes from head to head and from row to row."""

    address: int
    head: int
    row: int

    @property
    def struct(self) -> np.ndarray:
        """As the job sees it."""
        return ROWS.pack(address=self.address, head=self.head, row=self.row)


def attend(
    pool: Pool,
    parts: Sequence[tuple[Rows, Rows, int]],
    values: Rows,
    width: int,
    out: Rows,
    *,
    n_heads: int,
    shared: int,
    n_tokens: int,
    n_before: int,
    scale: float,
    window: int = 0,
    sinks: int = 0,
) -> None:
    """out[t, h] = softmax(scale * sum over parts of q[t, h] . k[s, h // shared]) v[s, h // shared], s <= n_before + t.

    Args:
        parts: queries, keys, and the length of both; one or two.
        width: of values.
        shared: heads that have the same keys and values.
        window: s > n_before + t - window, where it is not 0.
        sinks: address of float32 (H,), a logit more in each head's softmax, without a value; or 0.
    """
    blocks = -(-n_tokens // ATTENTION_TOKENS)
    item_blocks = max(1, min(_MOST_BLOCKS, blocks * n_heads // (ITEMS_PER_WORKER * pool.n_workers)))
    state_bytes = ROW * state_rows(width, sum(depth for _, _, depth in parts))
    scratch_bytes = worker_bytes(ADDRESSES + ROW * CHUNK + item_blocks * state_bytes)
    arguments = ATTEND.pack(
        counter=0, n_heads=n_heads, n_tokens=n_tokens, n_before=n_before, shared=shared, scale=scale,
        window=window, sinks=sinks, v=values.struct, width=width, out=out.struct,
        item_tokens=ATTENTION_TOKENS * item_blocks,
        state_bytes=state_bytes,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        n_parts=len(parts), parts=[PART.pack(q=q.struct, k=k.struct, depth=depth) for q, k, depth in parts],
    )  # fmt: skip
    pool.run(_attend.address, arguments)
