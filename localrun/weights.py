"""A model's tensors as the modules that compute with them, on the device where each lives.

Today everything lives on the CPU; the network asks for modules by name and never learns where they run.
"""

import numpy as np
import torch

from localrun import names
from localrun.bridge import Embedding, Experts, HeadLinear, Linear
from localrun.gguf import GGUFFile, Tensor
from quant import formats, linear
from quant.pool import Pool


class Weights:
    """The tensors of one file."""

    def __init__(self, file: GGUFFile, pool: Pool):
        self.file, self.pool = file, pool

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor `name` (GGUF spelling)."""
        return name in self.file.tensors

    def _weight(self, name: str, shape: tuple[int, ...] | None = None) -> linear.Weight:
        tensor = self.file.tensors[name]
        return linear.weight(tensor.data, formats.get(tensor.type.name), shape or tensor.shape)

    def vector(self, name: str) -> torch.Tensor:
        """A 1-D tensor, float32."""
        tensor: Tensor = self.file.tensors[name]
        values = formats.get(tensor.type.name).unpack(tensor.data)
        return torch.from_numpy(np.ascontiguousarray(values, np.float32))

    def embedding(self, name: str) -> Embedding:
        """Rows by token id."""
        return Embedding(self.pool, self._weight(name))

    def linear(self, name: str) -> Linear:
        """A matrix (out, in)."""
        return Linear(self.pool, self._weight(name))

    def heads(self, name: str) -> HeadLinear:
        """One matrix a head, (H, out, in)."""
        return HeadLinear(self.pool, self._weight(name))

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> tuple[HeadLinear, HeadLinear]:
        """A matrix of n_heads * sum(rows) rows as two: each head's first rows[0] rows, and its last rows[1]."""
        tensor = self.file.tensors[name]
        both = self._weight(name, (n_heads, sum(rows), tensor.shape[-1]))
        return HeadLinear(self.pool, both.rows(0, rows[0])), HeadLinear(self.pool, both.rows(*rows))

    def experts(self, index: int) -> Experts:
        """The routed experts of layer `index`, from separate or fused gate and up tensors (gate rows first)."""
        fused = names.layer(index, "mlp.experts.gate_up_proj")
        if self.has(fused):
            both = self._weight(fused)
            gate, up = both.rows(0, both.n_rows // 2), both.rows(both.n_rows // 2, both.n_rows // 2)
        else:
            gate, up = (self._weight(names.layer(index, f"mlp.experts.{part}_proj")) for part in ("gate", "up"))
        return Experts(self.pool, gate, up, self._weight(names.layer(index, "mlp.experts.down_proj")))
