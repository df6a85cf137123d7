"""How routed experts are shared among ranks, and which part of them a rank has.

By slices every rank has some inner columns of each expert: rows of gate and up, columns of down. What shares give adds
up to what the experts give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Span, let_go
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.ranks.world import World
from quant.decode.messages import TYPES
from quant.matrix import ExpertMatrices, QuantMatrix

_PARTS = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Sharing:
    """What all ranks agree on.

    Attributes:
        message: how vectors travel: "bf16", "f32" or "fp8".
        sizes: of the ranks' shares, in any unit; none for equal ones.
    """

    message: str = "bf16"
    sizes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.message not in TYPES:
            raise LocalrunError(f"messages of type {self.message!r}; expected one of {', '.join(TYPES)}")
        if any(not size > 0 for size in self.sizes):
            raise LocalrunError(f"shares of {', '.join(f'{size:g}' for size in self.sizes)}; each must be above 0")


@dataclass(frozen=True)
class Ranks:
    """A world, and how a model is shared in it: what localrun.load() takes on rank 0."""

    world: World
    sharing: Sharing = Sharing()


def cuts(n: int, unit: int, sizes: Sequence[float]) -> list[tuple[int, int]]:
    """First column and number of columns of each share of n columns, as near to these sizes as whole units allow.

    The last has what is left over. Raises LocalrunError if there are fewer units than shares.
    """
    n_units, n_shares = n // unit, len(sizes)
    if n_units < n_shares:
        raise LocalrunError(
            f"experts of {n} inner columns in blocks of {unit} can't be shared by {n_shares} ranks; at most {n_units}"
        )
    ends = np.round(np.cumsum(sizes) / np.sum(sizes) * n_units).astype(int)
    for i in range(n_shares):  # a unit at least for each
        ends[i] = max(ends[i], ends[i - 1] + 1 if i else 1)
    for i in range(n_shares - 1, -1, -1):
        ends[i] = min(ends[i], n_units - (n_shares - 1 - i))
    borders = [0, *(int(end) * unit for end in ends[:-1]), n]
    return [(first, end - first) for first, end in pairwise(borders)]


def expert_layers(file: GGUFFile, config: Config) -> list[int]:
    """The layers with routed experts, in the order in which messages count them; that for drafts among them."""
    n_layers = config.num_hidden_layers + names.has_mtp(file, config)
    gates = (names.layer(config.architecture, index, "mlp.gate") for index in range(n_layers))
    return [index for index, gate in enumerate(gates) if gate in file.tensors]


class Share:
    """The part of each layer's experts that one rank has.

    Rows of gate and up stay in the file's map. Columns of down are copied into memory of the rank's own: a page of the
    file has columns of all ranks (one of DeepSeek-V3's rows of down is shorter than a page), and would be resident on
    each of them.

    Attributes:
        layers: the matrices, by the layer's index, in the order in which messages count layers.
        type: how vectors travel.
        hidden, top_k: columns of these, experts per token.
    """

    def __init__(self, file: GGUFFile, config: Config, world: World, sharing: Sharing):
        """Raises LocalrunError if the model's experts can't be shared so."""
        sizes = sharing.sizes or (1.0,) * world.size
        if len(sizes) != world.size:
            raise LocalrunError(f"{len(sizes)} sizes of shares for {world.size} ranks")
        tensors, indices = GGUFTensors(file), expert_layers(file, config)
        if not indices:
            raise LocalrunError(f"{file.path}: has no routed experts that several ranks could share")
        self.type, self.top_k, self.hidden = TYPES[sharing.message], config.num_experts_per_tok, config.hidden_size
        if self.hidden % self.type.columns:
            raise LocalrunError(f"messages of type {sharing.message} take multiples of {self.type.columns} columns")
        self.layers: dict[int, ExpertMatrices] = {}
        for index in indices:
            whole = tensors.expert_matrices(index)
            own = cuts(whole.gate.n_rows, whole.inner_unit, sizes)[world.rank]
            self.layers[index] = whole.inner(*own)
            let_go(_spans_of(whole.down))
        self._file, self._config = file, config

    @property
    def spans(self) -> list[Span]:
        """The parts of the file's map that the share is read from."""
        mapped = (matrix for own in self.layers.values() for matrix in (own.gate, own.up))
        return [span for matrix in mapped for span in _spans_of(matrix)]

    @property
    def all_spans(self) -> list[Span]:
        """The same, and all tensors that are not shared."""
        name = partial(names.layer, self._config.architecture)
        shared = {name(index, f"mlp.experts.{part}_proj") for index in self.layers for part in _PARTS}
        beside = (tensor for name, tensor in self._file.tensors.items() if name not in shared)
        return [(tensor.data.ctypes.data, tensor.n_bytes) for tensor in beside] + self.spans


def _spans_of(matrix: QuantMatrix) -> list[Span]:
    """Of each expert."""
    return [
        (matrix.address + matrix.group_bytes * group, matrix.n_rows * matrix.row_bytes)
        for group in range(matrix.n_groups)
    ]
