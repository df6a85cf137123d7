"""gpt-oss: 20b and 120b. Grouped-query attention with sinks, a window in every second layer, biases everywhere.

Source: llama.cpp 0c1e57098, src/models/openai-moe.cpp and conversion/gpt_oss.py; transformers 5.24, models/gpt_oss;
gpt-oss model card (arXiv 2508.10925). Queries and keys are rotated by halves, and lie in a GGUF as in the checkpoint.

The models were trained with a yarn whose blend begins and ends between two pairs. No key says so, and llama.cpp rounds
both ends to whole pairs; the checkpoint's are meant here, as in transformers and vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from localrun.models import parts
from localrun.models.architecture import MOE, Architecture, Fields, Fused, Key, Plain, Settings, Shape, Tensor
from localrun.models.checkpoint_class import CheckpointClass, no_effect, only, read
from localrun.models.config import FULL, SLIDING, Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

ALPHA, LIMIT = 1.702, 7.0  # of the experts' activation
_PATTERN = "attention.sliding_window_pattern"
_MOST_LAYERS = 1024  # twice llama.cpp's limit; larger numbers of layers are refused later
_NO_PLACE = "others have no place in a GGUF"
CLASS = CheckpointClass(
    "GptOssForCausalLM",
    {
        "vocab_size": read(201088),
        "hidden_size": read(2880),
        "intermediate_size": read(2880),
        "num_hidden_layers": read(36),
        "num_attention_heads": read(64),
        "num_key_value_heads": read(8, null=parts.heads),
        "head_dim": read(64, null=parts.fair_share),
        "num_local_experts": read(128),
        "num_experts_per_tok": read(4),
        "max_position_embeddings": read(131072),
        "rms_norm_eps": read(1e-5),
        "rope_theta": read(150000.0),
        "sliding_window": read(128),
        "layer_types": read(None),
        "attention_bias": only(True, why="queries, keys, values and outputs have biases"),
        "swiglu_alpha": only(ALPHA, why=_NO_PLACE),
        "swiglu_limit": only(LIMIT, why=_NO_PLACE),
        **no_effect("hidden_act", "experts_per_token", "initial_context_length"),
    },
    spelled={"num_local_experts": ("num_experts", "num_local_experts")},
)
KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("attention.sliding_window", "sliding_window"),
    Key("expert_count", "n_routed_experts", setting="num_local_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size", setting="intermediate_size"),
    *ROPE_KEYS,
)


def _in_turn(n_layers: int, period: int = 2) -> tuple[str, ...]:
    """The last of every `period` layers is full."""
    return tuple(SLIDING if i % period < period - 1 else FULL for i in range(min(n_layers, _MOST_LAYERS)))


def _read(keys: Keys, fields: Fields) -> Fields:
    if keys.f32("rope.freq_base_swa", fields["rope_theta"]) != fields["rope_theta"]:
        keys.refuse("another rope.freq_base for layers with a window is not native")
    n_layers, pattern = fields["num_hidden_layers"], keys.file.metadata.get(keys.prefix + _PATTERN)
    if not isinstance(pattern, np.ndarray):
        return {"layer_types": _in_turn(n_layers, keys.u32(_PATTERN, 2) or n_layers + 1)}
    keys.has(_PATTERN)
    if len(pattern) != n_layers or pattern.dtype.kind not in "biu":
        keys.fail(_PATTERN, f"{len(pattern)} values of type {pattern.dtype}", f"{n_layers}, true or false a layer")
    return {"layer_types": tuple(SLIDING if slides else FULL for slides in pattern.tolist())}


def _parse(settings: Settings, fields: Fields) -> Fields:
    if not {"rope_parameters", "rope_scaling"} & settings.values.keys():
        settings.fail("rope_scaling is missing")  # a yarn of the class's own would be meant
    check_scaling(settings)
    types: Any = settings.values.get("layer_types")
    expected = _in_turn(fields["num_hidden_layers"])
    if types is not None and types != [*expected]:
        settings.fail(f"layer_types: expected {SLIDING} and {FULL} in turn, {len(expected)} layers: {_NO_PLACE}")
    return {"layer_types": expected}


def _describe(c: Config) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    return {"layer_types": [*c.layer_types], "rope_parameters": rope}


def _inner(c: Config) -> Shape:
    return c.n_routed_experts, c.moe_intermediate_size, c.hidden_size


def _outer(c: Config) -> Shape:
    return c.n_routed_experts, c.hidden_size, c.moe_intermediate_size


def _expert(part: str, shape: Any, source: str, first: int, step: int) -> tuple[Tensor, Tensor]:
    """A matrix of all experts and its bias: every step-th row of a source, from `first` on."""
    module, name = f"mlp.experts.{part}_proj", f"ffn_{part}_exps"
    return (
        Tensor(module, name + ".weight", shape, Fused(source, first, step), MOE),
        Tensor(module + ".bias", name + ".bias", lambda c: shape(c)[:2], Fused(source + "_bias", first, step), MOE),
    )


_GATE_UP, _DOWN, _OUTPUT_BIAS = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.o_proj.bias"

GPT_OSS = Architecture(
    name="gpt-oss",
    checkpoints=(CLASS,),
    constants={
        "attention": "gqa",
        "rope": "halves",
        "attention_bias": True,
        "scoring_func": "softmax_after_topk",
        "swiglu_alpha": ALPHA,
        "swiglu_limit": LIMIT,
        "swiglu_offset": 1.0,
    },
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.gqa(Plain()),
        *parts.biases(),
        Tensor(_OUTPUT_BIAS, "attn_output.bias", lambda c: (c.hidden_size,), Plain(_OUTPUT_BIAS)),
        Tensor("self_attn.sinks", "attn_sinks.weight", lambda c: (c.num_attention_heads,), Plain("self_attn.sinks")),
        replace(parts.POST_ATTENTION_NORM, name="post_attention_norm.weight"),
        replace(parts.GATE, source=Plain("mlp.router.weight")),
        Tensor("mlp.gate.bias", "ffn_gate_inp.bias", lambda c: (c.n_routed_experts,), Plain("mlp.router.bias"), MOE),
        *_expert("gate", _inner, _GATE_UP, 0, 2),
        *_expert("up", _inner, _GATE_UP, 1, 2),
        *_expert("down", _outer, _DOWN, 0, 1),
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
    yarn_truncates=False,
)
