"""How prompts go through the layers, by what one layer took: in one or two micro-batches, or with its experts uploaded.

Measured when the first prompt comes that is long enough for it to matter, on random vectors and choices.

Letters: T tokens, D hidden_size, E experts, K experts per token.
"""

import math
import time
from collections.abc import Callable

import torch

from localrun.gpu.caches.cache import new_cache
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.routed import Mode, Routed
from localrun.gpu.prefill import LayerTimes, Seconds, best_batches, best_chunks, streaming_threshold
from localrun.limits import PREFILL_CHUNK
from localrun.network.model import Network
from localrun.network.weight_source import Finish
from localrun.placement.sizes import activation_bytes

_FEW, _MANY = 64, PREFILL_CHUNK  # tokens that a layer is measured with; fewer are one batch
_MOST_CHUNKS = 8  # that are evaluated at a time: beyond, an upload is a small part, and Ctrl-C waits for a chunk


class Tuning:
    """What is known of a model's layers on one device.

    Attributes:
        few, many: tokens that a layer is measured with, when the first prompt of at least `few` comes.
        times: what was measured; None before.
        chunk: tokens that are evaluated at a time where the CPU has a part in it.
        most: the same where experts are uploaded, as far as there is memory.
        threshold: tokens at a time from which on a layer's experts are uploaded; None for never.
    """

    def __init__(self, device: Cuda | StandIn, network: Network, routed: Routed, spare: int):
        """Of the layers whose experts are `routed`. spare: bytes of the device that nothing else has."""
        self._device, self._network, self._routed = device, network, routed
        self._may_stream = 0 < routed.streamable <= spare
        self.few, self.many, self.chunk = _FEW, _MANY, PREFILL_CHUNK
        n_more = max(0, spare - routed.streamable) // activation_bytes(network.config)
        # A layer that has experts in both memories is not uploaded, and the CPU's memory is that of one chunk.
        can_be_longer = all(map(routed.is_whole, routed.in_ram))
        self.most = PREFILL_CHUNK * (min(_MOST_CHUNKS, 1 + n_more) if can_be_longer else 1)
        self.times: LayerTimes | None = None
        self.threshold: int | None = None

    def choose(self, n_tokens: int) -> tuple[Mode, int]:
        """How experts in RAM are computed for a prompt's n_tokens, and in how many batches these go."""
        self._measure_for(n_tokens)
        if self.times is None:
            return Mode.PREFILL, 1
        if self.threshold is not None and n_tokens >= self.threshold:
            return Mode.STREAM, 1
        return Mode.PREFILL, best_batches(self.times, n_tokens)

    def chunks(self, n_tokens: int) -> list[int]:
        """How many of a prompt's n_tokens to evaluate at a time: of each choose() then says how."""
        self._measure_for(n_tokens)
        if self.times is None:
            return [min(self.chunk, n_tokens - first) for first in range(0, n_tokens, self.chunk)]
        return best_chunks(self.times, n_tokens, self.chunk, self.most)

    def _measure_for(self, n_tokens: int) -> None:
        """Measure if there is a choice, it has not been done, and the prompt is long enough."""
        if self.times is None and self._routed.in_ram and n_tokens >= self.few:
            self.use(self.measure())

    def use(self, times: LayerTimes) -> None:
        """Choose by these times from now on."""
        self.times, self.threshold = times, streaming_threshold(times, self.chunk, self.most)

    def measure(self) -> LayerTimes:
        """Of the last layer that has experts in RAM: where only some are, it is the last that has none elsewhere."""
        index = max(self._routed.in_ram, key=lambda i: (self._routed.is_whole(i), i))
        attention = self._line(lambda n_tokens: self._attention(index, n_tokens))
        self._routed.mode = Mode.PREFILL
        by_cpu = self._line(lambda n_tokens: self._experts(index, n_tokens))
        if not self._can_stream():
            return LayerTimes(attention, by_cpu, Seconds(0.0, 0.0), math.inf)
        self._routed.mode = Mode.STREAM
        first_s = self._seconds(self._experts(index, self.few))
        by_device = self._line(lambda n_tokens: self._experts(index, n_tokens))
        return LayerTimes(attention, by_cpu, by_device, max(0.0, first_s - float(by_device(self.few))))

    def _can_stream(self) -> bool:
        """Whether there is work memory for it, which is set aside: others may have taken what was free at the start."""
        if self._may_stream:
            try:
                self._routed.allow_streaming()
            except torch.OutOfMemoryError:
                self._may_stream = False
        return self._may_stream

    def _line(self, work: Callable[[int], Callable[[], object]]) -> Seconds:
        """What work(n_tokens) takes, each the second time: the first compiles kernels and touches memory."""
        seconds = []
        for n_tokens in (self.few, self.many):
            run = work(n_tokens)
            self._seconds(run)
            seconds.append(self._seconds(run))
        return Seconds.measured(self.few, seconds[0], self.many, seconds[1])

    def _seconds(self, run: Callable[[], object]) -> float:
        self._device.synchronize()
        before = time.perf_counter()
        run()
        self._device.synchronize()
        return time.perf_counter() - before

    def _attention(self, index: int, n_tokens: int) -> Callable[[], object]:
        """A layer without its routed experts, on an empty context."""
        c, layer, device = self._network.config, self._network.layers[index], self._device.torch
        x_TD, ids_T = self._vectors(n_tokens), torch.zeros(n_tokens, dtype=torch.int64, device=device)
        x_TD = x_TD[:, None].repeat(1, c.hc_mult, 1) if c.hc_mult else x_TD
        cache = new_cache(c, n_tokens, device, n_layers=index + 1)

        def run() -> None:
            experts, layer.mlp.experts = layer.mlp.experts, _NoExperts()
            try:
                layer(x_TD, cache, ids_T)
            finally:
                layer.mlp.experts = experts

        return run

    def _experts(self, index: int, n_tokens: int) -> Callable[[], object]:
        """The routed experts of a layer."""
        c, x_TD = self._network.config, self._vectors(n_tokens)
        ids_TK = torch.rand(n_tokens, c.n_routed_experts, device=x_TD.device).argsort(-1)[:, : c.num_experts_per_tok]
        weights_TK = torch.full(ids_TK.shape, 1 / c.num_experts_per_tok, device=x_TD.device)
        experts = self._network.layers[index].mlp.experts
        return lambda: experts.begin(x_TD, ids_TK, weights_TK)()

    def _vectors(self, n_tokens: int) -> torch.Tensor:
        return torch.randn(n_tokens, self._network.config.hidden_size, device=self._device.torch)


class _NoExperts:
    """Experts that add nothing."""

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Finish:
        return lambda: torch.zeros_like(x)
