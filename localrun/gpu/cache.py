"""The latent cache in device memory: of each token and layer, one row of C latents and R rotated key values.

Where a layer has an indexer, it keeps that one's key of each token, too, of 16 bits.

Three forms. 16 bits (float16), as on the CPU. 8 bits: the latents are E4M3 with one float32 scale a row (the row's
largest value becomes 448), the rotated keys stay float16, since no norm bounds them; E4M3 rounds by up to 2^-4 of a
value whatever its size, so finer scales would only help values below 1/28672 of the row's largest. 32 bits is for
comparison. Grouped-query attention keeps keys and values of 16 bits, or of 32 for comparison.

Letters: L layers, S cached tokens, C kv_lora_rank, R qk_rope_head_dim, W = C + R, G key-value heads, d head_dim,
V v_head_dim; of an indexer d is index_head_dim.
E4M3: Micikevicius et al., FP8 Formats for Deep Learning (arXiv 2209.05433).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
import triton.language as tl

from localrun.gpu.compressed_cache import CompressedCache
from localrun.gpu.places import Places, Tables, of_each
from localrun.models.config import Config
from localrun.models.rows import Rows
from localrun.network.cache import Context, row_widths

E4M3_MAX = 448.0
_ALIGNED = 16  # bytes that a load takes at most, and that divide addresses of torch's memory


def row_bytes(config: Config, bits: int = 16) -> int:
    """Bytes a token takes in each layer."""
    c, r = config.kv_lora_rank, config.qk_rope_head_dim
    return c + 2 * r + 4 if bits == 8 else (c + r) * bits // 8


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


class GroupedCache(DeviceContext):
    """Keys and values of grouped-query attention for up to `capacity` tokens, all reserved at once.

    Layers with a window keep it and some rows more in a ring. What has been written over there cannot be gone back to:
    all is evaluated anew then.

    Attributes:
        keys, values: of each layer, (rows, G * d) and (rows, G * V), float16 or float32.
    """

    def __init__(
        self,
        config: Config,
        capacity: int,
        device: torch.device | Sequence[torch.device],
        bits: int = 16,
        n_layers: int | None = None,
    ):
        """As DeviceCache; bits: 16 or 32."""
        super().__init__(capacity, bits)
        self._kinds = [config.rows(i) for i in range(config.num_hidden_layers if n_layers is None else n_layers)]
        dtype = torch.float32 if self.is_exact else torch.float16
        self.keys, self.values = (
            [
                torch.empty(kinds[i].count(capacity), kinds[i].width, dtype=dtype, device=here)
                for kinds, here in zip(self._kinds, of_each(device, len(self._kinds)), strict=True)
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


class DeviceCache(DeviceContext):
    """Latent rows for up to `capacity` tokens, all reserved at once.

    Attributes:
        bits: 8, 16 or 32.
        latents: of each layer, (capacity, C), uint8 (E4M3), float16 or float32; on one device one tensor.
        rope_keys: of each layer, (capacity, R), float16 or float32.
        scales: of each layer, float32 (capacity,), of the latents; None unless bits is 8.
        indexer_keys: of layers with an indexer, (capacity, d), float16 or float32.
    """

    def __init__(
        self,
        config: Config,
        capacity: int,
        device: torch.device | Sequence[torch.device],
        bits: int = 16,
        n_layers: int | None = None,
    ):
        """torch.OutOfMemoryError if a device has no room.

        Args:
            device: of all layers, or of each.
            n_layers: num_hidden_layers unless given.
        """
        super().__init__(capacity, bits)
        self._n_layers = config.num_hidden_layers if n_layers is None else n_layers
        self._widths = config.kv_lora_rank, config.qk_rope_head_dim
        devices = of_each(device, self._n_layers)
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


AnyCache = DeviceCache | GroupedCache | CompressedCache


def new_cache(
    config: Config,
    capacity: int,
    device: torch.device | Sequence[torch.device],
    bits: int = 16,
    n_layers: int | None = None,
) -> AnyCache:
    """An empty cache of the model's kind; as DeviceCache."""
    kind = {"mla": DeviceCache, "gqa": GroupedCache, "compressed": CompressedCache}[config.attention]
    return kind(config, capacity, device, bits, n_layers)


def pack_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8 (..., C), and scales, float32 (...), each row's largest magnitude / 448 (1 for a row of zeros)."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = torch.where(largest > 0, largest / E4M3_MAX, 1.0)
    codes = (x / scales[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8), scales
