"""deepseek4: DeepSeek-V4 Flash and Pro. Hyper-connections, windows and compressed rows, hashed routers.

Every layer attends to a window of rows, one a token, which are key and value of all heads. Layers with a ratio attend
to pooled rows as well, one for so many tokens: those of ratio 4 to some that an indexer chooses, those of ratio 128 to
all. The first layers' experts follow from the token's id alone.
Source: llama.cpp 0c1e57098, src/models/deepseek4.cpp and conversion/deepseek.py; transformers 5.24, models/deepseek_v4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from localrun.models import indexer, parts, router
from localrun.models.architecture import (
    HASHED,
    MOE,
    RATIO_4,
    RATIO_128,
    SCORED,
    Architecture,
    Fields,
    Key,
    Plain,
    Settings,
    Shape,
    Stacked,
    Tensor,
)
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS

STREAMS = 4  # llama.cpp's kernels know no other number
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
GATING = 4
_NO_PLACE = "others have no place in a GGUF"
_BEFORE = ".attn_kv_latent.", ".attn_compress_", "hc_head_", ".indexer.compress_"  # in names of before the merge


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings as the published checkpoints have them: transformers writes those of both kinds of layers."""
    rope = values.get("rope_parameters")
    kinds = [rope.get(kind) for kind in ("main", "compress")] if isinstance(rope, dict) else []
    if not kinds or not all(isinstance(kind, dict) for kind in kinds):
        return values | {"rope_parameters": {"main": rope}} if _contradicts(values, rope) else values  # refused later
    main, compress = kinds
    own = {key: compress[key] for key in ("partial_rotary_factor",) if key in compress}
    if main.get("rope_type", "default") != "default" or own != {key: main[key] for key in own if key in main}:
        return values  # refused later
    theta = {"compress_rope_theta": compress["rope_theta"]} if "rope_theta" in compress else {}
    return values | {"rope_parameters": compress | {"rope_theta": main.get("rope_theta", 10000.0)}} | theta


def _contradicts(values: dict[str, Any], rope: Any) -> bool:
    """Whether settings of one kind of layers differ from those beside them, which are what transformers reads."""
    beside = (("rope_theta", 10000.0), ("partial_rotary_factor", None))
    return isinstance(rope, dict) and any(
        key in rope and rope[key] != values.get(key, default) for key, default in beside
    )


