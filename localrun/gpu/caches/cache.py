"""A cache of the model's kind in device memory."""

from collections.abc import Sequence

import torch

from localrun.gpu.caches.compressed import CompressedCache
from localrun.gpu.caches.grouped import GroupedCache
from localrun.gpu.caches.latent import LatentCache
from localrun.models.config import Config

AnyCache = LatentCache | GroupedCache | CompressedCache


def new_cache(
    config: Config,
    capacity: int,
    device: torch.device | Sequence[torch.device],
    bits: int = 16,
    n_layers: int | None = None,
) -> AnyCache:
    """An empty cache of the model's kind; as LatentCache."""
    kind = {"mla": LatentCache, "gqa": GroupedCache, "compressed": CompressedCache}[config.attention]
    return kind(config, capacity, device, bits, n_layers)
