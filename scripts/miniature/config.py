"""The model's sizes, under the names of Hugging Face's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Config:
    """DeepSeek-V3's architecture; the defaults are the miniature.

    Attributes:
        routed_scaling_factor: two experts whose weights add to 1 give a sum about 1/sqrt(2) of the size of one; this
            brings it back to the size of the shared expert's output, as V3's 2.5 does (about) for its eight.
        n_routed_experts: 0 makes every block dense, as wide as the experts that a token would go through: the model
            of equal active size that the miniature is compared with.
    """

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 1024
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 6
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 256
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 1

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has no routed experts."""
        return layer < self.first_k_dense_replace or not self.n_routed_experts

    def inner_size(self, layer: int) -> int:
        """Intermediate size of a dense layer."""
        if layer < self.first_k_dense_replace:
            return self.intermediate_size
        return self.moe_intermediate_size * (self.num_experts_per_tok + self.n_shared_experts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
