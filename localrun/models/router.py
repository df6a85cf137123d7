"""The settings of routed experts where a GGUF says all of them: keys, and what files mean that lack some.

Source: llama.cpp 3f545becc, src/llama-model.cpp; conversion/deepseek.py.
"""

from __future__ import annotations

from localrun.models import parts
from localrun.models.architecture import Fields, Key
from localrun.models.keys import Keys

GATING = {"softmax": 1, "sigmoid": 2, "softmax_after_topk": 3}
GATING_KEY = Key("expert_gating_func", default=0, value=lambda c: GATING[c.scoring_func])
KEYS = (
    Key("expert_count", "n_routed_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_shared_count", "n_shared_experts", default=0),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0),
    Key("expert_weights_norm", "norm_topk_prob", "bool", default=False, omit=False),
    GATING_KEY,
    Key("expert_group_count", "n_group", default=1),
    Key("expert_group_used_count", "topk_group", default=None),
)


def read_router(keys: Keys, fields: Fields) -> Fields:
    """What KEYS do not say by themselves."""
    n_group = fields["n_group"] or 1
    topk_group = keys.u32("expert_group_used_count", *([] if n_group > 1 else [1]))
    return {
        "n_group": n_group,
        "topk_group": topk_group if n_group > 1 else 1,
        "shared_intermediate_size": shared_width(keys),
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,  # 0 and absent mean no scaling
        **read_gate(keys),
    }


def shared_width(keys: Keys) -> int:
    """The inner width of all shared experts together: rows of the first layer's that has them."""
    gate = parts.SHARED_EXPERTS[0].name
    return next((keys.rows(name) for name in keys.file.tensors if name.endswith("." + gate)), 0)


def read_gate(keys: Keys) -> Fields:
    """Files without the key: those with a selection bias mean sigmoid (noaux_tc), the others softmax."""
    gating = keys.u32("expert_gating_func", 0)
    bias = parts.SELECTION_BIAS.name.removesuffix(".bias")
    has_bias = any(name.removesuffix(".bias").endswith("." + bias) for name in keys.file.tensors)
    known = {number: name for name, number in GATING.items()} | {0: "sigmoid" if has_bias else "softmax"}
    if gating not in known:
        keys.refuse(f"expert gating function {gating} is not native")
    return {"scoring_func": known[gating], "has_selection_bias": has_bias}
