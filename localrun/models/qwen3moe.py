"""qwen3moe: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder. Grouped-query attention with normed heads, experts everywhere.

Source: llama.cpp 0c1e57098, src/models/qwen3moe.cpp and conversion/qwen.py; transformers 5.24, models/qwen3_moe.
Queries and keys are rotated by halves, and lie in a GGUF as in the checkpoint. llama.cpp always divides the chosen
experts' weights by their sum; no key says otherwise.
"""

from __future__ import annotations

from localrun.models import parts
from localrun.models.architecture import Architecture, Fields, Key, Plain, Settings, Tensor
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS

KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("expert_count", "n_routed_experts", setting="num_experts", setting_default=0),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting=None, setting_default=1.0,
        omit=1.0),
    *ROPE_KEYS,
)  # fmt: skip


def _read(_: Keys, fields: Fields) -> Fields:
    return {"routed_scaling_factor": fields["routed_scaling_factor"] or 1.0}  # 0 means no scaling, as in llama.cpp


def _parse(settings: Settings, fields: Fields) -> Fields:
    if not settings.get("norm_topk_prob", bool, False):
        settings.fail("norm_topk_prob is False; only weights that are divided by their sum have a place in a GGUF")
    if settings.rope.type == "llama3":
        settings.fail("rope scaling is 'llama3'; expected default, linear or yarn")
    for parameter in ("attention_factor", "mscale", "mscale_all_dim", "truncate"):
        if settings.rope.type == "yarn" and settings.rope.parameters.get(parameter) is not None:
            settings.fail(f"yarn has {parameter}, which GGUF cannot tell of")
    # transformers 5 writes num_local_experts.
    return {"n_routed_experts": fields["n_routed_experts"] or settings.get("num_local_experts", int)}


QWEN3MOE = Architecture(
    name="qwen3moe",
    checkpoints=("Qwen3MoeForCausalLM",),
    constants={
        "attention": "gqa",
        "rope": "halves",
        "qk_norm": True,
        "scoring_func": "softmax",
        "norm_topk_prob": True,
    },
    keys=KEYS,
    ends=(parts.EMBED_TOKENS, parts.LM_HEAD, parts.NORM),
    layer=(
        parts.INPUT_NORM,
        *parts.gqa(Plain()),
        Tensor("self_attn.q_norm", "attn_q_norm.weight", lambda c: (c.head_dim,)),
        Tensor("self_attn.k_norm", "attn_k_norm.weight", lambda c: (c.head_dim,)),
        parts.POST_ATTENTION_NORM,
        parts.GATE,
        *parts.EXPERTS,
    ),
    read=_read,
    parse=_parse,
    expected=(
        ("attention_bias", [False], "biases of attention have no place in the model"),
        ("decoder_sparse_step", [1], "expected 1: experts in every layer"),
        ("mlp_only_layers", [[]], "expected none: experts in every layer"),
        ("use_sliding_window", [False], "a window has no place in the model"),
    ),
    describe=lambda _: {"norm_topk_prob": True},
)