CLASS = CheckpointClass(
    "DeepseekV4ForCausalLM",
    {
        "vocab_size": read(129280),
        "hidden_size": read(4096),
        "moe_intermediate_size": read(2048),
        "num_hidden_layers": read(43),
        "num_attention_heads": read(64),
        "num_key_value_heads": only(1, why="all heads share one row"),
        "head_dim": read(512),
        "qk_rope_head_dim": read(None, null=lambda fields: fields["head_dim"] // 8),
        "partial_rotary_factor": read(None),
        "q_lora_rank": read(1024),
        "o_groups": read(8),
        "o_lora_rank": read(1024),
        "sliding_window": read(128),
        "compress_ratios": read(None, null=lambda _: []),
        "compress_rates": read(None, null=lambda _: {}),
        "layer_types": read(None, null=lambda _: []),
        "mlp_layer_types": read(None, null=lambda _: []),
        "num_hash_layers": read(3),
        "compress_rope_theta": read(160000.0),
        "hc_mult": only(STREAMS, why="llama.cpp knows no other number of streams"),
        "hc_sinkhorn_iters": read(20),
        "hc_eps": read(1e-6),
        "index_n_heads": read(64),
        "index_head_dim": read(128),
        "index_topk": read(512),
        "n_routed_experts": read(256),
        "n_shared_experts": read(1),
        "num_experts_per_tok": read(6),
        "scoring_func": only("sqrtsoftplus", why=_NO_PLACE),
        "norm_topk_prob": only(True, why="programs differ in what else means; no published model has another"),
        "routed_scaling_factor": read(1.5),
        "swiglu_limit": read(10.0),
        "max_position_embeddings": read(1048576),
        "rms_norm_eps": read(1e-6),
        "num_nextn_predict_layers": read(1),
        # of checkpoints with DSpark's blocks
        "dspark_block_size": read(0),
        "dspark_noise_token_id": read(0),
        "dspark_target_layer_ids": read(None, null=lambda _: []),
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "mlp_bias": NO_BIAS,
        **no_effect("router_jitter_noise", "n_group", "topk_group", "topk_method", "expert_dtype"),
    },
    spelled={"n_routed_experts": ("num_local_experts", "n_routed_experts")},
    flat=_flat,
)
# Of variants that see; and a bias that layers with a table have no use for.
_LEFT_OUT = r"vision\.|aligner\.|image_|layers\.\d+\.ffn\.gate\.bias(_vl)?$"


def _by_layer(c: Config, value: Any) -> list[Any]:
    """An array with an item a layer, those for multi-token prediction included."""
    return [value] * (c.num_hidden_layers + c.num_nextn_predict_layers)


KEYS = (
    *(key for key in parts.COMMON_KEYS if key.field != "intermediate_size"),
    parts.BLOCK_COUNT,
    *parts.GQA_KEYS[:3],
    replace(parts.GQA_KEYS[3], setting="qk_rope_head_dim"),
    parts.NEXTN,
    Key("attention.q_lora_rank", "q_lora_rank"),
    Key("attention.sliding_window", "sliding_window"),
    Key("attention.output_group_count", "o_groups"),
    Key("attention.output_lora_rank", "o_lora_rank"),
    Key("attention.compress_ratios", "compress_ratios", "i32s", setting=None,
        value=lambda c: [*c.compress_ratios, *[0] * c.num_nextn_predict_layers]),
    Key("attention.compress_rope_freq_base", "compress_rope_theta", "f32"),
    *indexer.KEYS,
    Key("hyper_connection.count", "hc_mult"),
    Key("hyper_connection.sinkhorn_iterations", "hc_sinkhorn_iters"),
    Key("hyper_connection.epsilon", "hc_eps", "f32"),
    *(key for key in router.KEYS if key is not router.GATING_KEY and key.field not in ("n_group", "topk_group")),
    Key("expert_gating_func", value=lambda _: GATING),
    Key("swiglu_clamp_exp", "swiglu_limit", "f32s", setting=None,
        value=lambda c: _by_layer(c, c.swiglu_limit)),
    Key("swiglu_clamp_shexp", type="f32s", default=None, value=lambda c: _by_layer(c, c.swiglu_limit)),
    Key("hash_layer_count", "num_hash_layers", default=0),
    Key("embedding_length_out", default=None, value=lambda c: c.hc_mult * c.hidden_size),
    *ROPE_KEYS,
)  # fmt: skip


def _read(keys: Keys, fields: Fields) -> Fields:
    _refuse_names_of_before(keys)
    if fields["num_key_value_heads"] != 1:
        keys.fail("attention.head_count_kv", fields["num_key_value_heads"], "1, since all heads share a row")
    if fields["v_head_dim"] != fields["head_dim"]:
        keys.fail("attention.value_length", fields["v_head_dim"], f"attention.key_length, {fields['head_dim']}")
    if fields["num_attention_heads"] % fields["o_groups"]:
        keys.fail("attention.output_group_count", fields["o_groups"], f"a divisor of {fields['num_attention_heads']}")
    if fields["index_head_dim"] < fields["qk_rope_head_dim"]:
        rope_dim = fields["qk_rope_head_dim"]
        keys.fail(
            "attention.indexer.key_length", fields["index_head_dim"], f"rope.dimension_count, {rope_dim}, or more"
        )
    if fields["hc_mult"] != STREAMS:
        keys.refuse(f"{fields['hc_mult']} hyper-connections are not native, {STREAMS} are")
    if not fields["compress_rope_theta"] > 1:
        keys.fail("attention.compress_rope_freq_base", fields["compress_rope_theta"], "more than 1")
    if fields["rope_scaling"] is not None and fields["rope_scaling"].type != "yarn":
        keys.refuse(f"rope scaling '{fields['rope_scaling'].type}' is not native with compressed rows")
    if keys.u32("expert_gating_func") != GATING:
        keys.refuse(f"expert gating function {keys.u32('expert_gating_func')} is not native with hyper-connections")
    n_group = keys.u32("expert_group_count", 1) or 1
    if keys.u32("expert_group_used_count", n_group) != n_group:
        keys.refuse("groups of experts are not native with hyper-connections")
    keys.u32("feed_forward_length", 0)  # no layer is dense
    keys.u32("leading_dense_block_count", 0)
    return {
        "num_hidden_layers": (n_layers := parts.count_layers(keys, fields)),
        "compress_ratios": _read_ratios(keys, n_layers),
        "swiglu_limit": _read_limit(keys),
        "shared_intermediate_size": router.shared_width(keys),
        "has_selection_bias": True,
    }


def _refuse_names_of_before(keys: Keys) -> None:
    """Raises UnsupportedModelError for files whose tensors have the names of before llama.cpp knew the model."""
    found = next((name for name in keys.file.tensors if any(part in name for part in _BEFORE)), None)
    if found:
        keys.refuse(f"tensor '{found[:100]}' has a name of before llama.cpp knew deepseek4; convert the model anew")


def _read_ratios(keys: Keys, n_layers: int) -> tuple[int, ...]:
    name, ratios = "attention.compress_ratios", keys.i32s("attention.compress_ratios")
    if len(ratios) < n_layers or not set(ratios) <= {*RATIOS.values()}:
        keys.fail(
            name, f"{len(ratios)} numbers, {sorted(set(ratios))[:9]}", f"0, 4 or 128 for each of {n_layers} layers"
        )
    return ratios[:n_layers]


def _read_limit(keys: Keys) -> float:
    """The bound of all layers' experts."""
    limits = {*keys.f32s("swiglu_clamp_exp")}
    limits |= {*keys.f32s("swiglu_clamp_shexp", tuple(limits))}
    if len(limits) != 1 or not min(limits) > 0:
        keys.refuse(f"swiglu_clamp of {sorted(limits)[:9]} is not native; one positive number for all layers is")
    return limits.pop()


def _parse(settings: Settings, fields: Fields) -> Fields:
    rope, part = settings.rope, settings.rope.partial_rotary_factor
    if {"main", "compress"} & rope.parameters.keys():
        settings.fail(
            "rope_parameters: expected main without scaling and compress that rotates as many dimensions; or neither, "
            "and rope_theta beside them"
        )
    if rope.type not in ("default", "yarn"):
        settings.fail(f"rope scaling is '{rope.type}'; expected default or yarn")
    if rope.parameters.get("attention_factor") not in (None, 1):
        settings.fail(f"yarn has attention_factor {rope.attention_factor:g}; GGUF can only tell of 1")
    rotated = fields["qk_rope_head_dim"] if part is None else int(fields["head_dim"] * part)
    return {
        "qk_rope_head_dim": rotated,
        "compress_ratios": _parse_ratios(settings, fields["num_hidden_layers"]),
        "num_hash_layers": _parse_hashed(settings, fields["num_hidden_layers"]),
        "swiglu_limit": settings.get("swiglu_limit", float),
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "has_selection_bias": True,
    }


def _parse_ratios(settings: Settings, n_layers: int) -> tuple[int, ...]:
    """By compress_ratios or, as transformers writes them, layer_types; without either the large model's are meant."""
    ratios, types = settings.get("compress_ratios", list), settings.get("layer_types", list)
    if types:
        ratios = [RATIOS.get(each) if isinstance(each, str) else None for each in types]
    if not ratios:
        ratios = [128, 128, *[128 if i % 2 == 0 else 4 for i in range(n_layers)]]
    rates = settings.get("compress_rates", dict)
    if len(ratios) < n_layers or not set(ratios) <= {*RATIOS.values()} or any(RATIOS.get(k) != rates[k] for k in rates):
        settings.fail(f"compress_ratios, layer_types or compress_rates do not mean 0, 4 or 128 for {n_layers} layers")
    return tuple(ratios[:n_layers])


def _parse_hashed(settings: Settings, n_layers: int) -> int:
    types = settings.get("mlp_layer_types", list)
    n_hashed = types.count("hash_moe") if types else min(settings.get("num_hash_layers", int), n_layers)
    if types and types != ["hash_moe"] * n_hashed + ["moe"] * (n_layers - n_hashed):
        settings.fail(f"mlp_layer_types are not {n_layers}, 'hash_moe' and then 'moe'; {_NO_PLACE}")
    return n_hashed


def _describe(c: Config) -> dict[str, Any]:
    return {
        "compress_ratios": [*c.compress_ratios, *[0] * c.num_nextn_predict_layers],
        "num_key_value_heads": 1,
        "scoring_func": c.scoring_func,
        "swiglu_limit": c.swiglu_limit,
    }


def _hidden(c: Config) -> Shape:
    return (c.hidden_size,)


def _streams(c: Config) -> int:
    return c.hc_mult * c.hidden_size


def _mixed(c: Config) -> int:
    """What a hyper-connection computes: a weight in and one out for each stream, and a matrix among them."""
    return c.hc_mult * (2 + c.hc_mult)


def _hyper_connection(part: str) -> tuple[Tensor, ...]:
    module, name = f"{part}_hc", f"hc_{part}"
    return (
        Tensor(f"{module}.fn", f"{name}_fn.weight", lambda c: (_mixed(c), _streams(c)), Plain(f"{name}_fn")),
        Tensor(f"{module}.base", f"{name}_base.weight", lambda c: (_mixed(c),), Plain(f"{name}_base")),
        Tensor(f"{module}.scale", f"{name}_scale.weight", lambda _: (3,), Plain(f"{name}_scale")),
    )


def _head_rows(c: Config) -> int:
    return c.num_attention_heads * c.head_dim


_ATTN = "self_attn"
_ATTENTION = (
    Tensor(f"{_ATTN}.q_a_proj", "attn_q_a.weight", lambda c: (c.q_lora_rank, c.hidden_size), Plain("attn.wq_a.weight")),
    Tensor(f"{_ATTN}.q_a_norm", "attn_q_a_norm.weight", lambda c: (c.q_lora_rank,), Plain("attn.q_norm.weight")),
    Tensor(f"{_ATTN}.q_b_proj", "attn_q_b.weight", lambda c: (_head_rows(c), c.q_lora_rank), Plain("attn.wq_b.weight")),
    Tensor(f"{_ATTN}.kv_proj", "attn_kv.weight", lambda c: (c.head_dim, c.hidden_size), Plain("attn.wkv.weight")),
    Tensor(f"{_ATTN}.kv_norm", "attn_kv_a_norm.weight", lambda c: (c.head_dim,), Plain("attn.kv_norm.weight")),
    Tensor(f"{_ATTN}.sinks", "attn_sinks.weight", lambda c: (c.num_attention_heads,), Plain("attn.attn_sink")),
    Tensor(f"{_ATTN}.o_a_proj", "attn_output_a.weight",
           lambda c: (c.o_groups * c.o_lora_rank, _head_rows(c) // c.o_groups), Plain("attn.wo_a.weight")),
    Tensor(f"{_ATTN}.o_b_proj", "attn_output_b.weight",
           lambda c: (c.hidden_size, c.o_groups * c.o_lora_rank), Plain("attn.wo_b.weight")),
)  # fmt: skip


def _compressor(module: str, name: str, source: str, ratio: int, width: Any) -> tuple[Tensor, ...]:
    """What pools rows of `width` values, one for `ratio` tokens: of ratio 4 each token has a part in two of them."""
    n_parts, layers = (2, RATIO_4) if ratio == 4 else (1, RATIO_128)

    def projection(c: Config) -> Shape:
        return n_parts * width(c), c.hidden_size

    return (
        Tensor(f"{module}.kv_proj", f"{name}_kv.weight", projection, Plain(f"{source}.wkv.weight"), layers),
        Tensor(f"{module}.gate_proj", f"{name}_gate.weight", projection, Plain(f"{source}.wgate.weight"), layers),
        Tensor(f"{module}.position_bias", f"{name}_ape.weight", lambda c: (ratio, n_parts * width(c)),
               Plain(f"{source}.ape"), layers),
        Tensor(f"{module}.kv_norm", f"{name}_norm.weight", lambda c: (width(c),), Plain(f"{source}.norm.weight"),
               layers),
    )  # fmt: skip


_POOLED, _INDEXER = f"{_ATTN}.compressor", f"{_ATTN}.compressor.indexer"
_COMPRESSORS = (
    *_compressor(_POOLED, "attn_compressor", "attn.compressor", 4, lambda c: c.head_dim),
    *_compressor(_POOLED, "attn_compressor", "attn.compressor", 128, lambda c: c.head_dim),
    Tensor(f"{_INDEXER}.q_b_proj", "indexer.attn_q_b.weight",
           lambda c: (c.index_n_heads * c.index_head_dim, c.q_lora_rank), Plain("attn.indexer.wq_b.weight"), RATIO_4),
    Tensor(f"{_INDEXER}.weights_proj", "indexer.proj.weight", lambda c: (c.index_n_heads, c.hidden_size),
           Plain("attn.indexer.weights_proj.weight"), RATIO_4),
    *_compressor(_INDEXER, "indexer_compressor", "attn.indexer.compressor", 4, lambda c: c.index_head_dim),
)  # fmt: skip

_IMAGES = "mlp.gate.bias_vl"  # moves the choice for tokens of images, in variants that see
_MLP = (
    replace(parts.GATE, source=Plain("ffn.gate.weight")),
    replace(parts.SELECTION_BIAS, source=Plain("ffn.gate.bias"), layers=SCORED, with_module="", may_lack=False),
    Tensor(_IMAGES, "exp_probs_b_vl.bias", lambda c: (c.n_routed_experts,), None, MOE, with_module=_IMAGES),
    Tensor("mlp.gate.tid2eid", "ffn_gate_tid2eid.weight", lambda c: (c.vocab_size, c.num_experts_per_tok),
           Plain("ffn.gate.tid2eid"), HASHED),
    *(
        replace(tensor, source=Stacked(f"ffn.experts.{{expert}}.{source}.weight"), without_module="")
        for tensor, source in zip(
            (tensor for tensor in parts.EXPERTS if tensor.source is not None), ("w1", "w3", "w2"), strict=True
        )
    ),
    *(
        replace(tensor, source=Plain(f"ffn.shared_experts.{source}.weight"), with_module="")
        for tensor, source in zip(parts.SHARED_EXPERTS, ("w1", "w3", "w2"), strict=True)
    ),
)  # fmt: skip

HC_HEAD = (
    Tensor("hc_head.fn", "output_hc_fn.weight", lambda c: (c.hc_mult, _streams(c)), Plain("hc_head_fn")),
    Tensor("hc_head.base", "output_hc_base.weight", lambda c: (c.hc_mult,), Plain("hc_head_base")),
    Tensor("hc_head.scale", "output_hc_scale.weight", lambda _: (1,), Plain("hc_head_scale")),
)

DEEPSEEK4 = Architecture(
    name="deepseek4",
    checkpoints=(CLASS,),
    constants={
        "attention": "compressed",
        "rope": "pairs",
        "indexer_rope": "pairs",
        "intermediate_size": 0,
        "scoring_func": "sqrtsoftplus",
        "swiglu_alpha": 1.0,
    },
    keys=KEYS,
    ends=(
        replace(parts.EMBED_TOKENS, source=Plain("embed.weight")),
        replace(parts.LM_HEAD, source=Plain("head.weight"), with_module=""),
        replace(parts.NORM, source=Plain("norm.weight")),
        *HC_HEAD,
    ),
    layer=(
        *_hyper_connection("attn"),
        replace(parts.INPUT_NORM, source=Plain("attn_norm.weight")),
        *_ATTENTION,
        *_COMPRESSORS,
        *_hyper_connection("ffn"),
        replace(parts.POST_ATTENTION_NORM, source=Plain("ffn_norm.weight")),
        *_MLP,
        *parts.renamed(parts.MTP_TENSORS, {"shared_head.norm": "norm.weight"}),
    ),
    left_out=_LEFT_OUT,
    drafts="mtp.",
    layer_prefix="layers.",
    read=_read,
    parse=_parse,
    describe=_describe,
)
