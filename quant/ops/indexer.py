"""An indexer's choice for many tokens: which rows of the cache each of them attends to, in one job.

A work item is a few tokens: the scores of all keys that they see, then their choices, one after the other
(gemm/indexer.py). Keys are brought into shape once for all of them. Work memory of a worker grows with the context, by
20 bytes a row.
"""

import numpy as np

from quant.gemm import index_bytes
from quant.gemm.index_bytes import KEYS_TOGETHER, pack_keys, pack_query, panel_bytes, query_bytes
from quant.gemm.indexer import (
    BEHIND,
    HISTOGRAM_BYTES,
    blocks_of,
    choose_rows,
    clear_histogram,
    count_first_digits,
    expand_keys,
    pack_heads,
    rank_keys,
    score_bytes,
    score_keys,
    split_rows,
    to_rank,
)
from quant.gemm.lanes import ADDRESSES, ROW
from quant.simd.memory import load_f32, load_u32, store_f32, store_i32
from quant.simd.struct import address, atomic, boolean, i64, struct
from quant.target.jit import inline, kernel
from quant.threads.pool import Pool, worker_bytes
from quant.threads.work_items import work_items

_TOGETHER = 4  # tokens of a work item

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
    by_bytes=boolean,  # first
    top_k=i64,
    chosen=address,  # int32 (T, top_k)
    # A worker's memory. Of each token of an item: the packed query, its weights, the same as bytes, a margin; ranks.
    # Of all: addresses, keys and their scores, histogram, positions, a choice.
    scratch=address,
    scratch_bytes=i64,
    token_bytes=i64,
    packed_weights=i64,
    in_bytes=i64,
    margin=i64,
    ranks=i64,
    ranks_bytes=i64,
    panel=i64,
    histogram=i64,
    positions=i64,
    choice=i64,
)


@inline
def _begin(a, t, addresses, own):
    """Token t's query as lanes, and as bytes if these come first."""
    packed, packed_weights, n_heads, head_dim = own, own + a.packed_weights, a.n_heads, a.head_dim
    queries, weights = a.queries + 4 * n_heads * head_dim * t, a.weights + 4 * n_heads * t
    pack_heads(queries, weights, n_heads, head_dim, addresses, packed, packed_weights)
    if a.by_bytes:
        store_f32(own + a.margin, pack_query(packed, packed_weights, n_heads, head_dim, own + a.in_bytes))


@inline
def _rank_all(a, first, last, scratch):
    """Ranks of all keys that tokens first..last see. Returns the keys' largest scale."""
    n_heads, head_dim, panel, largest = a.n_heads, a.head_dim, scratch + a.panel, np.float32(0.0)
    for begin in range(0, a.n_before + last, KEYS_TOGETHER):
        keys, n = a.keys + a.row_bytes * begin, min(KEYS_TOGETHER, a.n_before + last - begin)
        if a.by_bytes:
            largest = max(largest, pack_keys(keys, a.row_bytes, n, head_dim, panel))
        else:
            expand_keys(keys, a.row_bytes, a.is_f16, 0, n, head_dim, panel)
        for t in range(first, last):
            own, out = (
                scratch + a.token_bytes * (t - first),
                scratch + a.ranks + a.ranks_bytes * (t - first) + 4 * begin,
            )
            n_seen = min(n, a.n_before + t + 1 - begin)
            if n_seen > 0:
                if a.by_bytes:
                    index_bytes.score(own + a.in_bytes, n_heads, head_dim, panel, n_seen, out)
                else:
                    score_keys(own, own + a.packed_weights, n_heads, head_dim, n_seen, panel, out)
            for at in range(out, out + 4 * n_seen, 4):
                to_rank(at)
    return largest


