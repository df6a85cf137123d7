"""How evenly workers share a step's phases: by reckoning, and that many workers on few cores change no bit.

Of each phase the items' weights in bytes are given out as workers take them when all are equally fast. What counts is
the mean of the workers' bytes over those of the busiest.
"""

from __future__ import annotations

import dataclasses
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from programs import pieces

import localrun
from localrun.cpu.decode import DecodeStep
from localrun.models.tensors import GGUFTensors
from localrun.plan.shapes import load_model
from quant.decode.attention import SPLIT_UNIT
from quant.decode.program import MAX_SPLITS, Phase
from quant.threads.pool import Pool
from quant.threads.work_items import busiest

EVEN = 0.95
EVEN_ROWS = 0.92  # of rows: splits are whole fours of them, so that 48.5 are 52
# What 500 GB/s bring in the microsecond that the end of a phase of 64 workers takes: where there is no more to read,
# workers without an item lose nothing that counts, and those that have one are counted.
OF_A_BARRIER = 500_000
N_LAYERS = {"deepseek-v3": 5, "qwen3-30b-a3b": 2, "gpt-oss-20b": 2, "gpt-oss-120b": 2}  # one of each kind


class Shapes(GGUFTensors):
    """A model's tensors without their weights."""

    def __init__(self, name: str):
        model = load_model(name)
        memory = np.empty(max(tensor.n_bytes for tensor in model.tensors), np.uint8)  # touched by nobody: takes no room
        memory[: 1 << 20] = 0  # but for norms and biases
        tensors = {
            t.name: SimpleNamespace(type=SimpleNamespace(name=t.type), shape=t.shape, data=memory[: t.n_bytes])
            for t in model.tensors
        }
        self.file, self._own, self.architecture = SimpleNamespace(tensors=tensors), None, model.config.architecture
        self.config = dataclasses.replace(model.config, num_hidden_layers=N_LAYERS[name])


def evenness(phase: Phase, n_workers: int) -> float:
    """Of the workers' time the part that has work, in a phase of one token."""
    if phase.name.endswith("queries") and not phase.weights:
        return 1.0  # heads are normed and rotated, some thousands of numbers: less than a barrier
    if not phase.weights:  # items are alike
        n_items = phase.n_items * (MAX_SPLITS if phase.per_split else 1)
        return n_items / min(n_workers, n_items) / busiest([(n_items, 1)], n_workers)
    n_rounds = phase.n_items // (phase.period or phase.n_items)
    costs = [sum(n for part in phase.weights for _, n in part.spans(i, 1)) for i in range(phase.n_items // n_rounds)]
    costs *= n_rounds
    experts = phase.weights[0].matrix.n_groups if n_rounds > 1 else 1  # all of them, where the chosen ones are read
    n_used = n_workers if sum(costs) / experts > OF_A_BARRIER else min(n_workers, len(costs))
    return sum(costs) / n_used / busiest([(1, cost) for cost in costs], n_workers)


@pytest.mark.parametrize("n_workers", [8, 32, 64, 128])
@pytest.mark.parametrize("name", list(N_LAYERS))
def test_phases_are_shared_evenly(name: str, n_workers: int) -> None:
    with closing(Pool(n_workers)) as pool:
        tensors = Shapes(name)
        step = DecodeStep(tensors.config, tensors, pool)
        found = {phase.name: evenness(phase, n_workers) for phase in step.program._phases}
    assert len(found) >= 6 * N_LAYERS[name]
    assert {phase: round(even, 3) for phase, even in found.items() if even < EVEN} == {}


@pytest.mark.parametrize("n_workers", [8, 32, 64, 128])
@pytest.mark.parametrize("n_groups", [1, 4, 8], ids=["DeepSeek-V2-Lite", "Qwen3-30B", "DeepSeek-V3"])
def test_contexts_are_shared_evenly(n_groups: int, n_workers: int) -> None:
    """From 1,000 tokens on, where all workers have a split."""
    found = {}
    for n_cached in [*range(1000, 5000, 7), 2112, 8192, 10_000, 32_768, 100_000]:
        rows = np.diff(pieces(n_cached, SPLIT_UNIT)).tolist()
        if n_groups * len(rows) >= n_workers:
            most = busiest([(n_groups, n) for n in rows], n_workers)
            found[n_cached] = n_groups * n_cached / n_workers / most
    assert found or n_groups < 4
    assert {n: round(even, 3) for n, even in found.items() if even < EVEN_ROWS} == {}


@pytest.mark.parametrize("variant", ["wide", "qwen3moe-wide", "gpt-oss-wide"])
def test_64_workers_on_few_cores_change_no_bit(variant: str) -> None:
    path, ids = tiny_models.shared(variant, type=tiny_models.Q4_K_M), tiny_models.token_ids(variant, 12)
    found = []
    for threads in (1, 64):
        with localrun.load(path, threads=threads, ctx=32) as model:
            cache = model.new_cache()
            found.append(np.concatenate([model.model.forward([i], cache, 1) for i in ids]))
    assert np.isfinite(found[0]).all() and np.array_equal(*found)
