"""What a step and a prompt take on a GPU and a CPU at once, and what each side has of it, for bench_hybrid.py.

Sides are measured apart: a step without its host nodes is the GPU's part, the same experts without a GPU the CPU's.
They overlap only where shared experts compute beside routed ones; so the time that neither covers is what is left of
the step after both, plus that overlap.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.device import StandIn
from localrun.gpu.experts.on_host import StepExperts
from localrun.gpu.experts.routed import Mode
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof.speed import seconds_of_each
from localrun.limits import cut
from localrun.network.moe import MoE
from quant.threads import bandwidth

ROOF_BYTES = 1 << 30  # of experts, read over and over: beyond all caches but the largest servers'


@dataclass(frozen=True)
class Effort:
    """How much to measure: runs of a step and of a prompt, how often a layer is repeated, contexts, prompts."""

    step_runs: int = 50
    prompt_runs: int = 3
    repeats: int = 8
    tokens: tuple[int, ...] = (1, 2, 5)
    context: int = 1024
    prompts: tuple[int, ...] = (512, 4096)


SMALL = Effort(step_runs=1, prompt_runs=1, repeats=1, tokens=(1, 2), context=3, prompts=(6,))


def times(call: Callable[[], object], runs: int) -> dict[str, float]:
    """Best and median ms of a call, after one that warms up."""
    seconds = seconds_of_each(call, runs)
    return {"best": 1e3 * min(seconds), "median": 1e3 * statistics.median(seconds)}


class Bench:
    """The measurements of one model."""

    def __init__(self, model: HybridModel, effort: Effort):
        self.model, self.effort = model, effort
        self.random = np.random.default_rng(0)

    def ids(self, n_tokens: int) -> list[int]:
        return self.random.integers(0, self.model.vocab_size, n_tokens).tolist()

    def cache(self, n_cached: int, more: int) -> LatentCache:
        """n_cached random rows, as a norm leaves them, and room for more."""
        cache = self.model.new_cache(n_cached + more)
        for rows in (cache.latents, cache.rope_keys):
            rows.normal_()
        cache.advance(n_cached)
        return cache

    # ---- steps

    def decode(self, n_tokens: int) -> dict[str, Any]:
        """A step of so many tokens, in ms, and who has what of it."""
        model, runs = self.model, self.effort.step_runs
        cache = self.cache(self.effort.context, n_tokens)
        replayed = times(lambda: self._step(cache, n_tokens), runs)
        eager = times(lambda: self._eager(cache, n_tokens), runs)
        with _without_nodes(model):
            gpu = times(self._recorded(cache, n_tokens), runs)
            with _without_shared_experts(model):
                alone = times(self._recorded(cache, n_tokens), runs)
        experts = self.experts(n_tokens)
        step, gpu_ms, cpu_ms = replayed["median"], gpu["median"], experts["ms"]["median"]
        beside = min(max(0.0, gpu_ms - alone["median"]), cpu_ms)
        return {
            "tokens": n_tokens,
            "context": self.effort.context,
            "step_ms": replayed,
            "eager_ms": eager,
            "gpu_ms": gpu,
            "cpu_experts": experts,
            "gpu_waits_ms": step - gpu_ms,
            "cpu_waits_ms": step - cpu_ms,
            "covered_by_neither": max(0.0, step - gpu_ms - cpu_ms + beside) / step,
            "tokens_per_s": 1e3 * n_tokens / step,
        }

    def _step(self, cache: LatentCache, n_tokens: int) -> None:
        self.model.forward(self.ids(n_tokens), cache, all_logits=True)
        cache.truncate(self.effort.context)

    @torch.inference_mode()
    def _eager(self, cache: LatentCache, n_tokens: int) -> None:
        """The same launch by launch."""
        self._load(cache, n_tokens)
        with self.model.pool.exclusive():
            self.model.step.queue(n_tokens, cache.bits, self._most(cache, n_tokens))
            self.model.device.synchronize()

    def _most(self, cache: LatentCache, n_tokens: int) -> int:
        return self.model.step.most(cache.length + n_tokens - 1)

    def _load(self, cache: LatentCache, n_tokens: int) -> None:
        positions = range(cache.length, cache.length + n_tokens)
        self.model.step.load(self.ids(n_tokens), [cache] * n_tokens, positions)

    @torch.inference_mode()
    def _recorded(self, cache: LatentCache, n_tokens: int) -> Callable[[], None]:
        """A recording of its own, by the device and the network as they are now."""
        model = self.model
        self._load(cache, n_tokens)
        with model.pool.exclusive():
            replay = model.device.capture(lambda: model.step.queue(n_tokens, cache.bits, self._most(cache, n_tokens)))

        @torch.inference_mode()
        def run() -> None:
            with model.pool.exclusive():
                replay()
                model.device.synchronize()

        return run

    def experts(self, n_tokens: int) -> dict[str, Any]:
        """The CPU's experts of all layers, of random choices: ms, bytes read a second, and what part that is of what
        could be read."""
        layers, c = self.model.routed.in_ram, self.model.config
        if not layers:
            return {"ms": {"best": 0.0, "median": 0.0}}
        nodes = StepExperts(StandIn(), self.model.pool, layers, c.num_experts_per_tok)
        x = torch.randn(n_tokens, c.hidden_size)
        weights = torch.full((n_tokens, c.num_experts_per_tok), 1 / c.num_experts_per_tok)
        n_read: list[int] = []

        def run() -> None:
            n_read.append(0)
            for index, layer in layers.items():
                ids = torch.from_numpy(self._choices(n_tokens))
                nodes.layer(index).begin(x, ids, weights)()
                n_read[-1] += ids.unique().numel() * _expert_bytes(layer)

        with self.model.pool.exclusive():
            ms = times(run, self.effort.step_runs)
        roof, rate = self.read_gb_per_s(), statistics.mean(n_read) / ms["median"] / 1e6
        return {"ms": ms, "gb_per_s": rate, "fraction_of_read": rate / roof}

    def _choices(self, n_tokens: int) -> np.ndarray:
        c = self.model.config
        every = np.tile(np.arange(c.n_routed_experts), (n_tokens, 1))
        return np.ascontiguousarray(self.random.permuted(every, axis=1)[:, : c.num_experts_per_tok])

    def read_gb_per_s(self) -> float:
        """Median, of the experts where they lie."""
        layer = next(iter(self.model.routed.in_ram.values()))
        n_bytes = min(ROOF_BYTES, layer.gate.group_bytes * layer.gate.n_groups)
        return bandwidth.read_bandwidth(self.model.pool, layer.gate.address, n_bytes).median / 1e9

    # ---- layers

    def layers(self) -> dict[str, float]:
        """ms of a step of one token by part: a dense layer, one with experts, the head, and what is left."""
        layers = self.model.network.layers
        dense = next((layer for layer in layers if not isinstance(layer.mlp, MoE)), None)
        sparse = next((layer for layer in layers if isinstance(layer.mlp, MoE)), None)
        rest, n = self._of([]), self.effort.repeats
        found = {"head": self._head()}
        found["rest"] = max(0.0, rest - found["head"])
        for name, layer in (("dense", dense), ("experts", sparse)):
            if layer is not None:
                found[name] = (self._of([layer] * n) - rest) / n
        return found

    def _of(self, layers: Sequence[Any]) -> float:
        """Median ms of a step through these layers."""
        cache, all_layers = self.cache(self.effort.context, 1), self.model.network.layers
        self.model.network.layers = list(layers)
        try:
            return times(self._recorded(cache, 1), self.effort.step_runs)["median"]
        finally:
            self.model.network.layers = all_layers

    @torch.inference_mode()
    def _head(self) -> float:
        model = self.model
        x, out = torch.randn(1, model.config.hidden_size, device=model.device.torch), []

        def head() -> None:
            out[:] = [model.network.lm_head(x)]

        replay = model.device.capture(head)

        def run() -> None:
            replay()
            model.device.synchronize()

        return times(run, self.effort.step_runs)["median"]

    # ---- prompts

    def prompt(self, n_tokens: int) -> dict[str, Any]:
        """Tokens a second of a prompt in the CPU's chunks, of one batch or two, and in chunks and ways as measured."""
        found: dict[str, Any] = {"tokens": n_tokens}
        usual = cut(n_tokens)
        for n_batches in (1, 2):
            with self._chosen((Mode.PREFILL, n_batches)):
                found["two batches" if n_batches == 2 else "one batch"] = self._rate(usual)
        sizes = self.model.chunks(n_tokens)
        found["as measured"] = self._rate(sizes) | {"chunks": sizes}
        return found

    @contextmanager
    def _chosen(self, choice: tuple[Mode, int]) -> Iterator[None]:
        self.model.tuning.choose = lambda n_tokens: choice  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.model.tuning.choose

    def _rate(self, sizes: Sequence[int]) -> dict[str, Any]:
        n_tokens = sum(sizes)
        cache, ids = self.model.new_cache(n_tokens), self.ids(n_tokens)

        def run() -> None:
            cache.truncate(0)
            for size in sizes:
                self.model.forward(ids[cache.length : cache.length + size], cache)

        ms = times(run, self.effort.prompt_runs)
        return {"best_ms": ms["best"], "median_ms": ms["median"], "tokens_per_s": 1e3 * n_tokens / ms["median"]}

    def tuning(self) -> dict[str, Any]:
        """What the model has measured, to choose by."""
        times_ = self.model.tuning.times
        if times_ is None:
            return {}
        lines = {name: vars(getattr(times_, name)) for name in ("attention", "cpu_experts", "device_experts")}
        upload_s = times_.upload_s if times_.upload_s < float("inf") else None
        return lines | {"upload_s": upload_s, "streams_from_tokens": self.model.tuning.threshold}

    def upload_gb_per_s(self) -> float:
        """From pinned memory to the device, best of five."""
        device, n_bytes = self.model.device, 256 << 20 if self.effort is not SMALL else 1 << 20
        host, there = device.pinned((n_bytes,), torch.uint8), torch.empty(n_bytes, dtype=torch.uint8).to(device.torch)

        def run() -> None:
            there.copy_(host, non_blocking=True)
            device.synchronize()

        return n_bytes / times(run, 5)["best"] / 1e6


