"""The step's router against network.moe and a float64 one, and its two phases of experts against their formula.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import itertools
from contextlib import closing

import kernels
import naive
import numpy as np
import pytest
from step_layers import SCORING, SMALL, Layer, choose, router, torch_choice

from quant.decode.program import MOST_TOKENS
from quant.decode.router import (
    ROUTER,
    SIGMOID,
    SOFTMAX,
    SOFTMAX_AFTER_TOPK,
    SQRT_SOFTPLUS,
    Router,
    new_choice,
    set_groups,
)
from quant.simd.memory import load_i64, store_i64
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes

ROUTERS = {
    "V2-Lite": router(SOFTMAX, 64, 6),
    "V2": router(SOFTMAX, 160, 6, 8, 3, routed_scaling_factor=16.0),
    "softmax, normalised": router(SOFTMAX, 160, 8, norm_topk_prob=True),
    "V3": router(SIGMOID, 256, 8, 8, 4, norm_topk_prob=True, routed_scaling_factor=2.5),
    "Kimi-K2": router(SIGMOID, 384, 8, norm_topk_prob=True, routed_scaling_factor=2.827),
    "sigmoid, not normalised": router(SIGMOID, 64, 6, 4, 2),
    "groups of one": router(SIGMOID, 32, 4, 32, 7, norm_topk_prob=True),
    "all of the kept groups": router(SIGMOID, 32, 8, 8, 2, norm_topk_prob=True),
    "all experts": router(SIGMOID, 32, 32, norm_topk_prob=True),
    "one expert": router(SOFTMAX, 8, 1, norm_topk_prob=True),
    "after top-k": router(SOFTMAX_AFTER_TOPK, 32, 4),
    "after top-k, normalised": router(SOFTMAX_AFTER_TOPK, 128, 4, norm_topk_prob=True, routed_scaling_factor=2.0),
    "after top-k, groups": router(SOFTMAX_AFTER_TOPK, 64, 4, 8, 3),
    "V4": router(SQRT_SOFTPLUS, 256, 6, norm_topk_prob=True, routed_scaling_factor=1.5),
}


def dense(ids_TK: np.ndarray, weights_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """(T, E): each expert's weight; one that is chosen twice counts twice."""
    out_TE = np.zeros((len(ids_TK), n_experts))
    np.add.at(out_TE, (np.arange(len(ids_TK))[:, None], ids_TK), weights_TK)
    return out_TE


def is_sure(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None) -> np.ndarray:
    """(T,): whether the float64 choice leads by more than float32 rounding of scores up to 5 in all."""
    if settings.scoring == SOFTMAX_AFTER_TOPK:  # naive.route knows no such scores; the logits are exact
        return np.ones(len(logits_TE), bool)
    routing = naive.Routing(
        SCORING[settings.scoring], settings.num_experts_per_tok, False, 1.0, settings.n_group, settings.topk_group,
        "best" if settings.scoring == SOFTMAX or settings.n_group == settings.n_routed_experts else "best two",
    )  # fmt: skip
    return np.array([naive.route(row.astype(np.float64), bias_E, routing)[2] > 1e-6 for row in logits_TE])


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_choice_is_the_torch_routers(name: str, with_bias: bool) -> None:
    settings, n_tokens, rng = ROUTERS[name], 2000, np.random.default_rng(0)
    n_experts = settings.n_routed_experts
    logits_TE = (rng.standard_normal((n_tokens, n_experts)) * rng.uniform(0.1, 4, (n_tokens, 1))).astype(np.float32)
    scale = 3 / n_experts if settings.scoring == SOFTMAX else 0.3  # of the size of the scores that it moves
    bias_E = (scale * rng.standard_normal(n_experts)).astype(np.float32) if with_bias else None
    sure = is_sure(settings, logits_TE, bias_E)
    assert sure.mean() > 0.98
    ids_TK, weights_TK = choose(settings, logits_TE, bias_E)
    torch_ids_TK, torch_weights_TK = torch_choice(settings, logits_TE, bias_E)
    assert np.array_equal(np.sort(ids_TK[sure]), np.sort(torch_ids_TK[sure]))
    found, expected = (
        dense(ids[sure], weights[sure], n_experts)
        for ids, weights in ((ids_TK, weights_TK), (torch_ids_TK, torch_weights_TK))
    )
    # Sums of up to 384 exponentials in float32, one after the other: 384 roundings at worst, some sqrt(384) here.
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3", "Kimi-K2"])
def test_weights_are_in_the_choices_order(name: str) -> None:
    """Best first, each beside its id."""
    settings = ROUTERS[name]
    logits_TE = np.random.default_rng(1).standard_normal((200, settings.n_routed_experts)).astype(np.float32)
    ids_TK, weights_TK = choose(settings, logits_TE)
    chosen_TK = np.take_along_axis(logits_TE, ids_TK, 1)
    assert np.all(np.diff(chosen_TK, axis=1) <= 0)
    assert np.all(np.diff(weights_TK, axis=1) <= 0)


