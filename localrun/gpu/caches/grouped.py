"""The cache of grouped-query attention in device memory: keys and values of 16 bits, or of 32 for comparison.

Letters: G key-value heads, d head_dim, V v_head_dim.
"""

from collections.abc import Sequence

import numpy as np
import torch

from localrun.gpu.caches.context import Blocks, DeviceContext
from localrun.models.config import Config
from localrun.models.rows import Rows


class GroupedCache(DeviceContext):
    """Keys and values of grouped-query attention for up to `capacity` tokens, all reserved at once.

    Layers with a window keep it and some rows more in a ring. What has been written over there cannot be gone back to:
    all is evaluated anew then.

    Attributes:
        keys, values: of each layer, (rows, G * d) and (rows, G * V), float16 or float32.
    """

    def __init__(self, config: Config, capacity: int, devices: Sequence[torch.device], bits: int):
        """As LatentCache; bits: 16 or 32."""
        super().__init__(capacity, bits)
        self._kinds = [config.rows(i) for i in range(len(devices))]
        dtype = torch.float32 if self.is_exact else torch.float16
        self.keys, self.values = (
            [
                torch.empty(kinds[i].count(capacity), kinds[i].width, dtype=dtype, device=here)
                for kinds, here in zip(self._kinds, devices, strict=True)
            ]
            for i in range(2)
        )
        self._know([Blocks(values, keys) for values, keys in zip(self.values, self.keys, strict=True)])
        self._ring = next((kinds[0] for kinds in self._kinds if kinds[0].window), None)  # all have the same window
        self._held = 0  # the first position that rings have

    @property
    def n_bytes(self) -> int:
        """Of device memory."""
        return sum(rows.nbytes for rows in (*self.keys, *self.values))

    def check_room(self, n_tokens: int) -> None:
        """Raises ContextFullError unless n_tokens more fit. What they go over in rings counts as lost from now on."""
        super().check_room(n_tokens)
        if self._ring:
            self._held = max(self._held, self.length + n_tokens - self._ring.count(self.capacity))

    def kept(self, length: int) -> int:
        """Tokens that truncate(length) would leave: as many, or none."""
        length = super().kept(length)
        return length if self._ring is None or self._ring.first(length) >= self._held else 0

    def truncate(self, length: int) -> None:
        """Forget all tokens from `length` on, or all, as kept() says."""
        super().truncate(length)
        self._held = min(self._held, self.length)

    def save(self) -> dict[str, np.ndarray]:
        """As Cache.save gives them, but for its marks; waits for the device."""
        saved = {}
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            places = self._places(layer, self.length - self._first(layer))
            for part, rows in enumerate((keys, values)):
                saved[f"{layer}.{part}"] = rows[places].cpu().numpy()
        return saved

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens. Raises LocalrunError if it is something else, or too long."""
        tensors = {name: rows for name, rows in tensors.items() if "@" not in name}  # those are for marks
        widths = [tuple(kind.width for kind in kinds) for kinds in self._kinds]
        dtype = np.float32 if self.is_exact else np.float16
        n_rows = [self._n_saved(kinds[0], tensors.get(f"{i}.0"), length) for i, kinds in enumerate(self._kinds)]
        self._check_saved(tensors, length, widths, dtype, n_rows)
        self.length, self._held = length, 0
        for layer, n in enumerate(n_rows):
            places = self._places(layer, n)
            for part, rows in enumerate((self.keys[layer], self.values[layer])):
                rows[places] = torch.from_numpy(np.ascontiguousarray(tensors[f"{layer}.{part}"])).to(rows.device)
            if self._kinds[layer][0].window:
                self._held = max(self._held, length - n)

    def _n_saved(self, kind: Rows, rows: np.ndarray | None, length: int) -> int:
        """Rows of a layer that there must be: of a ring as many as there are, if enough."""
        if rows is None or not kind.window:
            return length
        return max(length - kind.first(length), min(len(rows), length, kind.count(self.capacity)))

    def _first(self, layer: int) -> int:
        """The first position that a layer has."""
        return self._held if self._kinds[layer][0].window else 0

    def _places(self, layer: int, n: int) -> torch.Tensor | slice:
        """Where a layer has the last n positions, in order."""
        if not self._kinds[layer][0].window:
            return slice(self.length - n, self.length)
        n_rows = max(1, len(self.keys[layer]))
        return torch.arange(self.length - n, self.length, device=self.keys[layer].device) % n_rows
