"""A checkpoint as GGUF keys and targets, by the declaration of its architecture.

Keys and their exact types are those of llama.cpp's converter and loader: conversion/base.py and src/llama-model.cpp of
https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from localrun.convert import dspark
from localrun.convert.builder import Builder, layer_prefix
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata, PlannedHeader
from localrun.convert.sampling_hints import add_sampling
from localrun.convert.settings import Settings, read_config
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.convert.targets import Target
from localrun.errors import GGUFError, LocalrunError, UnsupportedModelError
from localrun.models.architecture import Architecture
from localrun.models.config import Config
from localrun.models.dspark import NAME as DSPARK
from localrun.models.names import check_tensors
from localrun.models.parts import EMBED_TOKENS, LM_HEAD, NORM
from localrun.models.reader import read_config as read_model_config


@dataclass
class Model:
    """What is to be written; types are chosen later.

    Attributes:
        metadata: all keys but those of the vocabulary and of the types.
        targets: in the order of the file.
        warnings: one line each.
    """

    metadata: Metadata
    targets: list[Target]
    warnings: list[str] = field(default_factory=list)


def read_model(checkpoint: Checkpoint, *, keep_mtp: bool = True, drafts: bool = False) -> Model:
    """The model that a checkpoint holds, or what makes drafts for it.

    Raises CheckpointError if it is of another kind or does not hold together, LocalrunError if it has no such drafts.
    """
    settings = Settings(checkpoint.config, str(checkpoint.path / "config.json"))
    architecture, config, warnings = settings.architecture, read_config(settings), [*checkpoint.warnings]
    if unknown := settings.unknown():
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        warnings.append(f"{settings.where}: not known here, nor read by transformers: {', '.join(unknown[:5])}{more}")
    if config.tie_word_embeddings and _has_own_head(checkpoint):
        warnings.append("config.json ties the head to the embedding; the checkpoint has another head, which is kept")
        config = replace(config, tie_word_embeddings=False)
    builder = Builder(checkpoint, architecture, config)
    if drafts:
        return _drafts(builder, architecture, settings)
    if architecture.drafts and (n_drafts := builder.skip_matching(re.escape(architecture.drafts))):
        how = _why_no_drafts(checkpoint, architecture) or "--drafts writes them as a file of their own"
        warnings.append(f"{n_drafts} tensors only make drafts and are left out: {how}")
        builder.config = config = replace(config, num_nextn_predict_layers=0)
    elif architecture.has_mtp:
        n_nextn = _count_nextn(builder, architecture, settings, keep_mtp, warnings)
        builder.config = config = replace(config, num_nextn_predict_layers=n_nextn)
    metadata = _metadata(architecture, config, checkpoint)
    _add_tensors(builder, architecture, settings)
    model = Model(metadata, builder.finish(), warnings + architecture.warnings(config))
    model.warnings += _check_header(model, settings.where)
    model.warnings += add_sampling(model.metadata, checkpoint)
    return model


def _drafts(builder: Builder, architecture: Architecture, settings: Settings) -> Model:
    """A file of the prediction layer alone, as llama.cpp has them: with the model's embedding, head and norm.

    Or of DSpark's blocks, where the checkpoint has those.
    """
    checkpoint = builder.checkpoint
    if reason := _why_no_drafts(checkpoint, architecture):
        raise LocalrunError(f"{checkpoint.path}: --drafts: {reason}")
    if dspark.is_dspark(set(checkpoint.tensors), architecture.drafts):
        dspark.add_blocks(builder, architecture, settings)
        metadata = _metadata(replace(architecture, name=DSPARK), builder.config, checkpoint)
        dspark.add_keys(metadata, settings)
        return Model(metadata, builder.finish(), [*checkpoint.warnings])
    index, at = builder.config.num_hidden_layers, f"{architecture.drafts}0."
    builder.config = replace(builder.config, num_nextn_predict_layers=1)
    for tensor in architecture.ends:
        is_models = tensor.module in (EMBED_TOKENS.module, LM_HEAD.module, NORM.module)
        builder.add(tensor, at="" if is_models else at)
    for tensor in architecture.layer_in_checkpoint(builder.config, index):
        if not tensor.may_lack or builder.has(tensor, at):
            builder.add(tensor, index, at)
    builder.skip_rest()
    return Model(_metadata(architecture, builder.config, checkpoint), builder.finish(), [*checkpoint.warnings])


def _why_no_drafts(checkpoint: Checkpoint, architecture: Architecture) -> str:
    """Why no file of drafts can be written; empty if it can."""
    numbers = {name.removeprefix(architecture.drafts).split(".")[0] for name in checkpoint.tensors
               if architecture.drafts and name.startswith(architecture.drafts)}  # fmt: skip
    if not numbers:
        return "it holds no tensors that only make drafts"
    if numbers == {"0"} or dspark.is_dspark(set(checkpoint.tensors), architecture.drafts):
        return ""
    return f"it holds neither {architecture.drafts}0, one prediction layer, nor DSpark's blocks"


def _has_own_head(checkpoint: Checkpoint) -> bool:
    """Whether there is a head beside the embedding, and another one: transformers does not tie them then."""
    head, embedding = LM_HEAD.source.name, EMBED_TOKENS.source.name
    return {head, embedding} <= checkpoint.tensors.keys() and not checkpoint.are_equal(head, embedding)


def _check_header(model: Model, where: str) -> list[str]:
    """A line if only llama.cpp will run the file. Raises CheckpointError if what reads models refuses it."""
    header = PlannedHeader(Path(where), model.metadata, model.targets)
    try:
        check_tensors(header, read_model_config(header))
    except UnsupportedModelError as error:
        return [f"{error}: llama.cpp runs it"]
    except GGUFError as error:
        raise CheckpointError(str(error)) from None
    return []


def add_keys(metadata: Metadata, architecture: Architecture, config: Config) -> None:
    """The architecture's keys."""
    for key in architecture.keys:
        value = key.written(config)
        if value is not None:
            getattr(metadata, key.type)("." + key.name, value)


