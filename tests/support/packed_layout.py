"""The layout of packed panels, read back: what quant.gemm.packed says of it."""

import numpy as np

from quant.block_format import PanelFormat
from quant.gemm import packed


def unpacked(steps: np.ndarray, format_: PanelFormat) -> np.ndarray:
    """The float32 (16, n*32) weights of n steps, uint8 (n, part_bytes): what packed.py says of the layout."""
    u = steps[:, :512].reshape(-1, 8, 16, 4).transpose(2, 0, 1, 3).reshape(16, -1, 2, 16)
    first, second, *third = (
        steps[:, 512:].copy().view(np.float32).reshape(len(steps), -1, 16).transpose(1, 2, 0)[..., None, None]
    )
    w = u.astype(np.float32) - np.float32(format_.offset)
    if format_.kind == packed.TWO_SCALES:
        return (np.concatenate([first, second], -2) * w).reshape(16, -1)
    if format_.kind == packed.TWO_MINIMA:
        return (first * w + np.concatenate([second, *third], -2)).reshape(16, -1)
    return (first * w + (second if format_.kind == packed.AFFINE else 0)).reshape(16, -1)
