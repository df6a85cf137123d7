"""The keys of tiny models' GGUF files, of the types that llama.cpp's loader wants and its converter writes."""

from __future__ import annotations

import gguf
from tiny_shapes import Deepseek2, Grouped, Llama, Model, Sparse

# Which of the keys that not all have a file of an architecture has.
_ROUTER_KEYS = "expert_feed_forward_length", "expert_gating_func", "expert_weights_norm", "expert_weights_scale"
_GROUPED_KEYS = {
    "llama": ("rope.dimension_count",),
    "qwen3moe": ("expert_feed_forward_length",),
    "glm4moe": (
        "rope.dimension_count", "leading_dense_block_count", "nextn_predict_layers", "expert_shared_count",
        "expert_group_count", "expert_group_used_count", *_ROUTER_KEYS,
    ),
    "minimax-m2": ("rope.dimension_count", "expert_feed_forward_length", "expert_gating_func"),
    "gpt-oss": ("attention.sliding_window", "expert_feed_forward_length"),
    "hy_v3": ("nextn_predict_layers", "expert_shared_feed_forward_length", *_ROUTER_KEYS),
    "bailingmoe2": (
        "rope.dimension_count", "leading_dense_block_count", "nextn_predict_layers", "expert_shared_count",
        "expert_group_count", "expert_group_used_count", *_ROUTER_KEYS,
    ),
}  # fmt: skip


def write_metadata(writer: gguf.GGUFWriter, m: Model, name: str) -> None:
    prefix = writer.arch + "."

    def u32(key: str, value: int) -> None:
        writer.add_uint32(prefix + key, value)

    writer.add_string("general.type", "model")
    writer.add_string("general.name", name)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_string("tokenizer.ggml.model", "none")
    u32("vocab_size", m.vocab_size)
    u32("context_length", m.context_length if isinstance(m, Sparse) else 1024)
    u32("embedding_length", m.hidden_size)
    u32("feed_forward_length", m.intermediate_size)
    u32("attention.head_count", m.num_attention_heads)
    writer.add_float32(prefix + "attention.layer_norm_rms_epsilon", m.rms_norm_eps)
    if isinstance(m, Llama):
        _write_llama_metadata(writer, m)
    elif isinstance(m, Grouped):
        _write_grouped_metadata(writer, m)
    else:
        _write_deepseek2_metadata(writer, m)


def _write_llama_metadata(writer: gguf.GGUFWriter, m: Llama) -> None:
    writer.add_uint32("llama.block_count", m.num_hidden_layers)
    writer.add_uint32("llama.attention.head_count_kv", m.num_key_value_heads)
    writer.add_uint32("llama.rope.dimension_count", m.head_dim)
    writer.add_float32("llama.rope.freq_base", m.rope_theta)
    if m.write_head_dim:
        writer.add_uint32("llama.attention.key_length", m.head_dim)
        writer.add_uint32("llama.attention.value_length", m.head_dim)
    if m.rope_linear_factor is not None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", m.rope_linear_factor)


def _write_grouped_metadata(writer: gguf.GGUFWriter, m: Grouped) -> None:
    optional = {
        "expert_feed_forward_length": m.moe_intermediate_size,
        "rope.dimension_count": m.qk_rope_head_dim,
        "leading_dense_block_count": m.first_k_dense_replace,
        "nextn_predict_layers": m.num_nextn_predict_layers or None,
        "expert_shared_count": m.n_shared_experts,
        "expert_shared_feed_forward_length": m.n_shared_experts * m.moe_intermediate_size,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2, "softmax_after_topk": 3}[m.scoring_func],
        "expert_group_count": m.n_group,
        "expert_group_used_count": m.topk_group,
        "attention.sliding_window": m.sliding_window,
        "expert_weights_norm": m.norm_topk_prob,
        "expert_weights_scale": m.routed_scaling_factor,
    }
    for key, value in optional.items():
        if key in _GROUPED_KEYS[m.architecture] and value is not None:
            add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{m.architecture}.{key}", value)
    counts = {
        "block_count": m.num_hidden_layers + m.num_nextn_predict_layers,
        "attention.head_count_kv": m.num_key_value_heads,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "expert_count": m.n_routed_experts,
        "expert_used_count": m.num_experts_per_tok,
    }
    for key, value in counts.items():
        writer.add_uint32(f"{m.architecture}.{key}", value)
    writer.add_float32(f"{m.architecture}.rope.freq_base", m.rope_theta)
    if m.yarn_factor is not None:
        scaling = f"{m.architecture}.rope.scaling."
        writer.add_string(scaling + "type", "yarn")
        writer.add_float32(scaling + "factor", m.yarn_factor)
        writer.add_uint32(scaling + "original_context_length", m.original_max_position_embeddings)


def _write_deepseek2_metadata(writer: gguf.GGUFWriter, m: Deepseek2) -> None:
    nope, rope, v, rank = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim, m.kv_lora_rank
    counts = {
        "block_count": m.num_hidden_layers + m.num_nextn_predict_layers,
        # The legacy files run MLA as multi-head attention: every head has its own decompressed key and value.
        "attention.head_count_kv": 1 if m.split_kv_b else m.num_attention_heads,
        "attention.key_length": rank + rope if m.split_kv_b else nope + rope,
        "attention.value_length": rank if m.split_kv_b else v,
        "attention.kv_lora_rank": rank,
        "leading_dense_block_count": m.first_k_dense_replace,
        "expert_feed_forward_length": m.moe_intermediate_size,
        "expert_count": m.n_routed_experts,
        "expert_used_count": m.num_experts_per_tok,
        "expert_shared_count": m.n_shared_experts,
        "rope.dimension_count": rope,
    }
    if m.write_gating_func:
        counts["expert_gating_func"] = {"softmax": 1, "sigmoid": 2}[m.scoring_func]
    if m.q_lora_rank is not None:
        counts["attention.q_lora_rank"] = m.q_lora_rank
    if m.split_kv_b:
        counts |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": v}
    if m.n_group is not None:
        counts |= {"expert_group_count": m.n_group, "expert_group_used_count": m.topk_group}
    if m.num_nextn_predict_layers:
        counts["nextn_predict_layers"] = m.num_nextn_predict_layers
    if isinstance(m, Sparse):
        counts |= {
            "attention.indexer.head_count": m.index_n_heads,
            "attention.indexer.key_length": m.index_head_dim,
            "attention.indexer.top_k": m.index_topk,
        }
    prefix = writer.arch + "."
    for key, value in counts.items():
        writer.add_uint32(prefix + key, value)
    if isinstance(m, Sparse) and m.indexer_types:
        writer.add_array(prefix + "attention.indexer.types", [letter == "F" for letter in m.indexer_types])
    writer.add_float32(prefix + "rope.freq_base", 10000.0)
    if m.norm_topk_prob:
        writer.add_bool(prefix + "expert_weights_norm", True)
    if m.routed_scaling_factor is not None:
        writer.add_float32(prefix + "expert_weights_scale", m.routed_scaling_factor)
    if m.yarn_factor is not None:
        _write_yarn_metadata(writer, m)


def _write_yarn_metadata(writer: gguf.GGUFWriter, m: Deepseek2) -> None:
    scaling = f"{writer.arch}.rope.scaling."
    writer.add_string(scaling + "type", "yarn")
    writer.add_float32(scaling + "factor", m.yarn_factor)
    writer.add_uint32(scaling + "original_context_length", m.original_max_position_embeddings)
    if m.mscale_all_dim is not None:
        writer.add_float32(scaling + "yarn_log_multiplier", 0.1 * m.mscale_all_dim)
