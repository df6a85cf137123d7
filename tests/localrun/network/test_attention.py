"""Both attentions against a float64 loop over heads (naive.py) and torch's scaled_dot_product_attention.

Letters: T tokens, H query heads, G key-value heads, D hidden_size.
"""

from __future__ import annotations

import dataclasses

import naive
import numpy as np
import pytest
import tiny_models
import torch
from caches import kinds

from localrun.cpu.bridge import Attend
from localrun.cpu.weights import LayerWeights
from localrun.gguf.file import open_gguf
from localrun.models.config import Config, RopeScaling
from localrun.models.reader import read_config
from localrun.network import attention
from localrun.network.attention import GroupedQueryAttention, LatentAttention
from localrun.network.cache import Cache
from localrun.network.rope import Rope
from quant.threads.pool import Pool

N_TOKENS = 40
CHUNKS = {
    "at once": [40],
    "one by one": [1] * 40,
    "prompt, then one by one": [37, 1, 1, 1],
    "uneven": [1, 7, 2, 30],
}
# Sums of up to 288 products in float32 against float64: 2^-24 * sqrt(288) = 1e-6 of the sum's size, three sums deep.
TOLERANCE = 1e-5


def assert_close(found: torch.Tensor, expected: np.ndarray | torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """tolerance is a fraction of the largest value expected."""
    expected = torch.as_tensor(np.asarray(expected))
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert float((found.double() - expected).abs().max() / expected.abs().max()) < tolerance


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_chunks(module: LatentAttention | GroupedQueryAttention, x_TD: torch.Tensor, chunks: list[int], cache: Cache):
    """(T, D) of x evaluated in chunks, from an empty cache."""
    outs = []
    for chunk in x_TD.split(chunks):
        outs.append(module(chunk, cache))
        cache.advance(len(chunk))
    return torch.cat(outs)


# ------------------------------------------------------------------------------------------------ latent attention


def latent(pool: Pool, variant: str, type_: str = "F32") -> tuple[LatentAttention, Cache, naive.Naive]:
    path = tiny_models.shared(variant, type=type_)
    file = open_gguf(path)
    config = read_config(file)
    module = LatentAttention(config, LayerWeights(file, pool), 0, Rope(config))
    cache = Cache([config.rows(0)], N_TOKENS, np.float32)
    return module, cache, naive.Naive(path)


def naive_mla(model: naive.Naive, x_TD: torch.Tensor) -> np.ndarray:
    weights = {n.removeprefix("blk.0."): t for n, t in model.tensors.items() if n.startswith("blk.0.")}
    return model._mla(x_TD.double().numpy(), weights)


MLA_VARIANTS = ["v3", "v2-lite", "v3-odd", "v3-legacy-kv-b", "v3-no-yarn", "v3-large-eps", "yarn-no-log-multiplier"]


@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbed", "decompressed"])
@pytest.mark.parametrize("variant", MLA_VARIANTS)
def test_latent_attention(pool: Pool, variant: str, absorbing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, cache, model = latent(pool, variant)
    monkeypatch.setattr(module, "_absorbing_is_cheaper", lambda n_tokens: absorbing)
    x_TD = random(N_TOKENS, module.config.hidden_size)
    assert_close(by_chunks(module, x_TD, [N_TOKENS], cache), naive_mla(model, x_TD))


@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbed", "decompressed"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("variant", ["v3", "v3-legacy-kv-b"])
def test_latent_attention_in_chunks(
    pool: Pool, variant: str, chunks: list[int], absorbing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cache, model = latent(pool, variant)
    monkeypatch.setattr(module, "_absorbing_is_cheaper", lambda n_tokens: absorbing)
    x_TD = random(N_TOKENS, module.config.hidden_size)
    assert_close(by_chunks(module, x_TD, chunks, cache), naive_mla(model, x_TD))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of one head at a time."""
    monkeypatch.setattr(attention, "ATTENTION_WORK_BYTES", 1)


@pytest.mark.parametrize("absorbing", [True, False], ids=["absorbed", "decompressed"])
@pytest.mark.parametrize("variant", ["v3", "v3-legacy-kv-b"])
def test_latent_attention_by_blocks(
    pool: Pool, variant: str, absorbing: bool, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cache, model = latent(pool, variant)
    monkeypatch.setattr(module, "_absorbing_is_cheaper", lambda n_tokens: absorbing)
    x_TD = random(N_TOKENS, module.config.hidden_size)
    assert_close(by_chunks(module, x_TD, [3, N_TOKENS - 3], cache), naive_mla(model, x_TD))


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("variant", ["v3", "v3-legacy-kv-b"])
def test_absorbed_equals_decompressed(pool: Pool, variant: str, type_: str) -> None:
    """On the same rows and queries, for few and many tokens."""
    module, _, _ = latent(pool, variant, type_)
    c = module.config
    rows_SW = random(N_TOKENS, c.kv_lora_rank + c.qk_rope_head_dim, seed=1)
    # Absorbing rounds the query to 8 bits before k_b and the mix before v_b, decompressing neither: 127 steps.
    tolerance = TOLERANCE if type_ in ("F32", "F16") else 2e-2
    for n_tokens in (1, 5, N_TOKENS):
        q_nope = random(n_tokens, c.num_attention_heads, c.qk_nope_head_dim, seed=2)
        q_rope = random(n_tokens, c.num_attention_heads, c.qk_rope_head_dim, seed=3)
        absorbed = module._absorbed(q_nope, q_rope, rows_SW)
        assert absorbed.shape == (n_tokens, c.num_attention_heads, c.v_head_dim)
        assert_close(absorbed, module._decompressed(q_nope, q_rope, rows_SW).double(), tolerance)


def test_what_is_cached_is_latent_and_rotated_key(pool: Pool) -> None:
    module, cache, model = latent(pool, "v3")
    c, x_TD = module.config, random(N_TOKENS, 256)
    by_chunks(module, x_TD, [N_TOKENS], cache)
    weights = {n.removeprefix("blk.0."): t for n, t in model.tensors.items() if n.startswith("blk.0.")}
    latent_TC, rope_TR = np.split(x_TD.double().numpy() @ weights["attn_kv_a_mqa.weight"].T, [c.kv_lora_rank], axis=1)
    latent_TC = naive.rms_norm(latent_TC, weights["attn_kv_a_norm.weight"], c.rms_norm_eps)
    rope_TR = naive.rotate_pairs(rope_TR, np.arange(N_TOKENS), model._rope()[0])
    assert_close(torch.from_numpy(cache.save()["0.0"]), np.concatenate([latent_TC, rope_TR], axis=1))


@pytest.mark.parametrize(("n_tokens", "absorbing"), [(1, True), (170, True), (171, False), (512, False)])
def test_the_cheaper_way_is_taken(pool: Pool, n_tokens: int, absorbing: bool) -> None:
    """V3's sizes. A cached token and head costs these multiplications; 170.7 tokens break even."""
    module, _, _ = latent(pool, "v3")
    module.config = dataclasses.replace(
        module.config, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
    )
    absorbed = n_tokens * (512 + 64) + n_tokens * 512  # scores against the row, mix of the latents
    decompressed = (128 + 128) * 512 + n_tokens * (128 + 64) + n_tokens * 128  # rebuild, scores, mix
    assert (absorbed < decompressed) is absorbing
    assert module._absorbing_is_cheaper(n_tokens) is absorbing


# ------------------------------------------------------------------------------------------ grouped-query attention


class RandomWeights:
    """Stands in for Weights: float32 matrices of any shape, by GGUF name."""

    attend = Attend(Pool(1))

    def __init__(self, config: Config):
        heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        shapes = {"q": (heads * config.head_dim, d), "k": (groups * config.head_dim, d)}
        shapes |= {"v": (groups * config.v_head_dim, d), "output": (d, heads * config.v_head_dim)}
        self.matrices = {
            f"blk.0.attn_{part}.weight": random(*shape, seed=seed) * shape[1] ** -0.5
            for seed, (part, shape) in enumerate(shapes.items(), start=10)
        }

        widths = {"q": heads if config.qk_norm_whole else 1, "k": groups if config.qk_norm_whole else 1}
        self.vectors = {
            f"blk.0.attn_{part}_norm.weight": 1 + 0.3 * random(width * config.head_dim, seed=seed)
            for seed, (part, width) in enumerate(widths.items())
        }
        for seed, part in enumerate("qkv" if config.attention_bias else "", start=20):
            self.vectors[f"blk.0.attn_{part}.bias"] = random(shapes[part][0], seed=seed)

    def linear(self, name: str):
        return lambda x: x @ self.matrices[name].T

    def has(self, name: str) -> bool:
        return name in self.vectors

    def vector(self, name: str) -> torch.Tensor:
        return self.vectors[name]


GQA = Config(
    architecture="llama", attention="gqa", rope="pairs",
    hidden_size=48, intermediate_size=1, num_hidden_layers=1, num_attention_heads=6,
    vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
    qk_rope_head_dim=16, v_head_dim=16, num_key_value_heads=2, head_dim=16,
)  # fmt: skip
SHAPES = {
    "3 heads a group": {},
    "a group a head": {"num_key_value_heads": 6},
    "one group": {"num_key_value_heads": 1},
    "values shorter than keys": {"v_head_dim": 8},
    "half of the head rotated": {"qk_rope_head_dim": 8},
    "positions stretched": {"rope_scaling": RopeScaling("linear", 4.0)},
    "rotated by halves": {"rope": "halves"},
    "normed heads, half of each rotated by halves": {"rope": "halves", "qk_norm": True, "qk_rope_head_dim": 8},
    "all heads normed as one vector": {"rope": "halves", "qk_norm": True, "qk_norm_whole": True},
    "biases, normed heads": {"attention_bias": True, "qk_norm": True},
}


def torch_gqa(config: Config, weights: RandomWeights, x_TD: torch.Tensor) -> torch.Tensor:
    """float64 (T, D) by torch's own attention; rotation by naive.py."""
    c, x_TD = config, x_TD.double()
    w = {name.split("_")[1].split(".")[0]: matrix.double() for name, matrix in weights.matrices.items()}
    products = {part: x_TD @ w[part].T for part in "qkv"}
    if c.attention_bias:
        products = {part: product + weights.vectors[f"blk.0.attn_{part}.bias"] for part, product in products.items()}
    positions = np.arange(len(x_TD)) / (c.rope_scaling.factor if c.rope_scaling else 1.0)
    frequencies = 10000.0 ** (-np.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim)

    def rotated_heads(part: str) -> torch.Tensor:
        row, norm = products[part].numpy(), weights.vectors.get(f"blk.0.attn_{part}_norm.weight")
        if c.qk_norm_whole:
            row = naive.rms_norm(row, norm.numpy(), c.rms_norm_eps)
        heads = row.reshape(len(row), -1, c.head_dim)
        if c.qk_norm and not c.qk_norm_whole:
            heads = naive.rms_norm(heads, norm.numpy(), c.rms_norm_eps)
        rotate = naive.rotate_halves if c.rope == "halves" else naive.rotate_pairs
        turned = rotate(heads[..., : c.qk_rope_head_dim], positions, frequencies)
        return torch.from_numpy(np.concatenate([turned, heads[..., c.qk_rope_head_dim :]], axis=-1)).transpose(0, 1)

    v_GTV = products["v"].unflatten(1, (-1, c.v_head_dim)).transpose(0, 1)
    out_HTV = torch.nn.functional.scaled_dot_product_attention(
        rotated_heads("q"), rotated_heads("k"), v_GTV, is_causal=True, enable_gqa=True
    )
    return out_HTV.transpose(0, 1).flatten(1) @ w["output"].T


def gqa_cache(config: Config, dtype: type[np.floating] = np.float32) -> Cache:
    groups = config.num_key_value_heads
    return Cache([kinds(groups * config.head_dim, groups * config.v_head_dim)], N_TOKENS, dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_grouped_query_attention(shape: dict[str, object]) -> None:
    config = dataclasses.replace(GQA, **shape)
    weights = RandomWeights(config)
    module = GroupedQueryAttention(config, weights, 0, Rope(config))
    x_TD = random(N_TOKENS, 48)
    found = by_chunks(module, x_TD, [N_TOKENS], gqa_cache(config))
    assert_close(found, torch_gqa(config, weights, x_TD))


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_grouped_query_attention_in_chunks(chunks: list[int]) -> None:
    weights = RandomWeights(GQA)
    module = GroupedQueryAttention(GQA, weights, 0, Rope(GQA))
    x_TD = random(N_TOKENS, 48)
    assert_close(by_chunks(module, x_TD, chunks, gqa_cache(GQA)), torch_gqa(GQA, weights, x_TD))


def test_the_16_bit_cache_rounds_and_nothing_else() -> None:
    weights = RandomWeights(GQA)
    module = GroupedQueryAttention(GQA, weights, 0, Rope(GQA))
    x_TD = random(N_TOKENS, 48)
    found = by_chunks(module, x_TD, [5] * 8, gqa_cache(GQA, np.float16))
    assert_close(found, torch_gqa(GQA, weights, x_TD), 2e-3)  # keys and values are rounded by up to 2^-11 = 5e-4


@pytest.mark.parametrize(
    ("n_heads", "bytes_per_head", "expected"),
    [
        (8, 30, [(0, 3), (3, 3), (6, 2)]),
        (8, 100, [(i, 1) for i in range(8)]),
        (8, 10**12, [(i, 1) for i in range(8)]),  # one head does not fit either: at least one
        (8, 1, [(0, 8)]),
        (1, 1, [(0, 1)]),
    ],
)
def test_head_groups(n_heads: int, bytes_per_head: int, expected: list) -> None:
    assert attention.in_groups(n_heads, bytes_per_head, 100) == expected
