"""Attention of many tokens, each over rows of the cache that were chosen for it: latent attention, in one job.

All heads share the rows, and values are the first part of keys. A work item is one token and some of its heads, which
are the lanes of all vectors; the rows are gathered a chunk at a time, in float32. The rest is ops/attention.py's, with
heads in the place of tokens, and without a future to hide.
"""

from collections.abc import Sequence

from quant.gemm.lanes import ADDRESSES, LANES, ROW, add_matmul, clear
from quant.ops.attention import MIXED, PART, ROWS, Rows, begin_block, end_block, fold_in, state_rows
from quant.simd.memory import load_i32, prefetch_near
from quant.simd.struct import address, array, atomic, boolean, f32, i64, struct
from quant.simd.vectors import copy, expand_f16
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

_CHUNK = 96  # rows at a time: in L2 with the blocks of a work item
_MOST_BLOCKS = 4  # of LANES heads of a work item
_AHEAD = 4  # rows that are asked for before they are read

ATTEND = struct(
    "AttendToChosen",
    counter=atomic,
    n_queries=i64,
    n_before=i64,  # tokens in the context before them
    n_tokens=i64,  # heads: what attention of a prompt calls tokens
    item_heads=i64,
    scale=f32,
    sinks=address,  # none
    depth=i64,  # of keys
    width=i64,  # of values
    out=ROWS,
    keys=address,  # of the context's first token
    row_bytes=i64,
    is_f16=boolean,
    chosen=address,  # int32 (queries, top_k)
    top_k=i64,
    state_bytes=i64,
    scratch=address,  # a worker's: addresses of 16 rows, scores f32[_CHUNK][32], rows f32[_CHUNK][depth], states
    scratch_bytes=i64,
    n_parts=i64,
    parts=array(PART, 2),
)


@inline
def _row(a, chosen, i):
    """Address of the i-th of the chosen rows."""
    return a.keys + a.row_bytes * load_i32(chosen + 4 * i)


@inline
def _gather(a, chosen, first, n, n_chosen, rows):
    """float32 (n, depth): chosen rows first.."""
    depth, row_bytes = a.depth, a.row_bytes
    for i in range(first, first + n):
        if i + _AHEAD < n_chosen:
            ahead = _row(a, chosen, i + _AHEAD)
            for line in range(ahead, ahead + row_bytes, 64):
                prefetch_near(line)
        if a.is_f16:
            expand_f16(_row(a, chosen, i), depth, depth, rows + 4 * depth * (i - first))
        else:
            copy(_row(a, chosen, i), depth, rows + 4 * depth * (i - first))


@inline
def _add_rows(a, n, rows, state, scores):
    """n gathered rows, to one block of heads."""
    depth, width = a.depth, a.width
    clear(scores, n)
    add_matmul(n, rows, 4 * depth, 4, state + MIXED + ROW * width, depth, scores)
    fold_in(scores, n, state, width)
    add_matmul(width, rows, 4, 4 * depth, scores, n, state + MIXED)


@inline
def _run_item(a, query, first, last, scratch):
    """Heads first..last of one token, in blocks."""
    scores, state_bytes, n_chosen = scratch + ADDRESSES, a.state_bytes, min(a.top_k, a.n_before + query + 1)
    rows = scores + ROW * _CHUNK
    states, chosen = rows + 4 * a.depth * _CHUNK, a.chosen + 4 * a.top_k * query
    for head in range(first, last, LANES):
        begin_block(a, query, head, scratch, states + state_bytes * ((head - first) // LANES))
    for i in range(0, n_chosen, _CHUNK):
        n = min(_CHUNK, n_chosen - i)
        _gather(a, chosen, i, n, n_chosen, rows)
        for head in range(first, last, LANES):
            _add_rows(a, n, rows, states + state_bytes * ((head - first) // LANES), scores)
    for head in range(first, last, LANES):
        end_block(a, query, head, states + state_bytes * ((head - first) // LANES))


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
    keys: int,
    chosen: int,
    out: Rows,
    *,
    row_bytes: int,
    is_f16: bool,
    width: int,
    n_heads: int,
    n_queries: int,
    n_before: int,
    top_k: int,
    scale: float,
) -> None:
    """out[t, h] = softmax(scale * q[t, h] . k[s]) v[s] over the rows s that are chosen for t.

    Args:
        parts: queries, one or two parts that lie behind each other in keys, with their widths. `head` and `row` of
            Rows are bytes from token to token and from head to head.
        keys: address of rows of float16 or float32, row_bytes apart; values are their first `width`.
        chosen: address of int32 (n_queries, top_k); of a token that sees fewer rows, as many as it sees count.
        out: float32 (n_queries, n_heads, width); strides as of parts.
    """
    depth = sum(part_width for _, part_width in parts)
    item_blocks = min(_MOST_BLOCKS, -(-n_heads // LANES))
    state_bytes = ROW * state_rows(width, depth)
    scratch_bytes = worker_bytes(ADDRESSES + _CHUNK * (ROW + 4 * depth) + item_blocks * state_bytes)
    nowhere = Rows(0, 0, 0).struct
    arguments = ATTEND.pack(
        counter=0, n_queries=n_queries, n_before=n_before, n_tokens=n_heads, item_heads=LANES * item_blocks,
        scale=scale, sinks=0, depth=depth, width=width, out=out.struct, keys=keys, row_bytes=row_bytes, is_f16=is_f16,
        chosen=chosen, top_k=top_k, state_bytes=state_bytes,
        scratch=pool.buffer("attention", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        n_parts=len(parts), parts=[PART.pack(q=q.struct, k=nowhere, depth=depth) for q, depth in parts],
    )  # fmt: skip
    pool.run(_attend.address, arguments)
