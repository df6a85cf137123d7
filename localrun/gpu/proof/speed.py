"""Speed: a step and a prompt with the card against the CPU alone, and what each side has of a step.

Of the whole model: what its first layers take, and for each layer with experts beyond them what the last one of these
adds. A step behind a prompt, and one at the end of the whole context that was asked for. Experts stay in RAM: those
that VRAM has room for only make the card's part faster. Not timed: several contexts at a time, drafts, experts that are
uploaded for a long prompt.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from localrun.gpu.device import StandIn
from localrun.gpu.experts.on_host import StepExperts
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof.steps import recorded_anew, replaced
from localrun.gpu.proof.subject import Subject, fill
from localrun.gpu.proof.task import Findings
from localrun.gpu.proof.verdict import PROMPT, REPLY

_PROMPT_RUNS = 3
_WORTH = 0.97  # of the time with all workers: less is noise


def prove(subject: Subject, findings: Findings) -> None:
    """The figures; nothing of them is a fault: being slower is not being wrong."""
    findings.doing("reading the first layers into memory")
    subject.bring_in()
    figures = findings.figures
    figures["copies"] = _copies(subject, findings)
    step, prompt, last_step = {}, {}, {}
    with subject.hybrid() as model:
        model.resident.wait()
        layers = list(model.network.layers)
        findings.doing("the card's prompts and steps")
        every = _times(subject, model)
        figures["step_sides_ms"] = _sides(subject, findings, model)
        with _layers(model, layers[: subject.before]):
            fewer = _times(subject, model)
        step["cuda"], prompt["cuda"], last_step["cuda"] = _whole(subject, fewer, every)
    _one_worker_less(subject, findings, every[0])
    found = []
    for n_layers in (subject.before, subject.before + 1):
        findings.doing(f"the CPU's prompts and steps, {n_layers} layers")
        with subject.native(n_layers) as native:
            found.append(_times(subject, native))
    step["cpu"], prompt["cpu"], last_step["cpu"] = _whole(subject, *found)
    n_prompt = subject.effort.prompt
    figures["step_s"], figures["prompt_s"], figures["prompt_tokens"] = step, prompt, n_prompt
    figures["last_step_s"], figures["ctx"] = last_step, subject.task.ctx
    figures["exchange_s"] = {side: prompt[side] * PROMPT / n_prompt + step[side] * REPLY for side in step}


def _one_worker_less(subject: Subject, findings: Findings, step_s: float) -> None:
    """Whether steps are faster with it: the driver's thread needs a core, too. choices: workers."""
    n_workers = subject.task.threads - 1
    if n_workers < 1:
        return
    findings.doing("steps with one worker less")
    with subject.hybrid(workers=n_workers) as model:
        model.resident.wait()
        found = _step_s(subject, model, subject.effort.prompt + 1)
    findings.figures["step_with_a_worker_less_s"] = found
    if found < _WORTH * step_s:
        findings.choices["workers"] = n_workers


def _whole(subject: Subject, fewer: Sequence[float], every: Sequence[float]) -> list[float]:
    """Seconds of all layers: those beyond the first ones are like the last of them."""
    beyond = subject.whole.num_hidden_layers - subject.config.num_hidden_layers
    return [b + beyond * max(0.0, b - a) for a, b in zip(fewer, every, strict=True)]


@contextmanager
def _layers(model: HybridModel, layers: Sequence[Any]) -> Iterator[None]:
    """Within, the network has only these."""
    before, model.network.layers = model.network.layers, list(layers)
    try:
        yield
    finally:
        model.network.layers = before


def _times(subject: Subject, model: Any) -> tuple[float, float, float]:
    """Seconds of a step behind a prompt, of a prompt, and of the last step that the context has room for."""
    effort = subject.effort
    cache, ids = model.new_cache(effort.prompt), subject.ids(effort.prompt)

    def prompt() -> None:
        cache.truncate(0)
        model.forward(ids, cache)

    long = seconds(prompt, min(effort.runs, _PROMPT_RUNS))
    return _step_s(subject, model, effort.prompt + 1), long, _step_s(subject, model, subject.task.ctx)


def _step_s(subject: Subject, model: Any, capacity: int) -> float:
    """Seconds of the last step that a context of so many tokens has room for, each time of another token."""
    cache, tokens = model.new_cache(capacity), iter(subject.ids(subject.effort.runs + 1))
    fill(cache, capacity - 1)

    def step() -> None:
        cache.truncate(capacity - 1)
        model.forward([next(tokens)], cache)

    return seconds(step, subject.effort.runs)


def seconds(call: Callable[[], object], runs: int) -> float:
    """The median, after a run that warms up."""
    return statistics.median(seconds_of_each(call, runs))


def seconds_of_each(call: Callable[[], object], runs: int) -> list[float]:
    """Of all runs, after one that warms up."""
    call()
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _copies(subject: Subject, findings: Findings) -> dict[str, float]:
    """Bytes a second: up from page-locked memory, down to it, and within the card's."""
    findings.doing("copies")
    device, n_bytes = subject.device, subject.effort.copy_bytes
    host = device.pinned((n_bytes,), torch.uint8)
    here = torch.zeros(n_bytes, dtype=torch.uint8, device=device.torch)
    other = torch.empty_like(here)

    def timed(target: torch.Tensor, source: torch.Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            device.synchronize()

        return round(n_bytes / seconds(copy, 5))

    return {"up": timed(here, host), "down": timed(host, here), "within": 2 * timed(other, here)}


def _sides(subject: Subject, findings: Findings, model: HybridModel) -> dict[str, float]:
    """A step of the first layers: in all, the card's part, the workers' part, and what neither covers."""
    findings.doing("each side's part of a step")
    cache, runs = model.new_cache(1), subject.effort.runs
    tokens = itertools.cycle(subject.ids(runs))  # others every time, and so their experts

    def step() -> None:
        cache.truncate(0)
        model.forward([next(tokens)], cache)

    whole = seconds(step, runs)
    with recorded_anew(model), replaced(model.device, call=lambda function, argument: None):
        card = seconds(step, runs)
    workers = _workers(subject, model, runs)
    # They overlap where shared experts compute beside routed ones: what both sides have may be more than the whole.
    uncovered = max(0.0, whole - card - workers) / whole
    times = {"whole": 1e3 * whole, "card": 1e3 * card, "workers": 1e3 * workers}
    return {name: round(ms, 4) for name, ms in times.items()} | {"covered_by_neither": round(uncovered, 3)}


def _workers(subject: Subject, model: HybridModel, runs: int) -> float:
    """Seconds of the routed experts of the first layers, of random choices."""
    c, layers = subject.config, model.routed.in_ram
    nodes = StepExperts(StandIn(), model.pool, layers, c.num_experts_per_tok)
    x = subject.vectors(1, c.hidden_size)
    weights = torch.full((1, c.num_experts_per_tok), 1 / c.num_experts_per_tok)

    def run() -> None:
        for index in layers:
            ids = torch.randperm(c.n_routed_experts)[None, : c.num_experts_per_tok].contiguous()
            nodes.layer(index).begin(x, ids, weights)()

    with model.pool.exclusive():
        return seconds(run, runs)
