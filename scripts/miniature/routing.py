"""Which experts a token goes to, the order that puts each expert's tokens together, and the bias that balances them.

Routing as transformers' DeepseekV3TopkRouter and section 2.1.2 of arXiv 2412.19437: sigmoid affinities; the groups are
chosen by the sum of their two best biased affinities, the experts by the biased affinity; the weights are affinities
without the bias. N tokens, D hidden_size, E experts, K experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from miniature.config import Config


class Router(nn.Module):
    """The gate of one layer, float32 throughout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.load = torch.zeros(config.n_routed_experts, dtype=torch.int64)  # tokens by expert, of the last batch

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights (N, K) float32, experts (N, K) int64) for x (N, D); the load is left in self.load."""
        c = self.config
        affinity = F.linear(x, self.weight).sigmoid()
        experts = self._choose(affinity.detach() + self.e_score_correction_bias)
        weights = affinity.gather(1, experts)
        if c.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        self.load = torch.bincount(experts.flatten(), minlength=c.n_routed_experts)
        return weights * c.routed_scaling_factor, experts

    def _choose(self, biased: torch.Tensor) -> torch.Tensor:
        c = self.config
        groups = biased.unflatten(1, (c.n_group, -1))
        best_groups = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1, sorted=False).indices
        shut = torch.ones(len(biased), c.n_group, 1, dtype=torch.bool).scatter_(1, best_groups[..., None], False)
        open_experts = groups.masked_fill(shut, float("-inf")).flatten(1)
        return open_experts.topk(c.num_experts_per_tok, dim=-1, sorted=False).indices

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Moves the bias by `rate` against the last batch's load: up where it was under the mean, down where over."""
        self.e_score_correction_bias += rate * torch.sign(self.load.float().mean() - self.load)

    def max_violation(self) -> float:
        """(largest load - mean load) / mean load in the last batch, V3's MaxVio; 0 is perfect balance."""
        load = self.load.float()
        return float(load.max() / load.mean() - 1)


class _Dispatch(torch.autograd.Function):
    """Rows of tokens (N, D) to rows of (token, choice) pairs in the order of experts (N*K, D)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, n_choices: int) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.n_choices = n_choices
        return x.index_select(0, order // n_choices)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).unflatten(0, (-1, ctx.n_choices)).sum(1), None, None, None


class _Return(torch.autograd.Function):
    """Rows in the order of experts back into the order of (token, choice) pairs."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


class Dispatch:
    """The permutation that sorts (token, choice) pairs by expert, there and back, without atomic additions.

    Attributes:
        n_rows: pairs of each expert.
    """

    def __init__(self, experts: torch.Tensor, load: torch.Tensor) -> None:
        self.n_choices = experts.shape[1]
        self.n_rows: list[int] = load.tolist()
        self._order = experts.flatten().argsort(stable=True)
        self._inverse = torch.empty_like(self._order).scatter_(0, self._order, torch.arange(len(self._order)))

    def sort(self, x: torch.Tensor) -> torch.Tensor:
        """(N*K, D) from x (N, D)."""
        return _Dispatch.apply(x, self._order, self._inverse, self.n_choices)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(N, D): the sum over choices of y (N*K, D) in the order of experts times weights (N, K)."""
        pairs = _Return.apply(y, self._order, self._inverse).unflatten(0, (-1, self.n_choices))
        return (pairs * weights[..., None]).sum(1)
