"""The latent cache in device memory: of each token and layer, one row of C latents and R rotated key values.

Where a layer has an indexer, it keeps that one's key of each token, too, of 16 bits.

Three forms. 16 bits (float16), as on the CPU. 8 bits: the latents are E4M3 with one float32 scale a row (the row's
largest value becomes 448), the rotated keys stay float16, since no norm bounds them; E4M3 rounds by up to 2^-4 of a
value whatever its size, so finer scales would only help values below 1/28672 of the row's largest. 32 bits is for
comparison.

Letters: L layers, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, W = C + R, d index_head_dim.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from localrun.gpu.caches.context import Blocks, DeviceContext
from localrun.gpu.e4m3 import pack_e4m3
from localrun.models.config import Config


def row_bytes(config: Config, bits: int = 16) -> int:
    """Bytes a token takes in each layer."""
    c, r = config.kv_lora_rank, config.qk_rope_head_dim
    return c + 2 * r + 4 if bits == 8 else (c + r) * bits // 8


class LatentCache(DeviceContext):
    """Latent rows for up to `capacity` tokens, all reserved at once.

    Attributes:
        bits: 8, 16 or 32.
        latents: of each layer, (capacity, C), uint8 (E4M3), float16 or float32; on one device one tensor.
        rope_keys: of each layer, (capacity, R), float16 or float32.
        scales: of each layer, float32 (capacity,), of the latents; None unless bits is 8.
        indexer_keys: of layers with an indexer, (capacity, d), float16 or float32.
    """

    def __init__(self, config: Config, capacity: int, devices: Sequence[torch.device], bits: int):
        """devices: of each layer. bits: of a value, 8, 16 or 32. torch.OutOfMemoryError if a device has no room."""
        super().__init__(capacity, bits)
        self._n_layers = len(devices)
        self._widths = config.kv_lora_rank, config.qk_rope_head_dim
        runs = [self._rows_on(here, len(list(layers))) for here, layers in groupby(devices)]
        self.latents, self.rope_keys, self.scales = runs[0] if len(runs) == 1 else map(_joined, zip(*runs, strict=True))
        width, dtype = config.index_head_dim, torch.float32 if self.is_exact else torch.float16
        self.indexer_keys = {
            i: torch.empty(capacity, width, dtype=dtype, device=here)
            for i, here in enumerate(devices)
            if config.chooses_rows(i)
        }
        scales = [None] * self._n_layers if self.scales is None else self.scales
        parts = zip(
            self.latents, self.rope_keys, scales, map(self.indexer_keys.get, range(self._n_layers)), strict=True
        )
        self._know([Blocks(*each) for each in parts])

    def _rows_on(self, device: torch.device, n_layers: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Latents, rotated keys and scales of so many layers, (n_layers, capacity, ...)."""
        shape = n_layers, self.capacity
        if self.bits == 8:
            latents, rope_keys = (
                torch.empty(*shape, width, dtype=dtype, device=device)
                for width, dtype in zip(self._widths, (torch.uint8, torch.float16), strict=True)
            )
            return latents, rope_keys, torch.empty(shape, device=device)
        dtype = torch.float32 if self.is_exact else torch.float16
        rows = torch.empty(*shape, sum(self._widths), dtype=dtype, device=device)
        latents, rope_keys = rows.split(self._widths, -1)
        return latents, rope_keys, None

    @property
    def n_bytes(self) -> int:
        """Of device memory."""
        parts = [*self.latents, *self.rope_keys, *self.indexer_keys.values()]
        parts += [] if self.scales is None else self.scales
        return sum(part.numel() * part.element_size() for part in parts)

    def rows(self, layer: int, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (n, C) and rotated keys (n, R) of tokens first..last; views where the cache has that dtype."""
        latents, rope_keys = self.latents[layer][first:last], self.rope_keys[layer][first:last]
        if self.scales is not None:
            latents = latents.view(torch.float8_e4m3fn).float() * self.scales[layer][first:last, None]
        return latents.to(dtype), rope_keys.to(dtype)

    def save(self) -> dict[str, np.ndarray]:
        """As Cache.save gives them: 16-bit rows (32-bit ones of a 32-bit cache); waits for the device."""
        dtype = torch.float32 if self.is_exact else torch.float16
        saved = {}
        for layer in range(self._n_layers):
            saved[f"{layer}.0"] = torch.cat(self.rows(layer, 0, self.length, dtype), -1).cpu().numpy()
            if layer in self.indexer_keys:
                saved[f"{layer}.1"] = self.indexer_keys[layer][: self.length].cpu().numpy()
        return saved

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens, of this form or of the CPU's (8 bits: rounded to them).

        Raises LocalrunError if it is something else, or too long.
        """
        dtype = np.float32 if self.is_exact else np.float16
        indexed = {layer: (keys.shape[1],) for layer, keys in self.indexer_keys.items()}
        widths = [(sum(self._widths), *indexed.get(layer, ())) for layer in range(self._n_layers)]
        self._check_saved(tensors, length, widths, dtype)
        for layer in range(self._n_layers):
            device = self.latents[layer].device
            rows = torch.from_numpy(np.ascontiguousarray(tensors[f"{layer}.0"])).to(device)
            latents, rope_keys = rows.split(self._widths, -1)
            if self.scales is not None:
                latents, self.scales[layer][:length] = pack_e4m3(latents)
            self.latents[layer][:length], self.rope_keys[layer][:length] = latents, rope_keys
            if layer in self.indexer_keys:
                keys = torch.from_numpy(np.ascontiguousarray(tensors[f"{layer}.1"]))
                self.indexer_keys[layer][:length] = keys.to(device)
        self.length = length


def _joined(runs: Sequence[torch.Tensor | None]) -> list[torch.Tensor] | None:
    """Layer by layer, of tensors of some layers each."""
    return None if runs[0] is None else [rows for run in runs for rows in run]
