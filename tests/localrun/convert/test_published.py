"""Configurations of published checkpoints: read, planned, and converted as far as a dry run goes.

Keys and values are those of the config.json files on Hugging Face; what only concerns training or names is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import slow_but

from localrun.convert.settings import Settings
from localrun.plan.known import load_data
from localrun.plan.shapes import from_config

_GLM = {
    "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 3, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 131072,
    "model_type": "glm4_moe", "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 160,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8,
    "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
    "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 1, "torch_dtype": "bfloat16",
    "use_cache": True, "use_qk_norm": True, "vocab_size": 151552,
}  # fmt: skip
_AIR = {
    "first_k_dense_replace": 1, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "num_hidden_layers": 46, "routed_scaling_factor": 1.0, "use_qk_norm": False,
}  # fmt: skip
_FP8 = {
    "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}  # fmt: skip
_MINIMAX = {
    "architectures": ["MiniMaxM2ForCausalLM"], "attn_type_list": [1] * 62,
    "auto_map": {"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config"}, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 3072, "intermediate_size": 1536, "max_position_embeddings": 196608, "model_type": "minimax_m2",
    "mtp_transformer_layers": 1, "num_attention_heads": 48, "num_experts_per_tok": 8, "num_hidden_layers": 62,
    "num_key_value_heads": 8, "num_local_experts": 256, "num_mtp_modules": 3, "qk_norm_type": "per_layer",
    "quantization_config": _FP8, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "rotary_dim": 64,
    "scoring_func": "sigmoid", "shared_intermediate_size": 0, "tie_word_embeddings": False,
    "transformers_version": "4.46.1", "use_cache": True, "use_mtp": True, "use_qk_norm": True,
    "use_routing_bias": True, "vocab_size": 200064,
}  # fmt: skip
_HY3 = {
    "architectures": ["HYV3ForCausalLM"], "enable_lm_head_fp32": True, "expert_hidden_dim": 1536,
    "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 13312,
    "max_position_embeddings": 262144, "model_type": "hy_v3", "moe_intermediate_size": 1536,
    "moe_router_enable_expert_bias": True, "moe_router_use_sigmoid": True, "num_attention_heads": 64,
    "num_experts": 192, "num_experts_per_tok": 8, "num_hidden_layers": 80, "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1, "num_shared_experts": 1, "output_router_logits": True, "qk_norm": True,
    "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 11158840.0, "rope_type": "default"}, "route_norm": True,
    "router_scaling_factor": 2.826, "tie_word_embeddings": False, "use_grouped_mm": False, "vocab_size": 120832,
}  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144, "max_window_layers": 48,
    "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6, "rope_scaling": None,
    "rope_theta": 10000000, "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
_CODER = {
    "hidden_size": 6144, "intermediate_size": 8192, "max_window_layers": 62, "moe_intermediate_size": 2560,
    "num_attention_heads": 96, "num_experts": 160, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True,
}  # fmt: skip
_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
_GLM_FLASH = {
    "architectures": ["Glm4MoeLiteForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10240,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 20, "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "v_head_dim": 256, "vocab_size": 154880,
}  # fmt: skip
# config.json, the architecture, billions of parameters without layers for multi-token prediction, as published.
PUBLISHED: dict[str, tuple[dict[str, Any], str, float]] = {
    "zai-org/GLM-4.5": (_GLM, "glm4moe", 355),
    "zai-org/GLM-4.5-Air": (_GLM | _AIR, "glm4moe", 106),
    "zai-org/GLM-4.6": (_GLM | {"max_position_embeddings": 202752}, "glm4moe", 355),
    "zai-org/GLM-4.7": (_GLM | {"max_position_embeddings": 202752, "dtype": "bfloat16"}, "glm4moe", 355),
    "zai-org/GLM-4.7-Flash": (_GLM_FLASH, "deepseek2", 30),
    "MiniMaxAI/MiniMax-M2": (_MINIMAX, "minimax-m2", 229),
    "MiniMaxAI/MiniMax-M2.5": (_MINIMAX | {"quantization_config": None}, "minimax-m2", 229),
    "tencent/Hy3": (_HY3, "hy_v3", 295),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (_QWEN3, "qwen3moe", 30.5),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (_QWEN3 | _CODER, "qwen3moe", 480),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (_MIXTRAL, "llama", 46.7),
    "inclusionAI/Ling-mini-2.0": (load_data("models")["ling-mini-2.0"]["config"], "bailingmoe2", 16.26),
    "inclusionAI/Ling-flash-2.0": (load_data("models")["ling-flash-2.0"]["config"], "bailingmoe2", 103),
    "inclusionAI/Ling-1T": (load_data("models")["ling-1t"]["config"], "bailingmoe2", 999.705),
    "openai/gpt-oss-20b": (load_data("models")["gpt-oss-20b"]["config"], "gpt-oss", 20.9),
    "openai/gpt-oss-120b": (load_data("models")["gpt-oss-120b"]["config"], "gpt-oss", 116.8),
}


@pytest.mark.parametrize("name", slow_but(PUBLISHED, {"zai-org/GLM-4.5", "MiniMaxAI/MiniMax-M2", "tencent/Hy3"}))
def test_a_published_configuration_is_read_without_a_doubt(name: str) -> None:
    """Every key is known; the converter's tensors add up to what is published; what reads GGUFs takes the header."""
    values, architecture, billions = PUBLISHED[name]
    assert Settings(values, name).unknown() == []
    model = from_config(values, Path(name))
    assert model.config.architecture == architecture
    assert (model.config.num_nextn_predict_layers > 0) == (values.get("num_nextn_predict_layers", 0) > 0)
    weights = sum(tensor.n_weights for tensor in model.tensors if not model.is_nextn(tensor))
    assert weights / 1e9 == pytest.approx(billions, rel=0.01)
