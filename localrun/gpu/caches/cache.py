"""A cache of the model's kind in device memory."""

from collections.abc import Sequence

import torch

from localrun.gpu.caches.compressed import CompressedCache
from localrun.gpu.caches.grouped import GroupedCache
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.caches.places import of_each
from localrun.models.config import Config

AnyCache = LatentCache | GroupedCache | CompressedCache
_KINDS = {"mla": LatentCache, "gqa": GroupedCache, "compressed": CompressedCache}


def new_cache(
    config: Config,
    capacity: int,
    device: torch.device | Sequence[torch.device],
    bits: int = 16,
    n_layers: int | None = None,
) -> AnyCache:
    """An empty cache of the model's kind for up to `capacity` tokens, all reserved at once.

    Args:
        device: of all layers, or of each.
        bits: of a value: 16, 32 for comparison, of latents 8, too.
        n_layers: the first ones that it is for, num_hidden_layers unless given.

    Raises:
        torch.OutOfMemoryError: a device has no room.
    """
    devices = of_each(device, config.num_hidden_layers if n_layers is None else n_layers)
    return _KINDS[config.attention](config, capacity, devices, bits)
