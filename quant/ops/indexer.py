"""An indexer's choice for many tokens: which rows of the cache each of them attends to, in one job.

A work item is one token: its scores of all keys that it sees, then their choice (gemm/indexer.py). Work memory of a
worker grows with the context, by 8 bytes a row.
"""

import numpy as np

from quant.gemm.indexer import (
    BEHIND,
    HISTOGRAM_BYTES,
    blocks_of,
    choose_rows,
    clear_histogram,
    count_first_digits,
    pack_heads,
    rank_keys,
    score_bytes,
)
from quant.gemm.lanes import ADDRESSES, ROW
from quant.simd.memory import load_u32, store_i32
from quant.simd.struct import address, atomic, boolean, i64, struct
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

CHOOSE = struct(
    "ChooseRows",
    counter=atomic,
    n_tokens=i64,
    n_before=i64,  # tokens in the context before them
    n_heads=i64,
    head_dim=i64,
    queries=address,  # float32 (T, n_heads, head_dim)
    weights=address,  # float32 (T, n_heads)
    keys=address,  # of the context's first token
    row_bytes=i64,
    is_f16=boolean,
    top_k=i64,
    chosen=address,  # int32 (T, top_k)
    # A worker's memory: addresses, the packed query, its weights, work of scores, histogram, ranks, positions, choice.
    scratch=address,
    scratch_bytes=i64,
    packed_weights=i64,
    work=i64,
    histogram=i64,
    ranks=i64,
    positions=i64,
    choice=i64,
)


@inline
def _choose(a, t, scratch):
    """Token t's rows."""
    n_seen, top_k, head_dim, n_heads = a.n_before + t + 1, a.top_k, a.head_dim, a.n_heads
    chosen, ranks, histogram = a.chosen + 4 * top_k * t, scratch + a.ranks, scratch + a.histogram
    if n_seen <= top_k:
        for i in range(top_k):
            store_i32(chosen + 4 * i, i if i < n_seen else -1)
        return
    packed, packed_weights = scratch + ADDRESSES, scratch + a.packed_weights
    queries, weights = a.queries + 4 * n_heads * head_dim * t, a.weights + 4 * n_heads * t
    pack_heads(queries, weights, n_heads, head_dim, scratch, packed, packed_weights)
    rank_keys(packed, packed_weights, n_heads, head_dim, a.keys, a.row_bytes, a.is_f16, n_seen, scratch + a.work, ranks)
    clear_histogram(histogram)
    count_first_digits(ranks, n_seen, histogram)
    choose_rows(ranks, n_seen, histogram, top_k, scratch + a.positions, scratch + a.choice)
    for i in range(top_k):
        store_i32(chosen + 4 * i, load_u32(scratch + a.choice + 4 * i))


@kernel("void(int64, int64)")
def _choose_all(arguments, worker):
    """The job of choose(): the tokens that see most first."""
    a = CHOOSE(arguments)
    n_tokens = a.n_tokens
    for item in work_items(a.counter, n_tokens):
        _choose(a, n_tokens - 1 - item, a.scratch + a.scratch_bytes * worker)


def choose(
    pool: Pool,
    queries: int,
    weights: int,
    keys: int,
    *,
    row_bytes: int,
    is_f16: bool,
    n_heads: int,
    head_dim: int,
    n_tokens: int,
    n_before: int,
    top_k: int,
    chosen: int,
) -> None:
    """Write the rows that each of n_tokens tokens attends to, behind n_before others.

    Args:
        queries, weights: addresses of float32 (T, n_heads, head_dim) and (T, n_heads).
        keys: address of rows of head_dim float16 or float32, row_bytes apart.
        chosen: address of int32 (T, top_k). A token that sees no more than top_k rows has all of them, then -1.
    """
    n_blocks, n_cached = blocks_of(n_heads), n_before + n_tokens
    sizes = {
        "addresses": ADDRESSES, "packed": ROW * head_dim * n_blocks, "packed_weights": ROW * n_blocks,
        "work": score_bytes(head_dim), "histogram": HISTOGRAM_BYTES, "ranks": 4 * n_cached,
        "positions": 4 * n_cached, "choice": 4 * (top_k + BEHIND),
    }  # fmt: skip
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()])
    places = dict(zip(sizes, [0, *ends[:-1].tolist()], strict=True))
    scratch_bytes = worker_bytes(int(ends[-1]))
    arguments = CHOOSE.pack(
        counter=0, n_tokens=n_tokens, n_before=n_before, n_heads=n_heads, head_dim=head_dim, queries=queries,
        weights=weights, keys=keys, row_bytes=row_bytes, is_f16=is_f16, top_k=top_k, chosen=chosen,
        scratch=pool.buffer("indexer", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        **{name: places[name] for name in ("packed_weights", "work", "histogram", "ranks", "positions", "choice")},
    )  # fmt: skip
    pool.run(_choose_all.address, arguments)
