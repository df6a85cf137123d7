"""Quantised matrices in VRAM, modules as network/weight_source.py says: the file's blocks, expanded inside kernels.

Letters: T tokens, G groups (attention heads).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.matrix import PADDING, Matrix, upload
from quant.matrix import QuantMatrix


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """float32 (T, G, in) -> (T, G, out): each matrix times its part of every token."""
    x = x.to(torch.float32).contiguous()
    if x.shape[0] == 0:
        return x.new_empty(0, matrix.n_groups, matrix.n_rows)
    return (gemv if x.shape[0] <= gemv.MOST_TOKENS else gemm).multiply(matrix, x)


class Linear:
    """y = W x for one matrix (out, in)."""

    def __init__(self, weight: QuantMatrix, device: torch.device):
        self.matrix = upload(weight, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, in) -> (T, out)."""
        return multiply(self.matrix, x[:, None]).squeeze(1)


class Joined:
    """Matrices that read one input: those of a format lie one after the other, and few tokens take one launch each."""

    def __init__(self, linears: Sequence[Linear]):
        """Moves their blocks; they stay what they are."""
        formats = dict.fromkeys(linear.matrix.layout.name for linear in linears)
        self._members = [[i for i, each in enumerate(linears) if each.matrix.layout.name == name] for name in formats]
        self._stacks = [_stack([linears[i] for i in members]) for members in self._members]
        self._sizes = [linear.matrix.n_rows for linear in linears]

    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """float32 (T, in) -> of each (T, out); of several tokens these are columns of something wider."""
        found: dict[int, torch.Tensor] = {}
        for members, matrix in zip(self._members, self._stacks, strict=True):
            rows = multiply(matrix, x[:, None]).squeeze(1).split([self._sizes[i] for i in members], 1)
            found |= zip(members, rows, strict=True)
        return [found[i] for i in range(len(found))]


def _stack(linears: Sequence[Linear]) -> Matrix:
    """All rows as one matrix; each linear's are a part of its memory from then on."""
    matrices = [linear.matrix for linear in linears]
    data = torch.cat([matrix.data[: matrix.group_bytes] for matrix in matrices] + [matrices[-1].data[-PADDING:]])
    first = 0
    for linear, matrix in zip(linears, matrices, strict=True):
        linear.matrix = replace(matrix, data=data[first:])
        first += matrix.group_bytes
    return replace(matrices[0], data=data, n_rows=sum(matrix.n_rows for matrix in matrices))


class HeadLinear:
    """One matrix a head: W (G, out, in)."""

    may_expand = True

    def __init__(self, weight: QuantMatrix, device: torch.device):
        self.matrix = upload(weight, device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, in) -> (T, G, out): W[g] x[t, g]."""
        return multiply(self.matrix, x)

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, out) -> (T, G, in): W[g]^T x[t, g]."""
        x = x.to(torch.float32).contiguous()
        if x.shape[0] <= gemv.MOST_TOKENS:
            return gemv.multiply_transposed(self.matrix, x)
        return torch.einsum("tgo,goi->tgi", x, self.dense(0, self.matrix.n_groups))

    def dense(self, first: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(count, out, in): the matrices of heads first..first+count, for one product over many tokens."""
        matrix = self.matrix
        rows = torch.arange(first * matrix.n_rows, (first + count) * matrix.n_rows, device=matrix.data.device)
        return gemv.expand_rows(matrix, rows, dtype).view(count, matrix.n_rows, matrix.n_cols)


class Embedding:
    """Rows of a matrix by token id."""

    def __init__(self, weight: QuantMatrix, device: torch.device):
        self.matrix = upload(weight, device)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) on the device -> float32 (T, D)."""
        return gemv.expand_rows(self.matrix, ids)
