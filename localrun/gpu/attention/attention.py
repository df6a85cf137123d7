"""A model's attention on one device or several."""

import functools
from collections.abc import Sequence

import torch

from localrun.gpu.attention.compressed import CompressedAttention
from localrun.gpu.attention.grouped import GroupedQueryAttention
from localrun.gpu.attention.latent import LatentAttention
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.places import of_each
from localrun.models.config import Config
from localrun.network.model import Attention, MakeAttention
from localrun.network.rope import Rope
from localrun.network.weight_source import WeightSource

_KINDS = {"mla": LatentAttention, "gqa": GroupedQueryAttention, "compressed": CompressedAttention}


def attention_on(device: torch.device | Sequence[torch.device]) -> MakeAttention:
    """What makes the layers' attention there, or on a device each, with the same turns for all on it."""
    turns_of = functools.cache(Turns)

    def make(config: Config, weights: WeightSource, index: int, rope: Rope) -> Attention:
        here = of_each(device, index + 1)[index]
        return _KINDS[config.attention](config, weights, index, turns_of(rope, here))

    return make
