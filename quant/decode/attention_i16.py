"""The phase of attention in 16-bit integers, where many heads share each cached row, which is key and value (MLA).

Arguments, splits and results are attention.py's. Rows of the cache are rounded as they are read, queries once for a
split (gemm/lanes_i16.py); softmax and sums over rows are in float32. Up to 16 heads are the lanes of queries, scores
and weights, and the rows of weighted sums.
"""

import math
from dataclasses import replace

import numpy as np

from quant.decode.attention import (
    ATTEND,
    PARTIAL,
    VALUES_AT,
    Heads,
    attend_phase,
    bytes_of_partial,
    find_rows,
    padded_lanes,
    seen_by,
)
from quant.decode.program import MAX_SPLITS, Phase, split_length, splits_of, tokens_of
from quant.gemm.lanes import ADDRESSES, LOWEST, pack_16
from quant.gemm.lanes_i16 import MOST_SUM_OF_ROWS, fold_rows, multiply_16, round_16, round_two_rows, weigh
from quant.simd.floats import splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_f32x16, load_i64, load_u16, store_f32x16, store_i16
from quant.target import isa
from quant.target.jit import inline, kernel

LEVEL = "avx512_vnni"
FEWEST_HEADS, MOST_HEADS = 8, 16  # that share rows: to be worth rounding them; lanes
_ROWS = 64  # of the cache at a time, a multiple of 16
_LOG2_E = math.log2(math.e)

# Work memory: of a row for each lane; then fixed sizes.
_LANES = 64
_SCORES, _WEIGHTS, _SCALES, _FOUND = _LANES * _ROWS, _LANES * _ROWS // 2, 4 * _ROWS, 8 * _ROWS


@inline
def _pair_bytes(width):
    return 4 * width + 64  # an odd number of lines: columns of pairs lie in all sets of the cache


@inline
def _whole(a, row, halves):
    """The address of a row whose columns are multiples of 16: its own, or that of a copy."""
    if a.key_width % 16 == 0:
        return row
    for c in range(a.key_width):
        store_i16(halves + 2 * c, load_u16(row + 2 * c))
    for c in range(a.key_width, a.query_width):
        store_i16(halves + 2 * c, 0)
    return halves


@inline
def _round_rows(a, found, n, halves, rows, pairs, scales):
    """n rows at these addresses to integers; behind an odd one itself, whose weight is 0. halves: scratch of two."""
    depth, width = a.query_width, a.padded_width
    for i in range(0, n, 2):
        first = _whole(a, load_i64(found + 8 * i), halves)
        second = _whole(a, load_i64(found + 8 * min(i + 1, n - 1)), halves + 2 * depth)
        to, at = rows + 2 * depth * i, pairs + _pair_bytes(width) * (i // 2)
        round_two_rows(first, second, depth, to, width, at, scales + 4 * i)


@inline
def _attend_split(a, group, token, split, work):
    """One group of a token's heads over one split."""
    n_heads, depth, width, all_heads = a.per_group, a.query_width, a.padded_width, a.n_groups * a.per_group
    halves, rows = work, work + 4 * depth
    pairs = rows + 2 * depth * _ROWS
    scores = pairs + _pair_bytes(width) * (_ROWS // 2)
    weights = scores + _SCORES
    scales = weights + _WEIGHTS
    factors, largest, total = scales + _SCALES, scales + _SCALES + 128, scales + _SCALES + 192
    found, addresses = factors + 256, factors + 256 + _FOUND
    queries = addresses + ADDRESSES

    first_head = all_heads * token + n_heads * group
    pack_16(
        a.queries + 4 * depth * first_head, 4 * depth, 0, n_heads, depth, np.float32(_LOG2_E), addresses, rows, _LANES
    )
    round_16(rows, _LANES, depth, queries, _LANES, scales)
    scale = load_f32x16(scales)
    store_f32x16(largest, splat_f32x16(np.float32(LOWEST)))
    store_f32x16(total, zero_f32x16())
    stride = bytes_of_partial(width)
    partials = a.partials + stride * (all_heads * (MAX_SPLITS * token + split) + n_heads * group)
    for h in range(n_heads):
        for i in range(0, width, 16):
            store_f32x16(partials + stride * h + VALUES_AT + 4 * i, zero_f32x16())

    n_seen = seen_by(a, token)
    length = split_length(n_seen)
    end = min(n_seen, length * (split + 1))
    for first in range(length * split, end, _ROWS):
        n = min(_ROWS, end - first)
        find_rows(a, token, a.key_slot, a.key_row, a.key_group * group, first, n, found)
        _round_rows(a, found, n, halves, rows, pairs, scales)
        for i in range(0, n, 16):
            multiply_16(rows + 2 * depth * i, 2 * depth, scales + 4 * i, queries, depth // 2, scores + _LANES * i)
        old, new = weigh(scores, _LANES, n, scales, scale, largest, total, MOST_SUM_OF_ROWS, weights)
        store_f32x16(factors, old)
        store_f32x16(factors + 64, new)
        n_pairs, at = (n + 1) // 2, partials + VALUES_AT
        fold_rows(n_heads, weights, pairs, _pair_bytes(width), n_pairs, factors, at, stride, width)
    for h in range(n_heads):
        partial = PARTIAL(partials + stride * h)
        partial.maximum = load_f32(largest + 4 * h) * np.float32(1 / _LOG2_E)
        partial.sum = load_f32(total + 4 * h)


@kernel("void(int64, int64, int64)", LEVEL)
def _run_attend(phase, item, work):
    """One group of a token's heads over one split, or more if there are more than items."""
    a = ATTEND(phase)
    group, rest, n_tokens = item % a.n_groups, item // a.n_groups, tokens_of(a)
    token, at_once = rest % n_tokens, a.phase.n_items // (a.n_groups * n_tokens)
    for split in range(rest // n_tokens, splits_of(seen_by(a, token)), at_once):
        _attend_split(a, group, token, split, work)


def fits(heads: Heads) -> bool:
    """Whether rows are key and value of so many heads that rounding them pays, and the CPU has the products."""
    is_shared = heads.key_slot == heads.value_slot and not heads.key_group and heads.key_width >= heads.value_width
    return isa.has(LEVEL) and is_shared and not heads.key_codes and FEWEST_HEADS <= heads.per_group <= MOST_HEADS


def integer_attend_phase(heads: Heads, queries: int, partials: int) -> Phase:
    """As attention.attend_phase, of heads that fit."""
    assert fits(heads)
    depth, width = heads.query_width, padded_lanes(heads.value_width)
    of_rows = 4 * depth + 2 * depth * _ROWS + (4 * width + 64) * (_ROWS // 2)
    work_bytes = of_rows + _SCORES + _WEIGHTS + _SCALES + 256 + _FOUND + ADDRESSES + _LANES * depth // 2
    return replace(attend_phase(heads, queries, partials), run=_run_attend, work_bytes=work_bytes)
