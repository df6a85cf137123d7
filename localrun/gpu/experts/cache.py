"""VRAM as a cache of routed experts: which it holds changes from token to token, and no token waits for that.

What a recorded step reads is a table in device memory, expert -> slot, a row for each layer: experts in VRAM are
computed there, all others by the CPU at the same time (routed.py). All lie in RAM as well, so that each can leave VRAM
at any moment. After a forward pass, when the device has nothing to do, the host reads how often each expert was chosen,
asks the policy (policy.py) and writes the table anew: with experts whose copies have arrived, without those
whose slots are to be overwritten. Then a thread copies into these slots, on a stream of its own, once the table is
there. An expert that is still coming is the CPU's, and so is one whose copy failed.

Letters: L layers with experts, E experts of a layer, N slots of a layer, T tokens, K experts per token.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.in_vram import Experts
from localrun.gpu.experts.policy import Policy, Swap
from localrun.gpu.experts.stream import Uploader, host_bytes
from quant.matrix import ExpertMatrices

_MOST_COMING = 8  # copies at a time: as many as are done between two tokens, or a few that are late
_PIECE_BYTES = 4 << 20  # of page-locked memory, twice


class ExpertCache:
    """The experts that VRAM holds now, of all layers.

    Attributes:
        in_vram: layer -> its slots; which expert lies where is read from its row of the table.
        policy: says which experts come and go.
        n_arrived: experts that have come since the start.
        failure: why none comes any more; "" while they do.
    """

    def __init__(
        self,
        device: Cuda | StandIn,
        layers: Mapping[int, ExpertMatrices],
        first: Mapping[int, Sequence[int]],
        notice: Callable[[str], None],
    ):
        """Uploads the experts that are the first in the slots.

        Args:
            layers: by index; their tensors must stay mapped.
            first: layer -> ids, as many as each layer has slots.
            notice: told if a copy fails, after which there are no more.
        """
        self._device, self._notice = device, notice
        self._host = list(layers.values())
        self._places = {index: place for place, index in enumerate(layers)}
        self.in_vram = {index: Experts(experts, device.torch, first[index]) for index, experts in layers.items()}
        n_experts = self._host[0].gate.n_groups
        self.policy = Policy(n_experts, np.array([first[index] for index in layers]))
        shape = len(layers), n_experts
        self._table, self._counts = (torch.zeros(shape, dtype=torch.int32, device=device.torch) for _ in range(2))
        self._table_on_host, self._counts_on_host = (device.pinned(shape, torch.int32).zero_() for _ in range(2))
        self._one = torch.ones(1, dtype=torch.int32, device=device.torch)
        for place, here in enumerate(self.in_vram.values()):
            here.slot_of = self._table[place]
        self._write_table()
        self._uploader = Uploader(device, _PIECE_BYTES, fill=_fill_on_one_core)
        self._thread = ThreadPoolExecutor(1, "localrun-expert-cache")
        self._coming: list[tuple[Swap, Future[None]]] = []
        self.n_arrived, self.failure = 0, ""

    def start(self) -> None:
        """A forward pass begins."""
        self._counts.zero_()

    def note(self, index: int, ids: torch.Tensor) -> None:
        """int64 (T, K): what tokens of it chose in layer `index`."""
        flat = ids.flatten()
        self._counts[self._places[index]].scatter_add_(0, flat, self._one.expand(flat.shape[0]))

    def read(self) -> None:
        """Its end is queued: settle() may be called once that is done."""
        self._counts_on_host.copy_(self._counts, non_blocking=True)

    def settle(self, n_tokens: int) -> None:
        """After a forward pass of so many tokens, while the device has nothing to do: make use of what has arrived."""
        arrived = [(swap, job) for swap, job in self._coming if job.done()]
        self._coming = [(swap, job) for swap, job in self._coming if not job.done()]
        for swap, job in arrived:
            self.policy.finish(swap, arrived=job.exception() is None)
            self.n_arrived += job.exception() is None
            self._tell(job.exception())
        self.policy.observe(self._counts_on_host.numpy(), n_tokens)
        swaps = [] if self.failure else self.policy.swaps(_MOST_COMING - len(self._coming))
        if arrived or swaps:
            written = self._write_table()
            self._coming += [(swap, self._thread.submit(self._copy, swap, written)) for swap in swaps]

    def _write_table(self) -> Callable[[], None]:
        """Queue the policy's table for the device; what comes back waits until it is there."""
        self._table_on_host.copy_(torch.from_numpy(self.policy.table()))
        self._table.copy_(self._table_on_host, non_blocking=True)
        return self._device.mark()

    @torch.inference_mode()
    def _copy(self, swap: Swap, written: Callable[[], None]) -> None:
        """In the thread: bring an expert to its slot, which nothing reads once the table is written."""
        written()
        host, here = self._host[swap.layer], list(self.in_vram.values())[swap.layer]
        with self._device.errors(), self._device.aside():
            for weight, matrix in ((host.gate, here.gate), (host.up, here.up), (host.down, here.down)):
                first = swap.slot * matrix.group_bytes
                slot = matrix.data[first : first + matrix.group_bytes]
                self._uploader.copy(host_bytes(weight, swap.expert), slot)
            self._device.mark()()

    def _tell(self, error: BaseException | None) -> None:
        if error is not None and not self.failure:
            self.failure = f"an expert could not be copied to the GPU ({error})"
            self._notice(f"{self.failure}: those that are there stay, no more come")

    @property
    def n_coming(self) -> int:
        """Experts whose copies are under way, or have not started."""
        return sum(not job.done() for _, job in self._coming)

    def wait(self) -> None:
        """Until these have arrived or failed; the next settle() makes use of them."""
        wait([job for _, job in self._coming])

    def misplaced(self) -> list[tuple[int, int]]:
        """Layer and expert of what the table on the device names and its slot does not hold, byte for byte; none."""
        found, table = [], self._table.cpu()
        for (index, here), host, slot_E in zip(self.in_vram.items(), self._host, table, strict=True):
            for expert in (slot_E >= 0).nonzero().flatten().tolist():
                for weight, matrix in ((host.gate, here.gate), (host.up, here.up), (host.down, here.down)):
                    first = int(slot_E[expert]) * matrix.group_bytes
                    slot = matrix.data[first : first + matrix.group_bytes]
                    if (index, expert) not in found and not torch.equal(slot.cpu(), host_bytes(weight, expert)):
                        found.append((index, expert))
        return found

    def close(self) -> None:
        """Drop what has not started, wait for what has, end the thread."""
        self._thread.shutdown(cancel_futures=True)


def _fill_on_one_core(piece: torch.Tensor, part: torch.Tensor) -> None:
    """The others belong to the workers, which compute meanwhile; torch's copy would take them."""
    np.copyto(piece.numpy(), part.numpy())
