"""Windows, sinks, bounded activations and indexers on a device against the CPU's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import error
from gpu_models import (
    CTX,
    GREEDY,
    MANY_TOLERANCE,
    MODELS,
    QUANTISED_TOLERANCE,
    STEP_TOLERANCE,
    Recording,
    cpus_logits,
    exact_logits,
    ids_of,
    load,
    opened,
    stream,
    two_batches,
)
from gpu_torch import TorchExperts

from localrun.gpu.experts import routed
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.matrices.matrix import Matrix
from quant.simd.gated import Activation


@pytest.mark.parametrize(
    ("in_vram", "tune"),
    [({}, None), ({0: tuple(range(8)), 1: (1, 4)}, None), ({}, two_batches), ({}, stream)],
    ids=["in RAM", "in VRAM", "two batches", "streamed"],
)
@pytest.mark.usefixtures("in_torch", "narrow")
def test_windows_sinks_and_bounds(
    in_vram: dict[int, tuple[int, ...]], tune: Callable[[HybridModel], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far beyond the window, in chunks and in steps; taken back as far as rows are there, and farther."""
    ids, both = ids_of(50), {0: (), 1: ()} | in_vram
    if tune is stream:  # its kernel is Triton's
        monkeypatch.setattr(routed, "_compute", streamed_in_torch)
    with opened(MODELS["gpt-oss"], in_vram=both) as (model, native):
        if tune:
            tune(model)
        expected, cache = exact_logits(native, ids), model.new_cache(60)
        for first, last in ((0, 20), (20, 22), (22, 45), (45, 50)):
            found = model.forward(ids[first:last], cache, all_logits=True)
            assert error(found, expected[first:last]) < MANY_TOLERANCE
        assert cache.kept(42) == 42 and cache.kept(30) == 0
        cache.truncate(42)
        assert error(model.forward(ids[42:47], cache, all_logits=True), expected[42:47]) < STEP_TOLERANCE
        cache.truncate(10)
        assert cache.length == 0
        assert error(model.forward(ids[:20], cache, all_logits=True), expected[:20]) < MANY_TOLERANCE
        saved, other = cache.save(), native.new_cache(60)
        other.load(saved, 20)
        again = model.new_cache(60)
        again.load(other.save(), 20)
        for each, by in ((again, model), (other, native)):
            assert error(by.forward(ids[20:21], each), expected[20:21]) < STEP_TOLERANCE


def streamed_in_torch(gate: Matrix, up: Matrix, down: Matrix, between: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """As routed._compute, of matrices of float32."""
    experts, shape = TorchExperts.__new__(TorchExperts), (gate.n_groups, gate.n_rows, gate.n_cols)
    stacks = [
        matrix.data.view(torch.float32)[: np.prod(each)].view(each)
        for matrix, each in ((gate, shape), (up, shape), (down, (shape[0], shape[2], shape[1])))
    ]
    experts.w = dict(enumerate(zip(*stacks, strict=True)))
    experts.biases = dict(enumerate(zip(between.gate, between.up, between.down, strict=True)))
    experts.activation = Activation(*between.activation)
    return experts.begin(*inputs)()


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("type_", ["F32", "MXFP4"])
def test_windows_sinks_and_bounds_by_every_kernel(type_: str) -> None:
    ids, most = ids_of(20), MANY_TOLERANCE if type_ == "F32" else QUANTISED_TOLERANCE
    with opened(MODELS["gpt-oss"], type_, in_vram={0: tuple(range(8)), 1: (1, 4)}) as (model, native):
        expected, cache = exact_logits(native, ids), model.new_cache(CTX)
        for first, last in ((0, 15), (15, 16), (16, 20)):
            assert error(model.forward(ids[first:last], cache, all_logits=True), expected[first:last]) < most


@pytest.mark.slow
@pytest.mark.usefixtures("in_torch", "gpu", "narrow")
def test_windows_through_the_engine() -> None:
    """A reply that goes round is the CPU's, with drafts and without; a conversation that goes on from far back, too."""
    shape, ids = MODELS["gpt-oss"], ids_of(20)
    with load(shape, speculative=3) as on_gpu, load(shape, device="cpu") as on_cpu:
        sessions = on_gpu.session(), on_gpu.session("off"), on_cpu.session("off")
        for prompt in (ids, ids[:12]):
            replies = [list(session.tokens(prompt, GREEDY, max_tokens=20)) for session in sessions]
            assert replies[0] == replies[1] == replies[2] and len(replies[0]) == 20
        assert sessions[0].stats.drafted_tokens > 0


@pytest.mark.parametrize(
    ("name", "tune"),
    [("V3.2", None), *(pytest.param(name, two_batches, marks=pytest.mark.slow) for name in ("V3.2", "GLM-5.2"))],
)
def test_sparse_attention(name: str, tune: Callable[[HybridModel], None] | None, in_torch: None) -> None:
    """Beyond top_k tokens: prompts, steps across it, forgotten tokens, sessions from either side."""
    ids = ids_of(40)
    with opened(MODELS[name]) as (model, native):
        if tune:
            tune(model)
        expected, cache = cpus_logits(native, ids), model.new_cache(CTX)
        for first, last in ((0, 3), (3, 7), (7, 10), (10, 30), (30, 31), (31, 36)):
            assert error(model.forward(ids[first:last], cache, True), expected[first:last]) < MANY_TOLERANCE
        cache.truncate(20)
        assert error(model.forward(ids[20:40], cache, True), expected[20:40]) < MANY_TOLERANCE
        cache.truncate(35)
        other, again = native.new_cache(CTX), model.new_cache(CTX)
        other.load(cache.save(), 35)
        again.load(other.save(), 35)
        for each, by in ((again, model), (other, native)):
            assert error(by.forward(ids[35:37], each, True), expected[35:37]) < STEP_TOLERANCE


@pytest.mark.slow
def test_sparse_steps_are_recorded_by_twice_the_context(in_torch: None) -> None:
    device, ids = Recording(), ids_of(40)
    with opened(MODELS["V3.2"], device=device) as (model, _):
        cache, counts = model.new_cache(CTX), []
        for token in ids:
            model.forward([token], cache)
            counts.append(device.n_recorded)
    assert [counts[at] for at in (0, 7, 8, 15, 16, 31, 32, 39)] == [1, 1, 2, 2, 3, 3, 4, 4]  # top_k is 8


@pytest.mark.slow
def test_sparse_attention_by_every_kernel() -> None:
    ids = ids_of(14)
    with opened(MODELS["V3.2"]) as (model, native):
        expected, cache = cpus_logits(native, ids), model.new_cache(CTX)
        for first, last in ((0, 10), (10, 11), (11, 14)):
            assert error(model.forward(ids[first:last], cache, True), expected[first:last]) < MANY_TOLERANCE
