"""Expansion of every format's blocks inside Triton kernels, against gguf's dequantize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_device import DEVICE
from kernels import random_weight

from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import gemv, matrix
from quant.formats import registry


def test_all_formats_of_the_cpu_are_there() -> None:
    assert set(LAYOUTS) == {*registry.NAMES, "FP8_E4M3"}


@pytest.mark.parametrize("name", registry.NAMES)
def test_expanded_rows_are_those_of_gguf(name: str, rng: np.random.Generator) -> None:
    """Of several groups, in any order.

    To the bit, where scale * (1 + q / 2^n) has no more than float32's 24 bits and there is no minimum; else one of the
    two is rounded at the block's range, where a weight may be of any size.
    """
    weight, values = random_weight(name, (3, 5, 512), rng)
    rows = torch.tensor([14, 0, 7, 7, 3], device=DEVICE)
    found = gemv.expand_rows(matrix.upload(weight, DEVICE), rows)
    rounded = name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
    tolerance = 2.0**-22 * np.abs(values).max() if rounded else 0.0
    expected = values.reshape(15, 512)[rows.cpu().numpy()].astype(np.float32)
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_rows_of_any_length(name: str, rng: np.random.Generator) -> None:
    weight, values = random_weight(name, (3, 75), rng)
    found = gemv.expand_rows(matrix.upload(weight, DEVICE), torch.arange(3, device=DEVICE))
    np.testing.assert_array_equal(found.cpu().numpy(), values.astype(np.float32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
