"""deepseek2: DeepSeek-V2, V2-Lite, V3 and R1, Kimi-K2, Moonlight. Latent attention, experts, multi-token prediction.

Which variant a file holds is decided by the tensors and keys that are present, never by a layer count or a file name.
Source: llama.cpp 3f545becc, src/models/deepseek2.cpp, conversion/deepseek.py; modeling_deepseek.py of
deepseek-ai/DeepSeek-V3. Our converter differs from llama.cpp's in keeping the layers for multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import parts
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Settings
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS

GATING = {"softmax": 1, "sigmoid": 2, "softmax_after_topk": 3}
_JOINT_MULTIPLE = 16  # of columns that a transposed product takes (quant.ops.linear)
_LATENT_EPS = 1e-6  # transformers' norms of latents have it, whatever rms_norm_eps says
_EPS_MATTERS = 1e-5  # another epsilon than the latents' moves logits by less than 1e-4 of their range up to here
_LITE_LAYERS = (26, 27)  # by which llama.cpp tells models without q_lora_rank from the others

KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers", value=lambda c: c.num_hidden_layers + c.num_nextn_predict_layers),
    Key("attention.head_count_kv", default=None, value=lambda _: 1, by_layer=True),  # the latent is one key for all
    Key("attention.q_lora_rank", "q_lora_rank", default=None),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    Key("attention.key_length", default=None, value=lambda c: c.kv_lora_rank + c.qk_rope_head_dim),
    Key("attention.value_length", default=None, value=lambda c: c.kv_lora_rank),
    Key("attention.key_length_mla", "qk_nope_head_dim", value=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    Key("attention.value_length_mla", "v_head_dim", value=lambda c: c.v_head_dim),
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    Key("rope.dimension_count", "qk_rope_head_dim"),
    Key("nextn_predict_layers", "num_nextn_predict_layers", default=0, omit=0),
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_shared_count", "n_shared_experts", default=0),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0),
    Key("expert_weights_norm", "norm_topk_prob", "bool", default=False, omit=False),
    Key("expert_gating_func", default=0, value=lambda c: GATING[c.scoring_func]),
    Key("expert_group_count", "n_group", default=1),
    Key("expert_group_used_count", "topk_group", default=None),
    *ROPE_KEYS,
)

# What both classes say.
_BOTH = {
    "hidden_act": SILU,
    "attention_bias": NO_BIAS,
    "rms_norm_eps": read(1e-6),
    "moe_layer_freq": only(1, why="expected 1: experts in every layer behind the dense ones"),
    **no_effect("num_key_value_heads", "pretraining_tp", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"),
}
V2 = CheckpointClass(
    "DeepseekV2ForCausalLM",
    _BOTH
    | {
        "vocab_size": read(102400),
        "hidden_size": read(4096),
        "intermediate_size": read(11008),
        "moe_intermediate_size": read(1407),
        "num_hidden_layers": read(32),
        "num_attention_heads": read(32),
        "max_position_embeddings": read(2048),
        "kv_lora_rank": read(512),
        "q_lora_rank": read(1536, null=lambda _: None),
        "qk_nope_head_dim": read(128),
        "qk_rope_head_dim": read(64),
        "v_head_dim": read(128),
        "first_k_dense_replace": read(0),
        "n_routed_experts": read(64),
        "n_shared_experts": read(2),
        "num_experts_per_tok": read(None),
        "n_group": read(None, null=lambda _: 0),
        "topk_group": read(None, null=lambda _: 0),
        "routed_scaling_factor": read(1.0),
        "topk_method": only("greedy", "group_limited_greedy", why="DeepseekV2's router has no other"),
        "scoring_func": only("softmax", why="DeepseekV2's router has no other"),
        # transformers never divides; the model's own code does, and then leaves out routed_scaling_factor
        "norm_topk_prob": only(
            False, None, why="what it means for DeepseekV2 is not agreed upon", null=lambda _: False
        ),
        "num_nextn_predict_layers": read(0),
        "mlp_bias": NO_BIAS,
        **no_effect("head_dim", "rope_interleave"),
    },
    spelled={"n_routed_experts": ("num_experts", "n_routed_experts")},
)
V3 = CheckpointClass(
    "DeepseekV3ForCausalLM",
    _BOTH
    | {
        "vocab_size": read(129280),
        "hidden_size": read(7168),
        "intermediate_size": read(18432),
        "moe_intermediate_size": read(2048),
        "num_hidden_layers": read(61),
        "num_attention_heads": read(128),
        "max_position_embeddings": read(4096),
        "kv_lora_rank": read(512),
        "q_lora_rank": read(1536, null=lambda _: None),
        "qk_nope_head_dim": read(128),
        "qk_rope_head_dim": read(64),
        "v_head_dim": read(128),
        "head_dim": read(None, null=lambda fields: fields["qk_rope_head_dim"]),
        "first_k_dense_replace": read(3),
        "n_routed_experts": read(256),
        "n_shared_experts": read(1),
        "num_experts_per_tok": read(8),
        "n_group": read(8),
        "topk_group": read(4),
        "routed_scaling_factor": read(2.5),
        "norm_topk_prob": read(True, null=lambda _: False),
        "topk_method": only("noaux_tc", why="DeepseekV3's router has no other"),
        "scoring_func": only("sigmoid", why="DeepseekV3's router has no other"),
        "rope_interleave": only(True, why="weights rotated by halves cannot be converted"),
        "num_nextn_predict_layers": read(1),
    },
    spelled={
        "n_routed_experts": ("num_local_experts", "n_routed_experts"),
        "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers"),
    },
)


def _read(keys: Keys, fields: Fields) -> Fields:
    tensors, n_nextn, rope_dim = keys.file.tensors, fields["num_nextn_predict_layers"], fields["qk_rope_head_dim"]
    if keys.has("attention.key_length_mla") != keys.has("attention.value_length_mla"):
        keys.fail("attention.value_length_mla", "alone or missing", "both *_mla keys or neither")
    lengths = ("key_length_mla", "value_length_mla")
    if not keys.has("attention.key_length_mla"):  # files of before April 2025 mean the heads' own lengths
        lengths = ("key_length", "value_length")
    key_length, v_head_dim = (keys.u32("attention." + length) for length in lengths)
    if key_length <= rope_dim:
        keys.fail("attention." + lengths[0], key_length, f"more than rope.dimension_count, {rope_dim}")
    if fields["rope_scaling"] is not None and fields["rope_scaling"].type == "linear":
        keys.refuse("deepseek2 with linear rope scaling is not native")
    if fields["kv_lora_rank"] % _JOINT_MULTIPLE and any(name.endswith(parts.JOINT_KV_B) for name in tensors):
        width = f"a kv_lora_rank of {fields['kv_lora_rank']}, no multiple of {_JOINT_MULTIPLE}"
        keys.refuse(f"attn_kv_b with {width}, is not native")
    q_a, n_group = "blk.0.attn_q_a.weight", fields["n_group"] or 1
    topk_group = keys.u32("expert_group_used_count", *([] if n_group > 1 else [1]))
    return {
        "num_hidden_layers": keys.u32("block_count") - n_nextn,
        "q_lora_rank": (fields["q_lora_rank"] or keys.rows(q_a)) if q_a in tensors else None,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": v_head_dim,
        "shared_intermediate_size": next(
            (keys.rows(name) for name in tensors if name.endswith(".ffn_gate_shexp.weight")), 0
        ),
        "n_group": n_group,
        "topk_group": topk_group if n_group > 1 else 1,
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,  # 0 and absent mean no scaling
        **_read_gate(keys),
    }


def _read_gate(keys: Keys) -> Fields:
    """Files without the key: those with a selection bias mean sigmoid (noaux_tc), the others softmax."""
    gating, has_bias = keys.u32("expert_gating_func", 0), False
    has_bias = any(name.endswith("." + parts.SELECTION_BIAS.name) for name in keys.file.tensors)
    known = {number: name for name, number in GATING.items()} | {0: "sigmoid" if has_bias else "softmax"}
    if gating not in known:
        keys.refuse(f"expert gating function {gating} is not native")
    return {"scoring_func": known[gating], "has_selection_bias": has_bias}


def _parse(settings: Settings, fields: Fields) -> Fields:
    is_v3 = settings.checkpoint_class is V3
    method = settings.get("topk_method", str)
    if not is_v3 and method == "greedy":  # among all, whatever n_group says
        fields |= {"n_group": 1, "topk_group": 1}
    for name in ("n_group", "topk_group"):
        if not fields[name]:
            settings.fail(f"{name} is null or 0; expected 1 or more for {method}")
    if is_v3 and settings.get("head_dim", int, fields) != fields["qk_rope_head_dim"]:
        settings.fail(f"head_dim is not qk_rope_head_dim, {fields['qk_rope_head_dim']}; it is what is rotated")
    if abs(fields["rms_norm_eps"] - _LATENT_EPS) > _EPS_MATTERS:
        found = f"rms_norm_eps is {fields['rms_norm_eps']:g}"
        settings.fail(f"{found}; norms of latents have {_LATENT_EPS:g}, and a GGUF holds one for all norms")
    return {
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "scoring_func": settings.get("scoring_func", str),
        "has_selection_bias": method == "noaux_tc",
        "n_group": fields["n_group"],
        "topk_group": fields["topk_group"] if fields["n_group"] > 1 else 1,
        "rope_scaling": _parse_scaling(settings, fields),
    }


def _parse_scaling(settings: Settings, fields: Fields) -> Any:
    rope, scaling = settings.rope, fields["rope_scaling"]
    if rope.type not in ("default", "yarn"):
        settings.fail(f"rope scaling is '{rope.type}'; expected default or yarn")
    if rope.type != "yarn":
        return scaling
    mscale, mscale_all_dim = rope.mscales
    if not mscale_all_dim or mscale != mscale_all_dim:
        found = f"mscale {mscale:g} and mscale_all_dim {mscale_all_dim:g}"
        settings.fail(f"yarn has {found}; GGUF can only tell of equal ones other than 0")
    if rope.attention_factor != 1:
        settings.fail(f"yarn has attention_factor {rope.attention_factor:g}; GGUF can only tell of 1 beside mscale")
    return replace(scaling, mscale_all_dim=mscale_all_dim)


def _describe(c: Config) -> dict[str, Any]:
    is_sigmoid = c.scoring_func == "sigmoid"
    return {
        "architectures": ["DeepseekV3ForCausalLM" if is_sigmoid else "DeepseekV2ForCausalLM"],
        "topk_method": "noaux_tc" if is_sigmoid else "group_limited_greedy",
        "scoring_func": c.scoring_func,
        "norm_topk_prob": is_sigmoid and c.norm_topk_prob,
        "head_dim": c.qk_rope_head_dim,
    }


def _warnings(c: Config) -> list[str]:
    warnings, n_layers = [], c.num_hidden_layers
    if (n_layers in _LITE_LAYERS or (n_layers == 48 and c.vocab_size == 128256)) == parts.has_q_lora(c):
        how = "with q_lora_rank" if parts.has_q_lora(c) else "without q_lora_rank"
        warnings.append(f"llama.cpp cannot load a model {how} and {n_layers} layers; localrun can")
    if c.rms_norm_eps != _LATENT_EPS:
        found = f"rms_norm_eps is {c.rms_norm_eps:g}, which a GGUF means for all norms"
        warnings.append(f"{found}; transformers takes {_LATENT_EPS:g} for those of the latents")
    return warnings


DEEPSEEK2 = Architecture(
    name="deepseek2",
    checkpoints=(V2, V3),
    constants={"attention": "mla", "rope": "pairs"},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.MLA,
        parts.POST_ATTENTION_NORM,
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
    warnings=_warnings,
)