def _expert_bytes(experts: Any) -> int:
    return sum(weight.n_rows * weight.row_bytes for weight in (experts.gate, experts.up, experts.down))


@contextmanager
def _without_nodes(model: HybridModel) -> Iterator[None]:
    """Host nodes do nothing."""
    model.device.call = lambda function, argument: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.device.call


@contextmanager
def _without_shared_experts(model: HybridModel) -> Iterator[None]:
    mlps = [layer.mlp for layer in model.network.layers if isinstance(layer.mlp, MoE)]
    shared = [mlp.shared_experts for mlp in mlps]
    for mlp in mlps:
        mlp.shared_experts = None
    try:
        yield
    finally:
        for mlp, experts in zip(mlps, shared, strict=True):
            mlp.shared_experts = experts


def projected(layers: dict[str, float], n_dense: int, n_sparse: int, vocabulary: int, own_vocabulary: int) -> dict:
    """Tokens a second of a model of such layers: their times added up, the head's by its rows."""
    head = layers["head"] * vocabulary / own_vocabulary
    ms = n_dense * layers.get("dense", 0.0) + n_sparse * layers["experts"] + head + layers["rest"]
    shape = {"dense_layers": n_dense, "layers_with_experts": n_sparse, "vocabulary": vocabulary}
    return {**shape, "step_ms": ms, "tokens_per_s": 1e3 / ms}
