"""glm-dsa: GLM-5, GLM-5.1, GLM-5.2. DeepSeek-V3.2's layers; the indexer rotates neighbours, and layers may share one.

Source: llama.cpp 0c1e57098, src/models/glm-dsa.cpp and conversion/glm.py; transformers 5.24, models/glm_moe_dsa.
"""

from __future__ import annotations

from typing import Any

from localrun.models import deepseek2, deepseek32, indexer, parts
from localrun.models.architecture import Architecture, Fields, Key, Settings
from localrun.models.checkpoint_class import CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys

_FULL_OF_SHARED = 1 << 20  # tokens of context from which on a file without types means those of GLM-5.2
_EVERY, _FROM = 4, 3  # GLM-5.2: full are the first layers and then every fourth
_LETTERS = {"F": indexer.FULL, "S": indexer.SHARED}

CLASS = CheckpointClass(
    "GlmMoeDsaForCausalLM",
    deepseek32.COMMON
    | {
        "vocab_size": read(154880),
        "hidden_size": read(6144),
        "intermediate_size": read(12288),
        "num_hidden_layers": read(78),
        "num_attention_heads": read(64),
        "max_position_embeddings": read(202752),
        "rms_norm_eps": read(1e-5),
        "q_lora_rank": read(2048),
        "qk_nope_head_dim": read(192),
        "v_head_dim": read(256),
        "n_group": read(1),
        "topk_group": read(1),
        "index_n_heads": read(32),
        "indexer_types": read(None),
        "index_topk_pattern": read(None),
        "index_topk_freq": read(1),
        "index_skip_topk_offset": read(2),
        "indexer_rope_interleave": only(True, None, why="the class's indexer rotates neighbours"),
        **no_effect("index_share_for_mtp_iteration"),  # the layer for multi-token prediction is dense here
    },
    deepseek32.SPELLED,
)
_KEYS = (
    *deepseek2.KEYS,
    *indexer.KEYS,
    Key("attention.indexer.types", type="bools", default=None,
        value=lambda c: [type_ == indexer.FULL for type_ in c.indexer_types]),
)  # fmt: skip


def _scheduled(n_layers: int, every: int, offset: int) -> tuple[str, ...]:
    """The layers' types: full are those up to the offset, and every so many behind."""
    full = (max(i - offset + 1, 0) % every == 0 for i in range(n_layers))
    return tuple(indexer.FULL if is_full else indexer.SHARED for is_full in full)


def _read(keys: Keys, fields: Fields) -> Fields:
    fields |= deepseek2.read_fields(keys, fields)
    if not keys.u32("expert_gating_func", 0):
        fields["scoring_func"] = "sigmoid"
    indexer.needs_q_lora(keys, fields)
    n_layers, given = fields["num_hidden_layers"], keys.bools("attention.indexer.types", None)
    if given is None:
        shares = fields["max_position_embeddings"] >= _FULL_OF_SHARED
        types = _scheduled(n_layers, _EVERY, _FROM) if shares else (indexer.FULL,) * n_layers
    else:
        types = tuple(indexer.FULL if is_full else indexer.SHARED for is_full in given)
    if len(types) != n_layers or types[0] != indexer.FULL:
        keys.fail(
            "attention.indexer.types", f"{len(types)} values", f"{n_layers}, one a layer, of which the first is true"
        )
    return fields | indexer.read_indexer(keys, fields, types)


def _parse(settings: Settings, fields: Fields) -> Fields:
    values, n_layers = settings.values, fields["num_hidden_layers"]
    types, pattern = values.get("indexer_types"), values.get("index_topk_pattern")
    if types is None and pattern is not None:
        types = [_LETTERS.get(each, each) for each in pattern] if isinstance(pattern, str) else pattern
    if types is None:
        every = max(settings.get("index_topk_freq", int), 1)
        types = _scheduled(n_layers, every, settings.get("index_skip_topk_offset", int))
    known = isinstance(types, list | tuple) and all(each in (indexer.FULL, indexer.SHARED) for each in types)
    if not known or len(types) != n_layers or types[0] != indexer.FULL:
        settings.fail(f"indexer_types are not {n_layers}, one a layer, full or shared, the first of them full")
    return deepseek32.parse_fields(settings, fields) | {"indexer_types": tuple(types)}


def _describe(c: Config) -> dict[str, Any]:
    return deepseek32.describe(c) | {"indexer_types": list(c.indexer_types)}


GLM_DSA = Architecture(
    name="glm-dsa",
    checkpoints=(CLASS,),
    constants={"attention": "mla", "rope": "pairs", "indexer_rope": "pairs"},
    keys=_KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=deepseek2.layer((*parts.MLA, *indexer.TENSORS)),
    read=_read,
    parse=_parse,
    describe=_describe,
    warnings=deepseek2.warnings_of_eps,
)
