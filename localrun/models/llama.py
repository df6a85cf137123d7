"""llama: grouped-query attention, dense or with experts in every layer (Mixtral). Rotated by pairs, for which a GGUF's
queries and keys are reordered.

Source: llama.cpp 3f545becc, conversion/llama.py and src/llama-model.cpp; the divisors of frequencies: Llama 3.1's own,
as in transformers' modeling_rope_utils.py, _compute_llama3_parameters.
"""

from __future__ import annotations

from math import pi
from typing import Any

from localrun.models import parts
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Pairs, Settings, Tensor, never
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, only, read
from localrun.models.config import Config
from localrun.models.keys import Keys
from localrun.models.rope_scaling import ROPE_KEYS, check_yarn

_BETAS = 32.0, 1.0  # of llama.cpp for llama, whatever a file says
CLASS = CheckpointClass(
    "LlamaForCausalLM",
    {
        "vocab_size": read(32000),
        "hidden_size": read(4096),
        "intermediate_size": read(11008),
        "num_hidden_layers": read(32),
        "num_attention_heads": read(32),
        "num_key_value_heads": read(None, null=parts.heads),
        "head_dim": read(None, null=parts.fair_share),
        "max_position_embeddings": read(2048),
        "rms_norm_eps": read(1e-6),
        "hidden_act": SILU,
        "attention_bias": NO_BIAS,
        "mlp_bias": NO_BIAS,
        **no_effect("pretraining_tp"),
    },
)


_WHY = "no published model has another"
MIXTRAL = CheckpointClass(
    "MixtralForCausalLM",
    {
        "vocab_size": read(32000),
        "hidden_size": read(4096),
        "intermediate_size": read(14336),  # of experts
        "num_hidden_layers": read(32),
        "num_attention_heads": read(32),
        "num_key_value_heads": read(8),
        "head_dim": read(None, null=parts.fair_share),
        "num_local_experts": read(8),
        "num_experts_per_tok": read(2),
        "max_position_embeddings": read(131072),
        "rms_norm_eps": read(1e-5),
        "rope_theta": read(1000000.0),
        "hidden_act": SILU,
        "sliding_window": only(None, why="a window has no place in the model"),
        **no_effect("router_jitter_noise"),
    },
    spelled={"num_local_experts": ("num_experts", "num_local_experts")},
)


def _with_experts(fields: Fields) -> Fields:
    """What experts' keys do not say: they are as wide as a dense layer; llama.cpp divides weights by their sum."""
    if not fields["n_routed_experts"]:
        return {}
    return {"moe_intermediate_size": fields["intermediate_size"], "norm_topk_prob": True}


def _read(keys: Keys, fields: Fields) -> Fields:
    if fields["n_routed_experts"] and not fields["num_experts_per_tok"]:
        keys.fail("expert_used_count", 0, "1 or more")
    if fields["rope_scaling"] is not None and fields["rope_scaling"].type == "yarn":
        keys.refuse("llama with yarn is not native")
    return {"routed_scaling_factor": fields["routed_scaling_factor"] or 1.0, **_with_experts(fields)}


def _parse(settings: Settings, fields: Fields) -> Fields:
    if not fields["num_attention_heads"]:
        settings.fail("num_attention_heads is 0; expected 1 or more")
    head_dim = fields["head_dim"]
    if not head_dim or head_dim % 2:
        settings.fail(f"head_dim is {head_dim}; expected an even number")
    check_yarn(settings)
    scaling = fields["rope_scaling"]
    if scaling is not None and scaling.type == "yarn" and (scaling.beta_fast, scaling.beta_slow) != _BETAS:
        settings.fail(
            f"yarn has betas {scaling.beta_fast:g} and {scaling.beta_slow:g}; llama.cpp, which runs it, takes "
            f"{_BETAS[0]:g} and {_BETAS[1]:g}"
        )
    if settings.checkpoint_class is MIXTRAL:
        fields["n_routed_experts"] = settings.get("num_local_experts", int)
        fields["num_experts_per_tok"] = settings.get("num_experts_per_tok", int)
    return _with_experts(fields)


def _describe(c: Config) -> dict[str, Any]:
    if not c.n_routed_experts:
        return {}
    counts = {"num_local_experts": c.n_routed_experts, "num_experts_per_tok": c.num_experts_per_tok}
    return {"architectures": [MIXTRAL.name]} | counts


def _frequency_divisors(settings: Settings, c: Config) -> list[float] | None:
    """What llama 3 divides each rotary frequency by: 1 for high ones, factor for low ones, a blend between."""
    rope = settings.rope
    if rope.type != "llama3" or not c.num_hidden_layers:
        return None
    factor, original = rope.positive("factor"), rope.original_max_position_embeddings
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        settings.fail(f"high_freq_factor is {high}; expected more than low_freq_factor, {low}")
    divisors = []
    for i in range(0, c.head_dim, 2):
        rotations = original * rope.theta ** (-i / c.head_dim) / (2 * pi)  # over the training length
        blend = min(max((rotations - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - blend) / factor + blend))
    return divisors


LLAMA = Architecture(
    name="llama",
    checkpoints=(CLASS, MIXTRAL),
    constants={"attention": "gqa", "rope": "pairs"},
    keys=(
        *parts.COMMON_KEYS,
        Key("block_count", "num_hidden_layers"),
        *parts.GQA_KEYS,
        Key("expert_count", "n_routed_experts", default=0, setting=None, omit=0),
        Key("expert_used_count", "num_experts_per_tok", default=0, setting=None, omit=0),
        Key("expert_weights_scale", "routed_scaling_factor", "f32", default=1.0, setting=None, omit=1.0),
        *ROPE_KEYS,
    ),
    ends=(
        parts.EMBED_TOKENS,
        parts.LM_HEAD,
        parts.NORM,
        Tensor(
            "rope_freqs", parts.ROPE_FREQS, lambda c: (c.qk_rope_head_dim // 2,), None,
            when=never, with_module="rope_freqs", values=_frequency_divisors,
        ),
    ),
    layer=parts.renamed(
        (
            parts.INPUT_NORM,
            parts.POST_ATTENTION_NORM,
            *parts.gqa(Pairs()),
            *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
            parts.GATE,
            *parts.EXPERTS,
        ),
        parts.MIXTRAL_NAMES,
    ),
    read=_read,
    parse=_parse,
    describe=_describe,
    values_need_bits=lambda n_layers, n_shared: n_layers == 80 and n_shared > 1,  # Llama 2 70B, known by its shape
)  # fmt: skip
