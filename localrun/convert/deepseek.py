"""DeepseekV2ForCausalLM and DeepseekV3ForCausalLM (V2, V2-Lite, V3, R1, Kimi-K2, Moonlight) as GGUF's deepseek2.

Source: conversion/deepseek.py and src/models/deepseek2.cpp of https://github.com/ggml-org/llama.cpp @3f545becc. Differs
from that converter in one thing: the layers for multi-token prediction are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

from localrun.convert.architecture import Model, Rope, add_ends, add_rope, new_metadata, read_rope
from localrun.convert.builder import Builder, Settings
from localrun.convert.checkpoint import Checkpoint
from localrun.convert.errors import CheckpointError
from localrun.convert.metadata import Metadata
from localrun.models.names import layer

# How llama.cpp tells models without q_lora_rank from the others: by these counts of layers.
_LITE_LAYERS = (26, 27)
_GATING = {"softmax": 1, "sigmoid": 2}


@dataclass(frozen=True)
class _Sizes:
    """config.json's sizes; E n_routed_experts, and so on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    moe_intermediate_size: int
    n_shared_experts: int
    first_k_dense_replace: int
    vocab_size: int
    n_nextn: int


def read(checkpoint: Checkpoint, settings: Settings, keep_mtp: bool) -> Model:
    """Keys and targets. Raises CheckpointError."""
    _refuse_unknown(settings)
    warnings: list[str] = []
    builder = Builder(checkpoint)
    sizes = _read_sizes(settings, _count_nextn(builder, settings, keep_mtp, warnings))
    metadata = new_metadata("deepseek2", checkpoint, settings)
    _add_keys(metadata, settings, sizes)
    add_ends(builder, settings)
    for index in range(sizes.num_hidden_layers + sizes.n_nextn):
        _add_layer(builder, sizes, index)
    _warn_of_lite(sizes, warnings)
    return Model(metadata, builder.finish(), warnings)


def _refuse_unknown(settings: Settings) -> None:
    """Settings that change results and that no key can carry."""
    settings.expect("rope_interleave", [True], "weights rotated by halves cannot be converted")
    settings.expect("moe_layer_freq", [1], "expected 1: experts in every layer behind the dense ones")
    settings.expect("topk_method", ["greedy", "group_limited_greedy", "noaux_tc"], "that routing has no GGUF key")
    settings.expect("scoring_func", list(_GATING), "that gate has no GGUF key")


def _read_sizes(settings: Settings, n_nextn: int) -> _Sizes:
    names = [name for name in _Sizes.__dataclass_fields__ if name not in ("n_nextn", "q_lora_rank")]
    optional = {"n_shared_experts": 0, "first_k_dense_replace": 0}
    sizes = {name: settings.get(name, int, *([optional[name]] if name in optional else [])) for name in names}
    return _Sizes(**sizes, q_lora_rank=settings.get("q_lora_rank", int, None), n_nextn=n_nextn)


def _count_nextn(builder: Builder, settings: Settings, keep_mtp: bool, warnings: list[str]) -> int:
    """Layers for multi-token prediction that go into the file; those that do not are skipped."""
    named, first = settings.get("num_nextn_predict_layers", int, 0), settings.get("num_hidden_layers", int)
    if not keep_mtp:
        builder.skip_layers(first, named)
        return 0
    present = 0
    while present < named and builder.has(f"model.layers.{first + present}.eh_proj.weight"):
        present += 1
    if 0 < present < named:
        raise CheckpointError(f"{settings.where}: names {named} prediction layers; the shards hold {present}")
    if not present and named:
        warnings.append(
            f"config.json names {named} layer(s) for multi-token prediction, the shards hold none: left out"
        )
    return present


