"""Operators on SIMD vectors, lane by lane, against NumPy's: one rounding each, so equal to the bit."""

import kernels
import numpy as np
import pytest
from numba.core.errors import TypingError

from quant.simd.core import i8x32
from quant.simd.exact import at_least, at_most, clamp, where
from quant.simd.floats import fma, greater, hmax, hsum, maximum
from quant.simd.ints import lookup_in
from quant.simd.memory import (
    load_f32,
    load_f32x16,
    load_f32x32,
    load_i8x32,
    load_i32x16,
    store_f32,
    store_f32x16,
    store_f32x32,
    store_i8x32,
    store_i32x16,
)
from quant.target.jit import kernel

pytestmark = pytest.mark.levels


@kernel("void(int64, int64, int64, int64)")
def _float_operators(x, y, scalar, out):
    a, b, s = load_f32x16(x), load_f32x16(y), load_f32(scalar)
    store_f32x16(out, a + b)
    store_f32x16(out + 64, a - b)
    store_f32x16(out + 128, a * b)
    store_f32x16(out + 192, a / b)
    store_f32x16(out + 256, -a)
    store_f32x16(out + 320, abs(a))
    store_f32x16(out + 384, where(a < b, a, 7))
    store_f32x16(out + 448, where(a > b, s, b))
    store_f32x16(out + 512, s - a)
    store_f32x16(out + 576, a / s)
    store_f32x16(out + 640, 1 / a)
    store_f32x16(out + 704, clamp(a, -1, s))
    store_f32x16(out + 768, at_least(a, b))
    store_f32x16(out + 832, at_most(a, b))
    store_f32x16(out + 896, fma(a, b, s))


def test_float_operators():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16)).astype(np.float32)
    s, one = np.float32(0.7), np.float32(1)
    out = np.empty((15, 16), np.float32)
    kernels.call(_float_operators, a, b, np.array([s]), out)
    fused = (a.astype(np.float64) * b + s).astype(np.float32)  # the product of two float32 is exact in float64
    expected = [
        a + b, a - b, a * b, a / b, -a, np.abs(a), np.where(a < b, a, np.float32(7)), np.where(a > b, s, b),
        s - a, a / s, one / a, np.clip(a, -one, s), np.maximum(a, b), np.minimum(a, b), fused,
    ]  # fmt: skip
    np.testing.assert_array_equal(out, np.array(expected))
    assert np.any(fused != a * b + s)  # that fma is fused shows


@kernel("void(int64, int64, int64)")
def _nan_rules(x, y, out):
    a, b = load_f32x16(x), load_f32x16(y)
    store_f32x16(out, at_least(a, 2))
    store_f32x16(out + 64, maximum(a, b))
    store_f32x16(out + 128, greater(a, b))
    store_f32(out + 192, hmax(a))


def test_nan_lanes():
    a, b = np.arange(16, dtype=np.float32), np.full(16, 5, np.float32)
    a[[3, 15]] = np.nan
    out = np.empty(49, np.float32)
    kernels.call(_nan_rules, a, b, out)
    np.testing.assert_array_equal(out[:16], np.where(a > 2, a, np.float32(2)))
    np.testing.assert_array_equal(out[16:32], np.fmax(a, b))
    np.testing.assert_array_equal(out[32:48], np.fmax(a, b))
    assert out[48] == 14


@kernel("void(int64, int64)")
def _wide_floats(x, out):
    v = load_f32x32(x)
    total = 2 * abs(v)
    total -= v
    store_f32x32(out, total)
    store_f32(out + 128, hsum(v))


def test_32_lanes():
    x = np.random.default_rng(1).integers(-99, 99, 32).astype(np.float32)  # sums of integers are exact in any order
    out = np.empty(33, np.float32)
    kernels.call(_wide_floats, x, out)
    np.testing.assert_array_equal(out[:32], 2 * np.abs(x) - x)
    assert out[32] == x.sum()


@kernel("void(int64, int64, int64)")
def _byte_operators(x, y, out):
    a, b = load_i8x32(x), load_i8x32(y)
    store_i8x32(out, a + b)
    store_i8x32(out + 32, a - b)
    store_i8x32(out + 64, a & b)
    store_i8x32(out + 96, a | b)
    store_i8x32(out + 128, a ^ b)
    store_i8x32(out + 160, a << 3)
    store_i8x32(out + 192, a >> 3)
    store_i8x32(out + 224, a - 300)


@kernel("void(int64, int64, int64)")
def _word_operators(x, y, out):
    a, b = load_i32x16(x), load_i32x16(y)
    store_i32x16(out, a + b)
    store_i32x16(out + 64, a - b)
    store_i32x16(out + 128, a & b)
    store_i32x16(out + 192, a | b)
    store_i32x16(out + 256, a ^ b)
    store_i32x16(out + 320, a << 3)
    store_i32x16(out + 384, a >> 3)
    store_i32x16(out + 448, a - 300)


@pytest.mark.parametrize("dtype, operators", [(np.uint8, _byte_operators), (np.uint32, _word_operators)])
def test_integer_operators(dtype, operators):
    """Lanes wrap and have no sign."""
    rng, lanes = np.random.default_rng(2), 32 if dtype is np.uint8 else 16
    a, b = rng.integers(0, np.iinfo(dtype).max, (2, lanes), dtype, endpoint=True)
    out = np.empty((8, lanes), dtype)
    kernels.call(operators, a, b, out)
    cut, three = np.array(300).astype(dtype), dtype(3)
    expected = [a + b, a - b, a & b, a | b, a ^ b, a << three, a >> three, a - cut]
    np.testing.assert_array_equal(out, np.array(expected))


# Of no order; numbers and their negatives, raised; halves a constant apart: each its own way without byte permutes.
_TABLES = (
    np.array([3, -1, *range(14)], np.int8),
    np.array([12, 13, 15, 20, 9, 40, 7, 1, 12, 11, 9, 4, 15, -16, 17, 23], np.int8),
    np.array([5, 2, 8, 1, 0, 9, 7, 7, 105, 102, 108, 101, 100, 109, 107, 107], np.int8),
)
_irregular, _mirrored, _shifted = (lookup_in(table, i8x32) for table in _TABLES)


@kernel("void(int64, int64)")
def _look_up(x, out):
    store_i8x32(out, _irregular(load_i8x32(x)))
    store_i8x32(out + 32, _mirrored(load_i8x32(x)))
    store_i8x32(out + 64, _shifted(load_i8x32(x)))


def test_lookup():
    x, out = np.arange(32, dtype=np.uint8) % 16, np.empty((3, 32), np.int8)
    kernels.call(_look_up, x, out)
    np.testing.assert_array_equal(out, [table[x] for table in _TABLES])


def test_float64_is_refused():
    """A Python float is one: rounding it to float32 must be asked for."""

    @kernel("void(int64)")
    def half(x):
        store_f32x16(x, load_f32x16(x) * 0.5)

    with pytest.raises(TypingError):
        half.compiled  # noqa: B018 (asking is compiling)
