"""The cache of attention over windows and pooled rows (DeepSeek-V4) in device memory: network.cache's, of blocks there.

Rings have all their rows whatever the capacity, so that kernels need not be told how many. Marks, copies of what rings
held, are in RAM: one is made every 1,024 tokens, and waits for the device.
"""

from collections.abc import Sequence

import numpy as np
import torch

from localrun.gpu.caches.places import ENTRIES, Places, Tables
from localrun.models.config import Config
from localrun.models.rows import Rows
from localrun.network.block import Block
from localrun.network.cache import Cache

# Of a layer in a table of Places: rows of the window, pooled rows, what they are pooled of, and the indexer's; of its
# pooled rows, which are its keys, the place is that of any indexer's keys.
WINDOW, POOLED, OPEN, INDEX_OPEN, INDEX_POOLED = range(ENTRIES)
_ORDER = WINDOW, POOLED, OPEN, INDEX_POOLED, INDEX_OPEN  # of Config.rows


class DeviceBlock(Block):
    """A block of rows on a device, all of it reserved at once."""

    def __init__(self, kind: Rows, capacity: int, dtype: torch.dtype, device: torch.device):
        """torch.OutOfMemoryError if the device has no room."""
        n_rows = ring_rows(kind) if kind.window else kind.count(capacity)
        super().__init__(kind, torch.empty(n_rows, kind.width, dtype=dtype, device=device), 1)

    @property
    def dtype(self) -> np.dtype:
        """Of values, as NumPy has it."""
        return np.dtype(np.float32 if self.rows.dtype == torch.float32 else np.float16)

    @property
    def address(self) -> int:
        """Of the first row."""
        return self.rows.data_ptr()

    @property
    def tensor(self) -> torch.Tensor:
        """The rows."""
        return self.rows

    def get(self, first: int, end: int) -> np.ndarray:
        """The rows of positions first to end - 1, copied to the host; waits for the device."""
        return self.rows[self._places(first, end)].cpu().numpy()

    def put(self, end: int, rows: np.ndarray) -> None:
        """Have the last positions before `end` hold these rows; what was before them is lost."""
        super().put(end, torch.from_numpy(np.ascontiguousarray(rows)).to(self.rows.device))

    def resident(self, touched: int) -> int:
        """Bytes of device memory."""
        return self.rows.nbytes

    def _places(self, first: int, end: int) -> slice | torch.Tensor:
        if self.is_ring:
            return torch.arange(first, end, device=self.rows.device) % len(self.rows)
        return super()._places(first, end)


class CompressedCache(Cache):
    """Rows for up to `capacity` tokens in every layer. Device work that is queued counts as done.

    Attributes:
        bits: of a value, 16 or 32; what is yet to be pooled has 32.
        addresses: int64 (L * ENTRIES,), where blocks are: as a column of a table of Places has it.
    """

    def __init__(self, config: Config, capacity: int, devices: Sequence[torch.device], bits: int):
        """As LatentCache; bits: 16 or 32."""
        self.bits = bits
        kinds = [config.rows(i) for i in range(len(devices))]
        self._devices = [device for device, of_layer in zip(devices, kinds, strict=True) for _ in of_layer]
        super().__init__(kinds, capacity, np.float32 if bits == 32 else np.float16)
        addresses = np.zeros((len(kinds), ENTRIES), np.int64)
        for row, blocks in zip(addresses, self._layers, strict=True):
            row[list(_ORDER[: len(blocks)])] = [block.address for block in blocks]
        self.addresses = addresses.flatten()
        self._tables = Tables(self.addresses, devices)

    def _new_blocks(self, kinds: list[Rows], dtype: type[np.floating]) -> list[DeviceBlock]:
        values = torch.float32 if dtype == np.float32 else torch.float16
        types = [torch.float32 if kind.is_exact else values for kind in kinds]
        each = zip(kinds, types, self._devices, strict=True)
        return [DeviceBlock(kind, self.capacity, type_, device) for kind, type_, device in each]

    @property
    def blocks(self) -> list[list[DeviceBlock]]:
        """Of each layer, as Config.rows has them."""
        return self._layers

    def places(self, n_tokens: int, device: torch.device | None = None) -> Places:
        """As HasPlaces: of the tokens after `length`."""
        return self._tables.places(self.length, n_tokens, self.bits, device)


def ring_rows(kind: Rows) -> int:
    """Rows of a ring on a device."""
    return kind.window + kind.spare
