"""minimax-m2: MiniMax-M2, M2.1, M2.5, M2.7. Grouped-query attention, experts in every layer, none of them shared.

Source: llama.cpp 0c1e57098, src/models/minimax-m2.cpp and conversion/minimax.py; transformers 5.24, models/minimax_m2.
All heads of a token's query are normed as one vector, and so are those of its key; half of each head is rotated, by
halves. Both programs always divide the chosen experts' weights by their sum; no key says otherwise.
"""

from __future__ import annotations

from localrun.models import parts, router
from localrun.models.architecture import Architecture, Fields, Key, Plain, Settings
from localrun.models.checkpoint_class import SILU, CheckpointClass, no_effect, only, read
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

_WHY = "no published model has another"
CLASS = CheckpointClass(
    "MiniMaxM2ForCausalLM",
    {
        "vocab_size": read(200064),
        "hidden_size": read(3072),
        "intermediate_size": read(1536),
        "num_hidden_layers": read(62),
        "num_attention_heads": read(48),
        "num_key_value_heads": read(8),
        "head_dim": read(128),
        "num_local_experts": read(256),
        "num_experts_per_tok": read(8),
        "max_position_embeddings": read(196608),
        "rms_norm_eps": read(1e-6),
        "rope_theta": read(5000000.0),
        "partial_rotary_factor": read(None),
        "rotary_dim": read(None, null=lambda fields: fields["head_dim"]),
        "hidden_act": SILU,
        # what transformers takes for granted
        "scoring_func": only("sigmoid", why=_WHY),
        "use_qk_norm": only(True, why=_WHY),
        "qk_norm_type": only("per_layer", why=_WHY),
        "use_routing_bias": only(True, why=_WHY),
        "shared_intermediate_size": only(0, why=_WHY),
        "sliding_window": only(None, why=_WHY),
        **no_effect(
            "router_jitter_noise", "attn_type_list", "layernorm_full_attention_beta", "layernorm_linear_attention_beta",
            "layernorm_mlp_beta", "mlp_intermediate_size", "shared_moe_mode", "use_mtp", "num_mtp_modules",
            "mtp_transformer_layers",
        ),
    },
    spelled={"num_local_experts": ("num_experts", "num_local_experts")},
)  # fmt: skip
KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("expert_count", "n_routed_experts", setting="num_local_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size", default=lambda fields: fields["intermediate_size"],
        setting="intermediate_size"),
    router.GATING_KEY,
    *ROPE_KEYS,
)  # fmt: skip


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    rotated = parts.rotated(settings, fields)
    if settings.rope.partial_rotary_factor is None:  # as in the published files
        rotated = settings.get("rotary_dim", int, fields)
    return {"qk_rope_head_dim": rotated, "scoring_func": "sigmoid", "has_selection_bias": True}


MINIMAX_M2 = Architecture(
    name="minimax-m2",
    checkpoints=(CLASS,),
    constants={
        "attention": "gqa",
        "rope": "halves",
        "qk_norm": True,
        "qk_norm_whole": True,
        "norm_topk_prob": True,
    },
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=parts.renamed(
        (
            parts.INPUT_NORM,
            *parts.gqa(Plain()),
            *parts.norms(whole=True),
            parts.POST_ATTENTION_NORM,
            parts.GATE,
            parts.SELECTION_BIAS,
            *parts.EXPERTS,
        ),
        parts.MIXTRAL_NAMES,
    ),
    read=lambda keys, _: router.read_gate(keys),
    parse=_parse,
    describe=lambda c: {"rotary_dim": c.qk_rope_head_dim},
)
