"""A model as the planner sees it: its configuration and every tensor's shape, type and bytes; no weights.

From a GGUF, from a Hugging Face config.json, or by the name of a known model. The last two are put through the
converter itself, which decides names, shapes and types as it would for the checkpoint, so the bytes are those of
`localrun convert`, all but the vocabulary, which a config.json does not hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import user_path
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.models.summary import group_of
from localrun.plan.known import load_data

DEFAULT_TYPE = "Q4_K_M"
MXFP4_TYPE = "MXFP4_MOE"  # in place of it where the checkpoint's experts are packed so, as in convert
_QWEN2 = ["Qwen2ForCausalLM"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file: GGUF name, shape in NumPy order, ggml's type, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int

    @property
    def n_weights(self) -> int:
        """Of all dimensions."""
        return prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is multiplied with: no vector, no table of whole numbers."""
        from localrun.convert.mixes import TABLE

        return len(self.shape) > 1 and self.type != TABLE


@dataclass(frozen=True)
class Conversion:
    """What the converter knows of a model: keys (convert.metadata), and targets (convert.targets) without content.

    is_mxfp4: whether the checkpoint's experts are packed so, which a mix may keep.
    """

    metadata: Any
    targets: list[Any]
    is_mxfp4: bool = False

    def types(self, mix: str) -> list[str]:
        """The type of each target, with an importance matrix if it takes one."""
        from localrun.convert.mixes import choose_types, needs_imatrix

        return choose_types(self.targets, self.metadata, mix, has_imatrix=needs_imatrix(mix))

    def tensors(self, mix: str) -> tuple[Tensor, ...]:
        """The file's tensors."""
        from localrun.convert.layout import tensor_bytes

        pairs = zip(self.targets, self.types(mix), strict=True)
        return tuple(Tensor(t.name, t.shape, type_, tensor_bytes(t, type_)) for t, type_ in pairs)


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        name: for people.
        type: the mix that was asked for; "as in the file" for a GGUF.
        source: where the shapes come from.
        file: the GGUF, if it was one.
        conversion: what the converter would do; None where that is not known yet.
    """

    name: str
    config: Config
    tensors: tuple[Tensor, ...]
    type: str
    source: str
    file: Path | None = None
    conversion: Conversion | None = field(default=None, repr=False)

    def with_type(self, type_: str) -> ModelShape:
        """The same in another mix. Raises LocalrunError if its types can't be changed."""
        from localrun.convert.mixes import parse_mix

        mix, conversion = parse_mix(type_), self.conversion
        if conversion is None:
            from localrun.convert.gguf_source import GGUFSource, read_model

            model = read_model(GGUFSource(self.file))
            conversion = Conversion(model.metadata, model.targets)
        return replace(self, tensors=conversion.tensors(mix), type=mix, file=None, conversion=conversion)

    def in_mixes(self) -> list[ModelShape]:
        """The same in every mix that there may be a reason for and that can be packed here, largest first.

        Where a checkpoint's experts are MXFP4 already, no larger mix says more.
        """
        from localrun.convert.mixes import MIXES, TABLE
        from quant.formats.registry import QUANTIZABLE

        others = [self.with_type(name) for name, mix in MIXES.items() if mix.compared]
        packable = [o for o in others if all(tensor.type in (*QUANTIZABLE, TABLE) for tensor in o.tensors)]
        if self.conversion is not None and self.conversion.is_mxfp4:
            kept = self.with_type(MXFP4_TYPE)
            packable = [kept, *(other for other in packable if n_bytes(other.tensors) < n_bytes(kept.tensors))]
        return sorted(packable, key=lambda other: -n_bytes(other.tensors))

    def is_nextn(self, tensor: Tensor) -> bool:
        """Whether a tensor belongs to a layer for multi-token prediction, which plain decoding leaves alone."""
        match = re.match(r"blk\.(\d+)\.", tensor.name)
        return match is not None and int(match[1]) >= self.config.num_hidden_layers

    def groups(self) -> dict[str, list[Tensor]]:
        """Tensors by the part of the model they belong to: summary.GROUPS, and "mtp"."""
        groups: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            group = "mtp" if self.is_nextn(tensor) else group_of(tensor.name)
            groups.setdefault(group, []).append(tensor)
        return groups

    @property
    def is_moe(self) -> bool:
        """Whether it has routed experts."""
        return self.config.n_routed_experts > 0

    @property
    def n_moe_layers(self) -> int:
        """Layers with routed experts, without those for multi-token prediction."""
        return sum(t.name.endswith("ffn_down_exps.weight") and not self.is_nextn(t) for t in self.tensors)

    @property
    def n_weights(self) -> int:
        """Of all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors."""
    return sum(tensor.n_bytes for tensor in tensors)


def known_models() -> list[str]:
    """The names that load_model knows."""
    return list(load_data("models"))


