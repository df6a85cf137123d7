"""Slices of experts: how many blocks of inner columns each rank has. Pure: no files, no devices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def by_sizes(n_blocks: int, sizes: Sequence[float]) -> list[int]:
    """Blocks of each share, one at least, as near to these sizes as whole ones allow."""
    n_shares = len(sizes)
    ends = np.round(np.cumsum(sizes) / np.sum(sizes) * n_blocks).astype(int)
    for i in range(n_shares):
        ends[i] = max(ends[i], ends[i - 1] + 1 if i else 1)
    for i in range(n_shares - 1, -1, -1):
        ends[i] = min(ends[i], n_blocks - (n_shares - 1 - i))
    return np.diff(ends, prepend=0).tolist()


def by_time(n_blocks: int, block_s: Sequence[float], before_s: Sequence[float]) -> list[int]:
    """Blocks of each rank, one at least: each block goes to the rank that would be done with it first.

    So the last of them is done as early as can be. Of several that would be done at once it is the first.

    Args:
        block_s: seconds that each rank takes for a block.
        before_s: what each one's take besides: of rank 0 the shared experts, of others their messages there and back.
    """
    counts = [1] * len(block_s)
    for _ in range(n_blocks - len(counts)):
        done_s = [b + (n + 1) * s for b, n, s in zip(before_s, counts, block_s, strict=True)]
        counts[done_s.index(min(done_s))] += 1
    return counts
