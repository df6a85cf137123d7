"""What lies in RAM and in VRAM, and what is measured of the first long prompt: how others are cut."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from cases import slow_but
from closeness import error
from gpu_models import (
    CTX,
    MANY_TOLERANCE,
    MTP,
    exact_logits,
    ids_of,
    load,
    new_device,
    opened,
    placed,
)
from tiny_models import SMALLEST as V3

from localrun.gguf.file import open_gguf
from localrun.gpu.experts.routed import Mode, Routed
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.prefill import LayerTimes, Seconds
from localrun.gpu.tuning import Tuning
from localrun.gpu.weights import spans_in_ram, spans_on_device
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.placement.memory_table import RAM
from localrun.placement.sizes import activation_bytes


def own_head(path: Path) -> Path:
    return path


def shared_head(path: Path) -> Path:
    return tiny_models.without(path, path.with_name("shared-head.gguf"), ["blk.2.nextn.shared_head_head.weight"])


@pytest.mark.parametrize("head", [own_head, shared_head])
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("gpu_experts", [0, 3, 8])
def test_what_stays_in_ram_is_what_the_table_says(gpu_experts: int, drafts: bool, head: Callable[[Path], Path]) -> None:
    with open_gguf(head(tiny_models.shared(MTP))) as file:
        config, tensors = read_config(file), GGUFTensors(file)
        placement = placed(file, config, gpu_experts, drafts)
        spans = spans_in_ram(tensors, config, placement)
        other = ("KV cache", "work memory", "the runner itself")
        expected = sum(row.n_bytes for row in placement.rows if row.where == RAM and row.what not in other)
        assert sum(n_bytes for _, n_bytes in spans) == expected
        uploaded = {file.tensors[name].data.ctypes.data for name, home in placement.tensors.items() if home == "cuda"}
        assert {start for start, _ in spans_on_device(tensors, placement)} == uploaded
        output = file.tensors["output.weight"].data.ctypes.data
        assert {start for start, _ in spans} & uploaded == ({output} if drafts and head is shared_head else set())


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_the_first_long_prompt_measures() -> None:
    ids = ids_of(12)
    with opened() as (model, native):
        model.tuning.few, model.tuning.many = 2, 4
        model.forward(ids[:3], model.new_cache(CTX))
        assert model.tuning.times is None
        cache = model.new_cache(CTX)
        assert error(model.forward(ids[:10], cache), exact_logits(native, ids[:10])[-1:]) < MANY_TOLERANCE
        times = model.tuning.times
        assert times is not None and times.upload_s < float("inf")
        for line in (times.attention, times.cpu_experts, times.device_experts):
            assert line.fixed + 4 * line.per_token > 0
        model.forward(ids[:10], model.new_cache(CTX))
        assert model.tuning.times is times


@pytest.mark.usefixtures("dense")
def test_without_room_nothing_is_streamed() -> None:
    with open_gguf(tiny_models.shared(V3)) as file:
        config = read_config(file)
        placement = placed(file, config)
        tight = replace(placement, available={**placement.available, "VRAM": placement.needed["VRAM"] + 1000})
        with closing(HybridModel(config, file, 1, tight, new_device())) as model:
            model.tuning.few, model.tuning.many = 2, 4
            times = model.tuning.measure()
            assert times.upload_s == float("inf")
            model.tuning.use(times)
            assert model.tuning.threshold is None


@pytest.mark.usefixtures("dense")
def test_memory_that_others_have_taken_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(routed: Routed) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB")

    monkeypatch.setattr(Routed, "allow_streaming", fail)
    ids = ids_of(9)
    with opened() as (model, native):
        model.tuning.few, model.tuning.many = 2, 4
        assert error(model.forward(ids, model.new_cache(CTX)), exact_logits(native, ids)[-1:]) < MANY_TOLERANCE
        assert model.tuning.times.upload_s == float("inf") and model.tuning.threshold is None


@pytest.mark.parametrize(("n_chunks", "expected"), [(-1, 512), (0, 512), (1, 1024), (2.5, 1536), (99, 4096)])
def test_memory_for_longer_chunks(n_chunks: float, expected: int) -> None:
    """What is left over beside a streamed layer, by the activations of so many chunks more."""
    with open_gguf(tiny_models.shared(V3)) as file:
        config = read_config(file)
        for in_vram in (0, 3):
            placement = placed(file, config, in_vram)
            with closing(HybridModel(config, file, 1, placement, new_device())) as model:
                spare = model.routed.streamable + int(n_chunks * activation_bytes(config))
                most = Tuning(model.device, model.network, model.routed, spare).most
            assert most == (512 if in_vram else expected)  # layers with experts in both memories are never uploaded


CHUNKS = {5: [5], 9: [9], 20: [20], 24: [24], 27: [24, 3], 33: [17, 16], 45: [23, 22]}


@pytest.mark.usefixtures("dense", "gpu")
@pytest.mark.parametrize("n_tokens", slow_but([5, 27, 33], [5, 27]))
def test_prompts_that_are_streamed_in_long_chunks(n_tokens: int) -> None:
    """The CPU takes 8 tokens at a time here and streaming 24; it pays from 6 on. Replies are the CPU's."""
    ids, sizes = ids_of(n_tokens), CHUNKS[n_tokens]
    with load() as on_gpu, load(device="cpu") as on_cpu:
        model = on_gpu.model
        assert model.chunks(40) == [40]
        model.tuning.chunk, model.tuning.most = 8, 24
        model.routed.allow_streaming()
        model.tuning.use(LayerTimes(Seconds(0.0, 0.01), Seconds(0.5, 1.0), Seconds(0.0, 0.01), 6.0))
        assert model.tuning.threshold == 6 and {n: model.chunks(n) for n in CHUNKS} == CHUNKS
        ways = [model.tuning.choose(n)[0] for n in sizes]
        assert ways == [Mode.STREAM if n >= 6 else Mode.PREFILL for n in sizes]
        told: list[int] = []
        found = on_gpu.session("off").advance(ids, lambda done, total: told.append(done))
        assert told == np.cumsum(sizes).tolist()
        assert error(found, on_cpu.session("off").advance(ids)) < MANY_TOLERANCE
