"""Blocks of made-up weights in any type: for measuring speed, and for models that are nothing else."""

from __future__ import annotations

import numpy as np

from quant.block_format import Format
from quant.formats import registry
from quant.threads.pool import Pool

_ROW = 4096  # weights that are packed at a time
_SAMPLE = 256  # blocks that tell how large a format's numbers are
_MANY = 16  # times as many blocks are drawn as are kept, where scales cannot be set


def made_up_blocks(pool: Pool, type_: str, n_blocks: int, deviation: float, seed: int = 0) -> np.ndarray:
    """uint8 (n_blocks, block_bytes): Gaussian weights of this standard deviation around 0, packed.

    Of a type that nothing here packs: random blocks whose weights deviate about as much.
    """
    format_, random = registry.get(type_), np.random.default_rng(seed)
    if type_ not in registry.QUANTIZABLE:
        return _drawn(format_, n_blocks, deviation, random)
    from quant.quantize.tensor import pack

    n_rows = -(-n_blocks * format_.block // _ROW)
    x = random.standard_normal((n_rows, _ROW), dtype=np.float32) * np.float32(deviation)
    out = np.empty((n_rows * _ROW // format_.block, format_.block_bytes), np.uint8)
    assert pack(pool, format_, x.ctypes.data, n_rows, _ROW, out.ctypes.data) == -1
    return out[:n_blocks]


def _drawn(format_: Format, n_blocks: int, deviation: float, random: np.random.Generator) -> np.ndarray:
    """Random bytes: with scales that give the deviation, or of many blocks those that are nearest to it."""
    names = format_.layout.names or ()
    halves = [name for name in names if format_.layout[name] == np.float16]
    n_drawn = n_blocks if halves else _MANY * n_blocks
    blocks = random.integers(0, 256, (n_drawn, format_.block_bytes), np.uint8)
    fields = blocks.view(format_.layout).reshape(n_drawn)
    for name in halves:
        fields[name] = 1
    if halves:
        typical = format_.unpack(blocks[:_SAMPLE].reshape(-1)).std()
        for name in halves:
            fields[name] = deviation / typical
        return blocks
    if "d" in names:  # of bytes: one value for all of a block's
        fields["d"] = np.arange(n_drawn)[:, None] % 256
    with np.errstate(all="ignore"):  # some are no numbers
        found = format_.unpack(blocks.reshape(-1)).reshape(n_drawn, -1).std(axis=1)
        distance = np.nan_to_num(np.abs(np.log(found / deviation)), nan=np.inf)
    return blocks[np.sort(np.argsort(distance, kind="stable")[:n_blocks])]
