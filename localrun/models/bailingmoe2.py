"""bailingmoe2: Ling and Ring 2.0 (mini, flash, 1T). Grouped-query attention with normed heads, experts in groups.

Source: llama.cpp 0c1e57098, src/models/bailingmoe2.cpp and conversion/bailingmoe.py; inclusionAI/Ling-V2 @efee9bb,
models/modeling_bailing_moe_v2.py. The class is not in transformers. Queries, keys and values are one matrix; half of
each head is rotated, by halves. What a prediction layer's head reads has a norm that a GGUF calls the layer's. Our
converter keeps these layers.
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
    "BailingMoeV2ForCausalLM",
    {
        "vocab_size": read(157184),
        "hidden_size": read(2048),
        "intermediate_size": read(5120),
        "moe_intermediate_size": read(512),
        "num_hidden_layers": read(20),
        "num_attention_heads": read(16),
        "num_key_value_heads": read(4),
        "head_dim": read(128, null=parts.fair_share),
        "max_position_embeddings": read(32768),
        "rms_norm_eps": read(1e-6),
        "rope_theta": read(600000.0),
        "hidden_act": SILU,
        "use_bias": NO_BIAS,
        "use_qkv_bias": NO_BIAS,
        "use_qk_norm": only(True, why=_WHY),
        "partial_rotary_factor": read(None),
        "rotary_dim": read(None, null=lambda _: 0),
        "first_k_dense_replace": read(1),
        "num_experts": read(256),
        "num_shared_experts": read(1),
        "num_experts_per_tok": read(8),
        "n_group": read(8),
        "topk_group": read(4),
        "routed_scaling_factor": read(1.0),
        "moe_shared_expert_intermediate_size": read(None, null=lambda fields: fields["moe_intermediate_size"]),
        "num_nextn_predict_layers": read(0),
        # what the class takes for granted
        "norm_topk_prob": only(True, why=_WHY),
        "score_function": only("sigmoid", why=_WHY),
        "moe_router_enable_expert_bias": only(True, why=_WHY),
        "tie_word_embeddings": only(False, why="the head has to be a tensor of its own"),
        **no_effect(
            "embedding_dropout", "output_dropout", "max_window_layers", "mtp_loss_scaling_factor", "router_dtype",
            "use_rmsnorm", "rotary_type", "use_sliding_window", "sliding_window",
        ),
    },
)  # fmt: skip
_SETTINGS = {"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"}


def _shared_width(c: Config) -> int:
    """Of one shared expert, which llama.cpp multiplies by their number."""
    return c.shared_intermediate_size // max(1, c.n_shared_experts)


KEYS = (
    *parts.COMMON_KEYS,
    parts.BLOCK_COUNT,
    *parts.GQA_KEYS,
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    parts.NEXTN,
    *(replace(key, setting=_SETTINGS.get(key.field, key.setting)) for key in router.KEYS),
    Key("expert_shared_feed_forward_length", default=None, value=_shared_width),
    *ROPE_KEYS,
)


def _read(keys: Keys, fields: Fields) -> Fields:
    return {"num_hidden_layers": parts.count_layers(keys, fields), **router.read_router(keys, fields)}


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    if fields["num_experts_per_tok"] == 1:
        settings.fail("num_experts_per_tok is 1, whose weight is not divided by itself; expected 2 or more")
    if fields["n_shared_experts"] < 1:
        settings.fail("num_shared_experts is 0; llama.cpp and this runner expect shared experts")
    if settings.get("moe_shared_expert_intermediate_size", int, fields) != fields["moe_intermediate_size"]:
        settings.fail("moe_shared_expert_intermediate_size is another width than moe_intermediate_size")
    return {
        "qk_rope_head_dim": _rotated(settings, fields),
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "scoring_func": "sigmoid",
        "has_selection_bias": True,
    }


def _rotated(settings: Settings, fields: Fields) -> int:
    """By rotary_dim (1T) or partial_rotary_factor (the others). Without both llama.cpp rotates half, the class all."""
    by_factor, dim = settings.rope.partial_rotary_factor, settings.get("rotary_dim", int)
    if by_factor is None and not dim:
        settings.fail("has neither partial_rotary_factor nor rotary_dim; programs differ in what that means")
    if by_factor is not None and dim not in (0, parts.rotated(settings, fields)):
        settings.fail(f"rotary_dim is {dim}, which is not partial_rotary_factor's part of a head")
    return dim or parts.rotated(settings, fields)


def _describe(c: Config) -> dict[str, Any]:
    return {"rotary_dim": c.qk_rope_head_dim}


BAILINGMOE2 = Architecture(
    name="bailingmoe2",
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "halves", "qk_norm": True},
    keys=KEYS,
    ends=(replace(parts.EMBED_TOKENS, source=Plain("model.word_embeddings.weight")), parts.LM_HEAD, parts.NORM),
    layer=parts.renamed(
        (
            parts.INPUT_NORM,
            *parts.joined_gqa(Plain("attention.query_key_value.weight")),
            *parts.norms(),
            parts.POST_ATTENTION_NORM,
            *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
            parts.GATE,
            parts.SELECTION_BIAS,
            *parts.EXPERTS,
            *parts.SHARED_EXPERTS,
            *parts.MTP_TENSORS[:-1],
            replace(parts.MTP_TENSORS[-1], name="layer_output_norm.weight", may_lack=False),
        ),
        {
            "self_attn.o_proj": "attention.dense.weight",
            "self_attn.q_norm": "attention.query_layernorm.weight",
            "self_attn.k_norm": "attention.key_layernorm.weight",
            "mlp.gate.e_score_correction_bias": "mlp.gate.expert_bias",
            "shared_head.norm": "final_layernorm.weight",
        },
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
)
