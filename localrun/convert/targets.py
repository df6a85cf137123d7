"""What a converted file is made of: tensors, each a sequence of pieces of source tensors, cut into units of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from localrun.convert.sources.checkpoint import SourceTensor
from localrun.gguf.types import ROWS


class Source(Protocol):
    """Where float32 rows come from: a Checkpoint, or a GGUF (GGUFSource)."""

    path: Path
    tensors: dict[str, SourceTensor]

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """out = rows start..stop of a tensor, float32 (stop - start, n_cols), C order."""


class BlockSource(Source, Protocol):
    """One that holds quantised blocks."""

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes): the blocks of rows in order."""


@dataclass(frozen=True, slots=True)  # hundreds of thousands in a large model
class Piece:
    """Rows start..stop of a source tensor, which become n_rows rows of the target.

    order: "rows" as they are; "columns", some of them; "transposed"; "pairs": the rows of one head, whose halves are
    rotated against each other, reordered so that what is rotated together is neighbours (llama.cpp's rotary embedding
    for llama). Of "rows" every step-th is taken, from `first` on; of "columns" and "transposed" every step-th column.
    """

    source: str
    start: int
    stop: int
    n_rows: int
    order: str = "rows"
    first: int = 0
    step: int = 1

    @property
    def is_plain(self) -> bool:
        """Whether these are rows as they are."""
        return self.order == "rows" and self.step == 1

    def read(self, source: Source, out: np.ndarray) -> None:
        """out = the target's rows, float32 (n_rows, n_cols), C order."""
        if self.is_plain:
            source.read(self.source, self.start, self.stop, out)
            return
        rows = np.empty((self.stop - self.start, source.tensors[self.source].n_cols), np.float32)
        source.read(self.source, self.start, self.stop, rows)
        if self.order == "rows":
            out[...] = rows[self.first :: self.step]
        elif self.order == "columns":
            out[...] = rows[:, self.first :: self.step]
        elif self.order == "transposed":
            out[...] = rows[:, self.first :: self.step].T
        else:
            out.reshape(-1, 2, out.shape[1])[...] = rows.reshape(2, -1, out.shape[1]).swapaxes(0, 1)

    def blocks(self, source: BlockSource) -> np.ndarray:
        """uint8 (n_rows, row_bytes): the target's rows in the blocks of the source. For "rows" only."""
        return source.blocks(self.source, self.start, self.stop)[self.first :: self.step]

    def origin(self, row: int, column: int) -> tuple[int, int]:
        """Where in the source tensor the weight at (row, column) of this piece comes from."""
        if self.order == "transposed":
            return self.start + column, self.first + self.step * row
        if self.order == "columns":
            return self.start + row, self.first + self.step * column
        if self.order == "pairs":
            return self.start + row % 2 * (self.n_rows // 2) + row // 2, column
        return self.start + self.first + self.step * row, column


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
        """Of the last dimension."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Of all dimensions but the last."""
        return prod(self.shape[:-1])

    @property
    def n_weights(self) -> int:
        """Of all dimensions."""
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
    cannot be cut or ROWS rows, which interleaved types keep together."""
    for index, target in enumerate(targets):
        if target.values:
            yield Unit(index, 0, 1, ())
            continue
        limit = max(ROWS, unit_bytes // (4 * target.n_cols) // ROWS * ROWS)
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
    if not piece.is_plain:
        yield piece
        return
    for start in range(piece.start, piece.stop, limit):
        stop = min(start + limit, piece.stop)
        yield replace(piece, start=start, stop=stop, n_rows=stop - start)


def read_unit(source: Source, target: Target, unit: Unit, out: np.ndarray) -> None:
    """out = the unit's rows, float32 (n_rows, n_cols), C order."""
    if target.values:
        out[0] = target.values
    first = 0
    for piece in unit.pieces:
        piece.read(source, out[first : first + piece.n_rows])
        first += piece.n_rows


def read_blocks(source: BlockSource, unit: Unit) -> np.ndarray:
    """uint8, 1-D, a new array: the unit's rows in the blocks of the source, whose type is the target's."""
    return np.concatenate([piece.blocks(source) for piece in unit.pieces]).reshape(-1)


def origin(unit: Unit, row: int, column: int) -> tuple[str, int, int] | None:
    """Which source tensor, row and column the weight at (row, column) of a unit comes from; None if from nowhere."""
    for piece in unit.pieces:
        if row < piece.n_rows:
            return (piece.source, *piece.origin(row, column))
        row -= piece.n_rows
    return None
