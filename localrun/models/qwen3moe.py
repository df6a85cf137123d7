"""qwen3moe: Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder. Grouped-query attention with normed heads, experts everywhere.

Source: llama.cpp 0c1e57098, src/models/qwen3moe.cpp and conversion/qwen.py; transformers 5.24, models/qwen3_moe.
Queries and keys are rotated by halves, and lie in a GGUF as in the checkpoint. llama.cpp always divides the chosen
experts' weights by their sum; no key says otherwise.
"""

from __future__ import annotations

from localrun.models import parts
from localrun.models.architecture import Architecture, Fields, Key, Plain, Settings
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_scaling

CLASS = CheckpointClass(
    "Qwen3MoeForCausalLM",
    {
        "vocab_size": read(151936),
        "hidden_size": read(2048),
        "intermediate_size": read(6144),
        "moe_intermediate_size": read(768),
        "num_hidden_layers": read(24),
        "num_attention_heads": read(32),
        "num_key_value_heads": read(4),
        "head_dim": read(None, null=parts.fair_share),
        "num_experts": read(128),
        "num_experts_per_tok": read(8),
        "max_position_embeddings": read(32768),
        "rms_norm_eps": read(1e-6),
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "norm_topk_prob": only(True, default=False,
                               why="only weights that are divided by their sum have a place in a GGUF"),
        "decoder_sparse_step": only(1, why="expected 1: experts in every layer"),
        "mlp_only_layers": only(None, [], why="expected none: experts in every layer"),
        "use_sliding_window": only(False, why="a window has no place in the model"),
        # Qwen3-Coder's, which transformers does not read
        "qkv_bias": NO_BIAS,
        "use_qk_norm": only(True, why="heads without norms have no place in the model"),
        "shared_expert_intermediate_size": only(0, why="shared experts have no place in the model"),
        **no_effect("sliding_window", "max_window_layers"),
    },
    spelled={"num_experts": ("num_local_experts", "num_experts")},
)  # fmt: skip
KEYS = (
    *parts.COMMON_KEYS,
    Key("block_count", "num_hidden_layers"),
    *parts.GQA_KEYS,
    Key("expert_count", "n_routed_experts", setting="num_experts"),
    Key("expert_used_count", "num_experts_per_tok"),
    Key("expert_feed_forward_length", "moe_intermediate_size"),
    Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting=None, omit=1.0),
    *ROPE_KEYS,
)  # fmt: skip


def _read(_: Keys, fields: Fields) -> Fields:
    return {"routed_scaling_factor": fields["routed_scaling_factor"] or 1.0}  # 0 means no scaling, as in llama.cpp


def _parse(settings: Settings, _: Fields) -> Fields:
    check_scaling(settings)
    return {}


QWEN3MOE = Architecture(
    name="qwen3moe",
    checkpoints=(CLASS,),
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
        *parts.norms(),
        parts.POST_ATTENTION_NORM,
        parts.GATE,
        *parts.EXPERTS,
    ),
    read=_read,
    parse=_parse,
    describe=lambda _: {"norm_topk_prob": True},
)
