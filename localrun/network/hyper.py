"""Hyper-connections: a residual of several streams, which each layer mixes anew (DeepSeek-V4).

A token's streams are weighed into what a sublayer reads; its output goes to all of them, weighed again, beside their
mixture by a matrix whose rows and columns sum to 1. All of these weights follow from the streams themselves.

Letters: T tokens, n streams, D hidden_size.
Source: DeepSeek-V4's report, section 2.2; Manifold-Constrained Hyper-Connections (arXiv 2512.24880); transformers 5.24,
models/deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import rms_norm

from localrun.models.config import Config
from localrun.network.weight_source import WeightSource

Return = Callable[[torch.Tensor], torch.Tensor]  # a sublayer's output, float32 (T, D) -> the streams after it (T, n, D)


class HyperConnection:
    """The weights around one sublayer."""

    def __init__(self, config: Config, weights: WeightSource, name: Callable[[str], str]):
        """name: the GGUF name of a part, "fn", "base" or "scale"."""
        self.config, self.mix_streams = config, weights.mix_streams
        self.fn = weights.linear(name("fn"))
        self.base, self.scale = weights.vector(name("base")), weights.vector(name("scale"))

    def __call__(self, streams_TnD: torch.Tensor, norm_D: torch.Tensor) -> tuple[torch.Tensor, Return]:
        """float32 (T, n, D) -> what the sublayer reads, (T, D), normed by these weights, and where its output goes."""
        computed_Tm = self.fn(streams_TnD.flatten(1))
        return self.mix_streams(computed_Tm, self.scale, self.base, streams_TnD, norm_D, self.config)


class HyperHead(HyperConnection):
    """What the model's head reads of the streams, before its norm."""

    def __call__(self, streams_TnD: torch.Tensor) -> torch.Tensor:
        """float32 (T, n, D) -> (T, D)."""
        computed_Tn = _as_of_normed(self.fn(streams_TnD.flatten(1)), streams_TnD, self.config)
        return _weighed((computed_Tn * self.scale + self.base).sigmoid() + self.config.hc_eps, streams_TnD)


def mix_streams(
    computed_Tm: torch.Tensor,
    scale: torch.Tensor,
    base_m: torch.Tensor,
    streams_TnD: torch.Tensor,
    norm_D: torch.Tensor,
    config: Config,
) -> tuple[torch.Tensor, Return]:
    """As HyperConnection, of what fn has computed, (T, 2 n + n * n), and the scales of the three parts of it."""
    n, computed_Tm = config.hc_mult, _as_of_normed(computed_Tm, streams_TnD, config)
    parts, bases = computed_Tm.split([n, n, n * n], -1), base_m.split([n, n, n * n])
    pre, post, mixed = (x * factor + base for x, factor, base in zip(parts, scale, bases, strict=True))
    pre_Tn, post_Tn = pre.sigmoid() + config.hc_eps, 2 * post.sigmoid()
    mix_Tnn = _doubly_stochastic(mixed.unflatten(-1, (n, n)), config)

    def expand(y_TD: torch.Tensor) -> torch.Tensor:
        return post_Tn[..., None] * y_TD[:, None] + mix_Tnn.mT @ streams_TnD

    return rms_norm(_weighed(pre_Tn, streams_TnD), norm_D.shape, norm_D, config.rms_norm_eps), expand


def _as_of_normed(computed_Tm: torch.Tensor, streams_TnD: torch.Tensor, config: Config) -> torch.Tensor:
    """What fn would compute of all streams as one normed vector: as it is linear, the norm's factor may come last."""
    return computed_Tm * (streams_TnD.square().mean((1, 2)) + config.rms_norm_eps).rsqrt()[:, None]


def _doubly_stochastic(mixed_Tnn: torch.Tensor, config: Config) -> torch.Tensor:
    """Rows and columns normed in turn (Sinkhorn and Knopp); the first norm of rows is a softmax."""
    eps = config.hc_eps
    m = mixed_Tnn.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(config.hc_sinkhorn_iters - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def _weighed(weights_Tn: torch.Tensor, streams_TnD: torch.Tensor) -> torch.Tensor:
    return sum(weights_Tn[:, i, None] * streams_TnD[:, i] for i in range(weights_Tn.shape[1]))
