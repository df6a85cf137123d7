"""Where torch tensors meet the CPU kernels: quantised matrices as callables over float32 tensors.

The only module that passes torch memory to quant. Weights stay in the file's map, in their blocks; nothing here keeps
a dequantised copy. Letters: T tokens, G groups (attention heads), E experts, K experts per token, D hidden_size.

Experts are on the CPU for a network there (Experts), for a device's step of a few tokens (StepExperts), or for its
prefill (PrefillExperts). All kinds, those in a device's memory too, have begin(x, ids, weights) of float32 (T, D),
int64 (T, K) and float32 (T, K), which gives a callable that waits for the weighted sum, float32 (T, D), and returns it.
An id of -1 stands for an expert that is not here.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from quant.decode.program import MOST_TOKENS
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.ops import attention as prompt_attention
from quant.ops import experts as quant_experts
from quant.ops import linear as quant_linear
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.gpu.device import Cuda, StandIn


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """float32 in C order, as the kernels read it."""
    return x.to(torch.float32).contiguous()


class Linear:
    """y = W x for one matrix (out, in)."""

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, in) -> (T, out)."""
        x = _as_rows(x)
        out = torch.empty(x.shape[0], self.weight.n_rows)
        quant_linear.multiply(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out


class JoinedMLP:
    """down(silu(gate x) * up x) as the only expert of all tokens."""

    def __init__(self, pool: Pool, matrices: ExpertMatrices):
        self.pool, self.matrices = pool, matrices

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, D) -> (T, D)."""
        x, n_tokens = _as_rows(x), x.shape[0]
        out, ids, weights = torch.empty_like(x), np.zeros((n_tokens, 1), np.int64), np.ones((n_tokens, 1), np.float32)
        quant_experts.run(self.pool, self.matrices, x.data_ptr(), ids, weights, out.data_ptr())
        return out


def joined(gate: Callable, up: Callable, down: Callable) -> JoinedMLP | None:
    """The three as one, if they are plain matrices on the CPU."""
    if not all(type(part) is Linear for part in (gate, up, down)):
        return None
    return JoinedMLP(gate.pool, ExpertMatrices(gate.weight, up.weight, down.weight))


class HeadLinear:
    """One matrix a head: W (G, out, in)."""

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, in) -> (T, G, out): W[g] x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_rows)
        quant_linear.multiply(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def transposed(self, x: torch.Tensor) -> torch.Tensor:
        """float32 (T, G, out) -> (T, G, in): W[g]^T x[t, g]."""
        x = _as_rows(x)
        out = torch.empty(*x.shape[:2], self.weight.n_cols)
        quant_linear.multiply_transposed(self.pool, self.weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out

    def dense(self, first: int, count: int) -> torch.Tensor:
        """float32 (count, out, in): the matrices of heads first..first+count, for one product over many tokens."""
        weight = self.weight
        rows = torch.arange(first * weight.n_rows, (first + count) * weight.n_rows)
        out = torch.empty(count, weight.n_rows, weight.n_cols)
        quant_linear.expand_rows(self.pool, weight, rows.numpy(), out.data_ptr())
        return out


class Embedding:
    """Rows of a matrix by token id."""

    def __init__(self, pool: Pool, weight: QuantMatrix):
        self.pool, self.weight = pool, weight

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 (T,) -> float32 (T, D)."""
        out = torch.empty(ids.shape[0], self.weight.n_cols)
        quant_linear.expand_rows(self.pool, self.weight, ids.numpy(), out.data_ptr())
        return out


class Attend:
    """softmax(q k^T) v over float32 tensors whose last dimensions are contiguous; each token sees itself and before."""

    def __init__(self, pool: Pool):
        self.pool = pool

    def __call__(
        self,
        parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
        v_SGV: torch.Tensor,
        scale: float,
        out_THV: torch.Tensor,
    ) -> None:
        """out_THV = softmax(scale * q k^T) v, of the last T of S tokens.

        Args:
            parts: queries (T, H, d) and keys (S, G, d) or, shared by all heads, (S, 1, d); products of two parts are
                added. H / G heads share one's keys and values.
        """
        (n_tokens, n_heads, width), (n_cached, n_groups, _) = out_THV.shape, v_SGV.shape
        prompt_attention.attend(
            self.pool,
            [(_strides(q), _strides(k), q.shape[-1]) for q, k in parts],
            _strides(v_SGV), width, _strides(out_THV),
            n_heads=n_heads, shared=n_heads // n_groups, n_tokens=n_tokens, n_before=n_cached - n_tokens, scale=scale,
        )  # fmt: skip


