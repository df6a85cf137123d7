"""What attention of a step has in common where heads are lanes: up to 16 that share each cached row, key and value.

Arguments, splits and results are attention.py's. A worker packs the queries of a token's group once, when it takes the
first split of theirs. Scores are to the base of 2.
"""

import math

import numpy as np

from quant.decode.attention import ATTEND, PARTIAL, SPLIT_UNIT, VALUES_AT, bytes_of_partial, seen_by
from quant.decode.program import MAX_SPLITS, MOST_TOKENS, padded, split_begin
from quant.gemm.lanes import LANE_ROW, LOWEST, pack_16
from quant.simd.floats import splat_f32x16, zero_f32x16
from quant.simd.memory import load_f32, load_i64, store_f32x16, store_i64
from quant.target.jit import inline, kernel

LEVEL = "avx512_vnni"
FEWEST_HEADS, MOST_HEADS = 8, 16  # that share rows: to be worth packing them; lanes
_LOG2_E = math.log2(math.e)

# The state of a split: rows of lanes. Of factors there are two, of earlier sums and of a chunk's.
LARGEST, TOTAL, FACTORS, STATE_BYTES = 0, LANE_ROW, 2 * LANE_ROW, 4 * LANE_ROW


def flags_bytes(n_groups: int) -> int:
    """Of a worker's flags: which tokens' groups it has packed the queries of."""
    return padded(8 * MOST_TOKENS * n_groups)


@kernel("void(int64, int64)", LEVEL)
def no_queries(phase, work):
    """To prepare: none are packed."""
    for i in range(MOST_TOKENS * ATTEND(phase).n_groups):
        store_i64(work + 8 * i, 0)


@inline
def behind_flags(a, work):
    """The address behind a worker's flags."""
    return work + (8 * MOST_TOKENS * a.n_groups + 63) // 64 * 64


@inline
def take_flag(flags, index):
    """Whether it is 0; it no longer is."""
    is_first = load_i64(flags + 8 * index) == 0
    store_i64(flags + 8 * index, 1)
    return is_first


@inline
def pack_queries(a, index, addresses, rows):
    """A group's queries, of the index-th of all tokens' groups: float32 rows of lanes, a row a column."""
    n_heads, depth = a.per_group, a.query_width
    queries = a.queries + 4 * depth * n_heads * index
    pack_16(queries, 4 * depth, 0, n_heads, depth, np.float32(_LOG2_E), addresses, rows, LANE_ROW)


@inline
def begin_heads(a, group, token, split, state):
    """Nothing is summed yet. Returns the address of the first head's result, and which rows are the split's."""
    n_heads, width = a.per_group, a.padded_width
    store_f32x16(state + LARGEST, splat_f32x16(np.float32(LOWEST)))
    store_f32x16(state + TOTAL, zero_f32x16())
    stride = bytes_of_partial(width)
    partials = a.partials + stride * (a.n_groups * n_heads * (MAX_SPLITS * token + split) + n_heads * group)
    for h in range(n_heads):
        for i in range(0, width, 16):
            store_f32x16(partials + stride * h + VALUES_AT + 4 * i, zero_f32x16())
    n_seen = seen_by(a, token)
    return partials, split_begin(n_seen, split, SPLIT_UNIT), split_begin(n_seen, split + 1, SPLIT_UNIT)


@inline
def end_heads(a, partials, state):
    """Each head's maximum and sum to its result."""
    for h in range(a.per_group):
        partial = PARTIAL(partials + bytes_of_partial(a.padded_width) * h)
        partial.maximum = load_f32(state + LARGEST + 4 * h) * np.float32(1 / _LOG2_E)
        partial.sum = load_f32(state + TOTAL + 4 * h)
