"""Runs beside each other: their smoothed losses, how far they are apart, how even their experts' load is; pictures.

Pictures need matplotlib (the extra 'plot').
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 100  # steps of the average: batches differ by about 0.2 nats, which leaves 0.02; runs share theirs


@dataclass(frozen=True)
class Run:
    """A run's log; all arrays have a value a step.

    Attributes:
        violations: layer to its largest excess of load over the mean; empty for a dense model.
    """

    name: str
    tokens: np.ndarray
    loss: np.ndarray
    mtp_loss: np.ndarray
    violations: dict[str, np.ndarray]


def read_runs(folders: list[Path]) -> list[Run]:
    """Their logs up to where the shortest ends."""
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in folders]
    n_steps = min(map(len, logs))
    return [_read(folder.name, log[:n_steps]) for folder, log in zip(folders, logs, strict=True)]


def _read(name: str, log: list[str]) -> Run:
    lines = [json.loads(line) for line in log]
    columns = [np.array([line[name] for line in lines]) for name in ("tokens", "loss", "mtp_loss")]
    layers = lines[0]["max_violation"]
    violations = {layer: np.array([line["max_violation"][layer] for line in lines]) for layer in layers}
    return Run(name, *columns, violations)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and the WINDOW - 1 before it; of fewer at the beginning."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def compare(folders: list[Path]) -> list[dict[str, Any]]:
    """Smoothed figures of each run where the shortest ends, and its loss over that of the first, less 1."""
    runs = read_runs(folders)
    losses = [float(smoothed(run.loss)[-1]) for run in runs]
    return [
        {
            "run": run.name,
            "tokens": int(run.tokens[-1]),
            "mean_of_steps": min(WINDOW, len(run.tokens)),
            "loss": loss,
            "mtp_loss": float(smoothed(run.mtp_loss)[-1]),
            "max_violation": {layer: float(smoothed(v)[-1]) for layer, v in run.violations.items()},
            "over_first": loss / losses[0] - 1,
        }
        for run, loss in zip(runs, losses, strict=True)
    ]


def draw_losses(folders: list[Path], path: Path) -> None:
    """Losses over tokens, faintly each step's, and how far the others are from the first. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7, 5.5), layout="constrained")
    losses, differences = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    runs = read_runs(folders)
    first = smoothed(runs[0].loss)
    for number, run in enumerate(runs):
        loss, color = smoothed(run.loss), f"C{number}"
        dashes = (0, (4, 2)) if number else "-"  # or one would hide the other
        losses.plot(run.tokens / 1e6, run.loss, color=color, alpha=0.25, linewidth=0.5)
        middles = run.tokens[WINDOW // 2 : -(WINDOW // 2)] / 1e6  # of the steps that a mean is of
        losses.plot(middles, loss[WINDOW:], label=run.name, color=color, linestyle=dashes)
        if number and len(loss) > WINDOW:
            over = loss[WINDOW:] / first[WINDOW:] - 1
            differences.plot(middles, over, color=color, label=f"{run.name}, at the end {over[-1]:+.2%}")
    losses.set(ylabel=f"loss, nats a token (mean of {WINDOW} steps)", yscale="log")
    losses.yaxis.set_major_formatter("{x:.0f}")
    losses.yaxis.set_minor_formatter("{x:.1f}")
    differences.axhline(0, color="C0")
    differences.set(xlabel="million tokens", ylabel=f"over {runs[0].name}")
    differences.yaxis.set_major_formatter(PercentFormatter(1, decimals=2))
    if len(runs) > 1:
        differences.legend()
    _finish(figure, (losses, differences), path)


def draw_balance(folders: list[Path], path: Path) -> None:
    """Smoothed max violation over tokens, a panel a layer with experts. Needs matplotlib."""
    from matplotlib.figure import Figure

    runs = [run for run in read_runs(folders) if run.violations]
    if not runs:
        raise SystemExit("none of the runs has routed experts")
    layers = list(runs[0].violations)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    grid = figure.subplots(2, -(-len(layers) // 2), sharex=True, squeeze=False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        for run in runs:
            axes.plot(run.tokens / 1e6, smoothed(run.violations[layer]), label=run.name)
        axes.set(title=f"layer {layer}", ylim=(0, None))
    figure.supxlabel("million tokens")
    figure.supylabel(f"max violation (mean of {WINDOW} steps)")
    _finish(figure, grid.flat[: len(layers)], path)


def _finish(figure: Any, panels: Any, path: Path) -> None:
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
    panels[0].legend()
    figure.savefig(path, dpi=110)
