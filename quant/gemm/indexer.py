"""Which cached rows one query attends to: scores of all keys by an indexer's heads, and the rows of the largest.

A score is the sum over heads of weight * relu(query . key); what all of them are divided by in models changes no order,
and is left out. Heads are the lanes of all vectors (lanes.py). A score's
rank is a whole number of 32 bits that grows with it. The largest top_k are found by their ranks' digits, 11, 11 and 10
bits: a histogram of a digit tells which value of it the last chosen rank has; rows above are chosen, those with that
value go on to the next digit. Equal ranks are chosen from the front, so the choice depends on the scores alone.

Where the machine has products of bytes, all keys are scored by them first (index_bytes.py). Rows above the last chosen
one by more than the margin are chosen, those below it by more are not; the rest is ranked in float32. So the choice is
float32's.
Source of the scores: transformers 5.24, models/deepseek_v32, class DeepseekV32Indexer.
"""

import numpy as np

from quant.gemm.index_bytes import KEYS_TOGETHER
from quant.gemm.lanes import LANES, ROW, add_matmul, clear, pack_lanes
from quant.simd.floats import fma, hsum, maximum
from quant.simd.memory import (
    bits_to_f32,
    load_f32,
    load_f32x16,
    load_i32,
    load_i64,
    load_u32,
    store_f32,
    store_i32,
    store_i64,
)
from quant.simd.vectors import copy, expand_f16
from quant.target.jit import inline

HISTOGRAM_BYTES = 8 << 11
BEHIND = 16  # int32 behind the top_k of a choice, that choosing writes to
_DIGITS, _BITS, _SHIFT = 3, 11, 21  # of ranks; the first digit's
_SIGN = 1 << 31


def score_bytes(head_dim: int) -> int:
    """Work memory of rank_keys."""
    return KEYS_TOGETHER * (4 * head_dim + ROW)


