"""Feed-forward layers: the dense one, and the mixture of routed and shared experts with its router.

Letters: T tokens, D hidden_size, E routed experts, g expert groups, K experts per token.
Source: DeepSeek-V3 (arXiv 2412.19437, eq. 12-16), deepseek-ai/DeepSeek-V3 @9b4e978 inference/model.py (Gate), and
modeling_deepseek.py of DeepSeek-V2 (group_limited_greedy).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import silu, softplus

from localrun.models import names
from localrun.models.config import Config
from localrun.network.weight_source import Finish, WeightSource, biased_linear
from quant.decode.router import SMALLEST_SUM
from quant.simd.gated import Activation


def gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """What quant.simd.gated makes of gate and up, float32 (T, I)."""
    alpha, limit = activation.alpha, activation.limit
    if limit == 0:
        return silu(gate) * up
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + activation.offset) * gate * torch.sigmoid(alpha * gate)


class MLP:
    """down(silu(gate x) * up x), or with the model's bounds."""

    def __init__(self, config: Config, weights: WeightSource, index: int, prefix: str):
        name = partial(names.layer, config.architecture, index)
        parts = [name(f"{prefix}.{part}_proj") for part in ("gate", "up", "down")]
        self.gate_proj, self.up_proj, self.down_proj = map(weights.linear, parts)
        self._joined, self.activation = weights.joined_mlp(*parts), weights.activation
        self.gated = weights.gated

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """float32 (T, D) -> (T, D)."""
        if self._joined is not None:
            return self._joined(x_TD)
        return self.down_proj(self.gated(self.activation, self.gate_proj(x_TD), self.up_proj(x_TD)))

    def begin(self, x_TD: torch.Tensor, ids_T: torch.Tensor | None = None) -> Finish:
        """As MoE.begin: there is nothing to wait for."""
        out_TD = self(x_TD)
        return lambda: out_TD


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config, ids_TK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts each token goes to: ids int64 (T, K), those that are given if any are, and weights float32 (T, K).

    The bias moves the choice and never the weights. Groups are ranked as the model was trained: by their best expert
    (V2, softmax), or by the sum of their two best (V3, sigmoid with bias).
    """
    c = config
    affinity_TE = _AFFINITY[c.scoring_func](logits_TE)
    if ids_TK is not None:
        return ids_TK, _weights_of(ids_TK, affinity_TE, c)
    choice_TE = affinity_TE if bias_E is None else affinity_TE + bias_E
    if c.n_group > 1:
        choice_TE = _keep_best_groups(choice_TE, c)
    ids_TK = choice_TE.topk(c.num_experts_per_tok, dim=-1).indices
    return ids_TK, _weights_of(ids_TK, affinity_TE, c)


_AFFINITY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "softmax_after_topk": lambda logits: logits,
    "sqrtsoftplus": lambda logits: softplus(logits).sqrt(),
}


def _weights_of(ids_TK: torch.Tensor, affinity_TE: torch.Tensor, config: Config) -> torch.Tensor:
    """float32 (T, K): the chosen experts' weights."""
    c, weights_TK = config, affinity_TE.gather(-1, ids_TK)
    if c.scoring_func == "softmax_after_topk":
        weights_TK = weights_TK.softmax(-1)
    if c.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(SMALLEST_SUM)
    return weights_TK * c.routed_scaling_factor


def _keep_best_groups(choice_TE: torch.Tensor, config: Config) -> torch.Tensor:
    """Scores outside each token's topk_group best groups become -inf."""
    members_TgE = choice_TE.unflatten(-1, (config.n_group, -1))
    if config.scoring_func == "softmax":
        scores_Tg = members_TgE.amax(-1)
    else:
        scores_Tg = members_TgE.topk(min(2, members_TgE.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(scores_Tg, dtype=torch.bool)
    kept.scatter_(-1, scores_Tg.topk(config.topk_group, dim=-1).indices, True)
    return members_TgE.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


class MoE:
    """Routed experts by the router's choice, plus the shared ones for every token."""

    def __init__(self, config: Config, weights: WeightSource, index: int):
        self.config, self.choose_experts = config, weights.choose_experts
        name = partial(names.layer, config.architecture, index)
        self.gate = biased_linear(weights, name("mlp.gate"))
        bias = name("mlp.gate.e_score_correction_bias")
        self.e_score_correction_bias = weights.vector(bias) if weights.has(bias) else None
        table = name("mlp.gate.tid2eid")
        self.tid2eid = weights.expert_table(index) if weights.has(table) else None
        self.experts = weights.experts(index)
        has_shared = weights.has(name("mlp.shared_experts.gate_proj"))
        self.shared_experts = MLP(config, weights, index, "mlp.shared_experts") if has_shared else None

    def begin(self, x_TD: torch.Tensor, ids_T: torch.Tensor | None = None) -> Finish:
        """Start on float32 (T, D); the result's call waits for the routed experts and gives (T, D).

        ids_T: the tokens, where experts may follow from them. Routed experts elsewhere work while the shared ones do
        here, and until the call.
        """
        given_TK = None if self.tid2eid is None else self.tid2eid[ids_T].long()
        bias_E = self.e_score_correction_bias
        ids_TK, weights_TK = self.choose_experts(self.gate(x_TD), bias_E, self.config, given_TK)
        finish = self.experts.begin(x_TD, ids_TK, weights_TK)
        if self.shared_experts is None:
            return finish
        shared_TD = self.shared_experts(x_TD)
        return lambda: finish() + shared_TD
