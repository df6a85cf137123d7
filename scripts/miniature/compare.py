"""Runs beside each other: their smoothed losses, how far they are apart, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 100  # steps of the average: batches differ by about 0.2 nats, which leaves 0.02; runs share theirs


def read_log(run: Path) -> dict[str, np.ndarray]:
    """Of each step: tokens so far, loss, mtp_loss, and violation, the largest excess of load of any layer."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    columns = {name: np.array([line[name] for line in lines]) for name in ("tokens", "loss", "mtp_loss")}
    violation = [max(line["max_violation"].values(), default=np.nan) for line in lines]
    return columns | {"violation": np.array(violation)}


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and the WINDOW - 1 before it; of fewer at the beginning."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def compare(runs: list[Path]) -> list[dict[str, Any]]:
    """Smoothed figures of each run where the shortest ends, and its loss over that of the first, less 1."""
    logs = [read_log(run) for run in runs]
    last = min(len(log["tokens"]) for log in logs) - 1
    final = [{name: float(smoothed(log[name])[last]) for name in ("loss", "mtp_loss", "violation")} for log in logs]
    first = final[0]["loss"]
    return [
        {"run": run.name, "tokens": int(log["tokens"][last]), **figures, "over_first": figures["loss"] / first - 1}
        for run, log, figures in zip(runs, logs, final, strict=True)
    ]


def draw(runs: list[Path], path: Path) -> None:
    """Loss and largest violation over tokens, smoothed. Needs matplotlib (the extra 'plot')."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, violation = figure.subplots(1, 2)
    for run in runs:
        log = read_log(run)
        millions = log["tokens"] / 1e6
        loss.plot(millions, smoothed(log["loss"]), label=run.name, linewidth=1)
        violation.plot(millions, smoothed(log["violation"]), label=run.name, linewidth=1)
    loss.set(xlabel="million tokens", ylabel=f"nats a token, mean of {WINDOW} steps")
    violation.set(xlabel="million tokens", ylabel="max violation, worst layer", ylim=(0, None))
    for axes in (loss, violation):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
