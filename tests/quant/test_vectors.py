"""Float32 vector kernels against NumPy in float64, at lengths around their 16 lanes."""

import kernels
import numpy as np
import pytest

from quant.simd import floats, vectors
from quant.simd.memory import bits_to_f32, load_f32, load_f32x16, store_f32, store_f32x16
from quant.target import isa
from quant.target.jit import kernel

pytestmark = pytest.mark.levels

LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 100, 255, 1408]
GUARD = np.float32(-77)  # behind every output: must stay as it is

# A float32 operation rounds by 2^-24 of its result; the exponential's polynomial is off by 2e-8, a third of that.
ROUNDING = 2.0**-24


@kernel("void(int64, int64, int64)")
def _exp(x, n, out):
    for i in range(0, n, 16):
        store_f32x16(out + 4 * i, floats.exp(load_f32x16(x + 4 * i)))


@kernel("void(int64, int64, int64)", "avx512_vnni")
def _exp2(x, n, out):
    for i in range(0, n, 16):
        store_f32x16(out + 4 * i, floats.exp2(load_f32x16(x + 4 * i)))


@kernel("void(int64, int64, int64, int64, int64)")
def _rms_norm(x, weight, epsilon_bits, n, out):
    vectors.rms_norm(x, weight, bits_to_f32(epsilon_bits), n, out)


@kernel("void(int64, int64, int64, int64)")
def _swiglu(gate, up, n, out):
    vectors.swiglu(gate, up, n, out)


@kernel("void(int64, int64, int64, int64)")
def _scale_add(factor, x, n, out):
    vectors.scale_add(load_f32(factor), x, n, out)


@kernel("void(int64, int64, int64)")
def _scale(factor, n, out):
    vectors.scale(load_f32(factor), n, out)


@kernel("void(int64, int64, int64, int64)")
def _expand_f16(row, n, padded, out):
    vectors.expand_f16(row, n, padded, out)


@kernel("void(int64, int64)")
def _max(x, out):
    store_f32(out, floats.hmax(load_f32x16(x)))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def guarded(n: int, fill: np.ndarray | float = np.nan) -> np.ndarray:
    """float32 (n + 16,): `fill`, then guards."""
    out = np.full(n + 16, GUARD)
    out[:n] = fill
    return out


def unguarded(out: np.ndarray) -> np.ndarray:
    """What was written, after a look at the guards."""
    assert np.all(out[-16:] == GUARD)
    return out[:-16]


