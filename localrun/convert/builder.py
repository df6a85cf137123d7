"""Builds the list of targets from a checkpoint, and sees to it that every source tensor is used, in its shape."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from localrun.convert.checkpoint import Checkpoint
from localrun.convert.errors import CheckpointError
from localrun.convert.targets import Piece, Target

# Not weights: what a runner computes itself, and the activation scales of other FP8 runtimes.
_IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.activation_scale$|\.input_scale$")
_FLOAT32_MAX = 3.4e38
REQUIRED: Any = object()


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
            raise CheckpointError(f"{self.where}: {key} is {value!r}; {why}")


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


class Builder:
    """Collects targets; every source tensor that goes into one is marked as used."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.targets: list[Target] = []
        self._used: set[str] = set()

    def has(self, source: str) -> bool:
        return source in self.checkpoint.tensors

    def plain(self, name: str, source: str, shape: tuple[int, ...]) -> None:
        """A tensor as it is."""
        n_rows = self._use(source, shape, name)
        self._add(name, shape, [Piece(source, 0, n_rows, n_rows)])

    def stacked(self, name: str, sources: list[str], shape: tuple[int, ...]) -> None:
        """Matrices of this shape one behind another: (len(sources), *shape)."""
        rows = [self._use(source, shape, name) for source in sources]
        pieces = [Piece(source, 0, n_rows, n_rows) for source, n_rows in zip(sources, rows, strict=True)]
        self._add(name, (len(sources), *shape), pieces)

    def heads(self, name: str, source: str, n_heads: int, rows: tuple[int, int], per_head: int, n_cols: int) -> None:
        """Rows rows[0]..rows[1] of each head of a matrix (n_heads * per_head, n_cols): (n_heads, rows, n_cols)."""
        self._use(source, (n_heads * per_head, n_cols), name)
        count = rows[1] - rows[0]
        starts = [head * per_head + rows[0] for head in range(n_heads)]
        self._add(name, (n_heads, count, n_cols), [Piece(source, start, start + count, count) for start in starts])

    def heads_transposed(
        self, name: str, source: str, n_heads: int, rows: tuple[int, int], per_head: int, n_cols: int
    ) -> None:
        """As heads, each head's matrix transposed: (n_heads, n_cols, rows)."""
        self._use(source, (n_heads * per_head, n_cols), name)
        count = rows[1] - rows[0]
        starts = [head * per_head + rows[0] for head in range(n_heads)]
        pieces = [Piece(source, start, start + count, n_cols, "transposed") for start in starts]
        self._add(name, (n_heads, n_cols, count), pieces)

    def rotary(self, name: str, source: str, n_heads: int, head_dim: int, n_cols: int) -> None:
        """A matrix (n_heads * head_dim, n_cols) whose heads' rows are reordered for rotation by neighbours."""
        self._use(source, (n_heads * head_dim, n_cols), name)
        starts = [head * head_dim for head in range(n_heads)]
        pieces = [Piece(source, start, start + head_dim, head_dim, "pairs") for start in starts]
        self._add(name, (n_heads * head_dim, n_cols), pieces)

    def values(self, name: str, values: list[float]) -> None:
        """A vector that is computed here."""
        self.targets.append(Target(name, (len(values),), "F32", values=tuple(values)))

    def skip(self, source: str) -> None:
        """A source that is left out on purpose, if it is there."""
        self._used.add(source)

    def skip_layers(self, first: int, count: int) -> None:
        """Layers whose sources are left out on purpose."""
        for name in self.checkpoint.tensors:
            match = re.match(r"model\.layers\.(\d+)\.", name)
            if match and first <= int(match[1]) < first + count:
                self._used.add(name)

    def finish(self) -> list[Target]:
        """All targets. Raises CheckpointError if a source tensor has found no place."""
        for name in self.checkpoint.tensors:
            if name not in self._used and not _IGNORED.search(name):
                raise CheckpointError(
                    f"{self.checkpoint.path}: tensor '{name}' is unknown and has no place in the model"
                )
        return self.targets

    def _use(self, source: str, shape: tuple[int, ...], target: str) -> int:
        """Marks a source as used; its rows. Raises CheckpointError if it is missing or has another shape."""
        tensor = self.checkpoint.tensors.get(source)
        if tensor is None:
            raise CheckpointError(f"{self.checkpoint.path}: tensor '{source}' is missing; '{target}' is made of it")
        if tensor.shape != shape or 0 in shape:
            found, path = list(tensor.shape), self.checkpoint.path
            raise CheckpointError(f"{path}: tensor '{source}' has shape {found}; expected {list(shape)}")
        self._used.add(source)
        return tensor.n_rows

    def _add(self, name: str, shape: tuple[int, ...], pieces: list[Piece]) -> None:
        dtype = self.checkpoint.tensors[pieces[0].source].dtype
        self.targets.append(Target(name, shape, dtype, tuple(pieces)))
