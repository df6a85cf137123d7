"""Pictures of the planner's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from localrun.pictures import new_figure, save_figure
from localrun.plan.cluster import expert_parallel
from localrun.plan.machine import Machine
from localrun.plan.memory import plan_memory
from localrun.plan.report import SHORT_CTX
from localrun.plan.shapes import ModelShape, load_model
from localrun.plan.speed import decode_speed


def plot_decode(path: Path, model: ModelShape, machine: Machine, ctx: int) -> None:
    """Where a token's time goes, against memory bandwidth from a quarter to four times the machine's."""
    figure, axes = new_figure()
    factors = [2 ** (step / 8) for step in range(-16, 17)]
    placement, short = plan_memory(model, machine, ctx).placement, min(SHORT_CTX, ctx)
    speeds = [decode_speed(model, machine.with_bandwidth(factor), placement, short) for factor in factors]
    rates = [factor * machine.cpu.read_bytes_per_s / 1e9 for factor in factors]
    kinds = [kind for kind in ("GPU", "experts", "CPU", "waiting") if any(kind in speed.split() for speed in speeds)]
    axes.stackplot(rates, [[1e3 * speed.split().get(kind, 0.0) for speed in speeds] for kind in kinds], labels=kinds)
    axes.axvline(machine.cpu.read_bytes_per_s / 1e9, color="black", linestyle=":", label=machine.name)
    axes.set(xscale="log", xlabel="RAM read bandwidth, GB/s", ylabel="ms a token", title=f"{model.name}, {model.type}")
    save_figure(figure, axes, path)


def plot_kv(path: Path, names: Sequence[str]) -> None:
    """KV cache against context."""
    figure, axes = new_figure()
    contexts = [2**step for step in range(10, 18)]
    for name in names:
        config = load_model(name).config
        axes.plot(contexts, [config.kv_bytes(ctx) / 2**30 for ctx in contexts], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel="KV cache, GiB")
    save_figure(figure, axes, path)


def plot_interconnect(path: Path, model: ModelShape, n_tokens: int, compute_s: float) -> None:
    """Time per output token against interconnect bandwidth: best case, and with a layer's arithmetic."""
    figure, axes = new_figure()
    rates = [10 * 2 ** (step / 4) for step in range(0, 29)]
    for seconds, label in ((0.0, "messages alone"), (compute_s, "two micro-batches overlapped")):
        limits = [expert_parallel(model, rate * 1e9, n_tokens, layer_compute_s=seconds) for rate in rates]
        axes.plot(rates, [1e3 * limit.token_s for limit in limits], label=label)
    axes.plot(rates, [1e3 * limit.token_without_overlap_s for limit in limits], label="one after the other")
    axes.set(xscale="log", yscale="log", xlabel="GB/s a device", ylabel="ms a token", title=model.name)
    save_figure(figure, axes, path)
