"""transformers' logits for a tiny file: deepseek2 by DeepseekV2ForCausalLM for a softmax gate, DeepseekV3 for a
sigmoid; architectures with grouped-query attention and experts by their class (_CLASSES), whose tensors a GGUF holds as
they are.

The GGUF is read back by gguf-py and its tensors are renamed to the checkpoint's (the inverse of llama.cpp's
conversion/deepseek.py): k_b is transposed and merged with v_b into kv_b_proj, gate and up experts are stacked. Rotary
dimensions need no permutation: both classes rotate consecutive pairs as the file has them (V3 with rope_interleave).
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tiny_models
import tiny_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn_kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
} | {
    f"ffn_{part}{gguf_suffix}.weight": f"mlp.{folder}{part}_proj.weight"
    for part in ("gate", "up", "down")
    for gguf_suffix, folder in (("", ""), ("_shexp", "shared_experts."))
}
_LAYER |= {
    "indexer.attn_q_b.weight": "self_attn.indexer.wq_b.weight",
    "indexer.attn_k.weight": "self_attn.indexer.wk.weight",
    "indexer.k_norm.weight": "self_attn.indexer.k_norm.weight",
    "indexer.k_norm.bias": "self_attn.indexer.k_norm.bias",
    "indexer.proj.weight": "self_attn.indexer.weights_proj.weight",
}
_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


# Of architectures with grouped-query attention: the class, and its names for what the others call otherwise.
_CLASSES = {
    "qwen3moe": "Qwen3Moe",
    "glm4moe": "Glm4Moe",
    "minimax-m2": "MiniMaxM2",
    "hy_v3": "HYV3",
    "bailingmoe2": "Glm4Moe",  # its own class is not in transformers; of the same arithmetic under other names
    "gpt-oss": "GptOss",
}
_OF_CLASS = {
    "minimax_m2": {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
    "hy_v3": {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
    "gpt_oss": {
        "attn_output.bias": "self_attn.o_proj.bias",
        "attn_sinks.weight": "self_attn.sinks",
        "ffn_gate_inp.weight": "mlp.router.weight",
        "ffn_gate_inp.bias": "mlp.router.bias",
        "ffn_gate_up_exps.bias": "mlp.experts.gate_up_proj_bias",
        "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
    },
}


def model(path: Path | str) -> torch.nn.Module:
    """transformers' model with the file's weights."""
    import torch

    metadata, tensors = tiny_models.read(path)
    config = _config(metadata, tensors)
    tensors = {_common(metadata["general.architecture"], name): values for name, values in tensors.items()}
    state = {name: torch.from_numpy(values) for name, values in _state_dict(config, tensors).items()}
    model = _model_class(config)(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    allowed = {name for name in missing if name.endswith("e_score_correction_bias")}  # a zero bias is no bias
    if unexpected or set(missing) - allowed:
        raise KeyError(f"{path}: transformers misses {sorted(missing)} and does not know {sorted(unexpected)}")
    return model


def _common(architecture: object, name: str) -> str:
    """A tensor's name, as most architectures have it."""
    blk = re.match(r"blk\.\d+\.", name)
    return blk[0] + tiny_weights.common_name(str(architecture), name.removeprefix(blk[0])) if blk else name


@functools.lru_cache(maxsize=256)
def _logits(path: str, ids: tuple[int, ...]) -> np.ndarray:
    import torch

    with torch.no_grad():
        result = model(path)(torch.tensor([ids])).logits[0].numpy()
    result.flags.writeable = False
    return result


def logits(path: Path | str, ids: list[int]) -> np.ndarray:
    """float32 (T, vocab): transformers' logits after every token of `ids`."""
    return _logits(str(path), tuple(ids))


def _model_class(config: PreTrainedConfig) -> type:
    import transformers

    kinds = "DeepseekV2", "DeepseekV3", "DeepseekV32", "GlmMoeDsa", *_CLASSES.values()
    classes = [getattr(transformers, f"{kind}ForCausalLM") for kind in kinds]

    return {each.config_class.model_type: each for each in classes}[config.model_type]


