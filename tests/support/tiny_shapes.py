"""What tiny models differ in: sizes named as in config.json, and the choices of published models, by architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Deepseek2:
    """One deepseek2 model: sizes (named as in config.json) and the choices in which the published models differ."""

    hidden_size: int = 256
    intermediate_size: int = 320
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int | None = 128
    kv_lora_rank: int = 192
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    vocab_size: int = 320
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "sigmoid"
    e_score_correction_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = 2.5
    yarn_factor: float | None = 40.0
    mscale_all_dim: float | None = 1.0  # None: the key yarn_log_multiplier is left out
    original_max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-6
    split_kv_b: bool = True
    fused_gate_up: bool = False
    num_nextn_predict_layers: int = 0
    write_gating_func: bool = True
    tie_word_embeddings: bool = False
    steady_routing: bool = False


@dataclass(frozen=True)
class Sparse(Deepseek2):
    """One deepseek32 or glm-dsa model: the same with an indexer.

    indexer_types: a letter a layer, F for one with an indexer, S for one that shares; empty for a file without the key.
    unused_indexers: whether layers that share have an indexer's tensors all the same.
    """

    architecture: str = "deepseek32"
    num_hidden_layers: int = 3
    index_n_heads: int = 12
    index_head_dim: int = 64
    index_topk: int = 8
    indexer_types: str = ""
    context_length: int = 1024
    unused_indexers: bool = False

    def has_indexer(self, layer: int) -> bool:
        if self.indexer_types and layer < self.num_hidden_layers and not self.unused_indexers:
            return self.indexer_types[layer] == "F"
        return True


@dataclass(frozen=True)
class Llama:
    """One dense llama model with grouped-query attention."""

    hidden_size: int = 256
    intermediate_size: int = 352
    num_hidden_layers: int = 3
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 320
    rope_theta: float = 10000.0
    rope_linear_factor: float | None = None
    rope_freqs: bool = False
    write_head_dim: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Grouped:
    """One model with grouped-query attention and experts, of one of several architectures.

    qk_norm: "head" for norms of each head, "whole" for norms of all heads as one vector, "" for none.
    sliding_window: of every second layer, the first among them; 0 for none. A model with windows is gpt-oss's kind: its
    heads have sinks, and everything has biases.
    joined_qkv: whether queries, keys and values are one matrix.
    """

    architecture: str
    hidden_size: int = 256
    intermediate_size: int = 320
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 0
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    qk_rope_head_dim: int = 32
    qk_norm: str = "head"
    attention_bias: bool = False
    vocab_size: int = 320
    n_routed_experts: int = 16
    n_shared_experts: int = 0
    num_experts_per_tok: int = 4
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "sigmoid"
    e_score_correction_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = None
    rope_theta: float = 1e6
    yarn_factor: float | None = None
    original_max_position_embeddings: int = 256
    sliding_window: int = 0
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    steady_routing: bool = False
    joined_qkv: bool = False
    fused_gate_up: ClassVar[bool] = False


def qwen3moe(**choices: object) -> Grouped:
    """Normed heads, and experts in every layer."""
    router = {"scoring_func": "softmax", "e_score_correction_bias": False}
    return Grouped("qwen3moe", **router | choices)


def mixtral(**choices: object) -> Grouped:
    """Experts in every layer of a llama."""
    router = {"scoring_func": "softmax", "e_score_correction_bias": False, "n_routed_experts": 8}
    return Grouped("llama", **router | {"intermediate_size": 96, "num_experts_per_tok": 2, "qk_norm": ""} | choices)


def glm4moe(**choices: object) -> Grouped:
    """GLM-4.5 and 4.6, but for its size; Air has no qk_norm."""
    return Grouped(
        "glm4moe",
        **{"qk_rope_head_dim": 16, "attention_bias": True, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1}
        | choices,
    )


def minimax_m2(**choices: object) -> Grouped:
    """MiniMax-M2, but for its size."""
    sizes = {"intermediate_size": 96, "qk_rope_head_dim": 16, "qk_norm": "whole", "rope_theta": 5e6}
    return Grouped("minimax-m2", **sizes | choices)


def hy_v3(**choices: object) -> Grouped:
    """Hy3, but for its size."""
    router = {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.826}
    return Grouped("hy_v3", **router | {"rms_norm_eps": 1e-5, "rope_theta": 11158840.0} | choices)


def bailingmoe2(**choices: object) -> Grouped:
    """Ling 2.0, but for its size. llama.cpp takes for granted that all heads together are as wide as hidden states."""
    router = {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_group": 4}
    sizes = {"num_attention_heads": 8, "qk_rope_head_dim": 16, "joined_qkv": True, "rope_theta": 6e5}
    return Grouped("bailingmoe2", **router | {"topk_group": 2} | sizes | choices)


def gpt_oss(**choices: object) -> Grouped:
    """gpt-oss, but for its size and its window."""
    router = {"scoring_func": "softmax_after_topk", "e_score_correction_bias": False, "norm_topk_prob": False}
    sizes = {"num_hidden_layers": 4, "intermediate_size": 96, "qk_norm": "", "attention_bias": True}
    return Grouped(
        "gpt-oss", **router | sizes | {"sliding_window": 16, "rms_norm_eps": 1e-5, "rope_theta": 150000.0} | choices
    )


Model = Deepseek2 | Llama | Grouped


def type_name(model: Model) -> str:
    """general.architecture."""
    return model.architecture if isinstance(model, Grouped | Sparse) else type(model).__name__.lower()
