"""The router against transformers' DeepSeek-V2 and V3 routers, and the feed-forward layers against naive.py.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses

import naive
import numpy as np
import pytest
import tiny_models
import torch
from routers import CONFIG

from localrun.cpu.weights import LayerWeights
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.network.moe import MLP, MoE, choose_experts
from quant.threads.pool import Pool

V3_ROUTERS = {
    "V3": {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "Kimi-K2": {"norm_topk_prob": True, "routed_scaling_factor": 2.827},
    "one expert a token": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 1, "norm_topk_prob": True},
    "not normalised": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
    "all experts": {"num_experts_per_tok": 32, "norm_topk_prob": True},
    "all of the kept groups": {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 8},
    "groups of two": {"n_group": 16, "topk_group": 5},
}
V2_ROUTERS = {
    "V2-Lite": {},
    "V2": {"n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
    "one group": {"n_group": 4, "topk_group": 1},
    "groups of one": {"n_group": 32, "topk_group": 7},
}


def router_logits(n_tokens: int = 64, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n_tokens, 32, generator=torch.Generator().manual_seed(seed))


def dense(ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """(T, E): each expert's weight, 0 where not chosen; an expert chosen twice would count twice."""
    return torch.zeros(ids_TK.shape[0], 32).scatter_add_(1, ids_TK, weights_TK)


def assert_like(router: torch.nn.Module, logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config) -> None:
    router.weight.data = torch.eye(32)  # the router's own product leaves the logits as they are
    with torch.no_grad():
        seen, weights_TK, ids_TK = router(logits_TE)
    assert torch.equal(seen, logits_TE)
    found_ids_TK, found_TK = choose_experts(logits_TE, bias_E, config)
    assert found_ids_TK.dtype == torch.int64 and found_TK.dtype == torch.float32
    assert found_ids_TK.shape == found_TK.shape == (len(logits_TE), config.num_experts_per_tok)
    # The same float32 operations, but for the sum's guard against 0.
    torch.testing.assert_close(dense(found_ids_TK, found_TK), dense(ids_TK, weights_TK), rtol=1e-6, atol=0)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", V3_ROUTERS)
def test_sigmoid_router_is_transformers(name: str, with_bias: bool) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = dataclasses.replace(CONFIG, scoring_func="sigmoid", **V3_ROUTERS[name])
    fields = ("num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
    settings = {field: getattr(config, field) for field in fields}
    router = DeepseekV3TopkRouter(DeepseekV3Config(n_routed_experts=32, hidden_size=32, **settings))
    bias_E = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(1)) if with_bias else None
    if with_bias:
        router.e_score_correction_bias = bias_E
    assert_like(router, router_logits(), bias_E, config)


@pytest.mark.parametrize("name", V2_ROUTERS)
def test_softmax_router_is_transformers(name: str) -> None:
    """Groups by their best expert, as the model was trained; llama.cpp takes the two best."""
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    config = dataclasses.replace(CONFIG, scoring_func="softmax", **V2_ROUTERS[name])
    fields = ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor")
    settings = {field: getattr(config, field) for field in fields}
    method = "group_limited_greedy" if config.n_group > 1 else "greedy"
    router = DeepseekV2TopkRouter(
        DeepseekV2Config(n_routed_experts=32, hidden_size=32, num_attention_heads=1, topk_method=method, **settings)
    )
    assert_like(router, router_logits(), None, config)


def test_best_and_two_best_groups_differ() -> None:
    """One strong expert against two good ones: V2 keeps the first's group, V3 the other's."""
    logits_TE = torch.full((1, 32), -6.0)
    logits_TE[0, 3], logits_TE[0, 16], logits_TE[0, 17] = 2.0, 1.0, 0.9
    groups = {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}
    v2 = dataclasses.replace(CONFIG, scoring_func="softmax", **groups)
    v3 = dataclasses.replace(CONFIG, scoring_func="sigmoid", **groups)
    assert 3 in choose_experts(logits_TE, None, v2)[0][0]
    assert sorted(choose_experts(logits_TE, None, v3)[0][0].tolist()) == [16, 17]


def test_softmax_after_topk() -> None:
    config = dataclasses.replace(CONFIG, scoring_func="softmax_after_topk", routed_scaling_factor=1.5)
    logits_TE = router_logits()
    found = dense(*choose_experts(logits_TE, None, config))
    kept = logits_TE >= logits_TE.sort(descending=True).values[:, 5:6]
    expected = 1.5 * logits_TE.masked_fill(~kept, float("-inf")).softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax"])
