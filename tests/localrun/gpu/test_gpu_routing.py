"""The router's choice beside the CPU's, rotations with their write into the cache beside float64.

Letters: T tokens, E experts, K experts per token, H heads, P qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank.
"""

from __future__ import annotations

import dataclasses

import naive
import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from localrun.models.config import Config, RopeScaling
from localrun.network.moe import choose_experts
from localrun.network.rope import Rope

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

from localrun.gpu.attention.latent_queries import turn_and_append
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.caches.places import HasPlaces, Places
from localrun.gpu.e4m3 import pack_e4m3
from localrun.gpu.experts import router

BASE = Config(
    architecture="deepseek2", attention="mla", rope="pairs",
    hidden_size=1, intermediate_size=1, num_hidden_layers=2, num_attention_heads=3,
    vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-3, rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=6,
    v_head_dim=1, kv_lora_rank=20, qk_nope_head_dim=5, n_routed_experts=32, num_experts_per_tok=6,
)  # fmt: skip
V3 = {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
ROUTERS = {
    "V3": {**V3, "scoring_func": "sigmoid", "norm_topk_prob": True},
    "V2": {"n_routed_experts": 160, "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0},
    "V2-Lite": {"n_routed_experts": 64},
    "Kimi-K2": {"n_routed_experts": 384, "num_experts_per_tok": 8, "scoring_func": "sigmoid", "norm_topk_prob": True},
    "odd groups": {"n_routed_experts": 21, "n_group": 3, "topk_group": 2, "scoring_func": "sigmoid"},
    "groups of one": {"n_group": 32, "topk_group": 7, "scoring_func": "sigmoid"},
    "all of the kept groups": {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 8, "scoring_func": "sigmoid"},
    "all experts": {"n_routed_experts": 7, "num_experts_per_tok": 7, "norm_topk_prob": True},
    "one expert": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "softmax of the chosen": {"scoring_func": "softmax_after_topk", "routed_scaling_factor": 1.5},
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chosen(logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    bias = None if bias_E is None else bias_E.to(DEVICE)
    ids, weights = router.choose_experts(logits_TE.to(DEVICE), bias, config)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    return ids.cpu(), weights.cpu()


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str, with_bias: bool) -> None:
    config = dataclasses.replace(BASE, **ROUTERS[name])
    logits_TE = 2 * random(9, config.n_routed_experts)
    bias_E = 0.3 * random(config.n_routed_experts, seed=1) if with_bias else None
    ids_TK, weights_TK = chosen(logits_TE, bias_E, config)
    expected_ids_TK, expected_TK = choose_experts(logits_TE, bias_E, config)
    assert torch.equal(ids_TK, expected_ids_TK)  # best first; no two of these scores are within rounding
    # exp, division and sums of up to 384 by another order and library: a few roundings of 2^-24.
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-6, atol=0)


def test_of_equal_scores_the_lower_id() -> None:
    config = dataclasses.replace(BASE, n_group=4, topk_group=2, scoring_func="sigmoid")
    assert chosen(torch.zeros(1, 32), None, config)[0].tolist() == [[0, 1, 2, 3, 4, 5]]
    logits_TE = torch.zeros(1, 32)
    logits_TE[0, [30, 9, 17]] = 1.0
    # Groups of 8: 8..15, 16..23 and 24..31 each have one better expert; the first two groups are kept.
    assert chosen(logits_TE, None, config)[0].tolist() == [[9, 17, 8, 10, 11, 12]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "softmax", "softmax_after_topk"])
def test_ids_stay_in_the_table_whatever_the_logits(bad: float, scoring_func: str) -> None:
    config = dataclasses.replace(BASE, n_group=4, topk_group=1, scoring_func=scoring_func, n_routed_experts=24)
    logits_TE = random(3, 24)
    logits_TE[0], logits_TE[1, 5], logits_TE[2, :20] = bad, bad, bad
    ids_TK, _ = chosen(logits_TE, None, config)
    assert all(len(set(ids)) == 6 and min(ids) >= 0 and max(ids) < 24 for ids in ids_TK.tolist())


def test_weights_that_sum_to_nothing_are_not_divided_by_it() -> None:
    config = dataclasses.replace(BASE, scoring_func="sigmoid", norm_topk_prob=True)
    logits_TE = torch.full((1, 32), -30.0)
    torch.testing.assert_close(chosen(logits_TE, None, config)[1], choose_experts(logits_TE, None, config)[1])


# ---------------------------------------------------------------------------------------------- rotations and the cache

ROPES = {
    "plain": {},
    "even sizes": {"num_attention_heads": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "kv_lora_rank": 32},
    "magnitude": {"rope_scaling": RopeScaling("yarn", 40.0, original_max_position_embeddings=64)},
}


def inputs(config: Config, n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (T, H * (P + R)), rows before norm and rotation (T, C + R), the norm (C,)."""
    c = config
    q = random(n_tokens, c.num_attention_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim), seed=1)
    return q, 3 * random(n_tokens, c.kv_lora_rank + c.qk_rope_head_dim, seed=2), 1 + random(c.kv_lora_rank, seed=3)


def expected(config: Config, n_tokens: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """float64: turned queries (T, H, R), latents (T, C), turned keys (T, R)."""
    c, rope = config, Rope(config)
    q, kv, norm = (x.double().numpy() for x in inputs(config, n_tokens))
    positions = np.arange(start, start + n_tokens)
    q = q.reshape(n_tokens, c.num_attention_heads, -1)[..., c.qk_nope_head_dim :]
    turned_q = naive.rotate_pairs(q, positions, rope.frequencies, rope.magnitude)
    turned_k = naive.rotate_pairs(kv[:, c.kv_lora_rank :], positions, rope.frequencies, rope.magnitude)
    return turned_q, naive.rms_norm(kv[:, : c.kv_lora_rank], norm, c.rms_norm_eps), turned_k


def turned(config: Config, cache: HasPlaces, n_tokens: int, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    q, kv, norm = (x.to(DEVICE) for x in inputs(config, n_tokens))
    return turn_and_append(q, kv, norm, Turns(Rope(config), DEVICE), cache, layer, config)


@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize("name", ROPES)
def test_turned_and_appended(name: str, n_tokens: int) -> None:
    config = dataclasses.replace(BASE, **ROPES[name])
    cache = new_cache(config, 12, DEVICE, bits=32)
    cache.latents.fill_(7), cache.rope_keys.fill_(7)
    cache.advance(3)
    q_nope, q_rope = turned(config, cache, n_tokens)
    q_rope_expected, latents, keys = expected(config, n_tokens, 3)
    q = inputs(config, n_tokens)[0].unflatten(1, (config.num_attention_heads, -1))
    assert torch.equal(q_nope.cpu(), q[..., : config.qk_nope_head_dim])
    tolerance = {"rtol": 0, "atol": 3e-6}  # float32 sums of 32 and products of values up to 10: 2^-24 * 10 * a few
    new = slice(3, 3 + n_tokens)
    torch.testing.assert_close(q_rope.cpu().double(), torch.from_numpy(q_rope_expected), **tolerance)
    torch.testing.assert_close(cache.latents[1, new].cpu().double(), torch.from_numpy(latents), **tolerance)
    torch.testing.assert_close(cache.rope_keys[1, new].cpu().double(), torch.from_numpy(keys), **tolerance)
    for part in (cache.latents, cache.rope_keys):  # nothing else is written
        assert (part[0] == 7).all() and (part[1, :3] == 7).all() and (part[1, 3 + n_tokens :] == 7).all()


def test_rows_of_several_caches() -> None:
    """Queries and rows are those of each token alone, at its position in its own cache."""
    config, starts = BASE, (3, 0)
    q, kv, norm = (x.to(DEVICE) for x in inputs(config, 2))
    turns, results = Turns(Rope(config), DEVICE), []
    for is_together in (False, True):
        caches = [new_cache(config, 4 + i, DEVICE) for i in range(2)]
        for cache, start in zip(caches, starts, strict=True):
            cache.latents.zero_(), cache.rope_keys.zero_()
            cache.advance(start)
        if is_together:
            table = torch.from_numpy(np.stack([cache.addresses for cache in caches], 1)).to(DEVICE)
            places = Places(torch.tensor(starts, device=DEVICE), table, 16, 4)
            queries = [turn_and_append(q, kv, norm, turns, places, 1, config)[1]]
        else:
            queries = [
                turn_and_append(q[i : i + 1], kv[i : i + 1], norm, turns, cache, 1, config)[1]
                for i, cache in enumerate(caches)
            ]
        results.append([torch.cat(queries), *(part for cache in caches for part in (cache.latents, cache.rope_keys))])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*results, strict=True))


def test_16_and_8_bits_are_roundings_of_32() -> None:
    config = dataclasses.replace(BASE, kv_lora_rank=200)
    caches = {bits: new_cache(config, 8, DEVICE, bits) for bits in (32, 16, 8)}
    for cache in caches.values():
        turned(config, cache, 6)
    exact_latents, exact_keys = caches[32].latents[1, :6], caches[32].rope_keys[1, :6]
    assert torch.equal(caches[16].latents[1, :6], exact_latents.half())
    assert torch.equal(caches[16].rope_keys[1, :6], exact_keys.half())
    codes, scales = pack_e4m3(exact_latents)  # by torch
    assert torch.equal(caches[8].latents[1, :6], codes)
    torch.testing.assert_close(caches[8].scales[1, :6], scales, rtol=1e-6, atol=0)  # one division
    assert torch.equal(caches[8].rope_keys[1, :6], exact_keys.half())


def test_every_e4m3_code_and_every_tie() -> None:
    """A row of all values of E4M3 and of what lies halfway between two: to the even one, as torch rounds."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 .. 448
    halfway = (values[1:] + values[:-1]) / 2
    row = torch.cat([values, halfway, halfway * 1.0001, halfway * 0.9999])
    row = torch.cat([row, -row])
    config = dataclasses.replace(BASE, kv_lora_rank=len(row), rms_norm_eps=0.0)
    cache = new_cache(config, 1, DEVICE, bits=8)
    kv = torch.ones(1, len(row) + 6)  # of ones, the norm leaves ones; its weights are the row
    q = torch.zeros(1, 3 * 11)
    turn_and_append(q.to(DEVICE), kv.to(DEVICE), row.to(DEVICE), Turns(Rope(config), DEVICE), cache, 0, config)
    assert float(cache.scales[0, 0]) == 1.0
    assert torch.equal(cache.latents[0, 0].cpu(), row.to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("position", [0, 1023, 1024, 131071, 163839, 4 * 1024 * 1024 - 1])
def test_far_positions(position: int) -> None:
    """R = 64 as in the published models; the fastest pair turns by a radian a position."""
    config = dataclasses.replace(BASE, num_attention_heads=1, qk_rope_head_dim=64)
    cache = new_cache(config, 1, DEVICE, bits=32)
    before = 4 * position * cache.latents.stride(1)  # bytes: its one row is where that of the position would be
    table = torch.from_numpy(cache.addresses[:, None] - before).to(DEVICE)
    _, q_rope = turned(config, Places(torch.tensor([position], device=DEVICE), table, 32, 1 + position), 1)
    found, want = q_rope.cpu().double(), torch.from_numpy(expected(config, 1, position)[0])
    # Two entries of 2^-25 each, their product, and a product with values of up to 4: some 2^-21 of these.
    torch.testing.assert_close(found, want, rtol=0, atol=4 * 2**-21)
