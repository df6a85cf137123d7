"""Phases of an indexer: which cached rows each token of a step attends to (gemm/indexer.py has the arithmetic).

The first phase leaves each token's key in the cache, and its query and weights as lanes. The second ranks the keys,
split by split, and counts the ranks' first digits; the last chooses. Where ranks come of products of bytes first, two
phases between them find the rows near the border, and rank these anew. While a token sees no more rows than are chosen,
its key is kept and nothing else is done: attention takes all rows then. Ranks and positions need room for the whole
context, which is the cache's to tell: they are found by a Room. Keys are of tokens, or of windows of several tokens
(DeepSeek-V4): those are made, and the first phase's work done, in compressor.py.
"""

from dataclasses import dataclass

import numpy as np

from quant.decode.program import (
    HEADER,
    MAX_SPLITS,
    MOST_TOKENS,
    NOTHING,
    PHASE,
    Phase,
    cache_block,
    cached_by,
    padded,
    split_begin,
    splits_of,
    tokens_of,
)
from quant.decode.queries import cache_row_of, rotate, store_row_f16
from quant.gemm import index_bytes
from quant.gemm.index_bytes import KEYS_TOGETHER, TILE, pack_keys, pack_query, panel_bytes, query_bytes
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
    split_rows,
    to_rank,
)
from quant.gemm.lanes import ADDRESSES, ROW
from quant.simd.memory import load_f32, load_i64, store_f32
from quant.simd.struct import address, boolean, f32, i64, struct
from quant.simd.vectors import layer_norm
from quant.target.jit import inline, kernel
from quant.target.kernel import Kernel
from quant.threads.atomics import atomic_add

ROOM = struct("Room", ranks=address, positions=address, capacity=i64)  # uint32 and int32 (MOST_TOKENS, capacity)
# Of a token: behind a histogram of its ranks' first digits. The keys' largest scale in each split lies behind it.
STATE = struct("ChoosingState", n_chosen=i64, n_within=i64, margin=f32)
_SCALES_AT = HISTOGRAM_BYTES + 64
STATE_BYTES = _SCALES_AT + 4 * MAX_SPLITS
# What all phases know. T: MOST_TOKENS.
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
    by_bytes=boolean,  # first
    in_bytes=address,  # (T, query_bytes)
    query_bytes=i64,
    states=address,  # (T, STATE_BYTES)
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
    if i.by_bytes:
        _state(i, t).margin = pack_query(packed, packed_weights, i.n_heads, i.head_dim, i.in_bytes + i.query_bytes * t)
    clear_histogram(_histogram(i, t))


@inline
def _histogram(i, t):
    return i.states + STATE_BYTES * t


@inline
def _state(i, t):
    return STATE(_histogram(i, t) + HISTOGRAM_BYTES)


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
    store_row_f16(work, head_dim, cache_row_of(a, i.slot, 2 * head_dim, t))
    if not has_to_choose(a, t):
        return
    for h in range(i.n_heads):
        query = i.queries + 4 * head_dim * (i.n_heads * t + h)
        rotate(query, a, t, query, a.stride, a.gap)
    pack_queries(i, t, work)


@inline
def _rank_bytes(a, t, first, n_keys, work, ranks):
    """Ranks of keys by products of bytes. Returns their largest scale."""
    i, largest = a.indexer, np.float32(0.0)
    keys, _ = cache_block(a, i.slot, t)
    query, row_bytes = i.in_bytes + i.query_bytes * t, 2 * i.head_dim
    for begin in range(0, n_keys, KEYS_TOGETHER):
        n, out = min(KEYS_TOGETHER, n_keys - begin), ranks + 4 * begin
        largest = max(largest, pack_keys(keys + row_bytes * (first + begin), row_bytes, n, i.head_dim, work))
        index_bytes.score(query, i.n_heads, i.head_dim, work, n, out)
        for at in range(out, out + 4 * n, 4):
            to_rank(at)
    return largest


@inline
def _rank_exactly(a, t, first, positions, n_keys, work, ranks):
    """Ranks of n_keys keys in float32: those from the first on, or those at int32 positions."""
    i = a.indexer
    keys, _ = cache_block(a, i.slot, t)
    packed, packed_weights, row_bytes = (
        i.packed + i.packed_bytes * t,
        i.packed_weights + i.weight_bytes * t,
        2 * i.head_dim,
    )
    keys += row_bytes * first
    rank_keys(packed, packed_weights, i.n_heads, i.head_dim, keys, row_bytes, True, positions, n_keys, work, ranks)


@inline
def _rank_split(a, t, split, work):
    """Ranks of one token's keys in one split of the context, whole tiles, and a histogram.

    work: a histogram, and of scores.
    """
    i, n_seen = a.indexer, _seen_by(a, t)
    first = split_begin(n_seen, split, TILE)
    n_keys, ranks = split_begin(n_seen, split + 1, TILE) - first, _ranks(i, t) + 4 * first
    if i.by_bytes:
        largest = _rank_bytes(a, t, first, n_keys, work + HISTOGRAM_BYTES, ranks)
        store_f32(_histogram(i, t) + _SCALES_AT + 4 * split, largest)
    else:
        _rank_exactly(a, t, first, 0, n_keys, work + HISTOGRAM_BYTES, ranks)
    clear_histogram(work)
    count_first_digits(ranks, n_keys, work)
    for at in range(0, HISTOGRAM_BYTES, 8):
        if load_i64(work + at) > 0:
            atomic_add(_histogram(i, t) + at, load_i64(work + at))


