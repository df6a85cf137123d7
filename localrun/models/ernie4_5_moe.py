"""ernie4_5-moe: ERNIE-4.5-21B-A3B, 300B-A47B. Grouped-query attention rotated by pairs, experts behind dense layers.

Source: llama.cpp 0c1e57098, src/models/ernie4-5-moe.cpp and conversion/ernie.py; transformers 5.24,
models/ernie4_5_moe. The checkpoint rotates neighbours as well, so nothing is reordered. Both programs divide the chosen
experts' weights by their sum.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import parts, router
from localrun.models.architecture import DENSE, Architecture, Fields, Key, OneRow, Plain, Settings
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

CLASS = CheckpointClass(
    "Ernie4_5_MoeForCausalLM",
    {
        "vocab_size": read(103424),
        "hidden_size": read(2560),
        "intermediate_size": read(12288),
        "moe_intermediate_size": read(1536),
        "num_hidden_layers": read(28),
        "num_attention_heads": read(20),
        "num_key_value_heads": read(4, null=parts.heads),
        "head_dim": read(None, null=parts.fair_share),
        "max_position_embeddings": read(131072),
        "rms_norm_eps": read(1e-5),
        "rope_theta": read(500000.0),
        "tie_word_embeddings": read(True),
        "hidden_act": SILU,
        "use_bias": NO_BIAS,
        "moe_num_experts": read(64),
        "moe_k": read(6),
        "moe_num_shared_experts": read(2),
        "moe_layer_start_index": read(1),
        "moe_layer_end_index": read(-1),
        "moe_layer_interval": only(1, why="expected 1: experts in every layer behind the dense ones"),
        "moe_use_aux_free": only(True, why="no published model has another"),
        "moe_gate": only("topk", "top2", why="the router has no other"),
        **no_effect("moe_norm_min", "moe_capacity", "num_nextn_predict_layers", "compression_ratio", "dropout_reg",
                    "rope_ratio"),
    },
    spelled={"moe_num_experts": ("num_experts", "moe_num_experts"), "moe_k": ("num_experts_per_tok", "moe_k")},
)  # fmt: skip
KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("leading_dense_block_count", "first_k_dense_replace", default=0, setting="moe_layer_start_index"),
    Key("interleave_moe_layer_step", default=None, value=lambda _: 1),
    Key("expert_count", "n_routed_experts", setting="moe_num_experts"),
    Key("expert_used_count", "num_experts_per_tok", setting="moe_k"),
    Key("expert_shared_count", "n_shared_experts", default=0, setting="moe_num_shared_experts"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_shared_feed_forward_length", default=None, omit=0, value=lambda c: c.shared_intermediate_size),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting=None, omit=1.0),
    *ROPE_KEYS,
)


def _read(keys: Keys, fields: Fields) -> Fields:
    if keys.u32("interleave_moe_layer_step", 1) != 1:
        keys.refuse("experts in some layers only are not native")
    bias = parts.SELECTION_BIAS.name
    return {
        "shared_intermediate_size": router.shared_width(keys),
        "has_selection_bias": any(name.endswith(bias) for name in keys.file.tensors),
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,
    }


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    if settings.get("moe_layer_end_index", int) not in (-1, fields["num_hidden_layers"] - 1):
        settings.fail("moe_layer_end_index is not the last layer; expected experts up to there")
    return {
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "has_selection_bias": True,
    }


def _describe(_: Config) -> dict[str, Any]:
    return {"tie_word_embeddings": False}


ERNIE4_5_MOE = Architecture(
    name="ernie4_5-moe",
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "pairs", "scoring_func": "softmax", "norm_topk_prob": True},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.gqa(Plain()),
        parts.POST_ATTENTION_NORM,
        *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
        parts.GATE,
        replace(parts.SELECTION_BIAS, source=OneRow("mlp.moe_statics.e_score_correction_bias")),
        *parts.EXPERTS,
        *parts.SHARED_EXPERTS,
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
    left_out=r"model\.mtp_",
)
