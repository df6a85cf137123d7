"""What is right of a file's matrices: some of their rows, expanded by the CPU. Letters: R rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from localrun.gpu.proof.subject import Subject
from quant.matrix import QuantMatrix
from quant.ops import linear
from quant.threads.pool import Pool


def sample(n: int, most: int) -> np.ndarray:
    """Up to `most` of n: the first third, the last third, and some between."""
    if n <= most:
        return np.arange(n)
    third = most // 3
    between = np.random.default_rng(n).choice(np.arange(third, n - third), most - 2 * third, replace=False)
    return np.concatenate([np.arange(third), np.sort(between), np.arange(n - third, n)])


def expanded(pool: Pool, weight: QuantMatrix, group: int, rows: np.ndarray) -> torch.Tensor:
    """Float64 (rows, n_cols) of a group, by the CPU."""
    out = torch.empty(len(rows), weight.n_cols)
    linear.expand_rows(pool, weight, np.ascontiguousarray(group * weight.n_rows + rows, np.int64), out.data_ptr())
    return out.double()


def largest_of_32(w: torch.Tensor) -> torch.Tensor:
    """|w| (R, n_cols), each the largest of its 32 columns."""
    n_cols = w.shape[-1]
    padded = torch.nn.functional.pad(w.abs(), (0, -n_cols % 32))
    return padded.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)[..., :n_cols]


def numbers_of_tokens(subject: Subject) -> Iterator[tuple[int, bool]]:
    """Numbers of tokens, and whether they are few."""
    yield from ((n, True) for n in subject.effort.few)
    yield from ((n, False) for n in subject.effort.many)