@kernel("void(int64, int64, int64)")
def _run_ranks(phase, item, work):
    """One split of a token's keys. Items are for as many as the longest context has, which are no fewer."""
    a = CHOOSING(phase)
    t, split = item % tokens_of(a), item // tokens_of(a)
    if has_to_choose(a, t) and split < splits_of(_seen_by(a, t)):
        _rank_split(a, t, split, work)


@inline
def _places(i, t):
    """Addresses of rows near the border and of the choice of token t."""
    return ROOM(i.room).positions + 4 * ROOM(i.room).capacity * t, i.chosen + i.chosen_bytes * t


@kernel("void(int64, int64, int64)")
def _run_border(phase, item, work):
    """Item t: token t's rows that are chosen in any case, and those near the border."""
    a, t = CHOOSING(phase), item
    i, n_seen = a.indexer, _seen_by(a, t)
    if not has_to_choose(a, t):
        return
    largest, scales, state = np.float32(0.0), _histogram(i, t) + _SCALES_AT, _state(i, t)
    for split in range(splits_of(n_seen)):
        largest = max(largest, load_f32(scales + 4 * split))
    positions, chosen = _places(i, t)
    n_chosen, n_within = split_rows(
        _ranks(i, t), n_seen, _histogram(i, t), i.top_k, largest * state.margin, positions, chosen
    )
    state.n_chosen, state.n_within = n_chosen, n_within


@kernel("void(int64, int64, int64)")
def _run_border_ranks(phase, item, work):
    """Ranks of some of a token's rows near the border, in float32."""
    a = CHOOSING(phase)
    i, t, part, parts = a.indexer, item % tokens_of(a), item // tokens_of(a), a.phase.n_items // tokens_of(a)
    if not has_to_choose(a, t):
        return
    n_within, (positions, _) = _state(i, t).n_within, _places(i, t)
    length = max(KEYS_TOGETHER, (n_within + parts - 1) // parts)
    first = length * part
    n = min(length, n_within - first)
    if n > 0:
        _rank_exactly(a, t, 0, positions + 4 * first, n, work, _ranks(i, t) + 4 * first)


@kernel("void(int64, int64, int64)")
def _run_choice(phase, item, work):
    """Item t: token t's rows; of those near the border as many as there is room for."""
    a, t = CHOOSING(phase), item
    i, n, n_chosen = a.indexer, _seen_by(a, t), 0
    if not has_to_choose(a, t):
        return
    ranks, histogram, (positions, chosen) = _ranks(i, t), _histogram(i, t), _places(i, t)
    if i.by_bytes:
        n, n_chosen = _state(i, t).n_within, _state(i, t).n_chosen
        clear_histogram(histogram)
        count_first_digits(ranks, n, histogram)
    choose_rows(ranks, n, histogram, i.top_k - n_chosen, i.by_bytes, positions, chosen + 4 * n_chosen)


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
        packed, packed_weights, in_bytes, states: addresses of packed_bytes, weight_bytes, query_bytes, STATE_BYTES a
            token.
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
    in_bytes: int = 0
    states: int = 0
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
    def query_bytes(self) -> int:
        """Of both as bytes."""
        return query_bytes(self.n_heads, self.head_dim)

    @property
    def by_bytes(self) -> bool:
        """Whether ranks come of products of bytes first."""
        return index_bytes.takes(self.head_dim, is_f16=True)

    @property
    def struct(self) -> np.ndarray:
        """As phases see it."""
        derived = ("packed_bytes", "weight_bytes", "query_bytes", "by_bytes", "chosen_bytes")
        return INDEXER.pack(**vars(self), **{name: getattr(self, name) for name in derived})


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


def choice_phases(indexer: Indexer) -> dict[str, Phase]:
    """Ranks of all keys; the choice. By name; where ranks come of bytes, with the border's between them."""
    score_work = max(score_bytes(indexer.head_dim), panel_bytes(indexer.head_dim))

    def phase(run: Kernel, work_bytes: int = 0, per_split: bool = False) -> Phase:
        arguments = CHOOSING.pack(phase=HEADER, indexer=indexer.struct)
        return Phase(NOTHING, run, 1, arguments, work_bytes, per_token=True, per_split=per_split)

    phases = {"ranks": phase(_run_ranks, HISTOGRAM_BYTES + score_work, per_split=True)}
    if indexer.by_bytes:
        phases["border"] = phase(_run_border)
        phases["border's ranks"] = phase(_run_border_ranks, score_work, per_split=True)
    return phases | {"choice": phase(_run_choice)}