def _warn_of_lite(sizes: _Sizes, warnings: list[str]) -> None:
    n_layers = sizes.num_hidden_layers
    lite = n_layers in _LITE_LAYERS or (n_layers == 48 and sizes.vocab_size == 128256)
    if lite != (sizes.q_lora_rank is None):
        how = "without q_lora_rank" if sizes.q_lora_rank is None else "with q_lora_rank"
        warnings.append(f"llama.cpp cannot load a model {how} and {n_layers} layers; localrun can")


def _add_keys(metadata: Metadata, settings: Settings, sizes: _Sizes) -> None:
    s = sizes
    metadata.u32(".block_count", s.num_hidden_layers + s.n_nextn)
    metadata.u32(".attention.head_count_kv", 1)  # the latent is one key for all heads
    if s.q_lora_rank is not None:
        metadata.u32(".attention.q_lora_rank", s.q_lora_rank)
    metadata.u32(".attention.kv_lora_rank", s.kv_lora_rank)
    metadata.u32(".attention.key_length", s.kv_lora_rank + s.qk_rope_head_dim)
    metadata.u32(".attention.value_length", s.kv_lora_rank)
    metadata.u32(".attention.key_length_mla", s.qk_nope_head_dim + s.qk_rope_head_dim)
    metadata.u32(".attention.value_length_mla", s.v_head_dim)
    metadata.u32(".leading_dense_block_count", s.first_k_dense_replace)
    metadata.u32(".rope.dimension_count", s.qk_rope_head_dim)
    if s.n_nextn:
        metadata.u32(".nextn_predict_layers", s.n_nextn)
    _add_routing(metadata, settings, sizes)
    _add_scaling(metadata, read_rope(settings))


def _add_routing(metadata: Metadata, settings: Settings, sizes: _Sizes) -> None:
    metadata.u32(".expert_count", sizes.n_routed_experts)
    metadata.u32(".expert_used_count", settings.get("num_experts_per_tok", int))
    metadata.u32(".expert_shared_count", sizes.n_shared_experts)
    metadata.u32(".expert_feed_forward_length", sizes.moe_intermediate_size)
    metadata.f32(".expert_weights_scale", settings.get("routed_scaling_factor", float, 1.0))
    if settings.get("norm_topk_prob", bool, False):
        metadata.bool(".expert_weights_norm", True)
    # transformers 5 leaves out what each class does anyway.
    default = "sigmoid" if settings.values["architectures"] == ["DeepseekV3ForCausalLM"] else "softmax"
    metadata.u32(".expert_gating_func", _GATING[settings.get("scoring_func", str, default)])
    n_group = settings.get("n_group", int, 1)
    if settings.get("topk_method", str, "noaux_tc") == "greedy":
        n_group = 1  # chooses among all experts, whatever n_group says
    metadata.u32(".expert_group_count", n_group)
    metadata.u32(".expert_group_used_count", settings.get("topk_group", int, 1) if n_group > 1 else 1)


def _add_scaling(metadata: Metadata, rope: Rope) -> None:
    """YaRN's keys; the one for the attention's scale holds 0.1 * mscale_all_dim, a quirk kept for old files' sake."""
    if rope.type == "llama3":
        raise CheckpointError(f"{rope.where}: rope scaling is 'llama3'; expected default, linear or yarn")
    add_rope(metadata, rope)
    if rope.type == "yarn":
        mscale, mscale_all_dim = rope.get("mscale", float, None), rope.get("mscale_all_dim", float, None)
        if not mscale_all_dim or mscale != mscale_all_dim:
            found = f"mscale {mscale} and mscale_all_dim {mscale_all_dim}"
            raise CheckpointError(f"{rope.where}: yarn has {found}; GGUF can only tell of equal ones other than 0")
        metadata.f32(".rope.scaling.yarn_log_multiplier", 0.1 * mscale_all_dim)


