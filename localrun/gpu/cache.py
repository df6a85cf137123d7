"""The latent cache in device memory: of each token and layer, one row of C latents and R rotated key values.

Three forms. 16 bits (float16), as on the CPU. 8 bits: the latents are E4M3 with one float32 scale a row (the row's
largest value becomes 448), the rotated keys stay float16, since no norm bounds them; E4M3 rounds by up to 2^-4 of a
value whatever its size, so finer scales would only help values below 1/28672 of the row's largest. 32 bits is for
comparison. Grouped-query attention has no form here: llama models run on the CPU.

Letters: L layers, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, W = C + R.
E4M3: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

import numpy as np
import torch

from localrun.models.config import Config
from localrun.network.cache import Context

E4M3_MAX = 448.0


def row_bytes(config: Config, bits: int = 16) -> int:
    """Bytes a token takes in each layer."""
    c, r = config.kv_lora_rank, config.qk_rope_head_dim
    return c + 2 * r + 4 if bits == 8 else (c + r) * bits // 8


class DeviceCache(Context):
    """Rows for up to `capacity` tokens, all reserved at once. Device work that is queued counts as done.

    `length` is also on the device, for kernels whose launches are recorded once; setting it queues a write on the
    current stream.

    Attributes:
        bits: 8, 16 or 32, of a latent value.
        is_exact: whether values have 32 bits.
        position: int32 (1,) on the device, `length`.
        latents: (L, capacity, C), uint8 (E4M3), float16 or float32.
        rope_keys: (L, capacity, R), float16 or float32.
        scales: float32 (L, capacity), of the latents; None unless bits is 8.
    """

    def __init__(
        self, config: Config, capacity: int, device: torch.device, bits: int = 16, n_layers: int | None = None
    ):
        """n_layers: num_hidden_layers unless given. torch.OutOfMemoryError if the device has no room."""
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        super().__init__(capacity)
        self.bits, self.is_exact = bits, bits == 32
        self._n_layers = config.num_hidden_layers if n_layers is None else n_layers
        self._widths = config.kv_lora_rank, config.qk_rope_head_dim
        self.scales: torch.Tensor | None = None
        if bits == 8:
            self.latents, self.rope_keys = (
                torch.empty(self._n_layers, capacity, width, dtype=dtype, device=device)
                for width, dtype in zip(self._widths, (torch.uint8, torch.float16), strict=True)
            )
            self.scales = torch.empty(self._n_layers, capacity, device=device)
        else:
            dtype = torch.float32 if self.is_exact else torch.float16
            rows = torch.empty(self._n_layers, capacity, sum(self._widths), dtype=dtype, device=device)
            self.latents, self.rope_keys = rows.split(self._widths, -1)

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, n_tokens: int) -> None:
        self._length = n_tokens
        self.position.fill_(n_tokens)

    @property
    def n_bytes(self) -> int:
        """Of device memory."""
        parts = [self.latents, self.rope_keys] + ([] if self.scales is None else [self.scales])
        return sum(part.numel() * part.element_size() for part in parts)

    def rows(self, layer: int, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (n, C) and rotated keys (n, R) of tokens first..last; views where the cache has that dtype."""
        latents, rope_keys = self.latents[layer, first:last], self.rope_keys[layer, first:last]
        if self.scales is not None:
            latents = latents.view(torch.float8_e4m3fn).float() * self.scales[layer, first:last, None]
        return latents.to(dtype), rope_keys.to(dtype)

    def save(self) -> dict[str, np.ndarray]:
        """As Cache.save gives them: 16-bit rows (32-bit ones of a 32-bit cache); waits for the device."""
        dtype = torch.float32 if self.is_exact else torch.float16
        return {
            f"{layer}.0": torch.cat(self.rows(layer, 0, self.length, dtype), -1).cpu().numpy()
            for layer in range(self._n_layers)
        }

    def load(self, tensors: dict[str, np.ndarray], length: int) -> None:
        """Take over what save() gave for `length` tokens, of this form or of the CPU's (8 bits: rounded to them).

        Raises LocalrunError if it is something else, or too long.
        """
        dtype = np.float32 if self.is_exact else np.float16
        self._check_saved(tensors, length, [(sum(self._widths),)] * self._n_layers, dtype)
        for layer in range(self._n_layers):
            rows = torch.from_numpy(np.ascontiguousarray(tensors[f"{layer}.0"])).to(self.position.device)
            latents, rope_keys = rows.split(self._widths, -1)
            if self.scales is not None:
                latents, self.scales[layer, :length] = pack_e4m3(latents)
            self.latents[layer, :length], self.rope_keys[layer, :length] = latents, rope_keys
        self.length = length


def pack_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8 (..., C), and scales, float32 (...), each row's largest magnitude / 448 (1 for a row of zeros)."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    codes = (x / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales
