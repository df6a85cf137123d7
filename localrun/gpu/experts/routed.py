"""All layers' routed experts, each in VRAM, in RAM, or some of them here and some there, and how those in RAM are
computed at present.

Letters: T tokens, D hidden_size, E experts, K experts per token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from functools import partial

import torch

from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts import in_vram as vram
from localrun.gpu.experts.cache import ExpertCache
from localrun.gpu.experts.on_host import PrefillExperts, StepExperts
from localrun.gpu.experts.stream import StreamedExperts, Uploader, work_bytes
from localrun.gpu.matrices.matrix import Matrix
from localrun.network.weight_source import Finish, RoutedExperts
from localrun.ranks.remote import Remote
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool


class Mode(Enum):
    """How experts that lie in RAM are computed: by host nodes of a step (within Pool.exclusive()), by a thread beside
    the device, or by the device after an upload (only layers that lie in RAM whole).
    """

    STEP = "step"
    PREFILL = "prefill"
    STREAM = "stream"


class Routed:
    """The routed experts of a model.

    Attributes:
        mode: of the next begin().
        layers: those that have experts.
        in_ram: layer -> its experts, of those that have some in RAM; of shared ones this rank's part.
        cache: what changes the experts in VRAM, if they are a cache of those in RAM, which are all then.
        streamable: bytes of VRAM that streaming takes for its work; 0 if no layer lies in RAM whole.
    """

    def __init__(
        self,
        device: Cuda | StandIn,
        pool: Pool,
        layers: Mapping[int, ExpertMatrices],
        in_vram: Mapping[int, Sequence[int]],
        top_k: int,
        is_cache: bool = False,
        notice: Callable[[str], None] = lambda line: None,
        remote: Remote | None = None,
    ):
        """Uploads.

        Args:
            layers: of the model, by index; their tensors must stay mapped.
            in_vram: layer -> ids to upload.
            is_cache: whether they are only the first of those that come to VRAM.
            notice: as ExpertCache has it.
            remote: other ranks that have shares of layers; nothing of such a layer is in VRAM.
        """
        self.mode = Mode.PREFILL
        self._device, self._remote, self.layers = device, remote, layers.keys()
        self.in_ram = {i: experts for i, experts in layers.items() if len(in_vram[i]) < experts.gate.n_groups}
        self.cache = ExpertCache(device, layers, in_vram, notice) if is_cache else None
        self._vram = self.cache.in_vram if self.cache is not None else self._upload(layers, in_vram)
        self._whole = [experts for i, experts in self.in_ram.items() if self.is_whole(i)]
        others = [remote.others(i) for i in self.in_ram] if remote else ()
        self._steps = StepExperts(device, pool, self.in_ram, top_k, others) if self.in_ram else None
        self._prefill = PrefillExperts(device, pool) if self.in_ram else None
        self._streamed: StreamedExperts | None = None
        self.streamable = max(map(work_bytes, self._whole), default=0)

    def _upload(
        self, layers: Mapping[int, ExpertMatrices], in_vram: Mapping[int, Sequence[int]]
    ) -> dict[int, vram.Experts]:
        device = self._device.torch
        return {i: vram.Experts(experts, device, in_vram[i]) for i, experts in layers.items() if in_vram[i]}

    def layer(self, index: int) -> RoutedExperts:
        """The experts of layer `index`."""
        return _Layer(self, index)

    def is_whole(self, index: int) -> bool:
        """Whether all of a layer's experts are in this rank's RAM."""
        is_here = index in self.in_ram and (index not in self._vram or self.cache is not None)
        return is_here and not self._is_shared(index)

    def _is_shared(self, index: int) -> bool:
        return self._remote is not None and self._remote.has(index)

    def allow_streaming(self) -> None:
        """Set the work memory for Mode.STREAM aside."""
        self._streamed = StreamedExperts(self._device, Uploader(self._device), self._whole, _compute)

    def homes(self, index: int) -> list[RoutedExperts]:
        """Where the experts of a layer are to be computed now: those in RAM first, as they start others' work."""
        found: list[RoutedExperts] = []
        if self.mode is Mode.STREAM and self._streamed is not None and self.is_whole(index):
            return [self._streamed.layer(self.in_ram[index])]
        if index in self.in_ram:
            found.append(self._in_ram(index))
        if index in self._vram:
            found.append(self._vram[index])
        return found

    def _in_ram(self, index: int) -> RoutedExperts:
        experts = self.in_ram[index]
        if self.mode is Mode.STEP:
            assert self._steps is not None
            here: RoutedExperts = self._steps.layer(index)
        else:
            assert self._prefill is not None
            begin_others = (partial(self._remote.begin_many, index),) if self._is_shared(index) else ()
            here = self._prefill.layer(experts, *begin_others)
        return _Others(here, self._vram[index].slot_of) if index in self._vram else here

    def start(self) -> None:
        """A forward pass begins."""
        if self.cache is not None:
            self.cache.start()

    def end(self) -> None:
        """All of it is queued."""
        if self.cache is not None:
            self.cache.read()

    def settle(self, n_tokens: int) -> None:
        """It is done, and was of so many tokens: experts may come to VRAM now, and others leave it."""
        if self.cache is not None:
            self.cache.settle(n_tokens)

    def cancel(self) -> None:
        """Drop what was begun by Mode.PREFILL, and wait for what can't be dropped."""
        if self._prefill is not None:
            self._prefill.cancel()

    def close(self) -> None:
        """End all threads."""
        if self.cache is not None:
            self.cache.close()
        if self._prefill is not None:
            self._prefill.close()


class _Layer:
    """One layer of them."""

    def __init__(self, routed: Routed, index: int):
        self._routed, self._index = routed, index

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """As RoutedExperts."""
        if self._routed.cache is not None:
            self._routed.cache.note(self._index, ids)
        finishes = [home.begin(x, ids, weights) for home in self._routed.homes(self._index)]
        return finishes[0] if len(finishes) == 1 else _sum_of(finishes)


def _sum_of(finishes: Iterable[Finish]) -> Callable[[], torch.Tensor]:
    def finish() -> torch.Tensor:
        first, *rest = (finish() for finish in finishes)
        return sum(rest, first)

    return finish


def _compute(
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    between: vram.Between,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The sum over experts that have just been uploaded, all of a layer."""
    slot_of_E = torch.arange(gate.n_groups, dtype=torch.int32, device=x.device)
    return vram.Experts.of(gate, up, down, slot_of_E, between).begin(x, ids, weights)()


class _Others:
    """A layer's experts in RAM, without those in VRAM."""

    def __init__(self, experts: RoutedExperts, slot_of_E: torch.Tensor):
        """slot_of_E: on the device; -1 for experts that are not in VRAM."""
        self._experts, self._slot_of = experts, slot_of_E

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """As RoutedExperts."""
        return self._experts.begin(x, ids.masked_fill(self._slot_of[ids] >= 0, -1), weights)
