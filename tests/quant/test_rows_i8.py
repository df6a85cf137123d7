"""Rows of a cache of 8 bits against NumPy: codes, scales, and that saving them in 16 bits loses nothing."""

from __future__ import annotations

import numpy as np
import pytest

from quant.gemv.rows_i8 import expand_rows, pack_rows, row_bytes

pytestmark = pytest.mark.levels

SHAPES = [(576, 512), (128, 64), (48, 16), (85, 64), (64, 64)]  # values of a row, and of a group
LEAST = 2.0**-21


def packed(x: np.ndarray, group: int) -> np.ndarray:
    x = np.ascontiguousarray(x, np.float32)
    rows = np.full((len(x), row_bytes(x.shape[1], group)), 0xAA, np.uint8)
    pack_rows.ctypes(x.ctypes.data, len(x), x.shape[1], group, rows.ctypes.data)
    return rows


def expanded(rows: np.ndarray, width: int, group: int) -> np.ndarray:
    x = np.full((len(rows), width), np.nan, np.float16)
    expand_rows.ctypes(rows.ctypes.data, len(rows), width, group, x.ctypes.data)
    return x


def scale_for(most: np.float32) -> np.float32:
    """The least of 4 significant bits by which 127 reaches `most`."""
    mantissa, exponent = np.frexp(most / np.float32(127))
    return max(np.float32(np.ldexp(np.ceil(mantissa * 16) / 16, exponent)), np.float32(LEAST))


def expected(x: np.ndarray, group: int) -> np.ndarray:
    """float64: what rows hold, group by group."""
    out = x.astype(np.float16).astype(np.float64)
    for row, values in zip(out, x.astype(np.float32), strict=True):
        for at in range(0, x.shape[1] // group * group, group):
            some = values[at : at + group]
            scale = scale_for(np.abs(some).max())
            scale = scale_for(np.rint(np.abs(some).max() / scale) * scale)
            row[at : at + group] = np.clip(np.rint(some / scale), -127, 127) * np.float64(scale)
    return out


def random_rows(width: int, n_rows: int = 400) -> np.ndarray:
    """Of many sizes; some with one large value, one of zeros, one of small numbers that float16 has no normal of."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((n_rows, width)) * np.exp(rng.uniform(-8, 7, (n_rows, 1)))
    x[5::7, 3] *= 30
    x[1], x[2] = 0, x[2] * 1e-6
    return np.clip(x, -60000, 60000).astype(np.float32)


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_rows_are_numpys(width: int, group: int) -> None:
    x = random_rows(width)
    found = expanded(packed(x, group), width, group)
    assert np.array_equal(found.astype(np.float64), expected(x, group))  # exact in float16, too


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_half_a_step_is_the_error(width: int, group: int) -> None:
    """A step is at most 9/8 of the largest / 127, and the largest may be off by a whole one."""
    x = random_rows(width)
    found, whole = expanded(packed(x, group), width, group).astype(np.float64), width // group * group
    most = np.abs(x[:, :whole].reshape(len(x), -1, group)).max(2).repeat(group, 1)
    off = np.abs(found - x)[:, :whole]
    assert np.all(off <= 1.125 * most / 127 + LEAST) and np.mean(off <= 0.5 * 1.125 * most / 127 + LEAST) > 0.999


@pytest.mark.parametrize(("width", "group"), SHAPES)
def test_what_was_saved_in_16_bits_packs_to_the_same_bytes(width: int, group: int) -> None:
    once = packed(random_rows(width, 5000), group)
    assert np.array_equal(packed(expanded(once, width, group), group), once)


def test_what_is_no_number_stays_so() -> None:
    x = np.ones((3, 64), np.float32)
    x[0, 5], x[1, 7] = np.nan, np.inf
    found = expanded(packed(x, 64), 64, 64)
    assert np.all(np.isnan(found[:2])) and np.all(np.isfinite(found[2]))
