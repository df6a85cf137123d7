"""The words in which an architecture is declared: its settings under all their names, and its tensors.

One file an architecture holds such a declaration; here alone do the spellings of GGUF and of Hugging Face meet. Who
reads it: models.reader (a GGUF's keys to a Config), models.names (what a file must hold), convert (a checkpoint to a
GGUF), plan (a checkpoint's tensors without the checkpoint). To add an architecture: a file, and its line in registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

from localrun.models.checkpoint_class import CheckpointClass
from localrun.models.config import Config
from localrun.models.keys import Keys

Shape = tuple[int, ...]
Fields = dict[str, Any]  # of Config

REQUIRED: Any = object()
ROUTER = "mlp.gate"  # a layer of a file that has it has routed experts

# Layers that have a tensor: all, those without or with routed experts, those for multi-token prediction, those with and
# without an indexer of their own; those whose experts follow from the token's id, and from the router's scores; those
# that pool the rows of 4 tokens, and of 128.
ALL, DENSE, MOE, MTP, INDEXED, UNINDEXED = "all", "dense", "moe", "mtp", "indexed", "unindexed"
HASHED, SCORED, RATIO_4, RATIO_128 = "hashed", "scored", "ratio 4", "ratio 128"


class Rope(Protocol):
    """config.json's rotary settings, of either spelling.

    type: "default", "linear", "yarn" or "llama3". partial_rotary_factor: the part of a head that is rotated;
    None where neither the file nor its class says.
    """

    type: str
    theta: float
    partial_rotary_factor: float | None
    original_max_position_embeddings: int

    def positive(self, key: str) -> float:
        """A parameter above 0. Raises CheckpointError if it is missing or something else."""

    @property
    def mscales(self) -> tuple[float, float]:
        """yarn's mscale and mscale_all_dim; 0 where the file has none."""

    @property
    def attention_factor(self) -> float:
        """What yarn multiplies rotated queries and keys by, each."""


class Settings(Protocol):
    """config.json with checks (convert.settings)."""

    values: dict[str, Any]
    checkpoint_class: CheckpointClass
    rope: Rope

    def get(self, key: str, kind: type, fields: Fields | None = None) -> Any:
        """The value of a key, or what its absence or null means. Raises CheckpointError if it is of another kind."""

    def fail(self, message: str) -> NoReturn:
        """Raises CheckpointError."""


@dataclass(frozen=True)
class Key:
    """A setting under its names.

    Attributes:
        name: in a GGUF, without the architecture's prefix.
        field: of Config; empty for keys that follow from others.
        type: in a GGUF: "u32", "f32", "bool" or "string", or an array: "i32s", "f32s" or "bools"; in config.json the
            like.
        default: what a GGUF means that lacks it. A function is given the fields of the keys before it.
        setting: in config.json; empty if named like the field, None if config.json has no such key: the field is then
            the default, or what the architecture's `parse` says.
        value: what is written, where that is not the field. Such a key is read by the architecture's `read`.
        omit: the value that is not written.
        by_layer: whether a GGUF may hold one number a layer instead.
    """

    name: str
    field: str = ""
    type: str = "u32"
    default: Any = REQUIRED
    setting: str | None = ""
    value: Callable[[Config], Any] | None = None
    omit: Any = None
    by_layer: bool = False

    def written(self, config: Config) -> Any:
        """The value for a GGUF; None if the key is left out."""
        value = self.value(config) if self.value else getattr(config, self.field)
        return None if value == self.omit else value