@pytest.mark.parametrize("scoring", SCORING, ids=SCORING.values())
def test_of_equals_the_first_is_chosen(scoring: int) -> None:
    ids_TK, weights_TK = choose(router(scoring, 32, 6, norm_topk_prob=True), np.full((3, 32), 0.7))
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    np.testing.assert_allclose(weights_TK, 1 / 6, rtol=1e-6)
    logits_E = np.zeros(32)
    logits_E[[30, 7, 19]] = 1
    ids_TK, _ = choose(router(scoring, 32, 4), logits_E[None])
    assert ids_TK.tolist() == [[7, 19, 30, 0]]


@pytest.mark.parametrize("scoring", SCORING, ids=SCORING.values())
def test_of_equal_groups_the_first_are_kept(scoring: int) -> None:
    ids_TK, _ = choose(router(scoring, 32, 8, 8, 2), np.zeros((1, 32)))
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_groups_count_two_experts_but_for_softmax() -> None:
    """One group has the best expert, another the two best together."""
    logits_E = np.full(16, -4.0)
    logits_E[1], logits_E[[8, 10]] = 3.0, 2.0
    assert choose(router(SOFTMAX, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[1]]
    assert choose(router(SIGMOID, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[8]]
    assert choose(router(SOFTMAX_AFTER_TOPK, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[8]]


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    logits_E, bias_E = np.linspace(-1, 1, 8, dtype=np.float32), np.zeros(8, np.float32)
    bias_E[0] = 10
    ids_TK, weights_TK = choose(router(SIGMOID, 8, 2), logits_E[None], bias_E)
    assert ids_TK.tolist() == [[0, 7]]
    np.testing.assert_allclose(weights_TK[0], 1 / (1 + np.exp(-logits_E[[0, 7]].astype(np.float64))), rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_large_logits(name: str, size: float) -> None:
    """Saturated scores: finite weights, none of them negative."""
    settings = ROUTERS[name]
    signs_TE = np.sign(np.random.default_rng(2).standard_normal((50, settings.n_routed_experts)))
    ids_TK, weights_TK = choose(settings, size * signs_TE)
    assert ids_TK.min() >= 0 and ids_TK.max() < settings.n_routed_experts
    assert np.all(np.isfinite(weights_TK)) and weights_TK.min() >= 0
    everywhere_negative = choose(settings, np.full((1, settings.n_routed_experts), -size))
    assert np.all(np.isfinite(everywhere_negative[1]))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_nan_logits_give_experts_that_exist(name: str, with_bias: bool) -> None:
    """Whatever is computed from them, no memory outside the experts is read."""
    settings, rng = ROUTERS[name], np.random.default_rng(3)
    n_experts = settings.n_routed_experts
    logits_TE = rng.standard_normal((100, n_experts))
    logits_TE[0] = np.nan
    logits_TE[1:50][rng.random((49, n_experts)) < 0.5] = np.nan
    logits_TE[50] = np.inf
    logits_TE[51] = -np.inf
    logits_TE[52:][rng.random((48, n_experts)) < 0.2] = np.inf
    ids_TK, weights_TK = choose(settings, logits_TE, rng.standard_normal(n_experts) if with_bias else None)
    assert ids_TK.min() >= 0 and ids_TK.max() < n_experts
    assert np.all(np.isnan(weights_TK[0]))  # a NaN in the network stays one


# ---- groups ----------------------------------------------------------------------------------------------------------


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _groups(router, memory, ids, n_tokens, members, starts):
    r = ROUTER(router)
    c, n_pairs = new_choice(r, memory), r.top_k * n_tokens
    for pair in range(n_pairs):
        c.ids[pair] = load_i64(ids + 8 * pair)
    set_groups(r, c, n_tokens)
    for i in range(n_pairs + 1):
        store_i64(starts + 8 * i, c.starts[i])
        if i < n_pairs:
            store_i64(members + 8 * i, c.members[i])


def groups(ids_TK: np.ndarray) -> list[list[tuple[int, int]]]:
    """(token, slot) of each group's pairs."""
    n_tokens, top_k = ids_TK.shape
    settings = router(SOFTMAX, int(ids_TK.max()) + 1, top_k)
    members, starts = np.full(ids_TK.size, -1), np.full(ids_TK.size + 1, -1)
    memory = aligned_bytes(settings.choice_bytes)
    kernels.call(_groups, settings.struct, memory, np.ascontiguousarray(ids_TK), n_tokens, members, starts)
    members, starts = members.tolist(), starts.tolist()
    spans = [span for span in itertools.pairwise(starts) if span[0] < span[1]]
    assert starts[: len(spans) + 1] == [0, *(end for _, end in spans)]  # those without work come last
    return [[divmod(pair, top_k) for pair in members[begin:end]] for begin, end in spans]


@pytest.mark.parametrize("n_experts", [8, 12, 256])
@pytest.mark.parametrize("n_tokens", range(1, MOST_TOKENS + 1))
def test_groups_are_the_union_of_the_choices(n_tokens: int, n_experts: int) -> None:
    rng = np.random.default_rng(n_tokens)
    for _ in range(50):
        ids_TK = np.stack([rng.permutation(n_experts)[:8] for _ in range(n_tokens)])
        found = groups(ids_TK)
        assert sorted(pair for group in found for pair in group) == [*np.ndindex(n_tokens, 8)]
        experts = [{int(ids_TK[pair]) for pair in group} for group in found]
        assert all(len(group) == 1 for group in experts)
        assert len(experts) == len(np.unique(ids_TK))


def test_an_expert_that_a_token_chose_twice_is_in_two_groups() -> None:
    """gemv_batch takes each token once."""
    ids_TK = np.array([[3, 3, 3, 5], [3, 7, 5, 3], [0, 0, 0, 0], [3, 3, 3, 3], [0, 3, 5, 7]])
    found = groups(ids_TK)
    assert sorted(pair for group in found for pair in group) == [*np.ndindex(5, 4)]
    assert all(len({token for token, _ in group}) == len(group) for group in found)
    assert all(len({int(ids_TK[pair]) for pair in group}) == 1 for group in found)


# ---- the two phases --------------------------------------------------------------------------------------------------


LAYERS = {
    "float32": Layer(("F32", "F32", "F32", "F32"), 64, 48, 96, SMALL),
    "no shared expert": Layer(("F32", "F32", "F32", "F32"), 64, 48, 0, SMALL),
    "odd sizes": Layer(("F32", "F32", "F32", "F32"), 72, 20, 36, SMALL),
    "rows no multiple of 8": Layer(("F32", "F32", "F32", "F32"), 76, 13, 5, SMALL),
    "V2-Lite's types": Layer(("Q4_0", "Q4_0", "Q8_0", "Q5_0"), 128, 96, 192, SMALL),
    "K-quants": Layer(("Q4_K", "Q4_K", "Q6_K", "Q8_0"), 256, 256, 512, SMALL),
    "integer experts, float shared": Layer(("Q4_0", "Q4_1", "Q8_0", "F16"), 64, 96, 32, SMALL),
    "float experts, integer shared": Layer(("BF16", "F16", "BF16", "Q8_0"), 64, 80, 160, SMALL),
    "one of K": Layer(("F32", "F32", "F32", "F32"), 64, 32, 32, router(SOFTMAX, 4, 1)),
    "all of K": Layer(("F32", "F32", "F32", "F32"), 64, 32, 32, router(SOFTMAX_AFTER_TOPK, 4, 4)),
    "biased, a bounded activation": Layer(("F32", "F32", "F32", "F32"), 76, 20, 36, SMALL, biased=True),
    "biased MXFP4": Layer(("MXFP4", "MXFP4", "MXFP4", "F32"), 64, 96, 0, SMALL, biased=True),
    "many rows": Layer(("F32", "F32", "Q8_0", "F32"), 1024, 608, 320, SMALL, n_tokens=2),
}


@pytest.mark.levels
@pytest.mark.parametrize("name", LAYERS)
def test_experts(pool: Pool, name: str) -> None:
    layer = LAYERS[name]
    found, expected = layer.run(pool), layer.expected()
    # Float formats: rounding of float32 sums. Integer ones: that of an input may tip its rounding to 8 bits, one step
    # of 1/127 in one of some hundred terms.
    tolerance = 2e-3 if any(w.format.integer for w in layer.weights.values()) else 2**-20
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.levels
@pytest.mark.parametrize("name", LAYERS)
def test_workers_do_not_change_the_experts_sum(name: str) -> None:
    answers = []
    for n_workers in (1, 2, 3, 5):
        with closing(Pool(n_workers)) as pool:
            answers.append(LAYERS[name].run(pool))
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@pytest.mark.levels
@pytest.mark.parametrize("name", LAYERS)
def test_a_given_choice_is_as_good_as_the_routers(pool: Pool, name: str) -> None:
    """To the bit: with the router's own choice, made before."""
    layer = LAYERS[name]
    logits_TE = layer.router_logits(pool)
    assert np.array_equal(layer.run(pool, given=choose(layer.settings, logits_TE)), layer.run(pool))


@pytest.mark.levels
@pytest.mark.parametrize("together", range(2, MOST_TOKENS + 1))
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_together_are_tokens_alone(pool: Pool, name: str, together: int) -> None:
    """Six tokens of 4 or 8 experts: most experts have several."""
    assert np.array_equal(LAYERS[name].run(pool, together), LAYERS[name].run(pool))
