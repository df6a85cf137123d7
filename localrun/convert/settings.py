"""config.json with checks, and the Config that it means by the declaration of its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown, typed
from localrun.models.architecture import Fields
from localrun.models.checkpoint_class import ONLY
from localrun.models.config import Config, RopeScaling
from localrun.models.registry import CHECKPOINTS
from localrun.models.rope_scaling import yarn_magnitude

_KINDS = {"u32": int, "f32": float, "bool": bool, "string": str}  # by the type of the key in a GGUF
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_ROPE_PARAMETERS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor", "mrope_section",
}  # fmt: skip
# Numbers beyond these give frequencies that 32 bits do not hold.
_SMALLEST, _LARGEST = 1e-30, 1e30


def _positive(values: dict[str, Any], key: str, where: str) -> float:
    value = typed(values, key, float, where)
    if not _SMALLEST < value < _LARGEST:
        raise CheckpointError(f"{where}: {key} is {value:g}; expected a positive number")
    return value


@dataclass(frozen=True)
class Rope:
    """Rotary settings, of either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5).

    Source: modeling_rope_utils.py of transformers 5.24.
    """

    type: str
    theta: float
    partial_rotary_factor: float | None
    parameters: dict[str, Any]
    trained_length: int
    where: str

    def positive(self, key: str) -> float:
        """A parameter above 0. Raises CheckpointError if it is missing or something else."""
        return _positive(self.parameters, key, self.where)

    @property
    def original_max_position_embeddings(self) -> int:
        """The training length; the whole length where the file has none."""
        value = self.trained_length
        if not value:
            raise CheckpointError(f"{self.where}: original_max_position_embeddings is 0; expected 1 or more")
        return value

    @property
    def betas(self) -> tuple[float, float]:
        """yarn's beta_fast and beta_slow; null and 0 mean the defaults."""
        given = {key: self.parameters.get(key) or default for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        fast, slow = (_positive(given, key, self.where) for key in given)
        if fast < slow:
            raise CheckpointError(f"{self.where}: beta_fast is {fast:g}; expected at least beta_slow, {slow:g}")
        return fast, slow

    @property
    def mscales(self) -> tuple[float, float]:
        """yarn's mscale and mscale_all_dim; 0 where the file has none."""
        given = {key: self.parameters.get(key) or 0.0 for key in ("mscale", "mscale_all_dim")}
        return typed(given, "mscale", float, self.where), typed(given, "mscale_all_dim", float, self.where)

    @property
    def attention_factor(self) -> float:
        """What yarn multiplies rotated queries and keys by, each."""
        if self.parameters.get("attention_factor") is not None:
            return typed(self.parameters, "attention_factor", float, self.where)
        factor, (mscale, mscale_all_dim) = self.positive("factor"), self.mscales
        if mscale and mscale_all_dim:
            return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
        return yarn_magnitude(factor)

    def scaling(self, truncate: bool) -> RopeScaling | None:
        """Linear or yarn scaling; what architectures add to it they parse themselves.

        truncate: what yarn means in a GGUF of this architecture; CheckpointError if it means something else here.
        """
        if self.type == "linear":
            return RopeScaling(self.type, self.positive("factor"))
        if self.type != "yarn":
            return None
        if self.theta <= 1:
            raise CheckpointError(f"{self.where}: rope_theta is {self.theta:g}; expected more than 1 with yarn")
        if self.parameters.get("truncate", True) is not truncate:
            found = shown(self.parameters.get("truncate", True))
            raise CheckpointError(f"{self.where}: truncate is {found}; GGUF means {truncate}")
        length = self.original_max_position_embeddings
        return RopeScaling(self.type, self.positive("factor"), length, None, *self.betas, truncate)


class Settings:
    """config.json with checks. Errors name the file, the key, what was found and expected.

    Attributes:
        where: what errors call the file.
        architecture, checkpoint_class: what its architectures names.
        values: the file's, as the class has them flat.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        """Raises CheckpointError if it names no class that is declared."""
        self.where = where
        names = typed(values, "architectures", list, where)
        if len(names) != 1 or not isinstance(names[0], str) or names[0] not in CHECKPOINTS:
            self.fail(f"architectures is {shown(names)}; expected one of {', '.join(CHECKPOINTS)}")
        self.architecture, self.checkpoint_class = CHECKPOINTS[names[0]]
        self.values = self.checkpoint_class.flat(values)

    def get(self, key: str, kind: type, fields: Fields | None = None) -> Any:
        """The value of a key, or what its absence or null means to its class. Raises CheckpointError."""
        names, setting = self.checkpoint_class.names(key), self.checkpoint_class.settings[key]
        name = next((name for name in names if name in self.values), None)
        value = setting.default if name is None else self.values[name]
        if value is None and setting.null is not None:
            return setting.null(fields or {})
        if value is None and name is None:
            return typed({}, key, kind, self.where)
        return typed({name or key: value}, name or key, kind, self.where)

    def has(self, key: str) -> bool:
        """Whether the file has the key, under any of its names."""
        return any(name in self.values for name in self.checkpoint_class.names(key))

    def fail(self, message: str) -> NoReturn:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.where}: {message}")

    def check(self) -> None:
        """Raises CheckpointError if a key has a value for which there is no place."""
        for key, setting in self.checkpoint_class.settings.items():
            value = self.values.get(key, setting.default)
            if setting.use == ONLY and value not in setting.values:
                self.fail(f"{key} is {shown(value)}; {setting.why}")

    def unknown(self) -> list[str]:
        """Keys of which nothing is known."""
        keys = [key for key in self.values if not self.checkpoint_class.knows(key)]
        return keys + [f"{key} of the rope settings" for key in self.rope.parameters if key not in _ROPE_PARAMETERS]

    @cached_property
    def rope(self) -> Rope:
        """The rotary settings, checked to be of a known type."""
        where = f"{self.where}: rope settings"
        parameters = {}
        for key in ("rope_parameters", "rope_scaling"):
            if self.values.get(key):
                parameters = typed(self.values, key, dict, self.where)
        type_ = parameters.get("rope_type", parameters.get("type", "default"))
        if type_ not in _ROPE_TYPES:
            self.fail(f"rope scaling is {shown(type_)}; expected default, linear, yarn or llama3")
        partial = self._rotated_part(parameters, where)
        theta = _positive(self._outside("rope_theta") | parameters, "rope_theta", where)
        return Rope(type_, theta, partial, parameters, self._trained_length(parameters, where), where)

    def _rotated_part(self, parameters: dict[str, Any], where: str) -> float | None:
        """partial_rotary_factor, wherever it stands; None if it stands nowhere."""
        key = "partial_rotary_factor"
        given = self._outside(key) | parameters
        if given.get(key) is None:
            return None
        part = typed(given, key, float, where)
        if self.checkpoint_class.settings[key].use == ONLY and part != 1:
            self.fail(f"{key} is not 1; {self.checkpoint_class.settings[key].why}")
        if not 0 < part <= 1:
            self.fail(f"{key} is {part:g}; expected a number above 0, and 1 at most")
        return part

    def _outside(self, key: str) -> dict[str, Any]:
        """A rotary setting that stands beside the others, or its default; empty if neither is."""
        value = self.values.get(key, self.checkpoint_class.settings[key].default)
        return {} if value is None and key not in self.values else {key: value}

    def _trained_length(self, parameters: dict[str, Any], where: str) -> int:
        """original_max_position_embeddings, wherever it stands; the whole length where it stands nowhere."""
        key = "original_max_position_embeddings"
        whole = {key: self.get("max_position_embeddings", int)}
        return typed(whole | parameters | self._outside(key), key, int, where)


def read_config(settings: Settings) -> Config:
    """The model of a config.json. Raises CheckpointError on what is missing, wrong, or has no place in a GGUF."""
    settings.check()
    architecture = settings.architecture
    fields: Fields = {"tie_word_embeddings": settings.get("tie_word_embeddings", bool)}
    for key in architecture.keys:
        if key.field and key.setting is not None:
            fields[key.field] = settings.get(key.setting or key.field, _KINDS[key.type], fields)
        elif key.field:
            fields[key.field] = key.default(fields) if callable(key.default) else key.default
    fields |= {"rope_theta": settings.rope.theta, "rope_scaling": settings.rope.scaling(architecture.yarn_truncates)}
    fields |= architecture.parse(settings, fields)
    return Config(architecture=architecture.name, **architecture.constants, **fields)
