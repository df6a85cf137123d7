"""The phase of attention in bytes, where many heads share each cached row, which is key and value (MLA) in 8 bits.

Arguments, splits and results are attention.py's, rows are gemv/rows_i8.py's. Up to 16 heads are the lanes of queries,
scores and weights, and the rows of weighted sums. Products of bytes (vpdpbusd) take four columns a lane, or four rows:

- scores: codes of latents times queries, which are rounded to bytes with a scale for each head and _BLOCK columns; what
  behind latents keeps 16 bits is a product of 16-bit integers (gemm/lanes_i16.py);
- weighted sums: weights have 16 bits, in two bytes. Where those of a head within a chunk of rows are within a small
  factor of their mean, one byte will do; if so for all heads of a tile, the other byte's products are left out.

Sums of products are exact; softmax and sums over chunks are in float32. A head's result depends on no other head.
"""

from dataclasses import replace

from quant.decode.attention import (
    ATTEND,
    VALUES_AT,
    Heads,
    attend_phase,
    bytes_of_partial,
    find_rows,
    items_of,
    padded_lanes,
)
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
from quant.decode.program import MOST_TOKENS, Phase, chunk_length
from quant.gemm.lanes import ADDRESSES, LANE_ROW
from quant.gemm.lanes_i8 import (
    COLUMNS,
    ROWS,
    add_pairs,
    add_scores,
    fold_bytes,
    round_bytes,
    take_four_rows,
    weigh_bytes,
)
from quant.gemm.rounding_i16 import LENGTH_OF_LANES, round_16, round_row
from quant.gemv.rows_i8 import SCALE_BYTES
from quant.simd.floats import zero_f32x16
from quant.simd.memory import load_f32, load_i64, prefetch, store_f32, store_f32x16
from quant.simd.vectors import expand_f16
from quant.target import isa
from quant.target.jit import inline, kernel

_CHUNK = 128  # rows of the cache at a time, a multiple of ROWS
_BLOCK = 128  # columns of a query that share a scale

# Work memory: packed queries of each token and group with flags of which there are; then, of a chunk, fixed sizes.
_SCORES, _WEIGHTS, _SCALES, _FOUND = LANE_ROW * _CHUNK, LANE_ROW // 2 * _CHUNK, 4 * _CHUNK, 8 * _CHUNK


@inline
def _blocks(n_codes):
    return (n_codes + _BLOCK - 1) // _BLOCK


