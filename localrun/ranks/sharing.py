"""How routed experts are shared among ranks, and which part of them a rank has.

By slices every rank has some inner columns of each expert: rows of gate and up, columns of down. What shares give adds
up to what the experts give. By experts every rank has whole ones (owners.py).

Both send the same messages, and a token waits for the rank with most of its experts, on which slices never have more
than their part: so slices it is where experts have blocks enough for all ranks, and nothing is said about whole ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise

import numpy as np

from localrun import hardware
from localrun.errors import LocalrunError
from localrun.gguf import types as tensor_types
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Span, let_go, own_memory
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.ranks.world import World
from quant.block_format import Format
from quant.decode.messages import TYPES
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.matrix import ExpertMatrices, QuantMatrix, bytes_at, quant_matrix
from quant.target import tuning

SLICES, EXPERTS, AUTO = "slices", "experts", "auto"
_PARTS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Sharing:
    """What all ranks agree on.

    Attributes:
        message: how vectors travel: "bf16", "f32" or "fp8".
        sizes: of the ranks' shares, in any unit; none for equal ones.
        share: SLICES, EXPERTS, or AUTO for what the model and the others of these say (settled).
        usage: an importance matrix, whose counts say how experts are divided; rank 0 alone reads it.
        copies: experts of each layer that a rank has beside its own, of those that are used most.
        by_speed: whether sizes are to follow from what ranks measure: slices so that all are done at once.
        repack: whether each rank lays its slices out anew as --repack does, in RAM of its own.
    """

    message: str = "bf16"
    sizes: tuple[float, ...] = ()
    share: str = SLICES
    usage: str | os.PathLike[str] | None = None
    copies: int = 0
    by_speed: bool = False
    repack: bool = False

    def __post_init__(self) -> None:
        if self.share not in (SLICES, EXPERTS, AUTO):
            raise LocalrunError(f"experts shared by {self.share!r}; expected {SLICES}, {EXPERTS} or {AUTO}")
        if self.share == EXPERTS and self.repack:
            raise LocalrunError("whole experts are read where the file has them; --repack goes with slices")
        if self.share == SLICES and (self.usage is not None or self.copies):
            raise LocalrunError("slices of experts have no use for counts or copies; share whole experts")
        if self.message not in TYPES:
            raise LocalrunError(f"messages of type {self.message!r}; expected one of {', '.join(TYPES)}")
        if self.copies < 0:
            raise LocalrunError(f"{self.copies} copies of experts; expected 0 or more")
        if any(not 0 < size < float("inf") for size in self.sizes):
            raise LocalrunError(f"shares of {', '.join(f'{size:g}' for size in self.sizes)}; each must be above 0")

    def sizes_of(self, world: World) -> tuple[float, ...]:
        """A size a rank. Raises LocalrunError."""
        if self.sizes and len(self.sizes) != world.size:
            raise LocalrunError(f"{len(self.sizes)} sizes of shares for {world.size} ranks")
        return self.sizes or (1.0,) * world.size


@dataclass(frozen=True)
class Ranks:
    """A world, and how a model is shared in it: what localrun.load() takes on rank 0."""

    world: World
    sharing: Sharing = Sharing()


@dataclass(frozen=True)
class Division:
    """Who has what, as rank 0 has decided (division.py).

    Attributes:
        layers: those that are shared, in the order in which messages count them.
        blocks: of slices, int64 (layers, N): blocks of inner columns that each rank has; None of whole experts.
        owners: of whole experts, int64 (layers, E): bits of the ranks that have each; None of slices.
    """

    layers: tuple[int, ...]
    blocks: np.ndarray | None = None
    owners: np.ndarray | None = None

    def parts(self, rank: int) -> list[float]:
        """Of each layer's experts, what a rank has."""
        if self.blocks is not None:
            return (self.blocks[:, rank] / self.blocks.sum(1)).tolist()
        return (self.owners >> rank & 1).mean(1).tolist()


