"""deepseek32: DeepSeek-V3.2 and V3.2-Exp. deepseek2's V3 with an indexer in every layer, which rotates by halves.

Community files of V3.2 that were made before it had a name of its own are deepseek2 without indexers: dense.
Source: llama.cpp 0c1e57098, src/models/deepseek32.cpp and conversion/deepseek.py; transformers 5.24,
models/deepseek_v32.
"""

from __future__ import annotations

from typing import Any

from localrun.models import deepseek2, indexer, parts
from localrun.models.architecture import Architecture, Fields, Settings
from localrun.models.checkpoint_class import NO_BIAS, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys

# What both classes with an indexer say.
COMMON = deepseek2.COMMON | indexer.SETTINGS | {
    "intermediate_size": read(18432),
    "moe_intermediate_size": read(2048),
    "kv_lora_rank": read(512),
    "qk_rope_head_dim": read(64),
    "n_routed_experts": read(256),
    "n_shared_experts": read(1),
    "num_experts_per_tok": read(8),
    "first_k_dense_replace": read(3),
    "mlp_layer_types": read(None),
    "routed_scaling_factor": read(2.5),
    "norm_topk_prob": read(True),
    "topk_method": only("noaux_tc", why="the class's router has no other"),
    "scoring_func": only("sigmoid", why="the class's router has no other"),
    "rope_interleave": only(True, None, why="weights rotated by halves cannot be converted"),
    "num_nextn_predict_layers": read(0),
    "mlp_bias": NO_BIAS,
    **no_effect("head_dim", "layer_types", "moe_router_dtype"),
}  # fmt: skip
SPELLED = {"n_routed_experts": ("num_experts", "num_local_experts", "n_routed_experts")}
CLASS = CheckpointClass(
    "DeepseekV32ForCausalLM",
    COMMON
    | {
        "vocab_size": read(129280),
        "hidden_size": read(7168),
        "num_hidden_layers": read(61),
        "num_attention_heads": read(128),
        "max_position_embeddings": read(163840),
        "q_lora_rank": read(1536),
        "qk_nope_head_dim": read(128),
        "v_head_dim": read(128),
        "n_group": read(8),
        "topk_group": read(4),
        "index_n_heads": read(64),
        "indexer_rope_interleave": only(False, None, why="the class's indexer rotates by halves"),
    },
    SPELLED,
)


def parse_fields(settings: Settings, fields: Fields) -> Fields:
    """As deepseek2's, of a class with an indexer."""
    given = settings.values.get("mlp_layer_types")
    if given is not None:
        n_dense, n_layers = given.count("dense") if isinstance(given, list) else 0, fields["num_hidden_layers"]
        if given != parts.layer_types(n_dense, n_layers):
            settings.fail(f"mlp_layer_types are not {n_layers}, one a layer, dense ones first and then sparse ones")
        fields |= {"first_k_dense_replace": n_dense}
    return deepseek2.parse_fields(settings, fields)


def describe(c: Config) -> dict[str, Any]:
    """As deepseek2's, of a class with an indexer."""
    return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "head_dim": c.qk_rope_head_dim}


def _read(keys: Keys, fields: Fields) -> Fields:
    fields |= deepseek2.read_fields(keys, fields)
    indexer.needs_q_lora(keys, fields)
    return fields | indexer.read_indexer(keys, fields, (indexer.FULL,) * fields["num_hidden_layers"])


def _parse(settings: Settings, fields: Fields) -> Fields:
    return parse_fields(settings, fields) | {"indexer_types": (indexer.FULL,) * fields["num_hidden_layers"]}


DEEPSEEK32 = Architecture(
    name="deepseek32",
    checkpoints=(CLASS,),
    constants={"attention": "mla", "rope": "pairs", "indexer_rope": "halves"},
    keys=(*deepseek2.KEYS, *indexer.KEYS),
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=deepseek2.layer((*parts.MLA, *indexer.TENSORS)),
    read=_read,
    parse=_parse,
    describe=describe,
    warnings=deepseek2.warnings_of_eps,
)
