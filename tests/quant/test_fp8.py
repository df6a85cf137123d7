"""FP8 E4M3 with scales by block, against torch's own type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.errors import QuantError
from quant.formats import fp8


def test_every_byte_means_what_torch_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(fp8.VALUES, codes.view(torch.float8_e4m3fn).float().numpy(), equal_nan=True)


@pytest.mark.parametrize("block", [(128, 128), (16, 32), (7, 9), (1, 50), (1000, 1000)], ids=str)
@pytest.mark.parametrize("rows", [(0, 45), (0, 1), (6, 8), (13, 45)], ids=str)
def test_rows_are_codes_times_their_blocks_scale(block: tuple[int, int], rows: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (45, 50), dtype=np.uint8)
    scales = rng.random((-(-45 // block[0]), -(-50 // block[1])), dtype=np.float32)
    spread = scales.repeat(block[0], 0)[:45].repeat(block[1], 1)[:, :50]
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy() * spread
    out = np.full((rows[1] - rows[0], 50), np.nan, np.float32)
    fp8.expand(codes[rows[0] : rows[1]], scales, rows[0], block, out)
    assert np.array_equal(out, expected[rows[0] : rows[1]])


def test_what_does_not_fit_is_refused() -> None:
    codes, out = np.zeros((4, 8), np.uint8), np.zeros((4, 8), np.float32)
    with pytest.raises(QuantError, match="3 scales for rows to 4 of 8; expected 4"):
        fp8.expand(codes, np.zeros(3, np.float32), 0, (2, 4), out)
    with pytest.raises(QuantError, match="6 of 8; expected 6"):
        fp8.expand(codes, np.zeros(4, np.float32), 2, (2, 4), out)
    with pytest.raises(QuantError, match="must be uint8, float32 and float32"):
        fp8.expand(codes, np.zeros(4), 0, (2, 4), out)
    with pytest.raises(QuantError, match="codes and out alike"):
        fp8.expand(codes, np.zeros(4, np.float32), 0, (2, 4), out[:3])
