"""hy_v3: Hy3, Hy-MT2-30B-A3B. Grouped-query attention with normed heads, experts, multi-token prediction.

Source: llama.cpp 0c1e57098, src/models/hy-v3.cpp and conversion/hunyuan.py; transformers 5.24, models/hy_v3. A layer
without a router is dense: no key counts them. The selection bias has no suffix in a GGUF, unlike all other vectors.
Our converter keeps the layers for multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import parts, router
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Plain, Settings
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

_WHY = "no published model has another"
CLASS = CheckpointClass(
    "HYV3ForCausalLM",
    {
        "vocab_size": read(120832),
        "hidden_size": read(4096),
        "intermediate_size": read(13312),
        "moe_intermediate_size": read(1536),
        "num_hidden_layers": read(80),
        "num_attention_heads": read(64),
        "num_key_value_heads": read(8),
        "head_dim": read(128),
        "num_experts": read(192),
        "num_experts_per_tok": read(8),
        "num_shared_experts": read(1),
        "router_scaling_factor": read(2.826),
        "max_position_embeddings": read(131072),
        "rms_norm_eps": read(1e-5),
        "rope_theta": read(11158840.0),
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "mlp_bias": NO_BIAS,
        "mlp_layer_types": read(None, null=lambda _: []),
        "num_nextn_predict_layers": read(0),
        # what transformers takes for granted
        "qk_norm": only(True, why=_WHY),
        "route_norm": only(True, why=_WHY),
        "moe_router_use_sigmoid": only(True, why=_WHY),
        "moe_router_enable_expert_bias": only(True, why=_WHY),
        **no_effect("first_k_dense_replace", "expert_hidden_dim", "enable_lm_head_fp32",
                    "enable_attention_fp32_softmax", "enable_moe_fp32_combine", "use_grouped_mm"),
    },
    spelled={"num_experts": ("num_local_experts", "num_experts")},
)  # fmt: skip
KEYS = (
    *parts.COMMON_KEYS,
    parts.BLOCK_COUNT,
    *parts.GQA_KEYS,
    parts.NEXTN,
    Key("expert_count", "n_routed_experts", setting="num_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_shared_feed_forward_length", default=None, value=lambda c: c.shared_intermediate_size),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting="router_scaling_factor"),
    Key("expert_weights_norm", "norm_topk_prob", "bool", default=False, setting=None),
    router.GATING_KEY,
    *ROPE_KEYS,
)


def _read(keys: Keys, fields: Fields) -> Fields:
    shared, width = router.shared_width(keys), fields["moe_intermediate_size"]
    return {
        "num_hidden_layers": parts.count_layers(keys, fields),
        "n_shared_experts": -(-shared // width),
        "shared_intermediate_size": shared,
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,
        **router.read_gate(keys),
    }


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    shared = settings.get("num_shared_experts", int)
    return {
        "norm_topk_prob": True,
        "n_shared_experts": shared,
        "shared_intermediate_size": shared * fields["moe_intermediate_size"],
        "first_k_dense_replace": parts.count_dense(settings, fields["num_hidden_layers"]),
        "scoring_func": "sigmoid",
        "has_selection_bias": True,
    }


def _describe(c: Config) -> dict[str, Any]:
    return {
        "num_shared_experts": c.n_shared_experts,
        "mlp_layer_types": parts.layer_types(c.first_k_dense_replace, c.num_hidden_layers),
    }


HY_V3 = Architecture(
    name="hy_v3",
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "halves", "qk_norm": True},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=parts.renamed(
        (
            parts.INPUT_NORM,
            *parts.gqa(Plain()),
            *parts.norms(),
            parts.POST_ATTENTION_NORM,
            *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
            parts.GATE,
            replace(parts.SELECTION_BIAS, name="exp_probs_b"),
            *parts.EXPERTS,
            *parts.SHARED_EXPERTS,
            *parts.MTP_TENSORS,
        ),
        {
            "mlp.gate": "mlp.router.gate.weight",
            "mlp.gate.e_score_correction_bias": "mlp.expert_bias",
            "mlp.shared_experts.gate_proj": "mlp.shared_mlp.gate_proj.weight",
            "mlp.shared_experts.up_proj": "mlp.shared_mlp.up_proj.weight",
            "mlp.shared_experts.down_proj": "mlp.shared_mlp.down_proj.weight",
            "shared_head.norm": "final_layernorm.weight",
        },
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
)
