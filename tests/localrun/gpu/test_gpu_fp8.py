"""FP8 matrices on the device against torch's own E4M3 and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE

from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import fp8, gemv, matrix


def random_matrix(n_rows: int, n_cols: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes but NaNs, scales, and the values by torch's float8_e4m3fn, float64."""
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 127, (n_rows, n_cols), dtype=np.uint8) | rng.integers(0, 2, (n_rows, n_cols), np.uint8) << 7
    scales = rng.random((-(-n_rows // 128), -(-n_cols // 128)), np.float32) / 64
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    return codes, scales, values * np.kron(scales.astype(np.float64), np.ones((128, 128)))[:n_rows, :n_cols]


def test_expanded_rows() -> None:
    """Bytes' values and scales to the bit, over the edges of blocks; NaN stays NaN."""
    codes, scales, values = random_matrix(131, 300)
    codes[5, 7], values[5, 7] = 127, np.nan
    device_matrix = matrix.Matrix(
        LAYOUTS["FP8_E4M3"], torch.from_numpy(codes).to(DEVICE), 1, 131, 300, torch.from_numpy(scales).to(DEVICE)
    )
    rows = torch.tensor([130, 5, 127, 128], device=DEVICE)
    found = gemv.expand_rows(device_matrix, rows).cpu().numpy()
    np.testing.assert_array_equal(found, values[rows.cpu().numpy()].astype(np.float32))


def test_few_tokens() -> None:
    codes, scales, values = random_matrix(131, 300)
    x = np.random.default_rng(3).standard_normal((2, 300)).astype(np.float32)
    found = fp8.FP8Linear(codes, scales, DEVICE)(torch.from_numpy(x).to(DEVICE)).cpu().numpy()
    # Sums of 300 float32 products.
    bound = 2.0**-20 * np.abs(x) @ np.abs(values).T
    assert (np.abs(found - x @ values.T) <= bound).all()


def test_many_tokens() -> None:
    """The rounding of activations aside (they are taken as rounded here), products are exact and sums in float32."""
    codes, scales, values = random_matrix(131, 300)
    x = np.random.default_rng(4).standard_normal((19, 300)).astype(np.float32)
    x[4, 128:256] = 0
    rounded, x_scale = fp8.quantise(torch.from_numpy(x))
    seen = rounded.view(torch.float8_e4m3fn).double().numpy() * np.repeat(x_scale.double().numpy(), 128, 1)[:, :300]
    # E4M3 has 3 bits behind the point: half a unit of the last is 1/16; below 2^-6 of 448ths steps are of fixed size.
    assert (np.abs(seen - x) <= np.abs(x) / 16 + np.repeat(x_scale.numpy(), 128, 1)[:, :300] * 2.0**-10).all()
    found = fp8.FP8Linear(codes, scales, DEVICE)(torch.from_numpy(x).to(DEVICE)).cpu().numpy()
    # Tensor cores may sum 128 products with as few as 14 bits; elsewhere it is float32.
    bound = (2.0**-13 if fp8.has_fp8_products(DEVICE) else 2.0**-20) * np.abs(seen) @ np.abs(values).T
    assert (np.abs(found - seen @ values.T) <= bound).all()


@pytest.mark.parametrize("n_tokens", [0, 20])
def test_shapes(n_tokens: int) -> None:
    codes, scales, _ = random_matrix(3, 128)
    assert fp8.FP8Linear(codes, scales, DEVICE)(torch.zeros(n_tokens, 128, device=DEVICE)).shape == (n_tokens, 3)