def _metadata(architecture: Architecture, config: Config, checkpoint: Checkpoint) -> Metadata:
    metadata = Metadata(architecture.name)
    metadata.string("general.type", "model")
    metadata.string("general.name", checkpoint.path.resolve().name or architecture.name)
    add_keys(metadata, architecture, config)
    return metadata


def _add_tensors(builder: Builder, architecture: Architecture, settings: Settings) -> None:
    config = builder.config
    for tensor in architecture.ends:
        if tensor.source is not None and tensor.when(config):
            builder.add(tensor)
        for source, _ in tensor.sources(config):  # a tied head may be there nevertheless
            builder.skip(source)
    for index in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        for tensor in architecture.layer_in_checkpoint(config, index):
            if not tensor.may_lack or builder.has(tensor, layer_prefix(architecture, index)):
                builder.add(tensor, index)
    if architecture.left_out:
        builder.skip_matching(architecture.left_out)
    for tensor in architecture.ends:
        values = tensor.values(settings, config) if tensor.values else None
        if values is not None:
            builder.values(tensor.name, values)


def _count_nextn(
    builder: Builder, architecture: Architecture, settings: Settings, keep_mtp: bool, warnings: list[str]
) -> int:
    """Layers for multi-token prediction that go into the file; those that do not are skipped."""
    named, first = builder.config.num_nextn_predict_layers, builder.config.num_hidden_layers
    if not keep_mtp:
        builder.skip_layers(first, named)
        return 0
    tells = architecture.tensor("eh_proj")
    present = 0
    while present < named and builder.has(tells, layer_prefix(architecture, first + present)):
        present += 1
    if 0 < present < named:
        raise CheckpointError(f"{settings.where}: names {named} prediction layers; the shards hold {present}")
    if not present and named and settings.has("num_nextn_predict_layers"):
        warnings.append(
            f"config.json names {named} layer(s) for multi-token prediction, the shards hold none: left out"
        )
    return present
