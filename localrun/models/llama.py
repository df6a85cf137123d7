"""llama: dense models with grouped-query attention. A GGUF's queries and keys are reordered to be rotated by pairs.

Source: llama.cpp 3f545becc, conversion/llama.py and src/llama-model.cpp; the divisors of frequencies: Llama 3.1's own,
as in transformers' modeling_rope_utils.py, _compute_llama3_parameters.
"""

from __future__ import annotations

from math import pi

from localrun.models import parts
from localrun.models.architecture import DENSE, Architecture, Fields, Key, Pairs, Settings, Tensor, never
from localrun.models.checkpoint_class import NO_BIAS, SILU, CheckpointClass, no_effect, read
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


def _read(keys: Keys, fields: Fields) -> Fields:
    if keys.u32("expert_count", 0):
        keys.refuse("llama with experts is not native")
    keys.u32("expert_used_count", 0)
    if fields["rope_scaling"] is not None and fields["rope_scaling"].type == "yarn":
        keys.refuse("llama with yarn is not native")
    return {}


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
    return {}


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
    checkpoints=(CLASS,),
    constants={"attention": "gqa", "rope": "pairs"},
    keys=(*parts.COMMON_KEYS, Key("block_count", "num_hidden_layers"), *parts.GQA_KEYS, *ROPE_KEYS),
    ends=(
        parts.EMBED_TOKENS,
        parts.LM_HEAD,
        parts.NORM,
        Tensor(
            "rope_freqs", parts.ROPE_FREQS, lambda c: (c.qk_rope_head_dim // 2,), None,
            when=never, with_module="rope_freqs", values=_frequency_divisors,
        ),
    ),
    layer=(
        parts.INPUT_NORM,
        parts.POST_ATTENTION_NORM,
        *parts.gqa(Pairs()),
        *parts.mlp("mlp", "", lambda c: c.intermediate_size, layers=DENSE),
    ),
    read=_read,
    parse=_parse,
    values_need_bits=lambda n_layers, n_shared: n_layers == 80 and n_shared > 1,  # Llama 2 70B, known by its shape
)  # fmt: skip
