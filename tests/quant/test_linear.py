"""Matrix products over quantised weights against NumPy in float64 over gguf's dequantized values."""

import kernels
import numpy as np
import pytest

from quant.errors import QuantError
from quant.formats import registry
from quant.matrix import quant_matrix
from quant.ops import linear
from quant.threads.pool import Pool

pytestmark = pytest.mark.levels

SHAPES = [
    ("F32", (5, 7, 24)),
    ("F16", (1, 33, 48)),
    ("BF16", (2, 5, 64)),
    ("Q8_0", (1, 200, 576)),
    ("Q4_0", (3, 40, 64)),
    ("Q4_K", (2, 70, 512)),
    ("Q6_K", (1, 9, 256)),
]


def close(got: np.ndarray, want: np.ndarray, magnitude: np.ndarray) -> bool:
    """Within float32 rounding of sums whose terms add up to `magnitude`; 8-bit errors would be 2^-8 of it."""
    return bool(np.all(np.abs(got - want) <= 2**-20 * magnitude + 1e-30))


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 4, 5, 9, 33])
@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_multiply(pool, name, shape, n_tokens):
    rng = np.random.default_rng(n_tokens)
    weight, values = kernels.random_weight(name, shape, rng)
    x = rng.standard_normal((n_tokens, shape[0], shape[2])).astype(np.float32)
    seen = kernels.rounded(x, weight.format).astype(np.float64)
    magnitude = np.einsum("grc,tgc->tgr", np.abs(values), np.abs(seen))
    assert close(kernels.multiply(pool, weight, x), np.einsum("grc,tgc->tgr", values, seen), magnitude)


def test_one_worker_gives_the_same_bits(pool):
    rng = np.random.default_rng(1)
    weight, _ = kernels.random_weight("Q5_K", (1, 300, 512), rng)
    single = Pool(1)
    for n_tokens in (1, 20):
        x = rng.standard_normal((n_tokens, 1, 512)).astype(np.float32)
        assert np.array_equal(kernels.multiply(pool, weight, x), kernels.multiply(single, weight, x))
    single.close()


@pytest.mark.parametrize("n_tokens", [1, 6])
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, s in SHAPES if s[2] % 16 == 0])
def test_multiply_transposed(pool, name, shape, n_tokens):
    rng = np.random.default_rng(n_tokens)
    weight, values = kernels.random_weight(name, shape, rng)
    x = rng.standard_normal((n_tokens, *shape[:2])).astype(np.float32)
    out = np.empty((n_tokens, shape[0], shape[2]), np.float32)
    linear.multiply_transposed(pool, weight, x.ctypes.data, n_tokens, out.ctypes.data)
    magnitude = np.einsum("grc,tgr->tgc", np.abs(values), np.abs(x))
    assert close(out, np.einsum("grc,tgr->tgc", values, x.astype(np.float64)), magnitude)


def test_expand_rows_of_a_restricted_view(pool):
    rng = np.random.default_rng(2)
    weight, values = kernels.random_weight("Q5_1", (3, 10, 64), rng)
    view = weight.rows(4, 5)
    rows = np.array([0, 4, 5, 14, 7])
    out = np.empty((len(rows), 64), np.float32)
    linear.expand_rows(pool, view, rows, out.ctypes.data)
    assert np.array_equal(out, values[:, 4:9].reshape(-1, 64)[rows].astype(np.float32))


def test_restricted_view_multiplies_its_rows(pool):
    rng = np.random.default_rng(3)
    weight, _ = kernels.random_weight("Q8_0", (4, 12, 64), rng)
    x = rng.standard_normal((2, 4, 64)).astype(np.float32)
    whole, part = kernels.multiply(pool, weight, x), kernels.multiply(pool, weight.rows(3, 7), x)
    assert np.array_equal(part, whole[:, :, 3:10])


def test_wrong_sizes_are_refused():
    q8_0 = registry.get("Q8_0")
    with pytest.raises(QuantError, match="takes 136 contiguous bytes; found 100"):
        quant_matrix(np.zeros(100, np.uint8), q8_0, (2, 64))
    weight = quant_matrix(np.zeros(136, np.uint8), q8_0, (2, 64))
    with pytest.raises(QuantError, match=r"rows 1\.\.3 of a matrix with 2"):
        weight.rows(1, 2)


def test_nan_weights_reach_the_result(pool):
    weight, _ = kernels.random_weight("F32", (1, 4, 64), np.random.default_rng(4))
    weight.owner[64 * 4 * 2 : 64 * 4 * 2 + 4] = np.array([np.nan], np.float32).view(np.uint8)
    out = kernels.multiply(pool, weight, np.ones((1, 1, 64), np.float32))
    assert np.array_equal(np.isnan(out.ravel()), [False, False, True, False])
