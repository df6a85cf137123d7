"""Builds the list of targets from a checkpoint, and sees to it that every source tensor is used, in its shape."""

from __future__ import annotations

import re
from collections.abc import Iterator

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.checkpoint import MXFP4, Checkpoint, SourceTensor
from localrun.convert.sources.json_file import shown
from localrun.convert.targets import Piece, Target
from localrun.models.architecture import Architecture, Fused, HeadRows, Pairs, Shape, Tensor
from localrun.models.config import Config


class Builder:
    """Collects targets; every source tensor that goes into one is marked as used."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture, config: Config) -> None:
        self.checkpoint, self.architecture, self.config = checkpoint, architecture, config
        self.targets: list[Target] = []
        self._used: set[str] = set()

    def has(self, tensor: Tensor, prefix: str = "") -> bool:
        """Whether the checkpoint has what a declared tensor is made of; prefix: of the layer, in the checkpoint."""
        return all(prefix + source in self.checkpoint.tensors for source, _ in tensor.sources(self.config))

    def add(self, tensor: Tensor, index: int | None = None, at: str | None = None) -> None:
        """A declared tensor, of layer `index` or of none; at: what its names in the checkpoint begin with."""
        prefix = "" if index is None else f"blk.{index}."
        if at is None:
            at = "" if index is None else layer_prefix(self.architecture, index)
        name, shape, pieces = prefix + tensor.name, tensor.shape(self.config), []
        for source, source_shape in tensor.sources(self.config):
            n_rows = self._use(at + source, source_shape, name, isinstance(tensor.source, Fused))
            pieces += _pieces(tensor, self.checkpoint.tensors[at + source], n_rows, self.config)
        dtype = self.checkpoint.tensors[pieces[0].source].dtype
        self.targets.append(Target(name, shape, dtype, tuple(pieces)))

    def values(self, name: str, values: list[float]) -> None:
        """A vector that is computed here."""
        self.targets.append(Target(name, (len(values),), "F32", values=tuple(values)))

    def skip(self, source: str) -> None:
        """A source that is left out on purpose, if it is there."""
        self._used.add(source)

    def skip_matching(self, pattern: str) -> int:
        """Sources that are left out on purpose, by what their names begin with; how many."""
        names = [name for name in self.checkpoint.tensors if re.match(pattern, name)]
        self._used.update(names)
        return len(names)

    def skip_rest(self) -> None:
        """All sources that have found no place."""
        self._used.update(self.checkpoint.tensors)

    def skip_layers(self, first: int, count: int) -> None:
        """Layers whose sources are left out on purpose."""
        for name in self.checkpoint.tensors:
            match = re.match(re.escape(self.architecture.layer_prefix) + r"(\d+)\.", name)
            if match and first <= int(match[1]) < first + count:
                self._used.add(name)

    def finish(self) -> list[Target]:
        """All targets. Raises CheckpointError if a source tensor has found no place."""
        for name in self.checkpoint.tensors:
            if name not in self._used:
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor {shown(name)} is unknown and has no place in the model"
                )
        return self.targets

    def _use(self, source: str, shape: tuple[int, ...], target: str, is_fused: bool) -> int:
        """Marks a source as used; its rows. Raises CheckpointError if it is missing or has another shape."""
        tensor = self.checkpoint.tensors.get(source)
        if tensor is None:
            shard = self.checkpoint.index.get(source)
            lacks = f"; the index says it is in {shard}" if shard else ""
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor '{source}' is missing; '{target}' is made of it{lacks}"
            )
        if is_fused and tensor.dtype == MXFP4:  # packed along the inputs, which come last
            shape = (*shape[:-2], shape[-1], shape[-2])
        if tensor.shape != shape or 0 in shape:
            found, path = list(tensor.shape), self.checkpoint.path
            raise CheckpointError(
                f"{path}: tensor '{source}' has shape {found}; expected {list(shape)}, by config.json"
            )
        self._used.add(source)
        return tensor.n_rows


def layer_prefix(architecture: Architecture, index: int) -> str:
    """What the names of a layer's tensors begin with in a checkpoint."""
    return f"{architecture.layer_prefix}{index}."


def _pieces(tensor: Tensor, stored: SourceTensor, n_rows: int, config: Config) -> Iterator[Piece]:
    """What a target takes of a source with n_rows rows."""
    rule, source = tensor.source, stored.name
    if isinstance(rule, Fused):
        yield from _fused_pieces(rule, stored, tensor.shape(config))
    elif isinstance(rule, HeadRows):
        n_heads, n_target_rows, _ = tensor.shape(config)
        per_head, (first, last) = n_rows // n_heads, rule.rows(config)
        order = "transposed" if rule.transposed else "rows"
        for start in range(0, n_rows, per_head):
            yield Piece(source, start + first, start + last, n_target_rows, order)
    elif isinstance(rule, Pairs):
        for start in range(0, n_rows, config.head_dim):
            yield Piece(source, start, start + config.head_dim, config.head_dim, "pairs")
    else:
        yield Piece(source, 0, n_rows, n_rows)


def _fused_pieces(rule: Fused, stored: SourceTensor, shape: Shape) -> Iterator[Piece]:
    """A piece an expert, of matrices; of biases one for all."""
    n_experts, n_outputs, *_ = shape
    if len(shape) == 2:
        yield Piece(stored.name, 0, n_experts, n_experts, "columns", rule.first, rule.step)
        return
    per_expert, order = stored.n_rows // n_experts, "rows" if stored.dtype == MXFP4 else "transposed"
    for start in range(0, stored.n_rows, per_expert):
        yield Piece(stored.name, start, start + per_expert, n_outputs, order, rule.first, rule.step)
