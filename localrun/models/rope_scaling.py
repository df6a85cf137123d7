"""Rotary settings in a GGUF: which keys there are, what is written, and what is read.

Source: llama.cpp 3f545becc, src/llama-model.cpp. yarn_log_multiplier holds 0.1 * mscale_all_dim, a quirk that llama.cpp
keeps for old files' sake.
"""

from collections.abc import Callable
from math import isclose, log
from typing import Any

from localrun.models.architecture import Key, Settings
from localrun.models.config import Config, RopeScaling
from localrun.models.keys import Keys

_TYPES = ("none", "linear", "yarn", "longrope")  # llama.cpp aborts on others
_MOST_LOG_MULTIPLIER = 1000.0  # published ones are 0.1 and less; scores' scale is to stay a float32


def _scaling(name: str, *types: str) -> Callable[[Config], Any]:
    """A field of the scaling, of these types; else None, which is not written."""

    def value(config: Config) -> Any:
        scaling = config.rope_scaling
        return getattr(scaling, name) if scaling is not None and scaling.type in (types or (scaling.type,)) else None

    return value


def _log_multiplier(config: Config) -> float | None:
    mscale = config.rope_scaling.mscale_all_dim if config.rope_scaling else None
    return 0.1 * mscale if mscale else None


ROPE_KEYS = (
    Key("rope.freq_base", "rope_theta", "f32", default=10000.0, setting=None),
    Key("rope.scaling.type", type="string", default=None, value=_scaling("type")),
    Key("rope.scaling.factor", type="f32", default=None, value=_scaling("factor")),
    Key("rope.scaling.original_context_length", default=None,
        value=_scaling("original_max_position_embeddings", "yarn")),
    Key("rope.scaling.yarn_beta_fast", type="f32", default=None, value=_scaling("beta_fast", "yarn")),
    Key("rope.scaling.yarn_beta_slow", type="f32", default=None, value=_scaling("beta_slow", "yarn")),
    Key("rope.scaling.yarn_log_multiplier", type="f32", default=None, value=_log_multiplier),
)  # fmt: skip


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """1 + 0.1 mscale ln(factor), by which YaRN lengthens queries and keys (arXiv 2309.00071, eq. 22)."""
    return 1 + 0.1 * mscale * log(factor) if factor > 1 else 1.0


def check_yarn(settings: Settings) -> None:
    """A checkpoint's yarn without mscale must mean what a GGUF does. Raises CheckpointError if it does not."""
    rope = settings.rope
    if rope.type != "yarn":
        return
    plain = yarn_magnitude(rope.positive("factor"))
    if not isclose(rope.attention_factor, plain, rel_tol=1e-6):  # config.json may have it rounded to float32
        found = f"attention_factor or mscale that give {rope.attention_factor:g}"
        settings.fail(f"yarn has {found}; GGUF can only tell of {plain:g}, which follows from the factor")


def check_scaling(settings: Settings) -> None:
    """A checkpoint's scaling must be one that RopeScaling holds. Raises CheckpointError if it is not."""
    if settings.rope.type == "llama3":
        settings.fail("rope scaling is 'llama3'; expected default, linear or yarn")
    check_yarn(settings)


def read_scaling(keys: Keys, truncate: bool = True) -> RopeScaling | None:
    """The scaling that a GGUF names; None for none. truncate: what yarn means to its architecture."""
    type_ = keys.string("rope.scaling.type", "linear")  # what llama.cpp takes where the file does not say
    factor = keys.f32("rope.scaling.factor", 1.0)
    original = keys.u32("rope.scaling.original_context_length", 0) or keys.u32("context_length")
    log_multiplier = keys.f32("rope.scaling.yarn_log_multiplier", 0.0)
    betas = keys.f32("rope.scaling.yarn_beta_fast", 32.0), keys.f32("rope.scaling.yarn_beta_slow", 1.0)
    for name in ("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        if keys.f32(name, 1.0) != 1.0:
            keys.refuse(f"key '{keys.prefix}{name}' other than 1 is not native")
    keys.bool("rope.scaling.finetuned", False)
    if type_ not in _TYPES:
        keys.fail("rope.scaling.type", repr(type_), f"one of {', '.join(_TYPES)}")
    if type_ == "longrope":
        keys.refuse(f"rope scaling '{type_}' is not native")
    if abs(log_multiplier) > _MOST_LOG_MULTIPLIER:
        keys.fail("rope.scaling.yarn_log_multiplier", log_multiplier, f"at most {_MOST_LOG_MULTIPLIER:g}")
    if not factor > 0:
        keys.fail("rope.scaling.factor", factor, "a positive number")
    if type_ == "none" or (type_ == "linear" and factor == 1.0):
        return None
    if type_ == "linear":
        return RopeScaling(type_, factor)
    for name, beta in zip(("fast", "slow"), betas, strict=True):
        if not beta > 0:
            keys.fail(f"rope.scaling.yarn_beta_{name}", beta, "a positive number")
    if not keys.f32("rope.freq_base", 10000.0) > 1:
        keys.fail("rope.freq_base", keys.f32("rope.freq_base"), "more than 1 with yarn")
    return RopeScaling(type_, factor, original, log_multiplier / 0.1 if log_multiplier else None, *betas, truncate)
