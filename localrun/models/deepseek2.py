"""deepseek2: DeepSeek-V2, V2-Lite, V3 and R1, Kimi-K2, Moonlight, GLM-4.7-Flash.

Latent attention, experts, multi-token prediction.

Which variant a file holds is decided by the tensors and keys that are present, never by a layer count or a file name.
Source: llama.cpp 3f545becc, src/models/deepseek2.cpp, conversion/deepseek.py; modeling_deepseek.py of
deepseek-ai/DeepSeek-V3. Our converter differs from llama.cpp's in keeping the layers for multi-token prediction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import parts, router
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Settings, Tensor
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS

_JOINT_MULTIPLE = 16  # of columns that a transposed product takes (quant.ops.linear)
_LATENT_EPS = 1e-6  # transformers' norms of latents have it, whatever rms_norm_eps says
_EPS_MATTERS = 1e-5  # another epsilon than the latents' moves logits by less than 1e-4 of their range up to here
_LITE_LAYERS = (26, 27)  # by which llama.cpp tells models without q_lora_rank from the others

KEYS = (
    *parts.COMMON_KEYS,
    parts.BLOCK_COUNT,
    Key("attention.head_count_kv", default=None, value=lambda _: 1, by_layer=True),  # the latent is one key for all
    Key("attention.q_lora_rank", "q_lora_rank", default=None),
    Key("attention.kv_lora_rank", "kv_lora_rank"),
    Key("attention.key_length", default=None, value=lambda c: c.kv_lora_rank + c.qk_rope_head_dim),
    Key("attention.value_length", default=None, value=lambda c: c.kv_lora_rank),
    Key("attention.key_length_mla", "qk_nope_head_dim", value=lambda c: c.qk_nope_head_dim + c.qk_rope_head_dim),
    Key("attention.value_length_mla", "v_head_dim", value=lambda c: c.v_head_dim),
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    Key("rope.dimension_count", "qk_rope_head_dim"),
    parts.NEXTN,
    *router.KEYS,
    *ROPE_KEYS,
)

# What all classes of these models say.
COMMON = {
    "hidden_act": SILU,
    "attention_bias": NO_BIAS,
    "rms_norm_eps": read(1e-6),
    "moe_layer_freq": only(1, why="expected 1: experts in every layer behind the dense ones"),
    **no_effect("num_key_value_heads", "pretraining_tp", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size"),
}
V2 = CheckpointClass(
    "DeepseekV2ForCausalLM",
    COMMON
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
    COMMON
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
GLM_LITE = CheckpointClass(
    "Glm4MoeLiteForCausalLM",
    COMMON
    | {
        "vocab_size": read(154880),
        "hidden_size": read(2048),
        "intermediate_size": read(10240),
        "moe_intermediate_size": read(1536),
        "num_hidden_layers": read(47),
        "num_attention_heads": read(20),
        "max_position_embeddings": read(202752),
        "rms_norm_eps": read(1e-5),
        "kv_lora_rank": read(512),
        "q_lora_rank": read(768, null=lambda _: None),
        "qk_nope_head_dim": read(192),
        "qk_rope_head_dim": read(64),
        "v_head_dim": read(256),
        "head_dim": read(None, null=lambda fields: fields["qk_rope_head_dim"]),
        "mlp_layer_types": read(None, null=lambda _: []),
        "first_k_dense_replace": read(1),  # mlp_layer_types count
        "n_routed_experts": read(64),
        "n_shared_experts": read(1),
        "num_experts_per_tok": read(4),
        "n_group": read(1),
        "topk_group": read(1),
        "routed_scaling_factor": read(1.8),
        "norm_topk_prob": read(True),
        "topk_method": only("noaux_tc", why="Glm4MoeLite's router has no other"),
        "scoring_func": only("sigmoid", why="Glm4MoeLite's router has no other"),
        "rope_interleave": only(True, why="weights rotated by halves cannot be converted"),
        "num_nextn_predict_layers": read(0),
    },
    spelled={"n_routed_experts": ("num_local_experts", "n_routed_experts")},
)


def read_fields(keys: Keys, fields: Fields) -> Fields:
    """What the keys do not say by themselves; refuses what the network cannot do."""
    tensors, rope_dim = keys.file.tensors, fields["qk_rope_head_dim"]
    if keys.has("attention.key_length_mla") != keys.has("attention.value_length_mla"):
        keys.fail("attention.value_length_mla", "alone or missing", "both *_mla keys or neither")
    lengths = ("key_length_mla", "value_length_mla")
    if not keys.has("attention.key_length_mla"):  # files of before April 2025 mean the heads' own lengths
        lengths = ("key_length", "value_length")
    key_length, v_head_dim = (keys.u32("attention." + length) for length in lengths)
    if key_length <= rope_dim:
        keys.fail("attention." + lengths[0], key_length, f"more than rope.dimension_count, {rope_dim}")
    if fields["rope_scaling"] is not None and fields["rope_scaling"].type == "linear":
        keys.refuse(f"{keys.prefix[:-1]} with linear rope scaling is not native")
    if fields["kv_lora_rank"] % _JOINT_MULTIPLE and any(name.endswith(parts.JOINT_KV_B) for name in tensors):
        width = f"a kv_lora_rank of {fields['kv_lora_rank']}, no multiple of {_JOINT_MULTIPLE}"
        keys.refuse(f"attn_kv_b with {width}, is not native")
    q_a = "blk.0.attn_q_a.weight"
    return {
        "num_hidden_layers": parts.count_layers(keys, fields),
        "q_lora_rank": (fields["q_lora_rank"] or keys.rows(q_a)) if q_a in tensors else None,
        "qk_nope_head_dim": key_length - rope_dim,
        "v_head_dim": v_head_dim,
        **router.read_router(keys, fields),
    }


def parse_fields(settings: Settings, fields: Fields) -> Fields:
    """What a config.json does not say by itself; refuses what a GGUF cannot say."""
    is_v2, is_v3 = settings.checkpoint_class is V2, settings.checkpoint_class in (V3, GLM_LITE)
    if settings.checkpoint_class is GLM_LITE:
        fields["first_k_dense_replace"] = parts.count_dense(settings, fields["num_hidden_layers"])
    method = settings.get("topk_method", str)
    if is_v2 and method == "greedy":  # among all, whatever n_group says
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


def warnings_of_eps(c: Config) -> list[str]:
    """A line if norms of latents have another epsilon in transformers."""
    if c.rms_norm_eps == _LATENT_EPS:
        return []
    found = f"rms_norm_eps is {c.rms_norm_eps:g}, which a GGUF means for all norms"
    return [f"{found}; transformers takes {_LATENT_EPS:g} for those of the latents"]


def _warnings(c: Config) -> list[str]:
    warnings, n_layers = [], c.num_hidden_layers
    if (n_layers in _LITE_LAYERS or (n_layers == 48 and c.vocab_size == 128256)) == parts.has_q_lora(c):
        how = "with q_lora_rank" if parts.has_q_lora(c) else "without q_lora_rank"
        warnings.append(f"llama.cpp cannot load a model {how} and {n_layers} layers; localrun can")
    return warnings + warnings_of_eps(c)


def layer(attention: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of a layer with this attention."""
    return (
        parts.INPUT_NORM,
        *attention,
        parts.POST_ATTENTION_NORM,
        *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
        parts.GATE,
        parts.SELECTION_BIAS,
        *parts.EXPERTS,
        *parts.SHARED_EXPERTS,
        *parts.MTP_TENSORS,
    )


DEEPSEEK2 = Architecture(
    name="deepseek2",
    checkpoints=(V2, V3, GLM_LITE),
    constants={"attention": "mla", "rope": "pairs"},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=layer(parts.MLA),
    read=read_fields,
    parse=parse_fields,
    describe=_describe,
    warnings=_warnings,
)
