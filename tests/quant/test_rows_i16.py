"""Rows of integers with a scale against NumPy: codes, scales, and that saving them in 16 bits loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from quant.gemm import rounding_i16
from quant.gemv.rows_i16 import LENGTH, expand_scaled_rows, pack_scaled_rows, row_bytes

pytestmark = pytest.mark.levels

WIDTHS = [16, 80, 576]
LEAST = 2.0**-24


def packed(x: np.ndarray) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    rows = np.full((len(x), row_bytes(x.shape[1])), 0xAA, np.uint8)
    pack_scaled_rows.ctypes(x.ctypes.data, len(x), x.shape[1], rows.ctypes.data)
    return rows


def expanded(rows: np.ndarray, width: int) -> np.ndarray:
    x = np.full((len(rows), width), np.nan, np.float16)
    expand_scaled_rows.ctypes(rows.ctypes.data, len(rows), width, x.ctypes.data)
    return x


def parts(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 codes (R, width) and scales (R, 1)."""
    return rows[:, :-4].copy().view(np.int16).astype(np.float64), rows[:, -4:].copy().view(np.float32).astype(
        np.float64
    )


def scale_for(row: np.ndarray) -> float:
    """The least power of two by which the row's codes fit."""
    least = max(np.linalg.norm(row) / LENGTH, np.abs(row).max() / 32767, LEAST)
    return float(2.0 ** np.ceil(np.log2(least)))


def random_rows(width: int, n_rows: int = 400) -> np.ndarray:
    """Of many sizes; some with one large value, one of zeros, one of small numbers that float16 has no normal of."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((n_rows, width)) * np.exp(rng.uniform(-8, 7, (n_rows, 1)))
    x[5::7, 3] *= 30
    x[1], x[2] = 0, x[2] * 1e-6
    return np.clip(x, -60000, 60000).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_numpys(width: int) -> None:
    """The scale of what comes of the values; none of these is so near a power of two that rounding asks for another."""
    x = random_rows(width)
    codes, scales = parts(packed(x))
    halves = x.astype(np.float16).astype(np.float64)
    expected = np.array([[scale_for(row)] for row in halves])
    assert np.array_equal(scales, expected)
    assert np.array_equal(codes, np.rint(halves / scales))
    assert np.all(np.linalg.norm(codes, axis=1) <= LENGTH)
    found = expanded(packed(x), width)
    assert np.array_equal(found.astype(np.float64), codes * scales)  # exact in float16, too


@pytest.mark.parametrize("width", WIDTHS)
def test_what_was_saved_in_16_bits_packs_to_the_same_bytes(width: int) -> None:
    """Also of rows whose length or largest value is within a rounding of where the next scale begins."""
    rng = np.random.default_rng(width)
    x = random_rows(width, 20_000)
    lengths = np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) + 1e-30
    border = (
        x / lengths * LENGTH * 2.0 ** rng.integers(-20, 0, (len(x), 1)) * rng.uniform(1 - 2e-4, 1 + 2e-4, (len(x), 1))
    )
    for rows in (x, np.clip(border, -60000, 60000)):
        once = packed(rows)
        codes, scales = parts(once)
        assert np.all(np.linalg.norm(codes, axis=1) <= LENGTH * (1 + 1e-6))  # float32's rounding of the length
        assert np.array_equal(packed(expanded(once, width)), once)
    halves = border.astype(np.float16).astype(np.float64)
    moved = [scale != scale_for(row) for row, scale in zip(halves, scales[:, 0], strict=True)]
    assert 0 < np.mean(moved) < 0.5  # rounding does ask for another scale of some


def test_what_is_no_number_stays_so() -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 7] = np.nan, np.inf
    found = expanded(packed(x), 64)
    assert np.all(np.isnan(found[:2])) and np.all(np.isfinite(found[2]))


def test_products_of_whole_lengths_fit_int32() -> None:
    assert LENGTH == rounding_i16.LENGTH_OF_LANES and LENGTH * rounding_i16.LENGTH < 2**31
