"""Routed experts on the device against gguf's dequantize and float64."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from cases import slow_but
from expert_cases import gated, random_biases
from gpu_device import DEVICE
from kernels import random_weight

from localrun.gpu.experts.in_vram import Experts
from localrun.gpu.experts.in_vram import gated as gated_on_device
from localrun.network import moe
from quant.formats import registry
from quant.matrix import ExpertMatrices
from quant.simd.gated import SWIGLU, Activation

HIDDEN, INNER, N_EXPERTS = 256, 32, 5


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def random_experts(
    types: tuple[str, str, str], rng: np.random.Generator, inner: int = INNER
) -> tuple[ExpertMatrices, list[np.ndarray]]:
    """The experts, and the values of their three stacks; at least a block of the down matrix is inside."""
    inner = max(inner, registry.get(types[2]).block)
    shapes = ((N_EXPERTS, inner, HIDDEN), (N_EXPERTS, inner, HIDDEN), (N_EXPERTS, HIDDEN, inner))
    made = [random_weight(name, shape, rng) for name, shape in zip(types, shapes, strict=True)]
    return ExpertMatrices(*(weight for weight, _ in made)), [values for _, values in made]


def expected(
    host: ExpertMatrices, values: list[np.ndarray], x: np.ndarray, ids: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    gate, up, down = values
    for_gate, for_up, for_down = host.biases or [np.zeros((N_EXPERTS, 1))] * 3
    out = np.zeros_like(x)
    for t, k in zip(*np.nonzero(ids >= 0), strict=True):
        e = ids[t, k]
        inner = gated(host.activation, gate[e] @ x[t] + for_gate[e], up[e] @ x[t] + for_up[e])
        out[t] += weights[t, k] * (down[e] @ inner + for_down[e])
    return out


def check(
    host: ExpertMatrices, values: list[np.ndarray], ids: np.ndarray, here: list[int] | None, tolerance: float
) -> None:
    rng = np.random.default_rng(8)
    x, weights = rng.standard_normal((len(ids), HIDDEN)) / 8, rng.random(ids.shape).astype(np.float32)
    experts = Experts(host, DEVICE, here)
    arguments = (x.astype(np.float32), ids, weights)
    finish = experts.begin(*(torch.from_numpy(a).to(DEVICE) for a in arguments))
    found = finish().cpu().numpy()
    mine = ids if here is None else np.where(np.isin(ids, here), ids, -1)
    wanted = expected(host, values, x.astype(np.float32).astype(np.float64), mine, weights)
    # Of the largest result: what is summed is larger than small results are.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def choices(n_tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Two different experts a token; one pair belongs to nobody."""
    ids = np.argsort(rng.random((n_tokens, N_EXPERTS)), axis=1)[:, :2].astype(np.int64)
    ids[n_tokens // 2, 1] = -1
    return ids


FEW = 1e-5  # sums of float32 products, twice, and the SwiGLU between
MANY = 4e-3  # three operands rounded to float16, 2^-11 each; SwiGLU amplifies gate's error by up to the gate itself


TYPES = [("Q4_K", "Q4_K", "Q5_0"), ("Q4_K", "Q6_K", "Q8_0"), ("IQ2_XXS", "IQ1_M", "IQ3_S")]  # gate, up, down


@pytest.mark.parametrize(
    ("types", "n_tokens"),
    slow_but(itertools.product(TYPES, (1, 2)), [(TYPES[0], 2), (TYPES[1], 1), (TYPES[2], 1)]),
)
def test_few_tokens(types: tuple[str, str, str], n_tokens: int, rng: np.random.Generator) -> None:
    host, values = random_experts(types, rng)
    check(host, values, choices(n_tokens, rng), None, FEW)


@pytest.mark.parametrize("types", TYPES)
def test_many_tokens(types: tuple[str, str, str], rng: np.random.Generator) -> None:
    """More pairs of an expert than fill a tile, tokens and rows that fill no whole one."""
    host, values = random_experts(types, rng)
    check(host, values, choices(45, rng), None, MANY)


@pytest.mark.parametrize("n_tokens", [2, 21])
def test_some_experts_are_elsewhere(n_tokens: int, rng: np.random.Generator) -> None:
    """In any order; their pairs count nothing."""
    host, values = random_experts(("Q8_0", "Q8_0", "Q8_0"), rng, inner=96)
    check(host, values, choices(n_tokens, rng), [4, 1], FEW if n_tokens == 2 else MANY)


@pytest.mark.parametrize(("n_tokens", "here"), [(2, None), (21, [3, 1])])
def test_biases_and_bounds(n_tokens: int, here: list[int] | None, rng: np.random.Generator) -> None:
    """As gpt-oss has them; the bounds are crossed on both sides."""
    host, values = random_experts(("Q8_0", "F16", "Q8_0"), rng)
    biases = random_biases(N_EXPERTS, host.gate.n_rows, HIDDEN, rng)
    host = dataclasses.replace(host, biases=biases, activation=Activation(1.702, 0.7, 1.0))
    check(host, values, choices(n_tokens, rng), here, FEW if n_tokens == 2 else MANY)


@pytest.mark.parametrize("activation", [SWIGLU, Activation(1.0, 2.0, 0.0), Activation(1.702, 0.7, 1.0)])
def test_the_activation_of_other_layers_is_the_networks(activation: Activation) -> None:
    gate, up = 4 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    found = gated_on_device(activation, gate.to(DEVICE), up.to(DEVICE)).cpu()
    # Of float32: an exponential and a quotient, and values of up to 200.
    torch.testing.assert_close(found, moe.gated(activation, gate, up), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_tokens", [2, 21])
def test_none_of_the_chosen_experts_is_here(n_tokens: int, rng: np.random.Generator) -> None:
    host, _ = random_experts(("Q8_0", "Q8_0", "Q8_0"), rng)
    experts = Experts(host, DEVICE, [0])
    ids = torch.full((n_tokens, 2), 3, device=DEVICE)
    found = experts(torch.ones(n_tokens, HIDDEN, device=DEVICE), ids, torch.ones(n_tokens, 2, device=DEVICE))
    assert found.shape == (n_tokens, HIDDEN) and not found.any()


def test_an_expert_that_all_tokens_choose(rng: np.random.Generator) -> None:
    host, values = random_experts(("Q8_0", "Q8_0", "Q8_0"), rng)
    check(host, values, np.full((40, 1), 2), None, MANY)


def test_no_tokens(rng: np.random.Generator) -> None:
    host, _ = random_experts(("Q8_0", "Q8_0", "Q8_0"), rng)
    nothing = torch.zeros(0, 2, device=DEVICE)
    assert Experts(host, DEVICE)(torch.zeros(0, HIDDEN, device=DEVICE), nothing.long(), nothing).shape == (0, HIDDEN)
