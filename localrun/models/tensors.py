"""A model's tensors by name, as quantised matrices in the file's map and as float32 vectors. No torch."""

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from localrun.errors import GGUFError
from localrun.gguf.file import GGUFFile
from localrun.models import names
from localrun.models.config import Config
from localrun.models.parts import joined_rows
from localrun.models.reader import architecture_of, read_config
from quant.formats import registry
from quant.matrix import ExpertMatrices, QuantMatrix, quant_matrix
from quant.simd.gated import SWIGLU, Activation

Own = Callable[[int, ExpertMatrices], ExpertMatrices]


class GGUFTensors:
    """The tensors of one file; names are GGUF's.

    Attributes:
        architecture: whose names they are.
    """

    def __init__(self, file: GGUFFile, own: Own | None = None):
        """own: what of a layer's experts is this process's, by the layer's index and all of them; all unless given."""
        self.file, self._own = file, own
        self.architecture = architecture_of(file)

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor `name`."""
        return name in self.file.tensors

    def matrix(self, name: str, shape: tuple[int, ...] | None = None) -> QuantMatrix:
        """A matrix (out, in), or one a group (G, out, in); `shape` reads the same rows in other groups.

        Of one that lies in a larger one (names.holder) a view of its rows.
        """
        holder = names.holder(self.architecture, name)
        if holder != name:
            return self.matrix(holder).rows(*self._joined[name.split(".", 2)[2]])
        tensor = self.file.tensors[name]
        return quant_matrix(tensor.data, registry.get(tensor.type.name), shape or tensor.shape)

    def grouped(self, name: str, n_groups: int) -> QuantMatrix:
        """A matrix (out, in) with its rows in groups, (n_groups, out / n_groups, in)."""
        n_rows, n_cols = self.file.tensors[name].shape
        return self.matrix(name, (n_groups, n_rows // n_groups, n_cols))

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.file.tensors[name]
        values = np.ascontiguousarray(registry.get(tensor.type.name).unpack(tensor.data), np.float32)
        return values.reshape(tensor.shape)

    def split_matrix(self, name: str, n_groups: int, rows: tuple[int, int]) -> tuple[QuantMatrix, QuantMatrix]:
        """A matrix of n_groups * sum(rows) rows as two: each group's first rows[0] rows, and its last rows[1]."""
        both = self.matrix(name, (n_groups, sum(rows), self.file.tensors[name].shape[-1]))
        return both.rows(0, rows[0]), both.rows(*rows)

    @cached_property
    def config(self) -> Config:
        """What the file's keys say."""
        return read_config(self.file)

    @cached_property
    def _joined(self) -> dict[str, tuple[int, int]]:
        return joined_rows(self.config)

    @cached_property
    def activation(self) -> Activation:
        """Of all feed-forward layers."""
        c = self.config
        return Activation(c.swiglu_alpha, c.swiglu_limit, c.swiglu_offset) if c.swiglu_limit else SWIGLU

    def expert_ids(self, index: int) -> np.ndarray:
        """int32 (vocab, K): the experts of each token in layer `index`. Raises GGUFError if there is no such expert."""
        name = names.layer(self.architecture, index, "mlp.gate.tid2eid")
        tensor = self.file.tensors[name]
        ids, n_experts = tensor.data.view(np.int32).reshape(tensor.shape), self.config.n_routed_experts
        if ids.min() < 0 or ids.max() >= n_experts:
            found = f"{ids.min()} to {ids.max()}"
            raise GGUFError(f"{self.file.path}: tensor '{name}' holds {found}; expected experts 0 to {n_experts - 1}")
        return ids

    def expert_matrices(self, index: int) -> ExpertMatrices:
        """The routed experts of layer `index`, from separate or fused gate and up tensors (gate rows first).

        With their biases, where the file has them, and the model's activation; or what of them is this process's.
        """
        name = partial(names.layer, self.architecture, index)
        fused = name("mlp.experts.gate_up_proj")
        if self.has(fused):
            both = self.matrix(fused)
            gate, up = both.rows(0, both.n_rows // 2), both.rows(both.n_rows // 2, both.n_rows // 2)
        else:
            gate, up = (self.matrix(name(f"mlp.experts.{part}_proj")) for part in ("gate", "up"))
        down = self.matrix(name("mlp.experts.down_proj"))
        biases = [names.bias(name(f"mlp.experts.{part}_proj")) for part in ("gate", "up", "down")]
        arrays = tuple(self.array(bias) for bias in biases) if self.has(biases[0]) else None
        whole = ExpertMatrices(gate, up, down, arrays, self.activation)
        return self._own(index, whole) if self._own else whole
