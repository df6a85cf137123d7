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
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS

GATING = {"softmax": 1, "sigmoid": 2, "softmax_after_topk": 3}
_GATES = ("softmax", "sigmoid")  # that a checkpoint may have
_JOINT_MULTIPLE = 16  # of columns that a transposed product takes (quant.ops.linear)
_LITE_LAYERS = (26, 27)  # by which llama.cpp tells models without q_lora_rank from the others

KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers", value=lambda c: c.num_hidden_layers + c.num_nextn_predict_layers),
    Key(
        "attention.head_count_kv", default=None, value=lambda _: 1, by_layer=True
    ),  # the latent is one key for all heads
    Key("attention.q_lora_rank", "q_lora_rank", default=None, setting_default=None),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    Key("attention.key_length", default=None, value=lambda c: c.kv_lora_rank + c.qk_rope_head_dim),
    Key("attention.value_length", default=None, value=lambda c: c.kv_lora_rank),
    Key("attention.key_length_mla", "qk_nope_head_dim", value=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    Key("attention.value_length_mla", "v_head_dim", value=lambda c: c.v_head_dim),
    Key("leading_dense_block_count", "first_k_dense_replace", default=0, setting_default=0),
    Key("rope.dimension_count", "qk_rope_head_dim"),
    Key("nextn_predict_layers", "num_nextn_predict_layers", default=0, setting_default=0, omit=0),
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_shared_count", "n_shared_experts", default=0, setting_default=0),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting_default=1.0),
    Key("expert_weights_norm", "norm_topk_prob", "bool", default=False, setting_default=False, omit=False),
    Key("expert_gating_func", default=0, value=lambda c: GATING[c.scoring_func]),
    Key("expert_group_count", "n_group", default=1, setting_default=1),
    Key("expert_group_used_count", "topk_group", default=None, setting_default=1),
    *ROPE_KEYS,
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
    # transformers 5 leaves out what each class does anyway.
    is_v3 = settings.values["architectures"] == ["DeepseekV3ForCausalLM"]
    method = settings.get("topk_method", str, "noaux_tc" if is_v3 else "greedy")
    chooses_among_all = settings.get("topk_method", str, "noaux_tc") == "greedy"  # whatever n_group says
    n_group = 1 if chooses_among_all else fields["n_group"]
    return {
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "scoring_func": settings.get("scoring_func", str, "sigmoid" if is_v3 else "softmax"),
        "has_selection_bias": method == "noaux_tc",
        "n_group": n_group,
        "topk_group": fields["topk_group"] if n_group > 1 else 1,
        "rope_scaling": _parse_scaling(settings, fields),
    }


def _parse_scaling(settings: Settings, fields: Fields) -> Any:
    rope, scaling = settings.rope, fields["rope_scaling"]
    if rope.type == "llama3":
        settings.fail("rope scaling is 'llama3'; expected default, linear or yarn")
    if rope.type != "yarn":
        return scaling
    mscale, mscale_all_dim = rope.get("mscale", float, None), rope.get("mscale_all_dim", float, None)
    if not mscale_all_dim or mscale != mscale_all_dim:
        found = f"mscale {mscale} and mscale_all_dim {mscale_all_dim}"
        settings.fail(f"yarn has {found}; GGUF can only tell of equal ones other than 0")
    return replace(scaling, mscale_all_dim=mscale_all_dim)


def _describe(c: Config) -> dict[str, Any]:
    is_sigmoid = c.scoring_func == "sigmoid"
    return {
        "architectures": ["DeepseekV3ForCausalLM" if is_sigmoid else "DeepseekV2ForCausalLM"],
        "topk_method": "noaux_tc" if is_sigmoid else "group_limited_greedy",
        "scoring_func": c.scoring_func,
    }


def _warnings(c: Config) -> list[str]:
    n_layers = c.num_hidden_layers
    if (n_layers in _LITE_LAYERS or (n_layers == 48 and c.vocab_size == 128256)) != parts.has_q_lora(c):
        return []
    how = "with q_lora_rank" if parts.has_q_lora(c) else "without q_lora_rank"
    return [f"llama.cpp cannot load a model {how} and {n_layers} layers; localrun can"]


DEEPSEEK2 = Architecture(
    name="deepseek2",
    checkpoints=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
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
    expected=(
        ("rope_interleave", [True], "weights rotated by halves cannot be converted"),
        ("moe_layer_freq", [1], "expected 1: experts in every layer behind the dense ones"),
        ("topk_method", ["greedy", "group_limited_greedy", "noaux_tc"], "that routing has no GGUF key"),
        ("scoring_func", list(_GATES), "that gate has no GGUF key"),
    ),
    describe=_describe,
    warnings=_warnings,
)
