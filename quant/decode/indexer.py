"""Phases of an indexer: which cached rows each token of a step attends to (gemm/indexer.py has the arithmetic).

The first phase leaves each token's key in the cache, and its query and weights as lanes. The second ranks the keys,
split by split, and counts the ranks' first digits; the third chooses. While a token sees no more rows than are chosen,
its key is kept and nothing else is done: attention takes all rows then. Ranks and positions need room for the whole
context, which is the cache's to tell: they are found by a Room.
"""

from dataclasses import dataclass

import numpy as np

from quant.decode.program import (
    HEADER,
    MOST_TOKENS,
    NOTHING,
    PHASE,
    Phase,
    cache_block,
    cached_by,
    padded,
    split_length,
    tokens_of,
)
from quant.decode.queries import cache_row_of, rotate, store_row_f16
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
from quant.simd.memory import load_i64
from quant.simd.struct import address, f32, i64, struct
from quant.simd.vectors import layer_norm
from quant.target.jit import inline, kernel
from quant.threads.atomics import atomic_add

ROOM = struct("Room", ranks=address, positions=address, capacity=i64)  # uint32 and int32 (MOST_TOKENS, capacity)
# What all three phases know. T: MOST_TOKENS.
INDEXER = struct(
    "Indexer",
    phase=PHASE,
    n_heads=i64,
    head_dim=i64,
    top_k=i64,
    slot=i64,  # which block of cache rows
    queries=address,  # float32 (T, n_heads, head_dim)
    keys=address,  # float32 (T, head_dim)
    weights=address,  # float32 (T, n_heads)
    norm=address,
    norm_bias=address,
    epsilon=f32,
    n_rope=i64,
    stride=i64,  # pair i that is rotated: stride * i, and gap behind it
    gap=i64,
    packed=address,  # (T, packed_bytes)
    packed_bytes=i64,
    packed_weights=address,  # (T, weight_bytes)
    weight_bytes=i64,
    histograms=address,  # (T, HISTOGRAM_BYTES)
    room=address,
    chosen=address,  # int32 (T, chosen_bytes / 4)
    chosen_bytes=i64,
)


@inline
def _has_to_choose(a, t):
    """Whether the step's token t sees more rows than are chosen."""
    return cached_by(a, t) > a.top_k


@inline
def _ranks(a, t):
    """Address of the ranks of what token t sees."""
    room = ROOM(a.room)
    return room.ranks + 4 * room.capacity * t


@kernel("void(int64, int64, int64)")
def _run_queries(phase, item, work):
    """Item t: token t's key to the cache; its query and weights as lanes."""
    a, t = INDEXER(phase), item
    n_heads, head_dim = a.n_heads, a.head_dim
    layer_norm(a.keys + 4 * head_dim * t, a.norm, a.norm_bias, a.epsilon, head_dim, work)
    rotate(work, a, t, work, a.stride, a.gap)
    store_row_f16(work, head_dim, cache_row_of(a, a.slot, head_dim, t))
    if not _has_to_choose(a, t):
        return
    queries = a.queries + 4 * n_heads * head_dim * t
    for h in range(n_heads):
        query = queries + 4 * head_dim * h
        rotate(query, a, t, query, a.stride, a.gap)
    packed, packed_weights = a.packed + a.packed_bytes * t, a.packed_weights + a.weight_bytes * t
    pack_heads(queries, a.weights + 4 * n_heads * t, n_heads, head_dim, work, packed, packed_weights)
    clear_histogram(a.histograms + HISTOGRAM_BYTES * t)


@kernel("void(int64, int64, int64)")
def _run_ranks(phase, item, work):
    """Ranks of one token's keys in one split of the context; work: of scores, a histogram."""
    a = INDEXER(phase)
    t, split = item % tokens_of(a), item // tokens_of(a)
    n_cached, head_dim = cached_by(a, t), a.head_dim
    first = split_length(n_cached) * split
    n_keys = min(split_length(n_cached), n_cached - first)
    if not _has_to_choose(a, t) or n_keys <= 0:
        return
    keys, _ = cache_block(a, a.slot, t)
    row_bytes, ranks = 2 * head_dim, _ranks(a, t) + 4 * first
    packed, packed_weights = a.packed + a.packed_bytes * t, a.packed_weights + a.weight_bytes * t
    own, histogram = work + HISTOGRAM_BYTES, a.histograms + HISTOGRAM_BYTES * t
    rank_keys(
        packed, packed_weights, a.n_heads, head_dim, keys + row_bytes * first, row_bytes, True, n_keys, own, ranks
    )
    clear_histogram(work)
    count_first_digits(ranks, n_keys, work)
    for at in range(0, HISTOGRAM_BYTES, 8):
        if load_i64(work + at) > 0:
            atomic_add(histogram + at, load_i64(work + at))


