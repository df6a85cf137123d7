"""A configuration of nothing but a router, to be changed by dataclasses.replace."""

from localrun.models.config import Config

CONFIG = Config(
    architecture="deepseek2", attention="mla", rope="pairs",
    hidden_size=1, intermediate_size=1, num_hidden_layers=1, num_attention_heads=1,
    vocab_size=1, max_position_embeddings=1, rms_norm_eps=0, rope_theta=1, rope_scaling=None, qk_rope_head_dim=2,
    v_head_dim=1, n_routed_experts=32, num_experts_per_tok=6,
)  # fmt: skip
