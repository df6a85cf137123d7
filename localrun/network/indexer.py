"""The indexer of DeepSeek-V3.2's sparse attention: which tokens each query attends to.

Every token leaves one key, shared by all the indexer's heads. A query's score of a cached token is the sum over heads
of weight * relu(query . key), but for a factor that changes no order; the index_topk tokens with the largest scores are
chosen, of equals the first.

Letters: T new tokens, S tokens in the cache (the new ones included), D hidden_size, Q q_lora_rank, I the indexer's
heads, d index_head_dim, K index_topk.
Source: transformers 5.24, models/deepseek_v32 and glm_moe_dsa; llama.cpp 0c1e57098, src/models/deepseek32.cpp.
"""

from __future__ import annotations

import torch
from torch.nn.functional import layer_norm

from localrun.models import names
from localrun.models.config import Config
from localrun.models.indexer import KEY_EPS
from localrun.network.rope import Rope
from localrun.network.weight_source import WeightSource


class Choice:
    """What layers with an indexer have chosen last, for layers without one.

    Attributes:
        rows_TK: int32 (T, K), positions of the tokens that each query attends to, in no order; a query that sees no
            more than K has all of them, and nothing behind. None while no query sees more than K tokens: all attend
            to all.
    """

    def __init__(self) -> None:
        self.rows_TK: torch.Tensor | None = None


class Indexer:
    """The indexer of one layer."""

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: Rope):
        def name(module: str) -> str:
            return names.layer(config.architecture, index, f"self_attn.indexer.{module}")

        self.config, self.weights, self.rope = config, weights, rope
        self.wq_b, self.wk, self.weights_proj = map(weights.linear, map(name, ("wq_b", "wk", "weights_proj")))
        self.k_norm, self.k_norm_bias = weights.vector(name("k_norm")), weights.vector(name("k_norm.bias"))

    def keys(self, x_TD: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """float32 (T, d): what the cache is to keep of each token."""
        k_Td = layer_norm(self.wk(x_TD), (self.config.index_head_dim,), self.k_norm, self.k_norm_bias, KEY_EPS)
        return self._rotated(k_Td[:, None], turns)[:, 0]

    def choose(
        self, x_TD: torch.Tensor, q_TQ: torch.Tensor, keys_Sd: torch.Tensor, turns: torch.Tensor
    ) -> torch.Tensor | None:
        """Choice.rows_TK of the last T of the cached tokens.

        Args:
            q_TQ: the latents of their queries, normed.
            keys_Sd: the cache's rows, float16 or float32.
        """
        if keys_Sd.shape[0] <= self.config.index_topk:
            return None
        q_TId, weights_TI = self.queries(q_TQ, turns), self.weights_proj(x_TD)
        return self.weights.choose_rows(q_TId, weights_TI, keys_Sd, self.config.index_topk)

    def queries(self, q_TQ: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """float32 (T, I, d) of the latents of attention's queries, normed."""
        return self._rotated(self.wq_b(q_TQ).unflatten(1, (self.config.index_n_heads, -1)), turns)

    def _rotated(self, x_THd: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """The first R of each head's values rotated."""
        rope_dim, by_halves = self.config.qk_rope_head_dim, self.config.indexer_rope == "halves"
        rotated = self.rope.rotate(x_THd[..., :rope_dim], turns, by_halves)
        return torch.cat([rotated, x_THd[..., rope_dim:]], -1)


def choose_rows(q_TId: torch.Tensor, weights_TI: torch.Tensor, keys_Sd: torch.Tensor, top_k: int) -> torch.Tensor:
    """int32 (T, K), in rising order: the rows that each of the last T of S tokens chooses. Slow, and obvious.

    Where a token sees no more than K rows they come first, and -1 behind.
    """
    n_tokens, n_cached = q_TId.shape[0], keys_Sd.shape[0]
    rows_TK = torch.full((n_tokens, top_k), -1, dtype=torch.int32)
    for t in range(n_tokens):
        seen = n_cached - n_tokens + t + 1
        scores_IS = (q_TId[t] @ keys_Sd[:seen].float().T).relu()
        scores_S = (weights_TI[t][:, None] * scores_IS).sum(0)
        best = scores_S.sort(descending=True, stable=True).indices[:top_k].sort().values
        rows_TK[t, : len(best)] = best
    return rows_TK
