"""The fused expert job against its formula in float64."""

import kernels
import numpy as np
import pytest
from expert_cases import N_EXPERTS, gated, random_biases, random_case, run

from quant.errors import QuantError
from quant.matrix import ExpertMatrices
from quant.simd.gated import SWIGLU, Activation
from quant.threads.pool import Pool

pytestmark = pytest.mark.levels


def naive(values, formats_, x, ids, weights, biases=None, activation=SWIGLU) -> np.ndarray:
    """sum_k w * down(silu(gate x) * up x), with the activations rounded as the formats want."""
    gate, up, down = values
    seen = kernels.rounded(x, formats_[0]).astype(np.float64)
    out = np.zeros(x.shape)
    for t, k in np.ndindex(*ids.shape):
        expert = ids[t, k]
        gate_bias, up_bias, down_bias = (bias[expert] for bias in biases) if biases else (0, 0, 0)
        inner = gated(activation, gate[expert] @ seen[t] + gate_bias, up[expert] @ seen[t] + up_bias)
        result = down[expert] @ kernels.rounded(inner.astype(np.float32), formats_[1]) + down_bias
        out[t] += weights[t, k] * result
    return out


@pytest.mark.parametrize("n_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize(
    ("gate", "up", "down", "hidden", "inner"),
    [
        ("F32", "F32", "F32", 64, 48),
        ("Q4_0", "Q4_0", "Q8_0", 128, 96),  # as V2-Lite's: other types below, and no multiple of 256
        ("Q4_K", "Q4_K", "Q6_K", 256, 512),
        ("Q5_0", "Q4_1", "BF16", 64, 80),
    ],
)
def test_run(pool, gate, up, down, hidden, inner, n_tokens):
    if hidden % 32 or (inner % 32 and down != "BF16" and down != "F32"):
        raise AssertionError("integer formats need whole groups of 32")
    rng = np.random.default_rng(n_tokens)
    matrices, values = zip(
        kernels.random_weight(gate, (N_EXPERTS, inner, hidden), rng),
        kernels.random_weight(up, (N_EXPERTS, inner, hidden), rng),
        kernels.random_weight(down, (N_EXPERTS, hidden, inner), rng),
        strict=True,
    )
    x, ids, weights = random_case(n_tokens, hidden, rng)
    x /= np.sqrt(hidden)
    want = naive(values, (matrices[0].format, matrices[2].format), x, ids, weights)
    got = run(pool, matrices, x, ids, weights)
    # A float32 rounding of `inner` may tip an 8-bit rounding of it: one step of 1/127 in one of `inner` terms.
    tolerance = 2**-20 if not matrices[2].format.integer else 2e-3
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("activation", [Activation(1.702, 1.5), Activation(1.0, 1.5, 0.0)], ids=["gpt-oss", "V4"])
@pytest.mark.parametrize("n_tokens", [1, 7, 40])
@pytest.mark.parametrize(("format_", "inner"), [("F32", 75), ("MXFP4", 96)])
def test_biases_and_a_bounded_activation(pool, format_, inner, n_tokens, activation):
    """Bounds that a fourth of all values meet; columns that are no whole vectors."""
    rng = np.random.default_rng(n_tokens)
    shapes = (N_EXPERTS, inner, 64), (N_EXPERTS, inner, 64), (N_EXPERTS, 64, inner)
    matrices, values = zip(*(kernels.random_weight(format_, shape, rng) for shape in shapes), strict=True)
    biases = random_biases(N_EXPERTS, inner, 64, rng)
    x, ids, weights = random_case(n_tokens, 64, rng)
    x /= 8
    want = naive(values, (matrices[0].format, matrices[2].format), x, ids, weights, biases, activation)
    found = run(pool, matrices, x, ids, weights, biases, activation)
    tolerance = 2**-20 if format_ == "F32" else 2e-3  # as in test_run
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


def test_biases_of_another_width_are_refused():
    rng = np.random.default_rng(0)
    shapes = (4, 32, 64), (4, 32, 64), (4, 64, 32)
    matrices = [kernels.random_weight("F32", shape, rng)[0] for shape in shapes]
    with pytest.raises(QuantError, match=r"a bias of float32 \(4, 64\) for experts' 32 rows"):
        ExpertMatrices(*matrices, random_biases(4, 64, 32, rng))


@pytest.mark.parametrize("n_tokens", [1, 3, 40])
@pytest.mark.parametrize("format_", ["F32", "Q4_0"])
@pytest.mark.parametrize("left_out", [0.3, 0.99, 1.0])
def test_pairs_without_an_expert_are_left_out(pool, format_, n_tokens, left_out):
    """As if their weights were 0, though nothing is computed for them."""
    rng = np.random.default_rng(n_tokens)
    shapes = (N_EXPERTS, 96, 64), (N_EXPERTS, 96, 64), (N_EXPERTS, 64, 96)
    matrices = [kernels.random_weight(format_, shape, rng)[0] for shape in shapes]
    x, ids, weights = random_case(n_tokens, 64, rng)
    skipped = rng.random(ids.shape) < left_out
    found = run(pool, matrices, x, np.where(skipped, -1, ids), weights)
    expected = run(pool, matrices, x, ids, np.where(skipped, np.float32(0), weights))
    # Fewer pairs may go another way through the kernels: float32 rounding, which may tip an 8-bit one.
    tolerance = 2**-20 if format_ == "F32" else 2e-3
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-9)


def test_one_worker_gives_the_same_bits(pool):
    rng = np.random.default_rng(0)
    matrices = [
        kernels.random_weight("Q4_0", shape, rng)[0]
        for shape in ((N_EXPERTS, 96, 64), (N_EXPERTS, 96, 64), (N_EXPERTS, 64, 96))
    ]
    single = Pool(1)
    for n_tokens in (1, 30):
        x, ids, weights = random_case(n_tokens, 64, rng)
        assert np.array_equal(run(pool, matrices, x, ids, weights), run(single, matrices, x, ids, weights))
    single.close()


def test_shapes_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(0)
    gate, _ = kernels.random_weight("F32", (4, 32, 64), rng)
    down, _ = kernels.random_weight("F32", (4, 64, 48), rng)
    with pytest.raises(QuantError, match="do not belong together"):
        ExpertMatrices(gate, gate, down)