def exp(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    out = guarded(x.size)
    kernels.call(_exp, x, x.size, out)
    return unguarded(out)


# ---- exponentials ----------------------------------------------------------------------------------------------------


def test_exp_is_rounded_like_float32() -> None:
    """A million arguments; around 0, and around the multiples of ln(2)/2 where the polynomial is at its end."""
    rng = np.random.default_rng(0)
    ends = np.arange(-250, 253) * (np.log(2) / 2)
    x = np.concatenate([rng.uniform(-87, 88, 1_000_000), rng.uniform(-1e-3, 1e-3, 10_000), ends, ends + 1e-6])
    x = np.clip(x, -87, 88).astype(np.float32)[: x.size // 16 * 16]
    expected = np.exp(x.astype(np.float64))
    # Three roundings of a result between 0.7 and 1.4 (the product, the sum, the constants), and the polynomial's error.
    assert np.max(np.abs(exp(x) / expected - 1)) < 2 * ROUNDING
    assert np.all(exp(np.zeros(16)) == 1)


def test_exp_over_all_floats() -> None:
    """Every 4099th bit pattern, NaN included."""
    patterns = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32)
    x = patterns[: patterns.size // 16 * 16].view(np.float32)
    found = exp(x)
    assert np.array_equal(np.isnan(found), np.isnan(x))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = np.exp(np.clip(x.astype(np.float64), None, 88))
    inside = x >= -87
    assert np.max(np.abs(found[inside] / expected[inside] - 1)) < 2 * ROUNDING
    assert np.all(found[x < -87] == 0)  # where e^x is below 1.7e-38: next to float32's smallest normal number


def test_exp_at_the_ends() -> None:
    x = np.array([-np.inf, -1e38, -87.5, -87, -0.0, 0, 88, 88.5, 1e38, np.inf, np.nan], np.float32)
    found = exp(np.resize(x, 16))[: x.size]
    most = np.float32(np.exp(88))
    expected = np.array([0, 0, 0, np.exp(-87), 1, 1, most, most, most, most, np.nan], np.float32)
    np.testing.assert_allclose(found, expected, rtol=2 * ROUNDING, atol=0)


@pytest.mark.skipif(not isa.has("avx512_vnni"), reason="its instructions are AVX-512's")
def test_exp2() -> None:
    """A million arguments; whole numbers and their neighbours, where the fraction begins anew; the ends."""
    rng, whole = np.random.default_rng(0), np.arange(-120, 120, dtype=np.float32)
    around = [np.nextafter(whole, np.float32(end)) for end in (-np.inf, np.inf)]
    x = np.concatenate([rng.uniform(-126, 126, 1_000_000), rng.uniform(-1e-3, 1e-3, 10_000), whole, *around])
    x = x.astype(np.float32)[: x.size // 16 * 16]
    out = guarded(x.size)
    kernels.call(_exp2, x, x.size, out)
    # The polynomial's error, and two roundings of what is between 1 and 2.
    assert np.max(np.abs(unguarded(out) / np.exp2(x.astype(np.float64)) - 1)) < 3e-6 + 2 * ROUNDING
    ends, out = np.resize(np.array([-np.inf, -1e38, -200, 0, np.nan], np.float32), 16), guarded(16)
    kernels.call(_exp2, ends, 16, out)
    np.testing.assert_array_equal(out[:5], np.array([0, 0, 0, 1, np.nan], np.float32))


def test_lanes_do_not_meet() -> None:
    for lane in range(16):
        x = np.zeros(16, np.float32)
        x[lane] = np.nan
        assert np.array_equal(np.isnan(exp(x)), np.isnan(x))


@pytest.mark.parametrize("lane", range(16))
def test_maximum_of_lanes(lane: int) -> None:
    out = np.zeros(1, np.float32)
    x = -1 - np.abs(random(16))
    x[lane] = -0.5
    kernels.call(_max, x, out)
    assert out[0] == -0.5
    x[lane] = np.nan
    kernels.call(_max, x, out)
    assert out[0] == np.nanmax(x)
    kernels.call(_max, np.full(16, -np.inf, np.float32), out)
    assert out[0] == -np.inf


# ---- rows of any length ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("in_place", [False, True])
def test_rms_norm(n: int, epsilon: float, in_place: bool) -> None:
    x, weight = 3 * random(n, seed=n), 1 + random(n, seed=1)
    out = guarded(n, x if in_place else np.nan)
    source = out if in_place else x
    kernels.call(_rms_norm, source, weight, int(np.float32(epsilon).view(np.int32)), n, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2) + np.float32(epsilon)) * weight
    # The sum of squares has n / 16 roundings a lane, all of the same sign at worst; its root halves them.
    np.testing.assert_allclose(unguarded(out), expected, rtol=(8 + n / 32) * ROUNDING, atol=0)


def test_rms_norm_of_zeros() -> None:
    out = guarded(33)
    kernels.call(_rms_norm, np.zeros(33, np.float32), random(33), int(np.float32(1e-6).view(np.int32)), 33, out)
    assert np.all(unguarded(out) == 0)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("place", ["elsewhere", "over gate", "over up"])
def test_swiglu(n: int, place: str) -> None:
    gate, up = 10 * random(n, seed=n), random(n, seed=1)
    out = guarded(n, {"over gate": gate, "over up": up}.get(place, np.nan))
    kernels.call(_swiglu, out if place == "over gate" else gate, out if place == "over up" else up, n, out)
    wide = gate.astype(np.float64)
    # The exponential's two roundings, then a sum, a quotient and a product.
    np.testing.assert_allclose(unguarded(out), wide / (1 + np.exp(-wide)) * up, rtol=6 * ROUNDING, atol=0)


def test_swiglu_far_from_zero() -> None:
    """Both the vector part and the tail; below -88 silu is 0 but for what float32 hardly holds."""
    gate = np.resize(np.array([-1e4, -1000, -200, -89, -88, 88, 89, 1000, 1e30], np.float32), 33)
    out = guarded(33)
    kernels.call(_swiglu, gate, np.ones(33, np.float32), 33, out)
    np.testing.assert_allclose(unguarded(out), np.maximum(gate, 0), rtol=ROUNDING, atol=1e-33)


def test_swiglu_keeps_nan() -> None:
    gate, up = random(33), random(33, seed=1)
    gate[[3, 32]] = np.nan
    up[[5, 16]] = np.nan
    out = guarded(33)
    kernels.call(_swiglu, gate, up, 33, out)
    assert np.flatnonzero(np.isnan(unguarded(out))).tolist() == [3, 5, 16, 32]


@pytest.mark.parametrize("n", LENGTHS)
def test_scale_add(n: int) -> None:
    x, before, factor = random(n, seed=n), random(n, seed=1), np.float32([-1.7])
    out = guarded(n, before)
    kernels.call(_scale_add, factor, x, n, out)
    expected = before.astype(np.float64) + factor.astype(np.float64) * x
    bound = 2 * ROUNDING * (np.abs(before) + 1.7 * np.abs(x))  # one rounding or two, as it is fused or not
    assert np.all(np.abs(unguarded(out) - expected) <= bound)


@pytest.mark.levels
def test_sums_are_the_same_in_pieces() -> None:
    """Where a worker's rows end changes no bit."""
    x, out, factor = random(40), random(40, seed=1), np.float32([0.3])
    whole = out.copy()
    kernels.call(_scale_add, factor, x, 40, whole)
    for first, n in [(0, 7), (7, 1), (8, 20), (28, 12)]:
        kernels.call(_scale_add, factor, x[first:], n, out[first:])
    assert kernels.same_bits(out, whole)


@pytest.mark.parametrize("n", LENGTHS)
def test_scale(n: int) -> None:
    x, factor = random(n, seed=n), np.float32([0.3])
    out = guarded(n, x)
    kernels.call(_scale, factor, n, out)
    assert np.array_equal(unguarded(out), factor * x)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("more", [0, 1, 15])
def test_expand_f16(n: int, more: int) -> None:
    row = random(n, seed=n).astype(np.float16)
    out = guarded(n + more)
    kernels.call(_expand_f16, row, n, n + more, out)
    assert np.array_equal(unguarded(out), np.concatenate([row.astype(np.float32), np.zeros(more, np.float32)]))


def test_expand_f16_of_every_pattern() -> None:
    """Subnormals, infinities and NaN, in the vector part and, shifted by one, in the tail."""
    row = np.arange(2**16, dtype=np.uint16).view(np.float16)
    for n in (2**16, 2**16 - 1):
        out = guarded(n)
        kernels.call(_expand_f16, row, n, n, out)
        np.testing.assert_array_equal(unguarded(out), row[:n].astype(np.float32))
