"""Where a call's tokens stand: each has a cache and a position of its own, which kernels look up in device memory.

So one recorded launch serves any contexts: tokens that follow each other in one, or a token each of several. Letters:
T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import triton
import triton.language as tl

# Of a layer in a table: addresses of its values (or latents), of its keys (or their rotated parts), and of scales; how
# many rows there are, in which those of a window go round; the address of the indexer's keys. Of a layer between
# hyper-connections five addresses: compressed.py.
ENTRIES = 5


@dataclass(frozen=True)
class Places:
    """Of T tokens.

    Attributes:
        positions: int64 (T,).
        table: int64 (L * ENTRIES, T), or of one column for all tokens.
        bits: of a value in the caches.
        most: more than each position: what shapes may depend on.
    """

    positions: torch.Tensor
    table: torch.Tensor
    bits: int
    most: int

    @property
    def is_exact(self) -> bool:
        """Whether values have 32 bits."""
        return self.bits == 32

    def places(self, n_tokens: int, device: torch.device | None = None) -> Places:
        """As HasPlaces: these."""
        assert n_tokens == len(self.positions)
        return self

    def part(self, first: int, last: int) -> Places:
        """Of tokens first..last."""
        table = self.table if self.table.shape[1] == 1 else self.table[:, first:last]
        return Places(self.positions[first:last], table, self.bits, self.most)

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """What kernels take: positions, the layer's part of the table, and its strides by entry and by token."""
        return self.positions, self.table[ENTRIES * layer :], self.table.stride(0), int(self.table.shape[1] > 1)


class HasPlaces(Protocol):
    """A cache, or the places themselves."""

    @property
    def is_exact(self) -> bool:
        """Whether values have 32 bits."""

    def places(self, n_tokens: int, device: torch.device | None = None) -> Places:
        """Of the next tokens, on a device that has some of the layers, the first layer's unless given."""


class Tables:
    """A context's table of one column, on every device that has some of its layers."""

    def __init__(self, addresses: np.ndarray, devices: Sequence[torch.device]):
        """addresses: int64 (L * ENTRIES,). devices: of each layer."""
        column = torch.from_numpy(addresses[:, None])
        self._first, self._columns = devices[0], {device: column.to(device) for device in dict.fromkeys(devices)}

    def places(self, length: int, n_tokens: int, bits: int, device: torch.device | None) -> Places:
        """Of n_tokens behind `length`, as HasPlaces.places."""
        device = device or self._first
        positions = torch.arange(length, length + n_tokens, device=device)
        return Places(positions, self._columns[device], bits, length + n_tokens)


def of_each(device: torch.device | Sequence[torch.device], n_layers: int) -> list[torch.device]:
    """The devices of the first n_layers, which are given, or one for all."""
    return [device] * n_layers if isinstance(device, torch.device) else list(device[:n_layers])


@triton.jit
def n_rows_of(table, token, entry_stride, token_stride):
    """Of a token's blocks."""
    return tl.load(table + 3 * entry_stride + token * token_stride)


@triton.jit
def block_of(table, ENTRY: tl.constexpr, token, entry_stride, token_stride, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a token's block of rows: an entry of the layer. ALIGNED: bytes that divide its address."""
    address = tl.load(table + ENTRY * entry_stride + token * token_stride)
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), ALIGNED)