def load_model(model: str | None, type_: str | None = None) -> ModelShape:
    """The model that an argument names: a known name, a bundled one, a config.json or its folder, or a GGUF.

    Args:
        type_: a mix of localrun.convert.mixes; None for a GGUF's own types, or DEFAULT_TYPE or MXFP4_TYPE.

    Raises:
        LocalrunError: no such model, a broken file, or an unknown type.
    """
    from localrun.bundled import model_path

    if model is not None and model.lower() in load_data("models"):
        return _known(model.lower(), type_)
    if model is not None and (path := _config_path(user_path(model))):
        return from_config(_read_config_json(path), path, type_, path.resolve().parent.name or str(path), str(path))
    try:
        path = model_path(model)
    except LocalrunError as error:
        raise LocalrunError(f"{error}; known models: {', '.join(known_models())}") from None
    return _from_gguf(path, type_)


@cache  # tables and plots ask for the same models again
def _known(name: str, type_: str | None) -> ModelShape:
    from localrun.convert.mixes import parse_mix

    if type_ is not None:
        return _known(name, None).with_type(parse_mix(type_))
    entry = load_data("models")[name]
    return from_config(entry["config"], Path(name), None, entry["title"], entry["source"])


def known_config(name: str) -> Config:
    """The configuration of a known model, without its tensors: Kimi-K2's are 70,000."""
    from localrun.convert.settings import Settings
    from localrun.convert.settings import read_config as read_settings

    return read_settings(Settings(_convertible(load_data("models")[name]["config"], Path(name)), name))


def _config_path(path: Path) -> Path | None:
    if path.is_dir():
        return path / "config.json"
    return path if path.suffix == ".json" and path.exists() else None


def _read_config_json(path: Path) -> dict[str, Any]:
    from localrun.convert.sources.json_file import read_json

    return read_json(path)


@dataclass
class _Checkpoint:
    """What the converter asks of a checkpoint before it reads weights."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    index: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def from_config(
    values: dict[str, Any], path: Path, type_: str | None = None, name: str = "", source: str = ""
) -> ModelShape:
    """The model of a config.json, packed as `localrun convert --type` would. Raises LocalrunError."""
    from localrun.convert.architecture import read_model
    from localrun.convert.metadata import PlannedHeader
    from localrun.convert.mixes import parse_mix
    from localrun.convert.settings import Settings
    from localrun.convert.sources.checkpoint import SourceTensor
    from localrun.plan.checkpoint_shapes import checkpoint_shapes

    is_qwen2 = values.get("architectures") == _QWEN2
    values = _convertible(values, path)
    is_mxfp4 = _is_mxfp4(values)
    mix = parse_mix(type_ or (MXFP4_TYPE if is_mxfp4 else DEFAULT_TYPE))
    checkpoint = _Checkpoint(path.parent if path.suffix == ".json" else path, values)
    try:
        settings = Settings(checkpoint.config, str(path))
        for tensor, shape in checkpoint_shapes(settings).items():
            checkpoint.tensors[tensor] = SourceTensor(tensor, shape, "BF16", 2 * prod(shape))
        model = read_model(checkpoint)
    except LocalrunError as error:
        raise LocalrunError(str(error).replace(str(checkpoint.path / "config.json"), str(path))) from None
    if is_qwen2:
        _add_biases(model.targets)
    conversion = Conversion(model.metadata, model.targets, is_mxfp4)
    tensors = conversion.tensors(mix)
    config = read_config(PlannedHeader(path, model.metadata, tensors))
    return ModelShape(name, config, tensors, mix, source, conversion=conversion)


def _convertible(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """A config.json as the converter reads it: its text part, and Qwen2 as Llama."""
    from localrun.convert.sources.text_part import has_text_part, text_config

    values = dict(text_config(values, str(path)) if has_text_part(values) else values)
    if values.get("architectures") == _QWEN2:  # the same tensors and, of 80 layers, the same rules for types
        values["architectures"] = ["LlamaForCausalLM"]
    return values


def _is_mxfp4(values: dict[str, Any]) -> bool:
    """Whether a config.json says that its checkpoint's experts are MXFP4, or DeepSeek-V4's FP4, which is the same."""
    quantization = values.get("quantization_config")
    is_gpt_oss = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    return is_gpt_oss or values.get("expert_dtype") == "fp4"


def _add_biases(targets: list[Any]) -> None:
    """Qwen2's: one vector for each of q, k and v."""
    from localrun.convert.targets import Target

    for target in list(targets):
        if re.search(r"attn_[qkv]\.weight$", target.name):
            targets.append(Target(target.name.replace(".weight", ".bias"), target.shape[:1], "BF16"))


def _from_gguf(path: Path, type_: str | None) -> ModelShape:
    from localrun.gguf.file import open_gguf
    from localrun.gguf.types import plain

    with open_gguf(path) as file:
        config = read_config(file)
        tensors = tuple(Tensor(t.name, t.shape, plain(t.type).name, t.n_bytes) for t in file.tensors.values())
        name = str(file.metadata.get("general.name", path.name))
    model = ModelShape(name, config, tensors, "as in the file", str(path), path)
    return model if type_ is None else model.with_type(type_)
