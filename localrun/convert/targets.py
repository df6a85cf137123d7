"""What a converted file is made of: tensors, each a sequence of pieces of source tensors, cut into units of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from localrun.convert.checkpoint import SourceTensor
from localrun.convert.errors import CheckpointError


class Source(Protocol):
    """Where float32 rows come from: a Checkpoint, or a GGUF (GGUFSource)."""

    path: Path
    tensors: dict[str, SourceTensor]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32 (stop - start, n_cols), rows of a tensor."""


@dataclass(frozen=True)
class Piece:
    """Rows start..stop of a source tensor, which become n_rows rows of the target.

    order: "rows" as they are; "transposed"; "pairs": the rows of one head, whose halves are rotated against each
    other, reordered so that what is rotated together is neighbours (llama.cpp's rotary embedding for llama).
    """

    source: str
    start: int
    stop: int
    n_rows: int
    order: str = "rows"

    def read(self, source: Source) -> np.ndarray:
        """float32 (n_rows, n_cols of the target), C order. Raises CheckpointError if a weight is not finite."""
        rows = source.rows(self.source, self.start, self.stop)
        self._check_finite(source, rows)
        if self.order == "transposed":
            return np.ascontiguousarray(rows.T)
        if self.order == "pairs":
            return rows.reshape(2, len(rows) // 2, -1).swapaxes(0, 1).reshape(rows.shape)
        return rows

    def _check_finite(self, source: Source, rows: np.ndarray) -> None:
        values = rows.reshape(-1)
        if np.isfinite(np.dot(values, values)):  # one quick pass; a sum that overflows is looked at again
            return
        wrong = ~np.isfinite(rows)
        if wrong.any():
            row, column = np.unravel_index(wrong.argmax(), rows.shape)
            where = f"row {self.start + row}, column {column}"
            raise CheckpointError(f"{source.path}: tensor '{self.source}' has {rows[row, column]} at {where}")


@dataclass(frozen=True)
class Target:
    """A tensor of the file.

    Attributes:
        shape: NumPy order.
        from_type: dtype of the sources, for the user.
        pieces: in the order of the target's rows; empty if values holds the content.
    """

    name: str
    shape: tuple[int, ...]
    from_type: str
    pieces: tuple[Piece, ...] = ()
    values: tuple[float, ...] = ()

    @property
    def n_cols(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """The rows of a target that are read, packed and written at once: n_rows from first_row."""

    target: int
    first_row: int
    n_rows: int
    pieces: tuple[Piece, ...]


def units(targets: list[Target], unit_bytes: int) -> Iterator[Unit]:
    """All work, in the order of the file; no unit takes more than unit_bytes as float32, but for a single piece that
    cannot be cut or a single row."""
    for index, target in enumerate(targets):
        if target.values:
            yield Unit(index, 0, 1, ())
            continue
        limit = max(1, unit_bytes // (4 * target.n_cols))
        row, gathered = 0, []
        for piece in target.pieces:
            for part in _cut(piece, limit):
                n_rows = sum(other.n_rows for other in gathered)
                if gathered and n_rows + part.n_rows > limit:
                    yield Unit(index, row, n_rows, tuple(gathered))
                    row, gathered = row + n_rows, []
                gathered.append(part)
        yield Unit(index, row, sum(piece.n_rows for piece in gathered), tuple(gathered))


def _cut(piece: Piece, limit: int) -> Iterator[Piece]:
    """The piece in parts of at most `limit` rows, where its order lets it be cut."""
    if piece.order != "rows":
        yield piece
        return
    for start in range(piece.start, piece.stop, limit):
        stop = min(start + limit, piece.stop)
        yield replace(piece, start=start, stop=stop, n_rows=stop - start)


def read_unit(source: Source, target: Target, unit: Unit) -> np.ndarray:
    """float32 (n_rows, n_cols), C order: the unit's rows."""
    if target.values:
        return np.array([target.values], np.float32)
    if len(unit.pieces) == 1:
        return unit.pieces[0].read(source)
    rows = np.empty((unit.n_rows, target.n_cols), np.float32)
    first = 0
    for piece in unit.pieces:
        rows[first : first + piece.n_rows] = piece.read(source)
        first += piece.n_rows
    return rows