@inline
def _query_bytes(n_codes, n_rest):
    """Of a group of heads: fours of bytes, pairs, then starts and scales of blocks, and the scale of pairs."""
    return 16 * n_codes + LANE_ROW * ((n_rest + 1) // 2) + 2 * LANE_ROW * _blocks(n_codes) + LANE_ROW


@inline
def _fours_bytes(width):
    return 4 * width + 64  # an odd number of lines: columns lie in all sets of the cache


@inline
def _queries(a, group, token, work, scratch):
    """A group's packed queries."""
    n_codes, n_rest = a.key_codes, a.key_width - a.key_codes
    index = a.n_groups * token + group
    at = behind_flags(a, work) + _query_bytes(n_codes, n_rest) * index
    if not take_flag(work, index):
        return at
    rows = scratch + ADDRESSES
    pack_queries(a, index, scratch, rows)
    pairs = at + 16 * n_codes
    starts = pairs + LANE_ROW * ((n_rest + 1) // 2)
    for first in range(0, n_codes, _BLOCK):
        n, of_block = min(_BLOCK, n_codes - first), starts + 2 * LANE_ROW * (first // _BLOCK)
        round_bytes(rows + LANE_ROW * first, n, at + 16 * first, of_block, of_block + LANE_ROW)
    scale = starts + 2 * LANE_ROW * _blocks(n_codes)
    round_16(rows + LANE_ROW * n_codes, LANE_ROW, n_rest, LENGTH_OF_LANES, pairs, LANE_ROW, scale)
    return at


@inline
def _add_rows(a, queries, found, n, ahead, codes, rest, fours, scores):
    """Scores of up to ROWS rows at these addresses, and their columns at `fours`. rest: scratch of ROWS.

    What lies `ahead` bytes behind the rows is brought into L2.
    """
    n_codes, n_rest, stride = a.key_codes, a.key_width - a.key_codes, _fours_bytes(a.key_codes)
    pairs = queries + 16 * n_codes
    starts = pairs + LANE_ROW * ((n_rest + 1) // 2)
    padded_rest = (n_rest + 15) // 16 * 16
    of_codes, of_rest, halves = rest, rest + 4 * ROWS, rest + 8 * ROWS
    rounded = halves + 4 * padded_rest
    for i in range(0, n, 4):
        first, second = load_i64(found + 8 * i), load_i64(found + 8 * min(i + 1, n - 1))
        third, fourth = load_i64(found + 8 * min(i + 2, n - 1)), load_i64(found + 8 * min(i + 3, n - 1))
        to = fours + stride * (i // 4)
        take_four_rows(first, second, third, fourth, n_codes, codes + n_codes * i, n_codes, to)
    for i in range(n):
        row = load_i64(found + 8 * i)
        for line in range(row + ahead, row + ahead + a.key_row, 64):
            prefetch(line)
        store_f32(of_codes + 4 * i, load_f32(row + n_codes))
        expand_f16(row + n_codes + SCALE_BYTES, n_rest, padded_rest, halves)
        round_row(halves, padded_rest, rounded + 2 * padded_rest * i, of_rest + 4 * i)
        store_f32x16(scores + LANE_ROW * i, zero_f32x16())
    for first in range(0, n_codes, _BLOCK):
        of_block = starts + 2 * LANE_ROW * (first // _BLOCK)
        n_fours = min(_BLOCK, n_codes - first) // 4
        add_scores(codes + first, n_codes, queries + 16 * first, n_fours, of_block, of_block + LANE_ROW, scores)
    scale = starts + 2 * LANE_ROW * _blocks(n_codes)
    add_pairs(rounded, 2 * padded_rest, of_rest, pairs, (n_rest + 1) // 2, scale, of_codes, scores)


@inline
def _attend_split(a, group, token, split, work):
    """One group of a token's heads over one split."""
    n_heads, n_codes, n_rest = a.per_group, a.key_codes, a.key_width - a.key_codes
    each = _query_bytes(n_codes, n_rest)
    fours = behind_flags(a, work) + each * MOST_TOKENS * a.n_groups
    queries = _queries(a, group, token, work, fours)
    stride = _fours_bytes(n_codes)
    codes = fours + stride * (_CHUNK // 4)
    scores = codes + n_codes * ROWS
    weights = scores + _SCORES
    scales = weights + _WEIGHTS
    found = scales + _SCALES
    state = found + _FOUND
    steps = state + STATE_BYTES
    rest = steps + LANE_ROW
    partial_bytes = bytes_of_partial(a.padded_width)
    partials, begin, end = begin_heads(a, group, token, split, state)
    length = chunk_length(end - begin, _CHUNK)
    for first in range(begin, end, length):
        n = min(length, end - first)
        find_rows(a, token, a.key_slot, a.key_row, a.key_group * group, first, n, found)
        # The next chunk; behind a split's last one it is the next split's first. Where groups of heads are several and
        # workers more than these, that is for another worker (items_of), and in vain: two cores do not show the cost.
        ahead = a.key_row * n
        if load_i64(found + 8 * (n - 1)) != load_i64(found) + ahead - a.key_row:
            ahead = 0
        for i in range(0, n, ROWS):
            few, to = min(ROWS, n - i), fours + stride * (i // 4)
            _add_rows(a, queries, found + 8 * i, few, ahead, codes, rest, to, scores + LANE_ROW * i)
            for j in range(few):
                store_f32(scales + 4 * (i + j), load_f32(rest + 4 * j))
        old, new = weigh_bytes(scores, n, scales, state + LARGEST, state + TOTAL, weights, steps)
        store_f32x16(state + FACTORS, old)
        store_f32x16(state + FACTORS + LANE_ROW, new)
        fold_bytes(
            n_heads, weights, steps, fours, stride, (n + 3) // 4, state + FACTORS, partials + VALUES_AT, partial_bytes,
            n_codes,
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
    """Whether rows are key and value of so many heads, in bytes, and the CPU has the products."""
    is_shared = heads.key_slot == heads.value_slot and not heads.key_group and heads.key_codes == heads.value_width
    is_whole = heads.key_codes > 0 and heads.key_codes % COLUMNS == 0
    return isa.has(LEVEL) and is_shared and is_whole and FEWEST_HEADS <= heads.per_group <= MOST_HEADS


def byte_attend_phase(heads: Heads, queries: int, partials: int) -> Phase:
    """As attention.attend_phase, of heads that fit."""
    assert fits(heads)
    n_codes, n_rest = heads.key_codes, heads.key_width - heads.key_codes
    n_blocks = -(-n_codes // _BLOCK)
    query_bytes = 16 * n_codes + LANE_ROW * (-(-n_rest // 2) + 2 * n_blocks + 1)
    packed = flags_bytes(heads.n_groups) + query_bytes * MOST_TOKENS * heads.n_groups
    of_rest = 8 * ROWS + padded_lanes(n_rest) * (4 + 2 * ROWS)
    of_chunk = (4 * n_codes + 64) * (_CHUNK // 4) + n_codes * ROWS
    scratch = of_chunk + _SCORES + _WEIGHTS + _SCALES + _FOUND + STATE_BYTES + LANE_ROW + of_rest
    work_bytes = packed + max(scratch, ADDRESSES + LANE_ROW * heads.query_width)
    phase = attend_phase(heads, queries, partials)
    return replace(phase, prepare=no_queries, run=_run_attend, work_bytes=work_bytes)