@dataclass(frozen=True)
class Plain:
    """A tensor that is the checkpoint's as it is. name: in the checkpoint; if empty <module>.weight."""

    name: str = ""

    def tensors(self, module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
        """The checkpoint's tensors that one of this shape is made of, with their shapes."""
        yield self.name or module + ".weight", shape


@dataclass(frozen=True)
class OneRow(Plain):
    """A vector that the checkpoint has as a matrix of one row."""

    def tensors(self, module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
        """As Plain.tensors: a matrix of one row."""
        yield self.name, (1, *shape)


@dataclass(frozen=True)
class Pairs(Plain):
    """Heads of config.head_dim rows rotated by halves, reordered so that what is rotated together is neighbours."""


@dataclass(frozen=True)
class Stacked(Plain):
    """Matrices of all experts, one behind another; the name has a place for {expert}."""

    def tensors(self, module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
        """As Plain.tensors: one for each expert."""
        return ((self.name.format(expert=expert), shape[1:]) for expert in range(shape[0]))


@dataclass(frozen=True)
class Fused(Plain):
    """All experts' matrices (or biases) in one tensor: those of a target are every step-th output from `first` on.

    Matrices are (experts, inputs, outputs); where they are packed as MXFP4 the last two the other way round.
    """

    first: int = 0
    step: int = 1

    def tensors(self, module: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
        """As Plain.tensors: one of all experts, inputs first, that holds the outputs of `step` modules."""
        experts, outputs, *inputs = shape
        yield self.name, (experts, *inputs, self.step * outputs)


@dataclass(frozen=True)
class HeadRows:
    """Some rows of each head of a matrix, (heads, rows, columns), or with transposed (heads, columns, rows).

    Attributes:
        rows: first and last (exclusive) of each head.
        matrix: the shape of the matrix in the checkpoint, all heads' rows one behind another.
    """

    name: str
    rows: Callable[[Config], tuple[int, int]]
    matrix: Callable[[Config], Shape]
    transposed: bool = False


Source = Plain | HeadRows


def always(_: Config) -> bool:
    """For layers that all have."""
    return True


def never(_: Config) -> bool:
    """For layers that none has."""
    return False


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model or of a layer.

    Attributes:
        module: what the network calls it.
        name: in a GGUF, of a layer's without "blk.<n>.".
        shape: in a GGUF, NumPy order.
        source: how it comes from a checkpoint; None if the converter never writes it, or computes it.
        layers: which have it: ALL, or one of the other kinds above.
        when: whether a model has it.
        with_module: a file has it if it has this module, whatever `when` says.
        without_module: a file has it unless it has this module, whatever `when` says.
        may_lack: whether a checkpoint may do without.
        values: computes it for a converted file; None if that is to have none.
    """

    module: str
    name: str
    shape: Callable[[Config], Shape]
    source: Source | None = Plain()
    layers: str = ALL
    when: Callable[[Config], bool] = always
    with_module: str = ""
    without_module: str = ""
    may_lack: bool = False
    values: Callable[[Settings, Config], list[float] | None] | None = None

    def in_file(self, config: Config, has: Callable[[str], bool]) -> bool:
        """Whether a file has it that has these modules."""
        if self.with_module:
            return has(self.with_module)
        return not has(self.without_module) if self.without_module else self.when(config)

    def sources(self, config: Config) -> Iterator[tuple[str, Shape]]:
        """The checkpoint's tensors that it is made of, with their shapes; a layer's without "model.layers.<n>."."""
        if isinstance(self.source, HeadRows):
            yield self.source.name, self.source.matrix(config)
        elif self.source is not None:
            yield from self.source.tensors(self.module, self.shape(config))


def no_fields(*_: Any) -> Fields:
    """Of a part that has none."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """A declaration.

    Attributes:
        name: general.architecture.
        checkpoints: the classes of transformers whose checkpoints mean it.
        constants: fields of Config that are the same for all its models.
        keys: in the order of a converted file, but for those of all files.
        ends: tensors outside of layers.
        layer: tensors of a layer; both in the order of a converted file.
        read: what a GGUF's keys do not say by themselves, given those that do; refuses what the network cannot do.
        parse: the same of a config.json; refuses what a GGUF cannot say.
        describe: entries of a config.json that mean a Config, beside those of the keys.
        warnings: of a converted model, one line each.
        left_out: a regular expression: names of a checkpoint's tensors that no GGUF has begin so.
        drafts: what names of prediction layers' tensors begin with, before the layer's number among those, where they
            are no part of the model's file; they have an end of their own for each but embedding, head and norm.
        yarn_truncates: whether yarn's blend begins and ends at whole pairs.
        layer_prefix: what the names of a layer's tensors begin with in a checkpoint, before its number.
        values_need_bits: whether llama.cpp's mixes give attn_v more bits, by layers and heads a key-value head.
    """

    name: str
    checkpoints: tuple[CheckpointClass, ...]
    constants: Mapping[str, Any]
    keys: tuple[Key, ...]
    ends: tuple[Tensor, ...]
    layer: tuple[Tensor, ...]
    read: Callable[[Keys, Fields], Fields] = no_fields
    parse: Callable[[Settings, Fields], Fields] = no_fields
    describe: Callable[[Config], dict[str, Any]] = no_fields
    warnings: Callable[[Config], list[str]] = field(default=lambda _: [])
    left_out: str = ""
    drafts: str = ""
    yarn_truncates: bool = True
    layer_prefix: str = "model.layers."
    values_need_bits: Callable[[int, int], bool] = field(default=lambda _n_layers, _n_shared: False)

    @property
    def has_mtp(self) -> bool:
        """Whether it knows layers for multi-token prediction."""
        return any(tensor.layers == MTP for tensor in self.layer)

    def tensor(self, module: str) -> Tensor:
        """A layer's tensor by its module."""
        return next(tensor for tensor in self.layer if tensor.module == module)

    def setting_of(self, field: str) -> str:
        """What config.json calls a field of Config."""
        return next((key.setting or field for key in self.keys if key.field == field), field)

    def settings(self, config: Config) -> dict[str, Any]:
        """A config.json that means a Config, but for the scaling of its rope."""
        values = {
            k.setting or k.field: getattr(config, k.field) for k in self.keys if k.field and k.setting is not None
        }
        values |= {"architectures": [self.checkpoints[0].name], "rope_theta": config.rope_theta}
        return values | self.describe(config)

    def layer_in_file(self, config: Config, index: int, has: Callable[[str], bool]) -> Iterator[Tensor]:
        """The tensors of layer `index` of a file in which that has these modules."""
        kinds = self._kinds(config, index, has(ROUTER))
        return (tensor for tensor in self.layer if tensor.layers in kinds and tensor.in_file(config, has))

    def layer_in_checkpoint(self, config: Config, index: int) -> Iterator[Tensor]:
        """The tensors that a converted file has of layer `index`; those with may_lack only if the checkpoint has."""
        has_experts = config.n_routed_experts > 0 and index >= config.first_k_dense_replace
        kinds = self._kinds(config, index, has_experts)
        return (t for t in self.layer if t.layers in kinds and t.source is not None and t.when(config))

    def _kinds(self, config: Config, index: int, has_experts: bool) -> set[str]:
        known = {tensor.layers for tensor in self.layer}
        if {DENSE, MOE} <= known:
            known -= {DENSE if has_experts else MOE}
        known -= {UNINDEXED if config.has_indexer(index) else INDEXED}
        known -= {SCORED if index < config.num_hash_layers else HASHED}
        known -= {RATIO_4, RATIO_128} - {f"ratio {config.compress_ratio(index)}"}
        return known if index >= config.num_hidden_layers else known - {MTP}