@kernel("void(int64, int64, int64)")
def _run_choice(phase, item, work):
    """Item t: token t's rows."""
    a, t = INDEXER(phase), item
    if _has_to_choose(a, t):
        positions, chosen = ROOM(a.room).positions + 4 * ROOM(a.room).capacity * t, a.chosen + a.chosen_bytes * t
        choose_rows(_ranks(a, t), cached_by(a, t), a.histograms + HISTOGRAM_BYTES * t, a.top_k, positions, chosen)


class Room:
    """Memory for ranks and positions of all tokens that a step's tokens may see; grows with the caches it is used for.

    Attributes:
        address: of a ROOM.
    """

    def __init__(self) -> None:
        self._struct, self._memory, self._capacity = ROOM.zeros(), np.empty(0, np.int32), 0
        self.address = self._struct.ctypes.data

    def make(self, capacity: int) -> None:
        """See to it that there is room for so many."""
        if capacity > self._capacity:
            self._memory, self._capacity = np.empty(2 * MOST_TOKENS * capacity, np.int32), capacity
            ranks = self._memory.ctypes.data
            ROOM.write(self._struct, ranks=ranks, positions=ranks + 4 * MOST_TOKENS * capacity, capacity=capacity)


@dataclass(frozen=True)
class Indexer:
    """An indexer's sizes; T is MOST_TOKENS.

    Attributes:
        n_rope: leading values of a query and of a key that are rotated; by_halves: i against i + n_rope / 2.
    """

    n_heads: int
    head_dim: int
    top_k: int
    n_rope: int
    by_halves: bool
    epsilon: float

    @property
    def chosen_bytes(self) -> int:
        """From one token's choice to the next one's."""
        return padded(4 * (self.top_k + BEHIND))

    @property
    def packed_bytes(self) -> int:
        """Of a token's query as lanes."""
        return ROW * self.head_dim * blocks_of(self.n_heads)

    @property
    def weight_bytes(self) -> int:
        """Of its weights."""
        return ROW * blocks_of(self.n_heads)


def indexer_phases(
    indexer: Indexer,
    *,
    queries: int,
    keys: int,
    weights: int,
    norm: int,
    norm_bias: int,
    packed: int,
    packed_weights: int,
    histograms: int,
    room: int,
    chosen: int,
    slot: int,
) -> tuple[Phase, Phase, Phase]:
    """Keys to the cache and queries as lanes; ranks of all keys; the choice.

    Args:
        queries, keys, weights: addresses of float32 (T, n_heads, head_dim), (T, head_dim), (T, n_heads), projected.
        norm, norm_bias: addresses of float32 (head_dim,).
        packed, packed_weights, histograms: addresses of packed_bytes, weight_bytes, HISTOGRAM_BYTES a token.
        room: of a Room.
        chosen: address of chosen_bytes a token, int32 rows.
        slot: which block of cache rows holds the layer's keys.
    """
    i = indexer
    stride, gap = (1, i.n_rope // 2) if i.by_halves else (2, 1)
    arguments = INDEXER.pack(
        phase=HEADER, n_heads=i.n_heads, head_dim=i.head_dim, top_k=i.top_k, slot=slot, queries=queries, keys=keys,
        weights=weights, norm=norm, norm_bias=norm_bias, epsilon=i.epsilon, n_rope=i.n_rope,
        stride=stride, gap=gap, packed=packed, packed_bytes=i.packed_bytes, packed_weights=packed_weights,
        weight_bytes=i.weight_bytes, histograms=histograms, room=room, chosen=chosen, chosen_bytes=i.chosen_bytes,
    )  # fmt: skip
    work_bytes = max(ADDRESSES, 4 * i.head_dim)
    ranks_bytes = HISTOGRAM_BYTES + score_bytes(i.head_dim)
    return (
        Phase(NOTHING, _run_queries, 1, arguments, work_bytes, per_token=True),
        Phase(NOTHING, _run_ranks, 1, arguments.copy(), ranks_bytes, per_token=True, per_split=True),
        Phase(NOTHING, _run_choice, 1, arguments.copy(), 0, per_token=True),
    )
