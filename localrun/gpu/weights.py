"""A model's tensors as modules over devices' memory: what localrun.cpu.weights is to the CPU.

What the placement gives to a device is uploaded as the network asks for it, once; the pages of the file that held it
are let go. The file's map stays the home of all experts that compute on the CPU.
"""

from collections.abc import Callable, Sequence

import torch

from localrun.gguf.file import GGUFFile
from localrun.gguf.residency import Span
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.in_vram import gated
from localrun.gpu.experts.routed import Routed
from localrun.gpu.experts.router import choose_experts
from localrun.gpu.matrices.linear import Embedding, HeadLinear, Linear
from localrun.gpu.streams import mix_streams
from localrun.models import names
from localrun.models.config import Config
from localrun.models.tensors import GGUFTensors
from localrun.network.weight_source import RoutedExperts
from localrun.placement.memory_table import DRAFTS_HEAD, MTP, RAM
from localrun.placement.placement import CPU, GPU, Placement
from localrun.ranks.remote import Remote
from localrun.ranks.sharing import Share
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool


class DeviceWeights(GGUFTensors):
    """The tensors of one file as modules over devices' tensors, and its routed experts wherever they are.

    Attributes:
        devices: of each layer. What comes before the layers is with the first, what comes behind with the last.
        routed: the experts of each device's layers.
    """

    choose_experts, mix_streams = staticmethod(choose_experts), staticmethod(mix_streams)
    gated = staticmethod(gated)

    def __init__(
        self,
        file: GGUFFile,
        config: Config,
        placement: Placement,
        devices: Sequence[Cuda | StandIn],
        pool: Pool,
        notice: Callable[[str], None],
        remote: Remote | None = None,
    ):
        """Uploads the experts that go to devices. The file must stay open.

        Args:
            devices: those of the placement's cards.
            notice: as HybridModel has it.
            remote: other ranks that have shares of the experts.
        """
        super().__init__(file, remote.own if remote else None)
        top_k, is_cache = config.num_experts_per_tok, placement.expert_slots > 0
        self.devices: list[torch.device] = []
        self.routed: list[Routed] = []
        for device, here in zip(devices, placement.layers, strict=True):
            self.devices += [device.torch] * len(here)
            layers = {i: self.expert_matrices(i) for i in here if has_experts(self, i)}
            self.routed.append(Routed(device, pool, layers, placement.experts, top_k, is_cache, notice, remote))

    def _home(self, name: str) -> torch.device:
        """Of a tensor that is no embedding."""
        layer = names.layer_of(name)
        return self.devices[-1 if layer is None else layer]

    def vector(self, name: str) -> torch.Tensor:
        """A tensor that is no matrix, float32."""
        return torch.from_numpy(self.array(name)).to(self._home(name))

    def embedding(self, name: str) -> Embedding:
        """Rows by token id."""
        return Embedding(self.matrix(name), self.devices[0])

    def linear(self, name: str) -> Linear:
        """A matrix (out, in)."""
        return Linear(self.matrix(name), self._home(name))

    def heads(self, name: str, n_groups: int | None = None) -> HeadLinear:
        """One matrix a head, (H, out, in); of a plain matrix its rows in so many groups."""
        matrix = self.matrix(name) if n_groups is None else self.grouped(name, n_groups)
        return HeadLinear(matrix, self._home(name))

    def split_heads(self, name: str, n_heads: int, rows: tuple[int, int]) -> tuple[HeadLinear, HeadLinear]:
        """A matrix of n_heads * sum(rows) rows as two: each head's first rows[0] rows, and its last rows[1]."""
        first, last = self.split_matrix(name, n_heads, rows)
        return HeadLinear(first, self._home(name)), HeadLinear(last, self._home(name))

    def joined_mlp(self, gate: str, up: str, down: str) -> None:
        """A device has no such call."""

    def expert_table(self, index: int) -> torch.Tensor:
        """int32 (vocab, K): the experts of each token in layer `index`, of which there is a table."""
        return torch.from_numpy(self.expert_ids(index)).to(self.devices[index])

    def experts(self, index: int) -> RoutedExperts:
        """The routed experts of layer `index`."""
        routed = next(routed for routed in self.routed if index in routed.layers)
        return routed.layer(index)


def has_experts(tensors: GGUFTensors, index: int) -> bool:
    """Whether layer `index` has routed experts."""
    return tensors.has(names.layer(tensors.architecture, index, "mlp.gate"))


def spans_on_device(tensors: GGUFTensors, placement: Placement) -> list[Span]:
    """The parts of the file's map that have been uploaded whole."""
    homes, files = placement.tensors, tensors.file.tensors
    return [(files[name].data.ctypes.data, files[name].n_bytes) for name in homes if homes[name] == GPU]


def spans_in_ram(tensors: GGUFTensors, config: Config, placement: Placement, share: Share | None = None) -> list[Span]:
    """The parts of the file's map that are used once all has been uploaded. share: this rank's, of some experts."""
    drafts, shared = placement.n_bytes(RAM, MTP) > 0, share.names if share else ()
    spans = [
        (tensor.data.ctypes.data, tensor.n_bytes)
        for name, tensor in tensors.file.tensors.items()
        if placement.tensors[name] == CPU and name not in shared and (drafts or not names.is_nextn(name, config))
    ]
    if placement.n_bytes(RAM, DRAFTS_HEAD) > 0:  # the model's own, which is on the device as well
        head = tensors.file.tensors[names.lm_head(tensors.has)]
        spans.append((head.data.ctypes.data, head.n_bytes))
    for index, ids in placement.experts.items():
        if 0 < len(ids) < placement.n_experts and not placement.expert_slots:
            spans += _expert_spans(tensors.expert_matrices(index), set(ids))
    return spans + (share.spans if share else [])


def _expert_spans(experts: ExpertMatrices, elsewhere: set[int]) -> list[Span]:
    """Of a layer's experts but those that are elsewhere."""
    here = [expert for expert in range(experts.gate.n_groups) if expert not in elsewhere]
    return [
        (weight.address + expert * weight.group_bytes, weight.n_rows * weight.row_bytes)
        for weight in (experts.gate, experts.up, experts.down)
        for expert in here
    ]
