"""glm4moe: GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7. Grouped-query attention, experts, multi-token prediction.

Source: llama.cpp 0c1e57098, src/models/glm4-moe.cpp and conversion/glm.py; transformers 5.24, models/glm4_moe. Half of
each head is rotated, by halves; the large models norm their heads, Air does not. The norm before a feed-forward layer
has a name of its own. Our converter keeps the layers for multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import parts, router
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Plain, Settings
from localrun.models.checkpoint_class import SILU, CheckpointClass, no_effect, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

CLASS = CheckpointClass(
    "Glm4MoeForCausalLM",
    {
        "vocab_size": read(151552),
        "hidden_size": read(4096),
        "intermediate_size": read(10944),
        "moe_intermediate_size": read(1408),
        "num_hidden_layers": read(46),
        "num_attention_heads": read(96),
        "num_key_value_heads": read(8),
        "head_dim": read(None, null=parts.fair_share),
        "max_position_embeddings": read(131072),
        "rms_norm_eps": read(1e-5),
        "hidden_act": SILU,
        "attention_bias": read(False),
        "use_qk_norm": read(False),
        "partial_rotary_factor": read(0.5),
        "first_k_dense_replace": read(1),
        "n_routed_experts": read(128),
        "n_shared_experts": read(1),
        "num_experts_per_tok": read(8),
        "n_group": read(1),
        "topk_group": read(1),
        "norm_topk_prob": read(True),
        "routed_scaling_factor": read(1.0),
        "num_nextn_predict_layers": read(1),
        **no_effect("ep_size", "pretraining_tp", "moe_layer_freq", "scoring_func", "topk_method"),
    },
    spelled={
        "n_routed_experts": ("num_local_experts", "n_routed_experts"),
        "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers"),
    },
)
KEYS = (
    *parts.COMMON_KEYS,
    parts.BLOCK_COUNT,
    *parts.GQA_KEYS,
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    parts.NEXTN,
    *router.KEYS,
    *ROPE_KEYS,
)


def _read(keys: Keys, fields: Fields) -> Fields:
    keys.has("rope.dimension_sections")  # of images; a text's positions are the same in all sections
    return {
        "num_hidden_layers": parts.count_layers(keys, fields),
        "attention_bias": parts.has_biases(keys),
        "qk_norm": parts.has_norms(keys),
        **router.read_router(keys, fields),
    }


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    return {
        "attention_bias": settings.get("attention_bias", bool),
        "qk_norm": settings.get("use_qk_norm", bool),
        "qk_rope_head_dim": parts.rotated(settings, fields),
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "scoring_func": "sigmoid",
        "has_selection_bias": True,
    }


def _describe(c: Config) -> dict[str, Any]:
    return {
        "attention_bias": c.attention_bias,
        "use_qk_norm": c.qk_norm,
        "partial_rotary_factor": c.qk_rope_head_dim / c.head_dim,
    }


GLM4MOE = Architecture(
    name="glm4moe",
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "halves"},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.gqa(Plain()),
        *parts.biases(),
        *parts.norms(),
        replace(parts.POST_ATTENTION_NORM, name="post_attention_norm.weight"),
        *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
        parts.GATE,
        parts.SELECTION_BIAS,
        *parts.EXPERTS,
        *parts.SHARED_EXPERTS,
        *parts.MTP_TENSORS,
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
)
