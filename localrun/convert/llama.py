"""LlamaForCausalLM as GGUF's llama: queries and keys reordered, llama 3's frequency factors as a tensor.

Source: conversion/llama.py of https://github.com/ggml-org/llama.cpp @3f545becc; the factors: Llama 3.1's own, as in
transformers' modeling_rope_utils.py, _compute_llama3_parameters.
"""

from __future__ import annotations

from math import pi

from localrun.convert.architecture import Model, Rope, add_ends, add_rope, new_metadata, read_rope
from localrun.convert.builder import Builder, Settings
from localrun.convert.checkpoint import Checkpoint
from localrun.convert.errors import CheckpointError
from localrun.models.names import ROPE_FREQS, layer


def read(checkpoint: Checkpoint, settings: Settings, _keep_mtp: bool) -> Model:
    """Keys and targets. Raises CheckpointError."""
    heads, hidden = settings.get("num_attention_heads", int), settings.get("hidden_size", int)
    if not heads:
        raise CheckpointError(f"{settings.where}: num_attention_heads is 0; expected 1 or more")
    kv_heads, head_dim = settings.get("num_key_value_heads", int, heads), settings.get("head_dim", int, hidden // heads)
    n_layers, rope = settings.get("num_hidden_layers", int), read_rope(settings)
    if not head_dim or head_dim % 2:
        raise CheckpointError(f"{settings.where}: head_dim is {head_dim}; expected an even number")
    settings.expect("pretraining_tp", [0, 1], "only 1 can be converted")
    metadata = new_metadata("llama", checkpoint, settings)
    metadata.u32(".block_count", n_layers)
    metadata.u32(".attention.head_count_kv", kv_heads)
    metadata.u32(".rope.dimension_count", head_dim)
    metadata.u32(".attention.key_length", head_dim)
    metadata.u32(".attention.value_length", head_dim)
    add_rope(metadata, rope)
    builder = Builder(checkpoint)
    add_ends(builder, settings)
    for index in range(n_layers):
        _add_layer(builder, settings, index, (heads, kv_heads, head_dim))
    if rope.type == "llama3" and n_layers:
        builder.values(ROPE_FREQS, _frequency_divisors(rope, head_dim))
    return Model(metadata, builder.finish())


def _add_layer(builder: Builder, settings: Settings, index: int, sizes: tuple[int, int, int]) -> None:
    heads, kv_heads, head_dim = sizes
    hidden, inner = settings.get("hidden_size", int), settings.get("intermediate_size", int)
    source = f"model.layers.{index}."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        builder.plain(layer(index, norm), f"{source}{norm}.weight", (hidden,))
    for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
        name = f"self_attn.{part}"
        builder.rotary(layer(index, name), f"{source}{name}.weight", count, head_dim, hidden)
    shapes = {
        "self_attn.v_proj": (kv_heads * head_dim, hidden),
        "self_attn.o_proj": (hidden, heads * head_dim),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    for name, shape in shapes.items():
        builder.plain(layer(index, name), f"{source}{name}.weight", shape)


def _frequency_divisors(rope: Rope, head_dim: int) -> list[float]:
    """What llama 3 divides each rotary frequency by: 1 for high ones, factor for low ones, a blend between."""
    factor, original = rope.get("factor", float), rope.get("original_max_position_embeddings", int)
    low, high = rope.get("low_freq_factor", float), rope.get("high_freq_factor", float)
    if high <= low:
        raise CheckpointError(f"{rope.where}: high_freq_factor is {high}; expected more than low_freq_factor, {low}")
    divisors = []
    for i in range(0, head_dim, 2):
        rotations = original * rope.theta ** (-i / head_dim) / (2 * pi)  # over the training length
        blend = min(max((rotations - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return divisors
