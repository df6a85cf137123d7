"""What caches on a device share: blocks of rows, where they are, and what kernels are compiled for.

Letters: L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl

from localrun.gpu.caches.places import Places, Tables
from localrun.models.config import Config
from localrun.network.cache import Context, row_widths

_ALIGNED = 16  # bytes that a load takes at most, and that divide addresses of torch's memory


def row_constants(config: Config, bits: int) -> dict[str, object]:
    """What kernels are compiled for: types, strides and alignment of rows of values (or latents) and keys."""
    c, size = config, {8: 1, 16: 2, 32: 4}[bits]
    key = tl.float32 if bits == 32 else tl.float16
    if c.attention != "mla":
        key_stride, value_stride = row_widths(c)
        before = 0
    elif bits == 8:
        value_stride, key_stride, before = c.kv_lora_rank, c.qk_rope_head_dim, 0
    else:
        value_stride = key_stride = c.kv_lora_rank + c.qk_rope_head_dim
        before = c.kv_lora_rank  # in the same row
    return {
        "VALUE": tl.uint8 if bits == 8 else key, "VALUE_STRIDE": value_stride,
        "VALUE_ALIGNED": math.gcd(_ALIGNED, size * value_stride),
        "KEY": key, "KEY_STRIDE": key_stride,
        "KEY_ALIGNED": math.gcd(_ALIGNED, max(2, size) * key_stride, size * before),
    }  # fmt: skip


@dataclass(frozen=True)
class Blocks:
    """What a layer keeps: values or latents, keys or their rotated parts; scales and indexer's keys if there are any.

    All are (rows, width), but for scales (rows,).
    """

    values: torch.Tensor
    keys: torch.Tensor
    scales: torch.Tensor | None = None
    indexer_keys: torch.Tensor | None = None

    @property
    def entries(self) -> list[int]:
        """Of a table of Places."""
        values, keys, scales, indexer_keys = map(_address, (self.values, self.keys, self.scales, self.indexer_keys))
        return [values, keys, scales, len(self.values), indexer_keys]


def _address(block: torch.Tensor | None) -> int:
    return 0 if block is None else block.data_ptr()


class DeviceContext(Context):
    """What caches on a device share. Device work that is queued counts as done.

    Attributes:
        bits: of a value.
        blocks: of each layer.
        addresses: int64 (L * ENTRIES,), where they are: as a column of a table of Places has it.
    """

    def __init__(self, capacity: int, bits: int):
        super().__init__(capacity)
        self.bits = bits

    def _know(self, blocks: Sequence[Blocks]) -> None:
        """The blocks of each layer."""
        self.blocks = blocks
        self.addresses = np.array([entry for each in blocks for entry in each.entries], np.int64)
        self._tables = Tables(self.addresses, [each.values.device for each in blocks])

    @property
    def is_exact(self) -> bool:
        """Whether values have 32 bits."""
        return self.bits == 32

    def places(self, n_tokens: int, device: torch.device | None = None) -> Places:
        """As HasPlaces: of the tokens after `length`."""
        return self._tables.places(self.length, n_tokens, self.bits, device)
