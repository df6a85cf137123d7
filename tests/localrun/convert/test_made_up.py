"""Made-up blocks: of the deviation asked for, in types that are packed and in those that are not."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.convert.made_up import made_up_blocks
from quant.formats import registry
from quant.threads.pool import Pool

NOT_PACKED = [name for name in registry.NAMES if name not in registry.QUANTIZABLE]


@pytest.mark.parametrize("name", ["Q2_K", *NOT_PACKED])
@pytest.mark.parametrize("deviation", [0.02, 1.0])
def test_weights_deviate_as_asked(name: str, deviation: float, pool: Pool) -> None:
    format_ = registry.get(name)
    blocks = made_up_blocks(pool, name, 64, deviation)
    assert blocks.shape == (64, format_.block_bytes) and blocks.dtype == np.uint8
    values = format_.unpack(blocks.reshape(-1))
    # Scales that are no plain halves are drawn: of many blocks the nearest, within a factor of 2.
    assert np.isfinite(values).all() and deviation / 2 < values.std() < deviation * 2
    assert np.array_equal(blocks, made_up_blocks(pool, name, 64, deviation))
