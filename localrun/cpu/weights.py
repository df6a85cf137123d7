"""A model's tensors as the modules that compute with them, on the device where each lives.

Here everything lives on the CPU; localrun.gpu.weights has the same methods for a device. The network asks for modules
by name and never learns where they run (network/weight_source.py).
"""

import torch

from localrun.cpu import bridge
from localrun.cpu.bridge import Embedding, HeadLinear, JoinedMLP, Linear
from localrun.gguf.file import GGUFFile
from localrun.models.tensors import GGUFTensors
from localrun.network.hyper import mix_streams
from localrun.network.moe import choose_experts, gated
from localrun.network.weight_source import RoutedExperts
from localrun.ranks.remote import Remote
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool


class LayerWeights(GGUFTensors):
    """The tensors of one file as modules over torch tensors; with `remote`, other ranks have shares of its experts."""

    choose_experts, mix_streams = staticmethod(choose_experts), staticmethod(mix_streams)
    gated = staticmethod(gated)

    def __init__(self, file: GGUFFile, pool: Pool, remote: Remote | None = None):
        super().__init__(file, remote.own if remote else None)
        self.pool, self._remote = pool, remote
        self.attend = bridge.Attend(pool)
        self.attend_rebuilt = bridge.AttendRebuilt(pool) if bridge.IN_INTEGERS else None
        self.attend_chosen, self.choose_rows = bridge.AttendChosen(pool), bridge.ChooseRows(pool)

    def vector(self, name: str) -> torch.Tensor:
        """A tensor that is no matrix, float32."""
        return torch.from_numpy(self.array(name))

    def embedding(self, name: str) -> Embedding:
        """Rows by token id."""
        return Embedding(self.pool, self.matrix(name))

    def linear(self, name: str) -> Linear:
        """A matrix (out, in)."""
        return Linear(self.pool, self.matrix(name))

    def heads(self, name: str, n_groups: int | None = None) -> HeadLinear:
        """One matrix a head, (H, out, in); of a plain matrix its rows in so many groups."""
        matrix = self.matrix(name) if n_groups is None else self.grouped(name, n_groups)
        return HeadLinear(self.pool, matrix)

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> tuple[HeadLinear, HeadLinear]:
        """A matrix of n_heads * sum(rows) rows as two: each head's first rows[0] rows, and its last rows[1]."""
        first, last = self.split_matrix(name, n_heads, rows)
        return HeadLinear(self.pool, first), HeadLinear(self.pool, last)

    def joined_mlp(self, gate: str, up: str, down: str) -> JoinedMLP | None:
        """down of the activation of gate and up, in one call."""
        matrices = map(self.matrix, (gate, up, down))
        return JoinedMLP(self.pool, ExpertMatrices(*matrices, activation=self.activation))

    def expert_table(self, index: int) -> torch.Tensor:
        """int32 (vocab, K): the experts of each token in layer `index`, of which there is a table."""
        return torch.from_numpy(self.expert_ids(index))

    def experts(self, index: int) -> RoutedExperts:
        """The routed experts of layer `index`."""
        own = bridge.Experts(self.pool, self.expert_matrices(index))
        return bridge.SharedExperts(own, self._remote, index) if self._remote and self._remote.has(index) else own