def n_bytes(whole: ExpertMatrices) -> int:
    """Of a layer's experts, but for biases."""
    return sum(matrix.n_groups * matrix.n_rows * matrix.row_bytes for matrix in (whole.gate, whole.up, whole.down))


def settled(sharing: Sharing, file: GGUFFile, config: Config, world: World) -> Sharing:
    """The sharing with a way to share. All ranks come to the same."""
    if sharing.share != AUTO:
        return sharing
    tensors = GGUFTensors(file)
    layers = (tensors.expert_matrices(index) for index in expert_layers(file, config))
    fits = all(whole.gate.n_rows // whole.inner_unit >= world.size for whole in layers)
    is_whole = sharing.usage is not None or sharing.copies > 0 or not fits
    return replace(sharing, share=EXPERTS if is_whole else SLICES)


def n_blocks(n: int, unit: int, n_shares: int) -> int:
    """Whole units of n columns. Raises LocalrunError if there are fewer than shares."""
    found = n // unit
    if found < n_shares:
        raise LocalrunError(
            f"experts of {n} inner columns in blocks of {unit} can't be shared by {n_shares} ranks; at most {found}"
        )
    return found


def cuts(n: int, unit: int, blocks: Sequence[int]) -> list[tuple[int, int]]:
    """First column and number of columns of each share of n columns; the last has what is left over."""
    borders = [0, *(int(end) * unit for end in np.cumsum(blocks)[:-1]), n]
    return [(first, end - first) for first, end in pairwise(borders)]


def expert_layers(file: GGUFFile, config: Config) -> list[int]:
    """The layers with routed experts, in the order in which messages count them; that for drafts among them."""
    n_layers = config.num_hidden_layers + names.has_mtp(file, config)
    gates = (names.layer(config.architecture, index, "mlp.gate") for index in range(n_layers))
    return [index for index, gate in enumerate(gates) if gate in file.tensors]


class Share:
    """The part of each layer's experts that one rank has.

    Of slices, rows of gate and up stay in the file's map, unless they are to be laid out anew. Columns of down are
    copied into memory of the rank's own: a page of the file has columns of all ranks (one of DeepSeek-V3's rows of down
    is shorter than a page), and would be resident on each of them. Whole experts stay in the map.

    Attributes:
        layers: the matrices, by the layer's index, in the order in which messages count layers.
        owners: int64 (layers, E), bits of the ranks that have each expert; None of slices.
        type: how vectors travel.
        hidden, top_k: columns of these, experts per token.
    """

    def __init__(self, file: GGUFFile, config: Config, world: World, sharing: Sharing, division: Division):
        """Raises LocalrunError if the model's experts can't be shared so."""
        tensors = GGUFTensors(file)
        self.type, self.top_k, self.hidden = TYPES[sharing.message], config.num_experts_per_tok, config.hidden_size
        if self.hidden % self.type.columns:
            raise LocalrunError(f"messages of type {sharing.message} take multiples of {self.type.columns} columns")
        self._file, self._config, self._rank, self.owners = file, config, world.rank, division.owners
        self.layers = {index: tensors.expert_matrices(index) for index in division.layers}
        self._repack = sharing.repack
        if division.blocks is not None:
            self._cut(division.blocks)

    def _cut(self, blocks: np.ndarray) -> None:
        """Keep this rank's slice of each layer. Raises LocalrunError if there is no room for what is copied of it."""
        own = {
            index: cuts(whole.gate.n_rows, whole.inner_unit, of_ranks)[self._rank]
            for (index, whole), of_ranks in zip(self.layers.items(), blocks, strict=True)
        }
        n_inner = {index: whole.gate.n_rows for index, whole in self.layers.items()}
        needed = sum(
            n_bytes * own[index][1] // n_inner[index]
            for index, whole in self.layers.items()
            for n_bytes in self._copied_bytes(whole)
        )
        if needed > (free := hardware.free_ram()):
            gib = f"{needed / 2**30:.1f} GiB of RAM, of which {free / 2**30:.1f} are free"
            what = (
                "slices of the experts, laid out anew," if self._repack else "columns of the experts' down projections"
            )
            raise LocalrunError(f"this rank's {what} take {gib}")

        def slice_of(index: int) -> ExpertMatrices:
            whole = self.layers[index]
            part = whole.inner(*own[index], own_memory)
            if self._repack:
                laid = [laid_out(matrix) for matrix in (part.gate, part.up, part.down)]
                for matrix, new in ((whole.gate, laid[0]), (whole.up, laid[1])):
                    if new.format.rows > 1:
                        let_go(_spans_of(matrix))
                part = ExpertMatrices(*laid, part.biases, part.activation)
            let_go(_spans_of(whole.down))
            return part

        with ThreadPoolExecutor() as readers:  # of a disk, most of the time
            self.layers = dict(zip(own, readers.map(slice_of, own), strict=True))

    def _copied_bytes(self, whole: ExpertMatrices) -> Iterator[int]:
        """Of what a rank with all of a layer would have in memory of its own, matrix by matrix."""
        for matrix in (whole.gate, whole.up, whole.down):
            format_ = _laid_out(matrix) if self._repack else matrix.format
            if matrix is whole.down or format_.name != matrix.format.name:
                yield matrix.n_groups * matrix.n_rows * format_.row_bytes(matrix.n_cols)

    @property
    def spans(self) -> list[Span]:
        """The parts of the file's map that the share is read from."""
        if self.owners is None:
            plain = (
                m
                for own in self.layers.values()
                for m in (own.gate, own.up)
                if not (self._repack and m.format.rows > 1)
            )
            return [span for matrix in plain for span in _spans_of(matrix)]
        here = (self.owners >> self._rank & 1).astype(bool)
        return [
            span
            for own, is_here in zip(self.layers.values(), here, strict=True)
            for matrix in (own.gate, own.up, own.down)
            for span, is_own in zip(_spans_of(matrix), is_here, strict=True)
            if is_own
        ]

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the tensors that are shared."""
        name = partial(names.layer, self._config.architecture)
        return frozenset(name(index, f"mlp.experts.{part}_proj") for index in self.layers for part in _PARTS)

    @property
    def all_spans(self) -> list[Span]:
        """The same, and all tensors that are not shared."""
        beside = (tensor for name, tensor in self._file.tensors.items() if name not in self.names)
        return [(tensor.data.ctypes.data, tensor.n_bytes) for tensor in beside] + self.spans


def _laid_out(matrix: QuantMatrix) -> Format:
    """What --repack makes of it on this CPU; its own format if that stays."""
    shape = matrix.n_groups, matrix.n_rows, matrix.n_cols
    return registry.get(tensor_types.laid_out(matrix.format.name, shape, tuning.current().interleaving_pays))


def laid_out(matrix: QuantMatrix) -> QuantMatrix:
    """The same as --repack lays it out, in memory of its own; itself where it stays as it is."""
    format_, shape = _laid_out(matrix), (matrix.n_groups, matrix.n_rows, matrix.n_cols)
    if format_.name == matrix.format.name:
        return matrix
    out = own_memory(matrix.n_groups * matrix.n_rows * format_.row_bytes(matrix.n_cols)).reshape(matrix.n_groups, -1)
    for group in range(matrix.n_groups):
        plain = bytes_at(matrix.address + matrix.group_bytes * group, matrix.n_rows * matrix.row_bytes)
        interleave(format_, plain, matrix.n_rows, matrix.row_bytes, out[group])
    return quant_matrix(out.reshape(-1), format_, shape)


def _spans_of(matrix: QuantMatrix) -> list[Span]:
    """Of each expert."""
    return [
        (matrix.address + matrix.group_bytes * group, matrix.n_rows * matrix.row_bytes)
        for group in range(matrix.n_groups)
    ]
