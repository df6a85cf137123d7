"""Where torch tensors meet the CPU kernels: quantised matrices as callables over float32 tensors.

The only module that passes torch memory to quant. Weights stay in the file's map, in their blocks; nothing here keeps
a dequantised copy. Letters: T tokens, G groups (attention heads), E experts, K experts per token.
"""

from collections.abc import Callable

import torch

from quant import experts as quant_experts
from quant import linear as quant_linear
from quant.linear import Weight
from quant.pool import Pool


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """float32 in C order, as the kernels read it."""
    return x.to(torch.float32).contiguous()


class Linear:
    """y = W x for one matrix (out, in)."""

    def __init__(self, pool: Pool, weight: Weight):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, in) -> (T, out)."""
        x = _as_rows(x)
        out = torch.empty(x.shape[0], self.weight.n_rows)
        quant_linear.multiply(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out


class HeadLinear:
    """One matrix a head: W (G, out, in)."""

    def __init__(self, pool: Pool, weight: Weight):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, in) -> (T, G, out): W[g] x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_rows)
        quant_linear.multiply(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, out) -> (T, G, in): W[g]^T x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_cols)
        quant_linear.multiply_transposed(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def dense(self, first: int, count: int) -> torch.Tensor:
        """float32 (count, out, in): the matrices of heads first..first+count, for one product over many tokens."""
        weight = self.weight
        rows = torch.arange(first * weight.n_rows, (first + count) * weight.n_rows)
        out = torch.empty(count, weight.n_rows, weight.n_cols)
        quant_linear.expand_rows(self.pool, weight, rows.numpy(), out.data_ptr())
        return out


class Embedding:
    """Rows of a matrix by token id."""

    def __init__(self, pool: Pool, weight: Weight):
        self.pool, self.weight = pool, weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> float32 (T, D)."""
        out = torch.empty(ids.shape[0], self.weight.n_cols)
        quant_linear.expand_rows(self.pool, self.weight, ids.numpy(), out.data_ptr())
        return out


class Experts:
    """The routed experts of a layer."""

    def __init__(self, pool: Pool, experts: quant_experts.Experts):
        self.pool, self.experts = pool, experts

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Callable[[], torch.Tensor]:
        """float32 (T, D), expert ids int64 (T, K) and float32 weights (T, K) -> weighted sum, float32 (T, D).

        An id of -1 stands for an expert that is not here. The sum comes when the result is called: other kinds of
        experts compute until then.
        """
        x = _as_rows(x)
        out = torch.empty_like(x)
        quant_experts.run(self.pool, self.experts, x.data_ptr(), ids.numpy(), weights.numpy(), out.data_ptr())
        return lambda: out
