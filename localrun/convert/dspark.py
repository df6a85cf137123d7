"""DSpark's blocks of a DeepSeek-V4 checkpoint, as keys and targets of a file of their own (models/dspark.py)."""

from __future__ import annotations

import re

from localrun.convert.builder import Builder
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.settings import Settings
from localrun.models import dspark
from localrun.models.architecture import Architecture, Tensor


def is_dspark(checkpoint_tensors: set[str], prefix: str) -> bool:
    """Whether the tensors that only make drafts, whose names begin with `prefix`, are DSpark's."""
    source = dspark.FC_SOURCE
    return any(name.startswith(prefix) and name.endswith(f".{source}") for name in checkpoint_tensors)


def add_blocks(builder: Builder, architecture: Architecture, settings: Settings) -> None:
    """The tensors, and their configuration, to the builder. Raises CheckpointError if something is missing."""
    prefix, names = architecture.drafts, builder.checkpoint.tensors
    numbers = [int(match[1]) for name in names if (match := re.match(re.escape(prefix) + r"(\d{1,3})\.", name))]
    n_blocks = 1 + max(numbers, default=0)
    block_size, layers = settings.get("dspark_block_size", int), settings.get("dspark_target_layer_ids", list)
    if block_size < 1 or not layers or not all(type(layer) is int for layer in layers):
        settings.fail("dspark_block_size or dspark_target_layer_ids is missing; DSpark's blocks need both")
    config = builder.config = dspark.draft_config(builder.config, n_blocks)
    markov = next((names[name] for name in names if name.endswith(dspark.MARKOV_SOURCE)), None)
    if markov is None:
        raise CheckpointError(f"{builder.checkpoint.path}: tensor '{prefix}*.{dspark.MARKOV_SOURCE}' is missing")
    for tensor in dspark.ends(len(layers), markov.shape[-1]):
        _add_end(builder, tensor, [f"{prefix}{block}." for block in range(n_blocks)])
    for block in range(n_blocks):
        for tensor in architecture.layer_in_checkpoint(config, block):
            builder.add(tensor, block, f"{prefix}{block}.")
    builder.skip_rest()


def add_keys(metadata: Metadata, settings: Settings) -> None:
    """The keys that the model's file has not. Raises CheckpointError if config.json lacks them."""
    block_size, layers = settings.get("dspark_block_size", int), settings.get("dspark_target_layer_ids", list)
    metadata.u32(".block_size", block_size)
    metadata.i32s(".target_layers", [layer + 1 for layer in layers])  # llama.cpp counts what goes into a layer
    metadata.u32(dspark.NOISE, settings.get("dspark_noise_token_id", int))


def _add_end(builder: Builder, tensor: Tensor, places: list[str]) -> None:
    """A tensor that belongs to no block, under the last of the blocks that has it."""
    at = next((place for place in reversed(places) if builder.has(tensor, place)), "")
    if at or not tensor.may_lack:
        builder.add(tensor, at=at or places[-1])
