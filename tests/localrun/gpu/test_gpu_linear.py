"""Quantised matrices over device tensors against gguf's dequantize and a float64 product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import slow_but
from gpu_device import DEVICE, cut, others
from kernels import random_weight

from localrun.gpu.matrices import gemv
from localrun.gpu.matrices.linear import Embedding, HeadLinear, Joined, Linear
from quant.block_format import Format
from quant.errors import QuantError
from quant.formats import registry
from quant.matrix import QuantMatrix


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def on_device(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float32)).to(DEVICE)


def assert_close(found: torch.Tensor, values: np.ndarray, x: np.ndarray, equation: str, relative: float) -> None:
    """found = einsum(equation, values, x) but for a part of what the same sum of absolute values is."""
    expected = np.einsum(equation, values, x)
    bound = relative * np.einsum(equation, np.abs(values), np.abs(x))
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (np.abs(found.cpu().numpy() - expected) <= bound + 1e-30).all()


# A weight is scale * (1 + q / 16) - offset: where it is small against its block's range, float32's 2^-24 counts for the
# range. Blocks of random bytes have weights of all sizes, and so has every sum of absolute values here.
FEW = 2.0**-17
# Weights and activations rounded to float16: 2^-11 each, of their own size.
MANY = 2.0**-10


# Formats that differ from another one in sizes alone.
TWINS = {"Q5_1", "Q5_K", "IQ2_XS", "IQ2_S", "IQ3_S"}


@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("name", slow_but(registry.NAMES, {*registry.NAMES} - TWINS))
def test_few_tokens(name: str, n_tokens: int, rng: np.random.Generator) -> None:
    """An odd number of rows, several tiles of columns of which the last is cut."""
    weight, values = random_weight(name, (19, 768), rng)
    x = rng.standard_normal((n_tokens, 768))
    assert_close(Linear(weight, DEVICE)(on_device(x)), values, x, "oi,ti->to", FEW)


@pytest.mark.parametrize("n_tokens", range(1, gemv.MOST_TOKENS + 1))
def test_every_number_of_few_tokens_gives_each_what_it_gets_alone(n_tokens: int, rng: np.random.Generator) -> None:
    """To the bit: greedy replies must not depend on how many drafts were verified."""
    linear = Linear(random_weight("Q8_0", (5, 64), rng)[0], DEVICE)
    x = on_device(rng.standard_normal((n_tokens, 64)))
    together = linear(x)
    assert torch.equal(together, torch.cat([linear(x[t : t + 1]) for t in range(n_tokens)]))


@pytest.mark.parametrize("name", slow_but(registry.NAMES, {*registry.NAMES} - TWINS))
def test_many_tokens(name: str, rng: np.random.Generator) -> None:
    """Rows, tokens and columns that fill no whole tile."""
    weight, values = random_weight(name, (70, 768), rng)
    x = rng.standard_normal((gemv.MOST_TOKENS + 10, 768))
    assert_close(Linear(weight, DEVICE)(on_device(x)), values, x, "oi,ti->to", MANY)


@pytest.mark.parametrize("n_tokens", [2, 20])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_rows_of_any_length(name: str, n_tokens: int, rng: np.random.Generator) -> None:
    weight, values = random_weight(name, (7, 75), rng)
    x = rng.standard_normal((n_tokens, 75))
    assert_close(Linear(weight, DEVICE)(on_device(x)), values, x, "oi,ti->to", MANY)


def test_large_activations_stay_finite(rng: np.random.Generator) -> None:
    """Larger than float16 can be; a token of zeros beside them."""
    weight, values = random_weight("Q8_0", (6, 64), rng)
    x = rng.standard_normal((20, 64)) * 1e6
    x[3] = 0
    assert_close(Linear(weight, DEVICE)(on_device(x)), values, x, "oi,ti->to", MANY)


def test_wide_matrices_of_few_rows_are_split(rng: np.random.Generator) -> None:
    weight, values = random_weight("Q4_K", (3, 256 * 9), rng)
    linear, x = Linear(weight, DEVICE), rng.standard_normal((1, 256 * 9))
    assert gemv.parts(linear.matrix, DEVICE) > 2
    assert_close(linear(on_device(x)), values, x, "oi,ti->to", FEW)


def test_sums_of_parts_are_there_again_and_again(rng: np.random.Generator) -> None:
    """Whoever is last leaves the counters as it has found them."""
    linear = Linear(random_weight("Q8_0", (40, 1024), rng)[0], DEVICE)
    x = on_device(rng.standard_normal((3, 1024)))
    assert gemv.parts(linear.matrix, DEVICE) > 1
    right = linear(x)
    assert all(torch.equal(linear(x), right) for _ in range(2)) and not linear.matrix.done.any()


@pytest.mark.parametrize("n_tokens", [1, 3, 12])
def test_matrices_of_one_input_together(n_tokens: int, rng: np.random.Generator) -> None:
    """Of two formats in turn, and as they are by themselves from then on."""
    weights = [random_weight(name, (rows, 256), rng) for name, rows in (("Q8_0", 7), ("F16", 5), ("Q8_0", 40))]
    linears, x = [Linear(weight, DEVICE) for weight, _ in weights], rng.standard_normal((n_tokens, 256))
    joined = Joined(linears)
    for found, linear, (_, values) in zip(joined(on_device(x)), linears, weights, strict=True):
        for y in (found, linear(on_device(x))):
            assert_close(y, values, x, "oi,ti->to", FEW if n_tokens < 9 else MANY)


TILES = [(kind, name, type_) for kind in ("few", "many") for name in others(kind) for type_ in ("Q4_K", "Q6_K", "F16")]


@pytest.mark.parametrize(("kind", "name", "type_"), slow_but(TILES, {("few", "low", "F16"), ("many", "narrow", "F16")}))
def test_tiles(kind: str, name: str, type_: str, rng: np.random.Generator) -> None:
    """Rows, tokens and columns that fill no whole tile; of a few tokens each gets the bits that it gets alone."""
    weight, values = random_weight(type_, (35, 768), rng)
    x = rng.standard_normal((3 if kind == "few" else 26, 768)).astype(np.float32)
    linear = Linear(weight, DEVICE)
    with cut(kind, name):
        found = linear(on_device(x))
        assert_close(found, values, x, "oi,ti->to", FEW if kind == "few" else MANY)
        if kind == "few":
            assert torch.equal(found, torch.cat([linear(on_device(x[t : t + 1])) for t in range(len(x))]))


def test_no_tokens(rng: np.random.Generator) -> None:
    assert Linear(random_weight("Q8_0", (6, 64), rng)[0], DEVICE)(torch.zeros(0, 64, device=DEVICE)).shape == (0, 6)


@pytest.mark.parametrize("n_tokens", [2, 18])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_heads(name: str, n_tokens: int, rng: np.random.Generator) -> None:
    """W[g] x, W[g]^T x, and the matrices themselves; rows that are a part of each group's, as a joint kv_b has them."""
    joint, values = random_weight(name, (2, 21, 256), rng)
    heads, values = HeadLinear(joint.rows(4, 11), DEVICE), values[:, 4:15]
    x = rng.standard_normal((n_tokens, 2, 256))
    assert_close(heads(on_device(x)), values, x, "goi,tgi->tgo", MANY)
    y = rng.standard_normal((n_tokens, 2, 11))
    assert_close(heads.transposed(on_device(y)), values, y, "goi,tgo->tgi", FEW)
    bound = 2.0**-22 * np.abs(values).max()  # as in test_gpu_blocks
    np.testing.assert_allclose(heads.dense(1, 1).cpu().numpy(), values[1:], rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["Q5_0", "IQ4_XS", "MXFP4", "Q5_K"])
def test_transposed_in_other_formats(name: str, rng: np.random.Generator) -> None:
    weight, values = random_weight(name, (1, 40, 256), rng)
    y = rng.standard_normal((2, 1, 40))
    assert_close(HeadLinear(weight, DEVICE).transposed(on_device(y)), values, y, "goi,tgo->tgi", FEW)


def test_embedding(rng: np.random.Generator) -> None:
    weight, values = random_weight("Q8_0", (9, 512), rng)
    ids = torch.tensor([8, 0, 8], device=DEVICE)
    found = Embedding(weight, DEVICE)(ids)
    np.testing.assert_array_equal(found.cpu().numpy(), values[[8, 0, 8]].astype(np.float32))


def test_unknown_formats_are_refused() -> None:
    unknown = Format("Q8_K", 256, 74, True, lambda blocks: blocks, 0, 0, 0)
    with pytest.raises(QuantError, match="no GPU kernels for type Q8_K"):
        Linear(QuantMatrix(unknown, 0, 1, 1, 256, 84), DEVICE)
