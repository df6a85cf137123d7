"""A model's tensors by name, as quantised matrices in the file's map and as float32 vectors. No torch."""

from functools import partial

import numpy as np

from localrun.gguf.file import GGUFFile
from localrun.models import names
from localrun.models.reader import architecture_of
from localrun.models.registry import ARCHITECTURES
from quant.formats import registry
from quant.matrix import ExpertMatrices, QuantMatrix, quant_matrix
from quant.simd.gated import Activation


class GGUFTensors:
    """The tensors of one file; names are GGUF's.

    Attributes:
        architecture: whose names they are.
    """

    def __init__(self, file: GGUFFile):
        self.file = file
        self.architecture = architecture_of(file)

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor `name`."""
        return name in self.file.tensors

    def matrix(self, name: str, shape: tuple[int, ...] | None = None) -> QuantMatrix:
        """A matrix (out, in), or one a group (G, out, in); `shape` reads the same rows in other groups."""
        tensor = self.file.tensors[name]
        return quant_matrix(tensor.data, registry.get(tensor.type.name), shape or tensor.shape)

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32."""
        tensor = self.file.tensors[name]
        values = np.ascontiguousarray(registry.get(tensor.type.name).unpack(tensor.data), np.float32)
        return values.reshape(tensor.shape)

    def split_matrix(self, name: str, n_groups: int, rows: tuple[int, int]) -> tuple[QuantMatrix, QuantMatrix]:
        """A matrix of n_groups * sum(rows) rows as two: each group's first rows[0] rows, and its last rows[1]."""
        both = self.matrix(name, (n_groups, sum(rows), self.file.tensors[name].shape[-1]))
        return both.rows(0, rows[0]), both.rows(*rows)

    def expert_matrices(self, index: int) -> ExpertMatrices:
        """The routed experts of layer `index`, from separate or fused gate and up tensors (gate rows first).

        With their biases, where the file has them, and the architecture's activation.
        """
        name = partial(names.layer, self.architecture, index)
        fused = name("mlp.experts.gate_up_proj")
        if self.has(fused):
            both = self.matrix(fused)
            gate, up = both.rows(0, both.n_rows // 2), both.rows(both.n_rows // 2, both.n_rows // 2)
        else:
            gate, up = (self.matrix(name(f"mlp.experts.{part}_proj")) for part in ("gate", "up"))
        down, constants = self.matrix(name("mlp.experts.down_proj")), ARCHITECTURES[self.architecture].constants
        biases = [names.bias(name(f"mlp.experts.{part}_proj")) for part in ("gate", "up", "down")]
        activation = Activation(constants.get("swiglu_alpha", 0.0), constants.get("swiglu_limit", 0.0))
        arrays = tuple(self.array(bias) for bias in biases) if self.has(biases[0]) else None
        return ExpertMatrices(gate, up, down, arrays, activation)
