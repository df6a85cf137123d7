"""config.json with checks, and the Config that it means by the declaration of its architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.models.architecture import REQUIRED, Architecture
from localrun.models.config import Config, RopeScaling
from localrun.models.registry import CHECKPOINTS

_FLOAT32_MAX = 3.4e38
_KINDS = {"u32": int, "f32": float, "bool": bool, "string": str}  # by the type of the key in a GGUF


def typed(values: dict[str, Any], key: str, kind: type, default: Any, where: str) -> Any:
    """values[key], checked to be of this kind: an int at least 0; a float that fits 32 bits, also written as an int."""
    value = values.get(key)
    if value is None:
        if default is REQUIRED:
            raise CheckpointError(f"{where}: {key} is missing; expected {kind.__name__}")
        return default
    sound = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
    if not sound or (kind is int and not 0 <= value < 2**32) or (kind is float and not abs(value) <= _FLOAT32_MAX):
        raise CheckpointError(f"{where}: {key} is {value!r}; expected {kind.__name__}")
    return kind(value)


@dataclass(frozen=True)
class Rope:
    """Rotary settings, of either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5)."""

    type: str
    theta: float
    parameters: dict[str, Any]
    where: str

    def get(self, key: str, kind: type, *default: Any) -> Any:
        """A parameter. Raises CheckpointError if it is missing without a default, or of another kind."""
        return typed(self.parameters, key, kind, default[0] if default else REQUIRED, f"{self.where}: rope settings")


class Settings:
    """config.json with checks. Raises CheckpointError naming the file, the key, what was found and expected."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where = str(checkpoint.path / "config.json")
        self.values = checkpoint.config

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key; null counts as absent."""
        return typed(self.values, key, kind, default, self.where)

    def expect(self, key: str, allowed: Iterable[Any], why: str) -> None:
        """The key is absent, null, or has one of these values; else refuses."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            self.fail(f"{key} is {value!r}; {why}")

    def fail(self, message: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.where}: {message}")

    @cached_property
    def rope(self) -> Rope:
        """The rotary settings, checked to be of a known type."""
        scaling = self.get("rope_scaling", dict, None) or self.get("rope_parameters", dict, None) or {}
        theta = typed(scaling, "rope_theta", float, self.get("rope_theta", float, 10000.0), self.where)
        type_ = scaling.get("rope_type", scaling.get("type")) or "default"
        if type_ not in ("default", "linear", "yarn", "llama3"):
            self.fail(f"rope scaling is {type_!r}; expected default, linear, yarn or llama3")
        return Rope(type_, theta, scaling, self.where)


def architecture_of(settings: Settings) -> Architecture:
    """The declaration that a config.json's architectures names. Raises CheckpointError if there is none."""
    names = settings.get("architectures", list)
    if len(names) != 1 or names[0] not in CHECKPOINTS:
        settings.fail(f"architectures is {names}; expected one of {', '.join(CHECKPOINTS)}")
    return CHECKPOINTS[names[0]]


def read_config(architecture: Architecture, settings: Settings) -> Config:
    """The model of a config.json. Raises CheckpointError on what is missing, wrong, or has no place in a GGUF."""
    settings.expect("hidden_act", ["silu", "swish"], "only silu has a place in the model")
    for name, allowed, why in architecture.expected:
        settings.expect(name, allowed, why)
    fields: dict[str, Any] = {"tie_word_embeddings": settings.get("tie_word_embeddings", bool, False)}
    for key in architecture.keys:
        default = key.setting_default(fields) if callable(key.setting_default) else key.setting_default
        if key.field and key.setting is not None:
            fields[key.field] = settings.get(key.setting or key.field, _KINDS[key.type], default)
        elif key.field and default is not REQUIRED:
            fields[key.field] = default
    fields |= {"rope_theta": settings.rope.theta, "rope_scaling": _scaling(settings.rope)}
    fields |= architecture.parse(settings, fields)
    return Config(architecture=architecture.name, **architecture.constants, **fields)


def _scaling(rope: Rope) -> RopeScaling | None:
    """Linear or yarn scaling; what architectures add to it they parse themselves."""
    if rope.type not in ("linear", "yarn"):
        return None
    factor = rope.get("factor", float)
    if rope.type == "linear":
        return RopeScaling(rope.type, factor)
    original = rope.get("original_max_position_embeddings", int)
    betas = rope.get("beta_fast", float, 32.0), rope.get("beta_slow", float, 1.0)
    return RopeScaling(rope.type, factor, original, None, *betas)