def _config(metadata: dict[str, object], tensors: dict[str, np.ndarray]) -> PreTrainedConfig:
    from transformers import DeepseekV2Config, DeepseekV3Config

    architecture = metadata["general.architecture"]
    meta = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    if architecture in _CLASSES:
        return _grouped_config(_CLASSES[architecture], meta, tensors)
    softmax = meta.get("expert_gating_func", 1) == 1
    n_rope = meta["rope.dimension_count"]
    qk_head_dim = meta.get("attention.key_length_mla", meta["attention.key_length"])
    fields = {
        "vocab_size": meta["vocab_size"],
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "moe_intermediate_size": meta["expert_feed_forward_length"],
        "num_hidden_layers": meta["block_count"] - meta.get("nextn_predict_layers", 0),
        "num_attention_heads": meta["attention.head_count"],
        "num_key_value_heads": meta["attention.head_count"],
        "n_shared_experts": meta["expert_shared_count"],
        "n_routed_experts": meta["expert_count"],
        "num_experts_per_tok": meta["expert_used_count"],
        "routed_scaling_factor": float(meta.get("expert_weights_scale", 1.0)),
        "kv_lora_rank": meta["attention.kv_lora_rank"],
        "q_lora_rank": meta.get("attention.q_lora_rank"),
        "qk_rope_head_dim": n_rope,
        "qk_nope_head_dim": qk_head_dim - n_rope,
        "v_head_dim": meta.get("attention.value_length_mla", meta["attention.value_length"]),
        "n_group": meta.get("expert_group_count", 1),
        "topk_group": meta.get("expert_group_used_count", 1),
        "first_k_dense_replace": meta["leading_dense_block_count"],
        "norm_topk_prob": meta.get("expert_weights_norm", False),
        "max_position_embeddings": meta["context_length"],
        "rms_norm_eps": float(meta["attention.layer_norm_rms_epsilon"]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope_parameters(meta),
        "attn_implementation": "eager",
    }
    if "attention.indexer.top_k" in meta:
        return _sparse_config(str(architecture), meta, fields)
    if softmax:
        method = "group_limited_greedy" if fields["n_group"] > 1 else "greedy"
        return DeepseekV2Config(**fields, topk_method=method)
    return DeepseekV3Config(**fields, rope_interleave=True, num_mtp_layers=0)


def _grouped_config(kind: str, meta: dict[str, object], tensors: dict[str, np.ndarray]) -> PreTrainedConfig:
    import transformers

    n_layers = meta["block_count"] - meta.get("nextn_predict_layers", 0)
    n_dense = sum(f"blk.{i}.ffn_gate.weight" in tensors for i in range(n_layers))
    rotated = meta.get("rope.dimension_count", meta["attention.key_length"]) / meta["attention.key_length"]
    rope = {"rope_type": "default", "rope_theta": float(meta["rope.freq_base"])}
    if "rope.scaling.type" in meta:
        rope |= {"rope_type": meta["rope.scaling.type"], "factor": float(meta["rope.scaling.factor"])}
        rope["original_max_position_embeddings"] = meta["rope.scaling.original_context_length"]
        rope |= {"truncate": False} if kind == "GptOss" else {}
    own = {
        "GptOss": {
            "num_local_experts": meta["expert_count"],
            "sliding_window": meta.get("attention.sliding_window"),
        },
        "Qwen3Moe": {"num_experts": meta["expert_count"], "norm_topk_prob": True},
        "Glm4Moe": {
            "n_routed_experts": meta["expert_count"],
            "n_shared_experts": meta.get("expert_shared_count"),
            "n_group": meta.get("expert_group_count"),
            "topk_group": meta.get("expert_group_used_count"),
            "first_k_dense_replace": n_dense,
            "norm_topk_prob": True,
            "routed_scaling_factor": meta.get("expert_weights_scale"),
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
            "partial_rotary_factor": rotated,
            "num_mtp_layers": 0,
        },
        "MiniMaxM2": {
            "num_local_experts": meta["expert_count"],
            "partial_rotary_factor": rotated,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        "HYV3": {
            "num_experts": meta["expert_count"],
            "num_shared_experts": meta.get("expert_shared_feed_forward_length", 0)
            // meta["expert_feed_forward_length"],
            "router_scaling_factor": meta.get("expert_weights_scale"),
            "mlp_layer_types": ["dense"] * n_dense + ["sparse"] * (n_layers - n_dense),
        },
    }
    return getattr(transformers, f"{kind}Config")(
        **own[kind],
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        moe_intermediate_size=meta["expert_feed_forward_length"],
        num_hidden_layers=n_layers,
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        head_dim=meta["attention.key_length"],
        num_experts_per_tok=meta["expert_used_count"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=float(meta["attention.layer_norm_rms_epsilon"]),
        tie_word_embeddings="output.weight" not in tensors,
        rope_parameters=rope,
        attn_implementation="eager",
    )


def _sparse_config(architecture: str, meta: dict[str, object], fields: dict[str, object]) -> PreTrainedConfig:
    """Of a model with an indexer."""
    from transformers import DeepseekV32Config, GlmMoeDsaConfig

    for name, key in (("index_n_heads", "head_count"), ("index_head_dim", "key_length"), ("index_topk", "top_k")):
        fields[name] = meta[f"attention.indexer.{key}"]
    if architecture == "deepseek32":
        return DeepseekV32Config(**fields)
    if "attention.indexer.types" in meta:
        fields["indexer_types"] = ["full" if is_full else "shared" for is_full in meta["attention.indexer.types"]]
    elif meta["context_length"] >= 1 << 20:  # as GLM-5.2's config.json has it
        fields |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    return GlmMoeDsaConfig(**fields)


def _rope_parameters(meta: dict[str, object]) -> dict[str, object]:
    if "rope.scaling.type" not in meta:
        return {"rope_type": "default", "rope_theta": float(meta["rope.freq_base"])}
    mscale = meta["rope.scaling.yarn_log_multiplier"] / 0.1  # all published checkpoints have mscale == mscale_all_dim
    return {
        "rope_type": meta["rope.scaling.type"],
        "rope_theta": float(meta["rope.freq_base"]),
        "factor": float(meta["rope.scaling.factor"]),
        "original_max_position_embeddings": meta["rope.scaling.original_context_length"],
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


def _state_dict(config: PreTrainedConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    state = {new: tensors[old] for old, new in _GLOBAL.items() if old in tensors}
    state.setdefault("lm_head.weight", tensors["token_embd.weight"])
    for i in range(config.num_hidden_layers):
        layer = {n.removeprefix(f"blk.{i}."): t for n, t in tensors.items() if re.match(rf"blk\.{i}\.", n)}
        if getattr(config, "indexer_types", ["full"] * config.num_hidden_layers)[i] == "shared":  # never used
            layer = {name: values for name, values in layer.items() if not name.startswith("indexer.")}
        if "attn_k_b.weight" in layer:
            k_b, v_b = layer.pop("attn_k_b.weight").transpose(0, 2, 1), layer.pop("attn_v_b.weight")
            layer["attn_kv_b.weight"] = np.concatenate([k_b, v_b], axis=1).reshape(-1, config.kv_lora_rank)
        if "attn_qkv.weight" in layer:
            counts = np.cumsum([config.num_attention_heads, config.num_key_value_heads])
            qkv = np.split(layer.pop("attn_qkv.weight"), config.head_dim * counts)
            layer |= {f"attn_{part}.weight": matrix for part, matrix in zip("qkv", qkv, strict=True)}
        if config.model_type == "gpt_oss":
            layer |= _fused(layer)
        if "ffn_gate_exps.weight" in layer:
            gate_up = layer.pop("ffn_gate_exps.weight"), layer.pop("ffn_up_exps.weight")
            layer["ffn_gate_up_exps.weight"] = np.concatenate(gate_up, axis=1)
        names = _LAYER | _OF_CLASS.get(config.model_type, {})
        state |= {f"model.layers.{i}.{names[name]}": values for name, values in layer.items()}
    return state


def _fused(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """gpt-oss's experts: (E, in, out), gate and up in turn; taken out of the layer."""
    weights, biases = (
        {part: layer.pop(f"ffn_{part}_exps.{kind}") for part in ("gate", "up", "down")} for kind in ("weight", "bias")
    )
    both = [np.stack([parts["gate"], parts["up"]], axis=2) for parts in (weights, biases)]  # (E, FE, 2, ...)
    gate_up, gate_up_bias = (part.reshape(part.shape[0], -1, *part.shape[3:]) for part in both)
    return {
        "ffn_gate_up_exps.weight": gate_up.transpose(0, 2, 1),
        "ffn_gate_up_exps.bias": gate_up_bias,
        "ffn_down_exps.weight": weights["down"].transpose(0, 2, 1),
        "ffn_down_exps.bias": biases["down"],
    }