def _add_layer(builder: Builder, sizes: _Sizes, index: int) -> None:
    source = f"model.layers.{index}."
    builder.plain(layer(index, "input_layernorm"), source + "input_layernorm.weight", (sizes.hidden_size,))
    _add_attention(builder, sizes, index)
    norm = "post_attention_layernorm"
    builder.plain(layer(index, norm), f"{source}{norm}.weight", (sizes.hidden_size,))
    if index < sizes.first_k_dense_replace:
        _add_mlp(builder, sizes, index, "mlp", sizes.intermediate_size)
    else:
        _add_experts(builder, sizes, index)
    if index >= sizes.num_hidden_layers:
        _add_nextn(builder, sizes, index)


def _add_attention(builder: Builder, sizes: _Sizes, index: int) -> None:
    s, heads, hidden = sizes, sizes.num_attention_heads, sizes.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (s.kv_lora_rank + s.qk_rope_head_dim, hidden),
        "kv_a_layernorm": (s.kv_lora_rank,),
        "o_proj": (hidden, heads * s.v_head_dim),
    }
    query_rows = heads * (s.qk_nope_head_dim + s.qk_rope_head_dim)
    if s.q_lora_rank is None:
        shapes["q_proj"] = (query_rows, hidden)
    else:
        shapes |= {
            "q_a_proj": (s.q_lora_rank, hidden),
            "q_a_layernorm": (s.q_lora_rank,),
            "q_b_proj": (query_rows, s.q_lora_rank),
        }
    for module, shape in shapes.items():
        builder.plain(layer(index, f"self_attn.{module}"), f"model.layers.{index}.self_attn.{module}.weight", shape)
    kv_b = f"model.layers.{index}.self_attn.kv_b_proj.weight"
    nope, per_head = s.qk_nope_head_dim, s.qk_nope_head_dim + s.v_head_dim
    k_b, v_b = layer(index, "self_attn.k_b_proj"), layer(index, "self_attn.v_b_proj")
    builder.heads_transposed(k_b, kv_b, heads, (0, nope), per_head, s.kv_lora_rank)
    builder.heads(v_b, kv_b, heads, (nope, per_head), per_head, s.kv_lora_rank)


def _add_mlp(builder: Builder, sizes: _Sizes, index: int, module: str, inner: int) -> None:
    shapes = {"gate_proj": (inner, sizes.hidden_size), "up_proj": (inner, sizes.hidden_size)}
    shapes["down_proj"] = (sizes.hidden_size, inner)
    for part, shape in shapes.items():
        builder.plain(layer(index, f"{module}.{part}"), f"model.layers.{index}.{module}.{part}.weight", shape)


def _add_experts(builder: Builder, sizes: _Sizes, index: int) -> None:
    s, source = sizes, f"model.layers.{index}.mlp."
    builder.plain(layer(index, "mlp.gate"), source + "gate.weight", (s.n_routed_experts, s.hidden_size))
    bias = "gate.e_score_correction_bias"
    if builder.has(source + bias):
        builder.plain(layer(index, "mlp." + bias), source + bias, (s.n_routed_experts,))
    inner = s.moe_intermediate_size
    for part in ("gate_proj", "up_proj", "down_proj"):
        shape = (s.hidden_size, inner) if part == "down_proj" else (inner, s.hidden_size)
        sources = [f"{source}experts.{expert}.{part}.weight" for expert in range(s.n_routed_experts)]
        builder.stacked(layer(index, f"mlp.experts.{part}"), sources, shape)
    if s.n_shared_experts:
        _add_mlp(builder, sizes, index, "mlp.shared_experts", s.n_shared_experts * inner)


def _add_nextn(builder: Builder, sizes: _Sizes, index: int) -> None:
    """What a layer for multi-token prediction has besides; embedding and head may be the main ones."""
    hidden, vocab = sizes.hidden_size, sizes.vocab_size
    shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
    optional = {"embed_tokens": (vocab, hidden), "shared_head.head": (vocab, hidden), "shared_head.norm": (hidden,)}
    for module, shape in (shapes | optional).items():
        source = f"model.layers.{index}.{module}.weight"
        if module in shapes or builder.has(source):
            builder.plain(layer(index, module), source, shape)
