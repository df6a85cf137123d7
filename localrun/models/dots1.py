"""dots1: dots.llm1. Attention with normed heads, experts and shared ones behind dense layers.

Source: llama.cpp 0c1e57098, src/models/dots1.cpp and conversion/dots1.py; transformers 5.24, models/dots1.
"""

from __future__ import annotations

from localrun.models import parts, router
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Plain, Settings
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

_ONLY = "Dots1's router has no other"
CLASS = CheckpointClass(
    "Dots1ForCausalLM",
    {
        "vocab_size": read(152064),
        "hidden_size": read(4608),
        "intermediate_size": read(10944),
        "moe_intermediate_size": read(1408),
        "num_hidden_layers": read(62),
        "num_attention_heads": read(32),
        "num_key_value_heads": read(32, null=parts.heads),
        "head_dim": read(None, null=parts.fair_share),
        "max_position_embeddings": read(2048),
        "rms_norm_eps": read(1e-6),
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "first_k_dense_replace": read(0),
        "n_routed_experts": read(None),
        "n_shared_experts": read(None),
        "num_experts_per_tok": read(None),
        "n_group": read(1),
        "topk_group": read(1),
        "norm_topk_prob": read(False),
        "routed_scaling_factor": read(1.0),
        "sliding_window": read(4096, null=lambda _: 0),
        "max_window_layers": read(62),
        "layer_types": read(None, null=lambda _: []),
        "scoring_func": only("noaux_tc", "sigmoid", why=_ONLY),
        "topk_method": only("noaux_tc", why=_ONLY),
        "moe_layer_freq": only(1, why="expected 1: experts in every layer behind the dense ones"),
        **no_effect("use_sliding_window", "pretraining_tp", "aux_loss_alpha", "seq_aux", "ep_size"),
    },
    spelled={"n_routed_experts": ("num_local_experts", "n_routed_experts")},
)
KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("leading_dense_block_count", "first_k_dense_replace", default=0),
    *router.KEYS,
    *ROPE_KEYS,
)


def _read(keys: Keys, fields: Fields) -> Fields:
    return router.read_router(keys, fields)


def _parse(settings: Settings, fields: Fields) -> Fields:
    check_scaling(settings)
    types, n_layers = settings.get("layer_types", list), fields["num_hidden_layers"]
    has_window = settings.get("sliding_window", int) and settings.get("max_window_layers", int) < n_layers
    if any(kind != "full_attention" for kind in types) or (has_window and not types):
        settings.fail("layers see a window (layer_types, or max_window_layers), which has no place in a GGUF")
    return {
        "shared_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "scoring_func": "sigmoid",
        "has_selection_bias": True,
    }


def _warnings(c: Config) -> list[str]:
    if c.num_key_value_heads == c.num_attention_heads:
        return []
    return ["llama.cpp cannot load a dots1 whose heads share keys and values; localrun can"]


DOTS1 = Architecture(
    name="dots1",
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "halves", "qk_norm": True},
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.gqa(Plain()),
        *parts.norms(),
        parts.POST_ATTENTION_NORM,
        *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
        parts.GATE,
        parts.SELECTION_BIAS,
        *parts.EXPERTS,
        *parts.SHARED_EXPERTS,
    ),
    read=_read,
    parse=_parse,
    describe=lambda _: {"sliding_window": None},
    warnings=_warnings,
)
