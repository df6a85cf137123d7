"""How vectors travel between ranks, against torch's types."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.decode.message_sizes import TILE, vector_bytes
from quant.decode.messages import TYPES


def travelled(name: str, x: np.ndarray) -> np.ndarray:
    """x as it arrives; nothing is written behind what travels, or behind x."""
    type_, size = TYPES[name], vector_bytes(name, x.size)
    message, out = np.full(size + 64, 0xA5, np.uint8), np.full(x.size + 16, 7.0, np.float32)
    type_.pack.ctypes(x.ctypes.data, x.size, message.ctypes.data)
    type_.unpack.ctypes(message.ctypes.data, x.size, out.ctypes.data)
    assert (message[size:] == 0xA5).all() and (out[x.size :] == 7.0).all()
    return out[: x.size]


def values(n: int) -> np.ndarray:
    """Of all sizes, zeros among them."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n) * 2.0 ** rng.integers(-30, 8, n)
    x[:: max(1, n // 5)] = 0.0
    return x.astype(np.float32)


@pytest.mark.parametrize("n", [1, 16, 33, 272])
def test_floats(n: int) -> None:
    x = values(n)
    assert np.array_equal(travelled("f32", x), x)
    assert np.array_equal(travelled("bf16", x), torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize("n", [16, 128, 272])
def test_fp8(n: int) -> None:
    """A tile's largest magnitude becomes 448, E4M3's largest."""
    x = values(n)
    expected = np.empty_like(x)
    for first in range(0, n, TILE):
        tile = x[first : first + TILE]
        largest = np.abs(tile).max()
        codes = torch.from_numpy(tile * (np.float32(448) / largest)).to(torch.float8_e4m3fn)
        expected[first : first + TILE] = codes.float().numpy() * (largest * np.float32(1 / 448))
    assert np.array_equal(travelled("fp8", x), expected)
    assert np.array_equal(travelled("fp8", np.zeros(n, np.float32)), np.zeros(n, np.float32))


def test_nan_arrives() -> None:
    """Of the tile that it is in."""
    for name in TYPES:
        x = values(272)
        x[3] = np.nan
        out = travelled(name, x)
        assert np.isnan(out[3]) and np.isfinite(out[TILE:]).all()


def test_infinity_is_not_lost() -> None:
    x = values(272)
    x[3] = np.inf
    assert all(not np.isfinite(travelled(name, x)[3]) for name in TYPES)
