"""Routed experts that the CPU computes for a network on a device: copies to the host, the workers, a copy back.

Of a recorded step of a few tokens (StepExperts), or of a prompt, beside the device (PrefillExperts); either gives
network/weight_source.py's RoutedExperts for each layer. Letters: T tokens, K experts per token, D hidden_size.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import numpy as np
import torch

from localrun.gpu.device import Cuda, StandIn
from localrun.network.weight_source import Finish
from quant.decode.host_node import ExpertNodes, OtherRanks
from quant.decode.program import MOST_TOKENS
from quant.matrix import ExpertMatrices
from quant.ops import experts as quant_experts
from quant.threads.pool import Pool

# x (T, D), ids and weights (T, K) -> ids of what this rank is to compute, and what adds other ranks' sums to its own.
BeginOthers = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, Callable[[np.ndarray], None]]]


def _begin_nobody(x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, Callable[..., None]]:
    """BeginOthers, of experts that are all here."""
    return ids, lambda sums: None


class _Staging:
    """Memory of the host that a device copies inputs to and sums from."""

    def __init__(self, device: Cuda | StandIn, n_tokens: int, hidden: int, top_k: int):
        self.x = device.pinned((n_tokens, hidden), torch.float32)
        self.ids = device.pinned((n_tokens, top_k), torch.int64)
        self.weights = device.pinned((n_tokens, top_k), torch.float32)
        self.out = device.pinned((n_tokens, hidden), torch.float32)

    def holds(self, x: torch.Tensor, ids: torch.Tensor) -> bool:
        """Whether there is room for so many tokens of this shape."""
        widths = self.x.shape[1], self.ids.shape[1]
        return x.shape[0] <= self.x.shape[0] and (x.shape[1], ids.shape[1]) == widths

    def fill(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Queue copies of the first rows."""
        for here, there in ((self.x, x), (self.ids, ids), (self.weights, weights)):
            here[: x.shape[0]].copy_(there, non_blocking=True)


class _LayerExperts:
    """One layer of a kind of experts."""

    def __init__(self, begin: Callable[..., Finish], layer: Any):
        self._begin, self._layer = begin, layer

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """As RoutedExperts."""
        return self._begin(self._layer, x, ids, weights)


class StepExperts:
    """Layers' routed experts for a device's steps of up to MOST_TOKENS tokens, which may be captured.

    On a branch beside the device's own work: copies down, a host node that has the workers compute, a copy up. All
    layers use the same host memory, one after the other. Steps run within Pool.exclusive().
    """

    def __init__(
        self, device: Cuda | StandIn, pool: Pool, layers: Mapping[int, ExpertMatrices], top_k: int,
        others: Sequence[OtherRanks | None] = (),
    ) -> None:  # fmt: skip
        """layers: by index, all of one width; their tensors must stay mapped. others: as ExpertNodes has them."""
        self._device = device
        self._staging = _Staging(device, MOST_TOKENS, next(iter(layers.values())).gate.n_cols, top_k)
        buffers = (getattr(self._staging, name).data_ptr() for name in ("x", "ids", "weights", "out"))
        self._nodes = ExpertNodes(pool, list(layers.values()), top_k, *buffers, others)
        self._places = {index: place for place, index in enumerate(layers)}

    def layer(self, index: int) -> _LayerExperts:
        """The experts of layer `index`."""
        return _LayerExperts(self._begin, self._places[index])

    def _begin(self, place: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        n_tokens, out = x.shape[0], torch.empty_like(x)
        with self._device.side() as branch:
            self._staging.fill(x, ids, weights)
            self._device.call(self._nodes.function, self._nodes.argument(place, n_tokens))
            out.copy_(self._staging.out[:n_tokens], non_blocking=True)
        return partial(self._join, branch, out, x, ids, weights)

    def _join(self, branch: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """inputs: held until now, or the device's allocator could give them away before the branch has read them."""
        self._device.join(branch)
        return out


class PrefillExperts:
    """Layers' routed experts for many tokens: on copies in host memory, in one thread that waits for the copies."""

    def __init__(self, device: Cuda | StandIn, pool: Pool):
        self._device, self._pool = device, pool
        self._thread = ThreadPoolExecutor(1, "localrun-experts")
        self._jobs: list[Future[Callable[[np.ndarray], None]]] = []
        self._free: list[_Staging] = []

    def layer(self, experts: ExpertMatrices, begin_others: BeginOthers = _begin_nobody) -> _LayerExperts:
        """The experts of a layer, whose tensors must stay mapped. begin_others: has other ranks compute shares."""
        return _LayerExperts(self._begin, (experts, begin_others))

    def _begin(
        self, layer: tuple[ExpertMatrices, BeginOthers], x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Finish:
        staging = self._take(x, ids)
        staging.fill(x, ids, weights)
        job = self._thread.submit(self._compute, *layer, staging, x.shape[0], self._device.mark())
        self._jobs = [other for other in self._jobs if not other.done()] + [job]
        return partial(self._collect, job, staging, x)

    def _take(self, x: torch.Tensor, ids: torch.Tensor) -> _Staging:
        """Memory that nobody uses: fill()'s copies come after those from it on the same stream."""
        self._free = [staging for staging in self._free if staging.holds(x, ids)]
        return self._free.pop() if self._free else _Staging(self._device, *x.shape, ids.shape[1])

    def _compute(
        self, experts: ExpertMatrices, begin_others: BeginOthers, staging: _Staging, n_tokens: int,
        copied: Callable[[], None],
    ) -> Callable[[np.ndarray], None]:  # fmt: skip
        """This rank's part; what comes back waits for the others', so that the thread goes on with the next batch."""
        copied()
        x, ids, weights = (rows[:n_tokens].numpy() for rows in (staging.x, staging.ids, staging.weights))
        ids, add_others = begin_others(x, ids, weights)
        quant_experts.run(self._pool, experts, x.ctypes.data, ids, weights, staging.out.data_ptr())
        return add_others

    def _collect(self, job: Future[Callable[[np.ndarray], None]], staging: _Staging, x: torch.Tensor) -> torch.Tensor:
        add_others, sums = job.result(), staging.out[: x.shape[0]]
        add_others(sums.numpy())
        out = torch.empty_like(x)
        out.copy_(sums, non_blocking=True)
        self._free.append(staging)
        return out

    def cancel(self) -> None:
        """Drop what has not started, wait for what has: afterwards nothing of it uses the workers or the file."""
        for job in self._jobs:
            job.cancel()
        wait(self._jobs)
        self._jobs.clear()

    def close(self) -> None:
        """End the thread."""
        self.cancel()
        self._thread.shutdown()