def _strides(x: torch.Tensor) -> prompt_attention.Rows:
    """Where (T, H, d) lies; a single head for all."""
    assert x.dtype == torch.float32 and x.stride(-1) == 1
    return prompt_attention.Rows(x.data_ptr(), 4 * x.stride(1) if x.shape[1] > 1 else 0, 4 * x.stride(0))


Finish = Callable[[], torch.Tensor]


class Experts:
    """The routed experts of a layer, for tensors on the CPU."""

    def __init__(self, pool: Pool, experts: ExpertMatrices):
        self.pool, self.experts = pool, experts

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        """The sum, at once."""
        x = _as_rows(x)
        out = torch.empty_like(x)
        quant_experts.run(self.pool, self.experts, x.data_ptr(), ids.numpy(), weights.numpy(), out.data_ptr())
        return lambda: out


class _Staging:
    """Memory of the host that a device copies inputs to and sums from."""

    def __init__(self, device: "Cuda | StandIn", n_tokens: int, hidden: int, top_k: int):
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
        """As the module says."""
        return self._begin(self._layer, x, ids, weights)


class StepExperts:
    """Layers' routed experts for a device's steps of up to MOST_TOKENS tokens, which may be captured.

    On a branch beside the device's own work: copies down, a host node that has the workers compute, a copy up. All
    layers use the same host memory, one after the other. Steps run within Pool.exclusive().
    """

    def __init__(self, device: "Cuda | StandIn", pool: Pool, layers: Mapping[int, ExpertMatrices], top_k: int) -> None:
        """layers: by index, all of one width; their tensors must stay mapped."""
        from quant.decode.host_node import ExpertNodes

        self._device = device
        self._staging = _Staging(device, MOST_TOKENS, next(iter(layers.values())).gate.n_cols, top_k)
        buffers = (getattr(self._staging, name).data_ptr() for name in ("x", "ids", "weights", "out"))
        self._nodes = ExpertNodes(pool, list(layers.values()), top_k, *buffers)
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

    def __init__(self, device: "Cuda | StandIn", pool: Pool):
        self._device, self._pool = device, pool
        self._thread = ThreadPoolExecutor(1, "localrun-experts")
        self._jobs: list[Future[None]] = []
        self._free: list[_Staging] = []

    def layer(self, experts: ExpertMatrices) -> _LayerExperts:
        """The experts of a layer, whose tensors must stay mapped."""
        return _LayerExperts(self._begin, experts)

    def _begin(self, experts: ExpertMatrices, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        staging = self._take(x, ids)
        staging.fill(x, ids, weights)
        job = self._thread.submit(self._compute, experts, staging, x.shape[0], self._device.mark())
        self._jobs = [other for other in self._jobs if not other.done()] + [job]
        return partial(self._collect, job, staging, x)

    def _take(self, x: torch.Tensor, ids: torch.Tensor) -> _Staging:
        """Memory that nobody uses: fill()'s copies come after those from it on the same stream."""
        self._free = [staging for staging in self._free if staging.holds(x, ids)]
        return self._free.pop() if self._free else _Staging(self._device, *x.shape, ids.shape[1])

    def _compute(self, experts: ExpertMatrices, staging: _Staging, n_tokens: int, copied: Callable[[], None]) -> None:
        copied()
        ids, weights = staging.ids[:n_tokens].numpy(), staging.weights[:n_tokens].numpy()
        quant_experts.run(self._pool, experts, staging.x.data_ptr(), ids, weights, staging.out.data_ptr())

    def _collect(self, job: "Future[None]", staging: _Staging, x: torch.Tensor) -> torch.Tensor:
        job.result()
        out = torch.empty_like(x)
        out.copy_(staging.out[: x.shape[0]], non_blocking=True)
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