@inline
def _choose(a, t, own, ranks, largest, scratch):
    """Token t's rows, by their ranks."""
    n, n_chosen, top_k, histogram = a.n_before + t + 1, 0, a.top_k, scratch + a.histogram
    positions, choice = scratch + a.positions, scratch + a.choice
    clear_histogram(histogram)
    count_first_digits(ranks, n, histogram)
    if a.by_bytes:
        n_chosen, n = split_rows(ranks, n, histogram, top_k, largest * load_f32(own + a.margin), positions, choice)
        rank_keys(
            own, own + a.packed_weights, a.n_heads, a.head_dim, a.keys, a.row_bytes, a.is_f16, positions, n,
            scratch + a.panel, ranks,
        )  # fmt: skip
        clear_histogram(histogram)
        count_first_digits(ranks, n, histogram)
    choose_rows(ranks, n, histogram, top_k - n_chosen, a.by_bytes, positions, choice + 4 * n_chosen)
    for i in range(top_k):
        store_i32(a.chosen + 4 * (top_k * t + i), load_u32(choice + 4 * i))


@inline
def _take_all(a, t):
    """Token t's rows, if it sees no more than it may choose."""
    for i in range(a.top_k):
        store_i32(a.chosen + 4 * (a.top_k * t + i), i if i < a.n_before + t + 1 else -1)


@kernel("void(int64, int64)")
def _choose_all(arguments, worker):
    """The job of choose(): the tokens that see most first."""
    a = CHOOSE(arguments)
    scratch, n_tokens = a.scratch + a.scratch_bytes * worker, a.n_tokens
    for item in work_items(a.counter, (n_tokens + _TOGETHER - 1) // _TOGETHER):
        last = n_tokens - _TOGETHER * item
        first = max(0, last - _TOGETHER)
        while first < last and a.n_before + first + 1 <= a.top_k:
            _take_all(a, first)
            first += 1
        if first == last:
            continue
        for t in range(first, last):
            _begin(a, t, scratch + a.panel, scratch + a.token_bytes * (t - first))
        largest = _rank_all(a, first, last, scratch)
        for t in range(first, last):
            i = t - first
            _choose(a, t, scratch + a.token_bytes * i, scratch + a.ranks + a.ranks_bytes * i, largest, scratch)


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
    n_blocks, ranks_bytes = blocks_of(n_heads), -(-4 * (n_before + n_tokens) // 64) * 64
    of_token, token_bytes = _places(
        packed=ROW * head_dim * n_blocks, packed_weights=ROW * n_blocks, in_bytes=query_bytes(n_heads, head_dim),
        margin=4,
    )  # fmt: skip
    places, n_bytes = _places(
        tokens=_TOGETHER * token_bytes, ranks=_TOGETHER * ranks_bytes,
        panel=max(ADDRESSES, score_bytes(head_dim), panel_bytes(head_dim)), histogram=HISTOGRAM_BYTES,
        positions=ranks_bytes, choice=4 * (top_k + BEHIND),
    )  # fmt: skip
    del of_token["packed"], places["tokens"]  # where they begin
    scratch_bytes = worker_bytes(n_bytes)
    arguments = CHOOSE.pack(
        counter=0, n_tokens=n_tokens, n_before=n_before, n_heads=n_heads, head_dim=head_dim, queries=queries,
        weights=weights, keys=keys, row_bytes=row_bytes, is_f16=is_f16,
        by_bytes=index_bytes.takes(head_dim, is_f16), top_k=top_k, chosen=chosen,
        scratch=pool.buffer("indexer", scratch_bytes * pool.n_workers), scratch_bytes=scratch_bytes,
        token_bytes=token_bytes, ranks_bytes=ranks_bytes, **of_token, **places,
    )  # fmt: skip
    pool.run(_choose_all.address, arguments)


def _places(**sizes: int) -> tuple[dict[str, int], int]:
    """Where parts of these bytes begin, each on a cache line, and the bytes of all."""
    ends = np.cumsum([-(-size // 64) * 64 for size in sizes.values()]).tolist()
    return dict(zip(sizes, [0, *ends[:-1]], strict=True)), ends[-1]
