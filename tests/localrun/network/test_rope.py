"""Rotary embedding: published attention scales, frequencies against transformers, rotation against an explicit loop."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from localrun.models.config import Config, RopeScaling
from localrun.network.rope import Rope, attention_scale, frequencies, rotation_magnitude

# V3's head: 128 + 64. The other fields have no part in this.
PLAIN = Config(
    architecture="deepseek2", attention="mla", rope="pairs",
    hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128,
    vocab_size=129280, max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=10000.0, rope_scaling=None,
    qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128,
)  # fmt: skip
LLAMA = dataclasses.replace(
    PLAIN, architecture="llama", attention="gqa", kv_lora_rank=0, qk_nope_head_dim=0, num_key_value_heads=8, head_dim=64
)


def scaled(scaling: RopeScaling | None, **fields: float) -> Config:
    return dataclasses.replace(PLAIN, rope_scaling=scaling, **fields)


def yarn(factor: float = 40.0, original: int = 4096, mscale: float | None = 1.0, **betas: float) -> RopeScaling:
    return RopeScaling("yarn", factor, original, mscale, **betas)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [(yarn(mscale=0.707), 0.114721), (yarn(mscale=1.0), 0.135233), (None, 0.0721688)],
    ids=["V2-Lite", "V3", "no yarn"],
)
def test_attention_scale_of_published_models(scaling: RopeScaling | None, expected: float) -> None:
    assert attention_scale(scaled(scaling)) == pytest.approx(expected, abs=1e-6)  # known to the sixth decimal
    assert rotation_magnitude(scaled(scaling)) == 1.0


def test_yarn_without_mscale_all_dim() -> None:
    """As in llama.cpp: both the rotated parts and the scale grow, by F = 1 + 0.1 ln 40 and F squared."""
    config = scaled(yarn(mscale=None))
    assert attention_scale(config) == pytest.approx(0.135233, abs=1e-6)
    assert rotation_magnitude(config) == pytest.approx(1.3688879, rel=1e-7)
    assert Rope(config).turns(5, 2).abs().flatten().tolist() == pytest.approx([1.3688879] * 64, rel=1e-6)


def test_attention_scale_elsewhere() -> None:
    assert attention_scale(LLAMA) == 1 / 8
    assert attention_scale(dataclasses.replace(LLAMA, qk_rope_head_dim=32)) == 1 / 8  # half of the head is rotated
    linear = RopeScaling("linear", 4.0)
    assert attention_scale(dataclasses.replace(LLAMA, rope_scaling=linear)) == 1 / 8
    assert attention_scale(scaled(yarn(factor=0.5))) == pytest.approx(192**-0.5)  # nothing is stretched


YARNS = {
    "V2 and V3": (40.0, 4096, 64, 10000.0, 32.0, 1.0),
    "Kimi-K2": (32.0, 4096, 64, 50000.0, 1.0, 1.0),
    "short": (40.0, 256, 32, 10000.0, 32.0, 1.0),
    "long": (4.0, 32768, 128, 1e6, 32.0, 1.0),
    "other betas": (8.0, 8192, 64, 10000.0, 16.0, 2.0),
}


def of_transformers(kind: str, dim: int, theta: float, **parameters: float) -> list[float]:
    """inv_freq of transformers for a head whose rotated part has `dim` dimensions."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": kind, "rope_theta": theta, **parameters}
    config = DeepseekV3Config(qk_rope_head_dim=dim, max_position_embeddings=163840, rope_parameters=parameters)
    assert config.head_dim == dim
    found, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return found.tolist()


@pytest.mark.parametrize("name", YARNS)
def test_yarn_frequencies_are_transformers(name: str) -> None:
    factor, original, dim, theta, beta_fast, beta_slow = YARNS[name]
    names = {"beta_fast": beta_fast, "beta_slow": beta_slow}
    found = frequencies(scaled(yarn(factor, original, **names), qk_rope_head_dim=dim, rope_theta=theta))
    yarn_names = {"factor": factor, "original_max_position_embeddings": original}
    expected = of_transformers("yarn", dim, theta, **yarn_names, mscale=1.0, mscale_all_dim=1.0, **names)
    assert found.dtype == np.float64
    # transformers computes powers and the blend in float32, 2^-24 each
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    plain = frequencies(scaled(None, qk_rope_head_dim=dim, rope_theta=theta))
    assert (found < plain).any() and (found >= plain / factor * (1 - 1e-12)).all()


def test_linear_frequencies_are_transformers() -> None:
    found = frequencies(scaled(RopeScaling("linear", 4.0), rope_theta=500000.0))
    assert found.tolist() == pytest.approx(of_transformers("linear", 64, 500000.0, factor=4.0), rel=1e-6)


