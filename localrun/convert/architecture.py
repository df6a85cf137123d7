"""config.json to GGUF keys and targets: what DeepSeek and Llama share, and which module knows the rest.

Keys and their exact types are those of llama.cpp's converter and loader: conversion/base.py and src/llama-model.cpp of
https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from localrun.convert.builder import Builder, Settings, typed
from localrun.convert.checkpoint import Checkpoint, read_json
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.convert.targets import Target
from localrun.models.names import EMBED_TOKENS, LM_HEAD, NORM


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


def read_model(checkpoint: Checkpoint, *, keep_mtp: bool = True) -> Model:
    """The model that a checkpoint holds. Raises CheckpointError if it is of another kind or does not hold together."""
    from localrun.convert import deepseek, llama

    readers = {
        "DeepseekV2ForCausalLM": deepseek.read,
        "DeepseekV3ForCausalLM": deepseek.read,
        "LlamaForCausalLM": llama.read,
    }
    settings = Settings(checkpoint)
    names = settings.get("architectures", list)
    if len(names) != 1 or names[0] not in readers:
        raise CheckpointError(f"{settings.where}: architectures is {names}; expected one of {', '.join(readers)}")
    model = readers[names[0]](checkpoint, settings, keep_mtp)
    _add_sampling(model.metadata, checkpoint)
    return model


def new_metadata(architecture: str, checkpoint: Checkpoint, settings: Settings) -> Metadata:
    """The keys that all architectures have."""
    metadata = Metadata(architecture)
    metadata.string("general.type", "model")
    metadata.string("general.name", checkpoint.path.resolve().name or architecture)
    metadata.u32(".context_length", settings.get("max_position_embeddings", int))
    metadata.u32(".embedding_length", settings.get("hidden_size", int))
    metadata.u32(".feed_forward_length", settings.get("intermediate_size", int))
    metadata.u32(".attention.head_count", settings.get("num_attention_heads", int))
    metadata.f32(".attention.layer_norm_rms_epsilon", settings.get("rms_norm_eps", float, 1e-6))
    metadata.u32(".vocab_size", settings.get("vocab_size", int))
    settings.expect("hidden_act", ["silu", "swish"], "only silu has a place in the model")
    return metadata


def add_ends(builder: Builder, settings: Settings) -> None:
    """Embedding, last norm, and the head unless it is tied to the embedding."""
    shape = settings.get("vocab_size", int), settings.get("hidden_size", int)
    builder.plain(EMBED_TOKENS, "model.embed_tokens.weight", shape)
    if settings.get("tie_word_embeddings", bool, False):
        builder.skip("lm_head.weight")
    else:
        builder.plain(LM_HEAD, "lm_head.weight", shape)
    builder.plain(NORM, "model.norm.weight", shape[1:])


@dataclass(frozen=True)
class Rope:
    """Rotary settings, of either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5)."""

    type: str
    theta: float
    parameters: dict[str, Any]
    where: str

    def get(self, key: str, kind: type, *default: Any) -> Any:
        from localrun.convert.builder import REQUIRED

        return typed(self.parameters, key, kind, default[0] if default else REQUIRED, f"{self.where}: rope settings")


def read_rope(settings: Settings) -> Rope:
    """The rotary settings, checked to be of a known type. Raises CheckpointError."""
    scaling = settings.get("rope_scaling", dict, None) or settings.get("rope_parameters", dict, None) or {}
    theta = typed(scaling, "rope_theta", float, settings.get("rope_theta", float, 10000.0), settings.where)
    type_ = scaling.get("rope_type", scaling.get("type")) or "default"
    if type_ not in ("default", "linear", "yarn", "llama3"):
        raise CheckpointError(f"{settings.where}: rope scaling is {type_!r}; expected default, linear, yarn or llama3")
    return Rope(type_, theta, scaling, settings.where)


def add_rope(metadata: Metadata, rope: Rope) -> None:
    """The keys of the frequency base and of linear or yarn scaling."""
    metadata.f32(".rope.freq_base", rope.theta)
    if rope.type not in ("linear", "yarn"):
        return
    metadata.string(".rope.scaling.type", rope.type)
    metadata.f32(".rope.scaling.factor", rope.get("factor", float))
    if rope.type == "yarn":
        original = rope.get("original_max_position_embeddings", int)
        metadata.u32(".rope.scaling.original_context_length", original)
        for key in ("beta_fast", "beta_slow"):
            if rope.parameters.get(key) is not None:
                metadata.f32(f".rope.scaling.yarn_{key}", rope.get(key, float))


# generation_config.json's names, and the keys and types of llama.cpp's common/common.cpp.
_SAMPLING = {"temperature": "temp", "top_p": "top_p", "min_p": "min_p", "repetition_penalty": "penalty_repeat"}


def _add_sampling(metadata: Metadata, checkpoint: Checkpoint) -> None:
    """What the model's makers recommend for sampling, unless they recommend none."""
    path = checkpoint.path / "generation_config.json"
    if not path.exists():
        return
    checkpoint.files.append(path)
    recommended = read_json(path)
    if recommended.get("do_sample") is not True:
        return
    for name, key in _SAMPLING.items():
        if recommended.get(name) is not None:
            metadata.f32(f"general.sampling.{key}", typed(recommended, name, float, None, str(path)))
    if recommended.get("top_k") is not None:
        metadata.i32("general.sampling.top_k", typed(recommended, "top_k", int, None, str(path)))