def test_the_bias_moves_the_choice_only(scoring_func: str) -> None:
    config = dataclasses.replace(CONFIG, scoring_func=scoring_func)
    logits_TE = router_logits()
    scores_TE = logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(-1)
    bias_E = torch.zeros(32)
    bias_E[[4, 9]], bias_E[7] = 10.0, -10.0
    found = dense(*choose_experts(logits_TE, bias_E, config))
    assert bool((found[:, [4, 9]] == scores_TE[:, [4, 9]]).all())
    assert bool((found[:, 7] == 0).all()) and bool((dense(*choose_experts(logits_TE, None, config))[:, 7] > 0).any())
    chosen = found > 0
    assert torch.equal(found[chosen], scores_TE[chosen])


@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "softmax_after_topk"])
@pytest.mark.parametrize("groups", [(1, 1), (8, 4), (16, 3)])
def test_ties(scoring_func: str, groups: tuple[int, int]) -> None:
    """All scores equal: any experts will do, but different ones, of as many groups as allowed, equally weighted."""
    n_group, topk_group = groups
    config = dataclasses.replace(
        CONFIG, scoring_func=scoring_func, n_group=n_group, topk_group=topk_group, norm_topk_prob=True
    )
    ids_TK, weights_TK = choose_experts(torch.zeros(5, 32), None, config)
    for ids in ids_TK.tolist():
        assert len(set(ids)) == 6
        assert len({i // (32 // n_group) for i in ids}) <= topk_group
    torch.testing.assert_close(weights_TK, torch.full((5, 6), 1 / 6))


def test_normalised_weights_sum_to_the_scale() -> None:
    config = dataclasses.replace(CONFIG, scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5)
    _, weights_TK = choose_experts(router_logits(), None, config)
    torch.testing.assert_close(weights_TK.sum(-1), torch.full((64,), 2.5))


def test_a_vanishing_sum_is_not_divided_by() -> None:
    """llama.cpp divides by 2^-14 instead, float16's smallest normal number."""
    config = dataclasses.replace(CONFIG, scoring_func="sigmoid", norm_topk_prob=True)
    _, weights_TK = choose_experts(torch.full((1, 32), -40.0), None, config)
    expected = torch.full((1, 6), -40.0).sigmoid() / 2**-14
    torch.testing.assert_close(weights_TK, expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------- the layers


def layer(variant: str, index: int) -> tuple[naive.Naive, dict[str, np.ndarray], Config, GGUFFile]:
    path = tiny_models.shared(variant)
    model, file = naive.Naive(path), open_gguf(path)
    weights = {n.removeprefix(f"blk.{index}."): t for n, t in model.tensors.items() if n.startswith(f"blk.{index}.")}
    return model, weights, read_config(file), file


def assert_close(found: torch.Tensor, expected: np.ndarray) -> None:
    # Sums of up to 320 products in float32, two deep: 2^-24 * sqrt(320) = 1e-6 of the largest value each.
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("variant", ["v3", "v2", "v2-lite", "v3-no-bias", "v3-fused-gate-up", "kimi-k2"])
def test_mixture(pool: Pool, variant: str, n_tokens: int) -> None:
    index = tiny_models.VARIANTS[variant].first_k_dense_replace
    model, weights, config, file = layer(variant, index)
    x_TD = np.random.default_rng(n_tokens).standard_normal((n_tokens, config.hidden_size), dtype=np.float32)
    model.margins = np.full(n_tokens, np.inf)
    expected = model._moe(x_TD.astype(np.float64), weights)
    assert model.margins.min() > 1e-6  # or rounding decides
    assert_close(MoE(config, LayerWeights(file, pool), index).begin(torch.from_numpy(x_TD))(), expected)


@pytest.mark.parametrize("n_tokens", [1, 40])
@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_dense_layer(pool: Pool, variant: str, n_tokens: int) -> None:
    model, weights, config, file = layer(variant, 0)
    x_TD = np.random.default_rng(n_tokens).standard_normal((n_tokens, config.hidden_size), dtype=np.float32)
    found = MLP(config, LayerWeights(file, pool), 0, "mlp")(torch.from_numpy(x_TD))
    assert_close(found, model._mlp(x_TD.astype(np.float64), weights, ""))