def test_frequencies_by_formula() -> None:
    expected = [10000 ** (-2 * i / 64) for i in range(32)]
    assert frequencies(PLAIN).tolist() == pytest.approx(expected, rel=1e-14)
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    divided = [f / factor for f, factor in zip(expected, factors.tolist(), strict=True)]
    assert frequencies(PLAIN, factors).tolist() == pytest.approx(divided, rel=1e-14)
    linear = scaled(RopeScaling("linear", 4.0))
    assert frequencies(linear, factors).tolist() == pytest.approx([f / 4 for f in divided], rel=1e-14)


def rotated_by_hand(x: torch.Tensor, start: int, angle_of: list[float], magnitude: float) -> torch.Tensor:
    """(T, H, R): [[cos, -sin], [sin, cos]] on each pair (x[2i], x[2i + 1]), in Python's floats."""
    out = x.double().clone()
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i, frequency in enumerate(angle_of):
                cos, sin = math.cos((start + t) * frequency), math.sin((start + t) * frequency)
                a, b = float(x[t, h, 2 * i]), float(x[t, h, 2 * i + 1])
                out[t, h, 2 * i] = magnitude * (cos * a - sin * b)
                out[t, h, 2 * i + 1] = magnitude * (sin * a + cos * b)
    return out


@pytest.mark.parametrize("start", [0, 1, 4095, 163_836])
@pytest.mark.parametrize("mscale", [1.0, None])
def test_rotation_by_hand(start: int, mscale: float | None) -> None:
    x = torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(start))
    config = scaled(yarn(mscale=mscale))
    rope = Rope(config)
    found = rope.rotate(x, rope.turns(start, 4))
    magnitude = 1 + 0.1 * math.log(40) if mscale is None else 1.0
    expected = rotated_by_hand(x, start, frequencies(config).tolist(), magnitude)
    assert found.dtype == torch.float32 and found.shape == x.shape
    # Values up to 5, cosines and sums rounded to float32. An angle in float32 would be off by 0.01 at the last start.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)


def test_rotation_by_halves() -> None:
    """The same as of neighbours, once what is rotated together lies side by side."""
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0))
    rope = Rope(dataclasses.replace(LLAMA, rope="halves"))
    side_by_side = x.unflatten(-1, (2, 32)).transpose(-1, -2).flatten(-2)
    expected = rotated_by_hand(side_by_side, 9, frequencies(LLAMA).tolist(), 1.0)
    apart = expected.unflatten(-1, (32, 2)).transpose(-1, -2).flatten(-2)
    found = rope.rotate(x, rope.turns(9, 3))
    assert found.dtype == torch.float32 and found.shape == x.shape
    torch.testing.assert_close(found.double(), apart, rtol=0, atol=3e-6)  # as above


@pytest.mark.parametrize("rope", ["pairs", "halves"])
def test_rotation_of_a_part_of_each_head(rope: str) -> None:
    """As of the same values apart: queries come as slices of longer rows."""
    x = torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(0))
    turner = Rope(dataclasses.replace(LLAMA, rope=rope))
    for part in (x[..., :64], x[..., 32:]):
        found = turner.rotate(part, turner.turns(9, 5))
        assert found.is_contiguous()
        assert torch.equal(found, turner.rotate(part.contiguous(), turner.turns(9, 5)))


def test_yarn_of_grouped_queries_is_longer_vectors_and_no_other_scale() -> None:
    """As in llama.cpp and transformers: 1 + 0.1 ln factor on queries and keys alike."""
    config = dataclasses.replace(LLAMA, rope_scaling=yarn(factor=4.0, mscale=None))
    assert attention_scale(config) == 1 / 8
    assert rotation_magnitude(config) == pytest.approx(1.1386294)


def test_rotation_uses_the_factors() -> None:
    x = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0))
    rope = Rope(LLAMA, np.full(32, 2.0, np.float32))
    halved = [f / 2 for f in frequencies(LLAMA).tolist()]
    torch.testing.assert_close(
        rope.rotate(x, rope.turns(9, 2)).double(), rotated_by_hand(x, 9, halved, 1.0), rtol=0, atol=3e-6
    )


def test_scores_depend_on_distance_alone() -> None:
    """<R(p) q, R(p + d) k> is the same for every p: what makes the embedding relative."""
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    rope = Rope(scaled(yarn()))
    scores = [
        float((rope.rotate(q, rope.turns(p, 1)) * rope.rotate(k, rope.turns(p + 7, 1))).sum()) for p in (0, 5, 99)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=2e-5)  # 64 products of size 1, rounded at 2^-24 each
