"""The phase of attention in 16-bit integers, where many heads share each cached row, which is key and value (MLA).

Arguments, splits and results are attention.py's, rows are gemv/rows_i16.py's. Up to 16 heads are the lanes of queries,
scores and weights, and the rows of weighted sums. Products take rows where they lie: of scores a row's pair of columns
is repeated in all lanes, of sums two rows are put into each other. Where a chunk's rows do not follow each other, or
are an odd number or less than a tile, they are copied first. Softmax and sums over chunks are in float32.
"""

from dataclasses import replace

from quant.decode.attention import ATTEND, VALUES_AT, Heads, attend_phase, bytes_of_partial, find_rows, items_of
from quant.decode.attention_lanes import (
    FACTORS,
    FEWEST_HEADS,
    LARGEST,
    LEVEL,
    MOST_HEADS,
    STATE_BYTES,
    TOTAL,
    begin_heads,
    behind_flags,
    end_heads,
    flags_bytes,
    no_queries,
    pack_queries,
    take_flag,
)
from quant.decode.program import MOST_TOKENS, Phase, chunk_length, padded
from quant.gemm.lanes import ADDRESSES, LANE_ROW
from quant.gemm.lanes_i16 import AHEAD, COLUMNS, fold_rows, multiply_16
from quant.gemm.rounding_i16 import LENGTH, MOST_SUM_OF_ROWS, round_16, weigh
from quant.simd.memory import load_f32, load_f32x16, load_i64, store_f32, store_f32x16
from quant.simd.vectors import copy
from quant.target import isa
from quant.target.jit import inline, kernel

_CHUNK, _TILE = 96, 16  # rows of the cache at a time, and of scores

# Work memory: packed queries of each token and group with flags of which there are; then, of a chunk, fixed sizes.
_SCORES, _WEIGHTS, _SCALES, _FOUND = LANE_ROW * _CHUNK, LANE_ROW // 2 * _CHUNK, 4 * _CHUNK, 8 * _CHUNK


@inline
def _query_bytes(depth):
    """Of a group of heads: pairs, and their scales."""
    return LANE_ROW * (depth // 2) + LANE_ROW


@inline
def _queries(a, group, token, work, scratch):
    """A group's packed queries."""
    depth, index = a.query_width, a.n_groups * token + group
    at = behind_flags(a, work) + _query_bytes(depth) * index
    if take_flag(work, index):
        rows = scratch + ADDRESSES
        pack_queries(a, index, scratch, rows)
        round_16(rows, LANE_ROW, depth, LENGTH, at, LANE_ROW, at + LANE_ROW * (depth // 2))
    return at


@inline
def _rows(found, n, row_bytes, room):
    """The address of n rows that follow each other, a tile and pairs: of the first one, or of copies."""
    first, in_place = load_i64(found), n % 2 == 0 and n >= _TILE
    for i in range(n):
        in_place = in_place and load_i64(found + 8 * i) == first + row_bytes * i
    if in_place:
        return first
    for i in range(n):
        copy(load_i64(found + 8 * i), row_bytes // 4, room + row_bytes * i)
    return room


@inline
def _attend_split(a, group, token, split, work):
    """One group of a token's heads over one split."""
    n_heads, depth, width, row_bytes = a.per_group, a.query_width, a.padded_width, a.key_row
    room = behind_flags(a, work) + _query_bytes(depth) * MOST_TOKENS * a.n_groups
    queries = _queries(a, group, token, work, room)
    scores = room + (row_bytes * _CHUNK + 63) // 64 * 64
    weights = scores + _SCORES
    scales = weights + _WEIGHTS
    found, state = scales + _SCALES, scales + _SCALES + _FOUND
    scale = load_f32x16(queries + LANE_ROW * (depth // 2))
    partials, begin, end = begin_heads(a, group, token, split, state)
    length = chunk_length(end - begin, _CHUNK)
    for first in range(begin, end, length):
        n = min(length, end - first)
        find_rows(a, token, a.key_slot, row_bytes, 0, first, n, found)
        rows = _rows(found, n, row_bytes, room)
        ahead = rows if rows == room else rows + row_bytes * n  # mostly the next chunk
        for i in range(n):
            store_f32(scales + 4 * i, load_f32(rows + row_bytes * i + 2 * depth))
        for i in range(0, n, _TILE):
            j = max(0, min(i, n - _TILE))  # the last tile has rows before it again
            at = rows + row_bytes * j
            multiply_16(at, row_bytes, scales + 4 * j, queries, depth // 2, ahead, scores + LANE_ROW * j)
            ahead += AHEAD * (depth // 2)
        old, new = weigh(scores, LANE_ROW, n, scales, scale, state + LARGEST, state + TOTAL, MOST_SUM_OF_ROWS, weights)
        store_f32x16(state + FACTORS, old)
        store_f32x16(state + FACTORS + LANE_ROW, new)
        fold_rows(
            n_heads, weights, rows, row_bytes, (n + 1) // 2, ahead, state + FACTORS, partials + VALUES_AT,
            bytes_of_partial(width), width,
        )  # fmt: skip
    end_heads(a, partials, state)


@kernel("void(int64, int64, int64)", LEVEL)
def _run_attend(phase, item, work):
    """One group of a token's heads over one split, or more if there are more than items."""
    a = ATTEND(phase)
    group, token, first, end, step = items_of(a, item)
    for split in range(first, end, step):
        _attend_split(a, group, token, split, work)


def fits(heads: Heads) -> bool:
    """Whether rows are key and value of so many heads, in integers, and the CPU has the products."""
    is_whole = heads.is_scaled and heads.value_width % COLUMNS == 0
    return isa.has(LEVEL) and is_whole and FEWEST_HEADS <= heads.per_group <= MOST_HEADS


def integer_attend_phase(heads: Heads, queries: int, partials: int) -> Phase:
    """As attention.attend_phase, of heads that fit."""
    assert fits(heads)
    depth = heads.query_width
    packed = flags_bytes(heads.n_groups) + LANE_ROW * (depth // 2 + 1) * MOST_TOKENS * heads.n_groups
    of_chunk = padded(heads.key_row * _CHUNK) + _SCORES + _WEIGHTS + _SCALES + _FOUND + STATE_BYTES
    work_bytes = packed + max(of_chunk, ADDRESSES + LANE_ROW * depth)
    phase = attend_phase(heads, queries, partials)
    return replace(phase, prepare=no_queries, run=_run_attend, work_bytes=work_bytes)