def blocks_of(n_heads: int) -> int:
    """Blocks of LANES heads."""
    return -(-n_heads // LANES)


@inline
def pack_heads(queries, weights, n_heads, head_dim, addresses, packed, packed_weights):
    """A query float32 (n_heads, head_dim) and its weights (n_heads,) as lanes; weights are 0 behind them."""
    for block in range((n_heads + LANES - 1) // LANES):
        at = packed + ROW * head_dim * block
        pack_lanes(queries, 4 * head_dim, LANES * block, n_heads, head_dim, np.float32(1.0), addresses, at)
        for lane in range(LANES):
            head, weight = LANES * block + lane, np.float32(0.0)
            if head < n_heads:
                weight = load_f32(weights + 4 * head)
            store_f32(packed_weights + ROW * block + 4 * lane, weight)


@inline
def _rank(score):
    """Of a float32's bits: NaN above all, 0 of either sign alike."""
    if score == _SIGN:
        score = 0
    return (_SIGN << 1) - 1 - score if score >= _SIGN else score + _SIGN


@inline
def to_rank(at):
    """The float32 score at this address to its rank."""
    store_i32(at, _rank(load_u32(at)))


@inline
def _score(rank):
    """The float32 of a rank."""
    return bits_to_f32(rank - _SIGN if rank >= _SIGN else (_SIGN << 1) - 1 - rank)


@inline
def expand_keys(keys, row_bytes, is_f16, positions, n, head_dim, work):
    """n rows of float16 or float32 at `keys` as float32 (n, head_dim): the first, or those at int32 positions."""
    for i in range(n):
        row = keys + row_bytes * (load_i32(positions + 4 * i) if positions != 0 else i)
        if is_f16:
            expand_f16(row, head_dim, head_dim, work + 4 * head_dim * i)
        else:
            copy(row, head_dim, work + 4 * head_dim * i)


@inline
def score_keys(packed, packed_weights, n_heads, head_dim, n, work, scores):
    """scores[i] of n expanded keys, float32; n is KEYS_TOGETHER at most."""
    n_blocks, products = (n_heads + LANES - 1) // LANES, work + 4 * head_dim * KEYS_TOGETHER
    for i in range(n):
        store_f32(scores + 4 * i, np.float32(0.0))
    for block in range(n_blocks):
        clear(products, n)
        add_matmul(n, work, 4 * head_dim, 4, packed + ROW * head_dim * block, head_dim, products)
        weights = packed_weights + ROW * block
        low, high = load_f32x16(weights), load_f32x16(weights + 64)
        for i in range(n):
            at = products + ROW * i
            score = fma(maximum(load_f32x16(at), 0), low, maximum(load_f32x16(at + 64), 0) * high)
            store_f32(scores + 4 * i, load_f32(scores + 4 * i) + hsum(score))


@inline
def rank_keys(packed, packed_weights, n_heads, head_dim, keys, row_bytes, is_f16, positions, n_keys, work, ranks):
    """ranks[i] = the rank of a key's score, uint32, for n_keys rows of expand_keys."""
    for first in range(0, n_keys, KEYS_TOGETHER):
        n, out = min(KEYS_TOGETHER, n_keys - first), ranks + 4 * first
        if positions != 0:
            expand_keys(keys, row_bytes, is_f16, positions + 4 * first, n, head_dim, work)
        else:
            expand_keys(keys + row_bytes * first, row_bytes, is_f16, 0, n, head_dim, work)
        score_keys(packed, packed_weights, n_heads, head_dim, n, work, out)
        for i in range(n):
            to_rank(out + 4 * i)


@inline
def clear_histogram(histogram):
    """Zeros."""
    for at in range(histogram, histogram + HISTOGRAM_BYTES, 8):
        store_i64(at, 0)


@inline
def _count(at):
    store_i64(at, load_i64(at) + 1)


@inline
def count_first_digits(ranks, n, histogram):
    """Add the first digits of n ranks to an int64 histogram."""
    for i in range(n):
        _count(histogram + 8 * (load_u32(ranks + 4 * i) >> _SHIFT))


@inline
def _last_digit(histogram, last, wanted):
    """The digit, from `last` downwards, with which so many are reached, and how many of that digit are wanted."""
    while load_i64(histogram + 8 * last) < wanted:
        wanted -= load_i64(histogram + 8 * last)
        last -= 1
    return last, wanted


@inline
def split_rows(ranks, n, histogram, top_k, margin, positions, chosen):
    """Of n rows by their ranks: those more than the margin above the last of the top_k, and those within it.

    chosen, positions: int32, with room for BEHIND more, and for n; returns how many rows are in either. histogram: of
    the ranks' first digits; it is written over.
    """
    first, wanted = _last_digit(histogram, (1 << _BITS) - 1, top_k)
    clear_histogram(histogram)
    for i in range(n):
        rank = load_u32(ranks + 4 * i)
        if rank >> _SHIFT == first:
            _count(histogram + 8 * ((rank >> (_SHIFT - _BITS)) & ((1 << _BITS) - 1)))
    second, _ = _last_digit(histogram, (1 << _BITS) - 1, wanted)
    least = (first << _SHIFT) | (second << (_SHIFT - _BITS))  # the last one's rank, but for its last digit
    most = least + (1 << (_SHIFT - _BITS)) - 1
    low, high = _score(least) - margin, _score(most) + margin
    n_chosen = n_within = 0
    for i in range(n):
        score = _score(load_u32(ranks + 4 * i))
        store_i32(chosen + 4 * n_chosen, i)
        store_i32(positions + 4 * n_within, i)
        is_above, is_below = score > high, score < low
        n_chosen += is_above
        n_within += not (is_above or is_below)
    return n_chosen, n_within


@inline
def choose_rows(ranks, n, histogram, top_k, has_positions, positions, chosen):
    """chosen = the top_k of n >= top_k rows that have the largest ranks; int32, with room for BEHIND more.

    histogram: of the ranks' first digits. It, the ranks and positions, int32 (n,), are written over. has_positions:
    rows are what those say, and not the numbers of the ranks.
    """
    n_chosen = 0
    for digit in range(_DIGITS):
        shift = max(0, _SHIFT - _BITS * digit)
        mask = (1 << (_BITS if digit < _DIGITS - 1 else _SHIFT - _BITS)) - 1
        if digit > 0:
            clear_histogram(histogram)
            for i in range(n):
                _count(histogram + 8 * ((load_u32(ranks + 4 * i) >> shift) & mask))
        last, _ = _last_digit(histogram, mask, top_k - n_chosen)  # the digit of the last chosen rank
        n_left, is_numbered = 0, digit == 0 and not has_positions
        for i in range(n):
            rank = load_u32(ranks + 4 * i)
            row, value = i if is_numbered else load_u32(positions + 4 * i), (rank >> shift) & mask
            store_i32(chosen + 4 * n_chosen, row)
            n_chosen += value > last
            store_i32(ranks + 4 * n_left, rank)
            store_i32(positions + 4 * n_left, row)
            n_left += value == last
        n = n_left
    for i in range(top_k - n_chosen):
        store_i32(chosen + 4 * (n_chosen + i), load_u32(positions + 4 * i))
