"""Phases of an indexer: which cached rows each token of a step attends to (gemm/indexer.py has the arithmetic).

The first phase leaves each token's key in the cache, and its query and weights as lanes. The second ranks the keys,
split by split, and counts the ranks' first digits; the third chooses. While a token sees no more rows than are chosen,
its key is kept and nothing else is done: attention takes all rows then. Ranks and positions need room for the whole
context, which is the cache's to tell: they are found by a Room. Keys are of tokens, or of windows of several tokens
(DeepSeek-V4): those are made, and the first phase's work done, in compressor.py.
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
    n_heads=i64,
    head_dim=i64,
    top_k=i64,
    ratio=i64,  # tokens of a key
    slot=i64,  # which block of cache rows
    queries=address,  # float32 (T, n_heads, head_dim)
    weights=address,  # float32 (T, n_heads)
    packed=address,  # (T, packed_bytes)
    packed_bytes=i64,
    packed_weights=address,  # (T, weight_bytes)
    weight_bytes=i64,
    histograms=address,  # (T, HISTOGRAM_BYTES)
    room=address,
    chosen=address,  # int32 (T, chosen_bytes / 4)
    chosen_bytes=i64,
)
CHOOSING = struct("IndexerPhase", phase=PHASE, indexer=INDEXER)
KEYS = struct(
    "IndexerKeys",
    phase=PHASE,
    indexer=INDEXER,
    keys=address,  # float32 (T, head_dim)
    norm=address,
    norm_bias=address,
    epsilon=f32,
    n_rope=i64,
    stride=i64,  # pair i that is rotated: stride * i, and gap behind it
    gap=i64,
)


@inline
def _seen_by(a, t):
    """Keys that the step's token t sees."""
    return cached_by(a, t) // a.indexer.ratio


@inline
def has_to_choose(a, t):
    """Whether the step's token t sees more keys than are chosen; a: arguments of a phase with an INDEXER."""
    return _seen_by(a, t) > a.indexer.top_k


@inline
def pack_queries(i, t, work):
    """Token t's rotated query and its weights as lanes; work: ADDRESSES bytes."""
    queries, weights = i.queries + 4 * i.n_heads * i.head_dim * t, i.weights + 4 * i.n_heads * t
    packed, packed_weights = i.packed + i.packed_bytes * t, i.packed_weights + i.weight_bytes * t
    pack_heads(queries, weights, i.n_heads, i.head_dim, work, packed, packed_weights)
    clear_histogram(i.histograms + HISTOGRAM_BYTES * t)


@inline
def _ranks(i, t):
    """Address of the ranks of what token t sees."""
    room = ROOM(i.room)
    return room.ranks + 4 * room.capacity * t


@kernel("void(int64, int64, int64)")
def _run_queries(phase, item, work):
    """Item t: token t's key to the cache; its query and weights as lanes."""
    a, t = KEYS(phase), item
    i = a.indexer
    head_dim = i.head_dim
    layer_norm(a.keys + 4 * head_dim * t, a.norm, a.norm_bias, a.epsilon, head_dim, work)
    rotate(work, a, t, work, a.stride, a.gap)
    store_row_f16(work, head_dim, cache_row_of(a, i.slot, head_dim, t))
    if not has_to_choose(a, t):
        return
    for h in range(i.n_heads):
        query = i.queries + 4 * head_dim * (i.n_heads * t + h)
        rotate(query, a, t, query, a.stride, a.gap)
    pack_queries(i, t, work)


@kernel("void(int64, int64, int64)")
def _run_ranks(phase, item, work):
    """Ranks of one token's keys in one split of the context; work: of scores, a histogram."""
    a = CHOOSING(phase)
    i, t, split = a.indexer, item % tokens_of(a), item // tokens_of(a)
    n_seen, head_dim = _seen_by(a, t), i.head_dim
    first = split_length(n_seen) * split
    n_keys = min(split_length(n_seen), n_seen - first)
    if not has_to_choose(a, t) or n_keys <= 0:
        return
    keys, _ = cache_block(a, i.slot, t)
    row_bytes, ranks = 2 * head_dim, _ranks(i, t) + 4 * first
    packed, packed_weights = i.packed + i.packed_bytes * t, i.packed_weights + i.weight_bytes * t
    own, histogram = work + HISTOGRAM_BYTES, i.histograms + HISTOGRAM_BYTES * t
    rank_keys(
        packed, packed_weights, i.n_heads, head_dim, keys + row_bytes * first, row_bytes, True, n_keys, own, ranks
    )
    clear_histogram(work)
    count_first_digits(ranks, n_keys, work)
    for at in range(0, HISTOGRAM_BYTES, 8):
        if load_i64(work + at) > 0:
            atomic_add(histogram + at, load_i64(work + at))


@kernel("void(int64, int64, int64)")
def _run_choice(phase, item, work):
    """Item t: token t's rows."""
    a, t = CHOOSING(phase), item
    i = a.indexer
    if has_to_choose(a, t):
        positions, chosen = ROOM(i.room).positions + 4 * ROOM(i.room).capacity * t, i.chosen + i.chosen_bytes * t
        choose_rows(_ranks(i, t), _seen_by(a, t), i.histograms + HISTOGRAM_BYTES * t, i.top_k, positions, chosen)


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
    """An indexer's sizes and places; T is MOST_TOKENS.

    Attributes:
        ratio: tokens of a key.
        slot: which block of cache rows holds the layer's keys.
        queries, weights: addresses of float32 (T, n_heads, head_dim) and (T, n_heads), projected.
        packed, packed_weights, histograms: addresses of packed_bytes, weight_bytes, HISTOGRAM_BYTES a token.
        room: of a Room.
        chosen: address of chosen_bytes a token, int32 rows.
    """

    n_heads: int
    head_dim: int
    top_k: int
    ratio: int = 1
    slot: int = 0
    queries: int = 0
    weights: int = 0
    packed: int = 0
    packed_weights: int = 0
    histograms: int = 0
    room: int = 0
    chosen: int = 0

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

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        sizes = {name: getattr(self, name) for name in ("packed_bytes", "weight_bytes", "chosen_bytes")}
        return INDEXER.pack(**vars(self), **sizes)


def indexer_keys_phase(
    indexer: Indexer, keys: int, norm: int, norm_bias: int, epsilon: float, n_rope: int, by_halves: bool
) -> Phase:
    """Tokens' keys to the cache, and their queries as lanes.

    Args:
        keys: address of float32 (T, head_dim), projected.
        norm, norm_bias: addresses of float32 (head_dim,).
        n_rope: leading values of a query and of a key that are rotated; by_halves: i against i + n_rope / 2.
    """
    stride, gap = (1, n_rope // 2) if by_halves else (2, 1)
    arguments = KEYS.pack(
        phase=HEADER, indexer=indexer.struct, keys=keys, norm=norm, norm_bias=norm_bias, epsilon=epsilon,
        n_rope=n_rope, stride=stride, gap=gap,
    )  # fmt: skip
    return Phase(NOTHING, _run_queries, 1, arguments, max(ADDRESSES, 4 * indexer.head_dim), per_token=True)


def choice_phases(indexer: Indexer) -> tuple[Phase, Phase]:
    """Ranks of all keys; the choice."""
    ranks, choice = (CHOOSING.pack(phase=HEADER, indexer=indexer.struct) for _ in range(2))
    work_bytes = HISTOGRAM_BYTES + score_bytes(indexer.head_dim)
    return (
        Phase(NOTHING, _run_ranks, 1, ranks, work_bytes, per_token=True, per_split=True),
        Phase(NOTHING, _run_choice, 1, choice, 0, per_token=True),
    )
