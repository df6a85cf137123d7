"""The model on a device and on the CPU at once against the model on the CPU.

Without a GPU the device is its stand-in. A few tests run every kernel, through Triton's interpreter; in the others, of
what goes on between kernels, the quantised matrices on the device are dense ones that torch multiplies (`dense`).
Tolerances are fractions of the range of the logits (support/gpu_models.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import tiny_models
import torch
from cases import slow_but
from closeness import error
from gpu_models import (
    CTX,
    EXACT_TOLERANCE,
    MANY_TOLERANCE,
    MODELS,
    QUANTISED_TOLERANCE,
    STEP_TOLERANCE,
    Recording,
    exact_logits,
    ids_of,
    new_device,
    opened,
    stream,
    two_batches,
)
from tiny_models import SMALLEST as V3

import localrun
from localrun.cpu import bridge
from localrun.errors import ContextFullError
from localrun.gguf.file import open_gguf
from localrun.gpu.experts.routed import Mode, Routed
from localrun.gpu.hybrid import HybridModel
from localrun.models.tensors import GGUFTensors
from quant.decode.program import MOST_TOKENS
from quant.threads.pool import Pool


@pytest.mark.parametrize(
    ("name", "type_", "in_vram"),
    [
        ("V3", "F32", {1: ()}),
        pytest.param("V2-Lite", "F16", {1: (1, 2, 4, 7), 2: tuple(range(8))}, marks=pytest.mark.slow),
        pytest.param("V3 with a joint kv_b and fused gate and up", "Q8_0", {1: (5,)}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_cpus(name: str, type_: str, in_vram: dict[int, tuple[int, ...]]) -> None:
    """A prompt of more tokens than a step takes, then steps; experts in RAM, in VRAM, and in both."""
    ids, most = ids_of(12, name), QUANTISED_TOLERANCE if type_ == "Q8_0" else MANY_TOLERANCE
    with opened(MODELS[name], type_, in_vram=in_vram) as (model, native):
        expected, cache = exact_logits(native, ids), model.new_cache(CTX)
        assert error(model.forward(ids[:10], cache, all_logits=True), expected[:10]) < most
        assert error(model.forward(ids[10:], cache, all_logits=True), expected[10:]) < most
        assert cache.length == 12


def test_steps_are_more_exact_than_prompts() -> None:
    ids = ids_of(3)
    with opened() as (model, native):
        found = model.forward(ids, model.new_cache(CTX), all_logits=True)
        assert error(found, exact_logits(native, ids)) < STEP_TOLERANCE


@pytest.mark.parametrize("in_vram", [(), (2,), (0, 3, 5, 6), tuple(range(8))], ids=len)
def test_experts_wherever_they_are(in_vram: tuple[int, ...]) -> None:
    """Each way of those in RAM, beside those in VRAM, is the CPU's sum."""
    device = new_device()
    with open_gguf(tiny_models.shared(V3)) as file, closing(Pool(2)) as pool, torch.inference_mode():
        layer = GGUFTensors(file).expert_matrices(1)
        routed = Routed(device, pool, {1: layer}, {1: in_vram}, 2)
        if not in_vram:
            routed.allow_streaming()
        generator = torch.Generator().manual_seed(0)
        for mode, n_tokens in ((Mode.STEP, 3), (Mode.PREFILL, 3), (Mode.STREAM, 9)):
            if mode is Mode.STREAM and in_vram:
                continue  # as PREFILL
            x, weights = torch.randn(n_tokens, 64, generator=generator), torch.rand(n_tokens, 2, generator=generator)
            ids = torch.rand(n_tokens, 8, generator=generator).argsort(-1)[:, :2]
            expected = bridge.Experts(pool, layer).begin(x, ids, weights)()
            routed.mode = mode
            inputs = [each.to(device.torch) for each in (x, ids, weights)]
            if mode is Mode.STEP:
                with pool.exclusive():
                    found = routed.layer(1).begin(*inputs)()
                    device.synchronize()
            else:
                found = routed.layer(1).begin(*inputs)()
            assert error(found.cpu().numpy(), expected.numpy()) < (MANY_TOLERANCE if n_tokens > 8 else EXACT_TOLERANCE)
        routed.close()


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize(
    "name", slow_but(MODELS, {"V3", "V3 with a joint kv_b and fused gate and up", "V2", "V2-Lite"})
)
def test_every_kind_of_model(name: str) -> None:
    ids = ids_of(12, name)
    with opened(MODELS[name]) as (model, native):
        expected, cache = exact_logits(native, ids), model.new_cache(CTX)
        assert error(model.forward(ids[:10], cache, all_logits=True), expected[:10]) < STEP_TOLERANCE
        assert error(model.forward(ids[10:], cache, all_logits=True), expected[10:]) < STEP_TOLERANCE


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("type_", ["Q8_0", "MXFP4"])
def test_quantised_experts_on_the_cpu(type_: str) -> None:
    ids = ids_of(12)
    with opened(type_=type_) as (model, native):
        expected, cache = exact_logits(native, ids), model.new_cache(CTX)
        found = np.concatenate([model.forward(ids[:10], cache, True), model.forward(ids[10:], cache, True)])
        assert error(found, expected) < QUANTISED_TOLERANCE


@pytest.mark.usefixtures("dense")
def test_exact_caches(gpu: None) -> None:
    """Engine.logits keeps 32 bits, and so gives what the CPU does."""
    ids = ids_of(12)
    with opened() as (model, native):
        found = model.forward(ids, model.new_cache(12, exact=True), all_logits=True)
        # Attention's products have 16 bits for prompts on a GPU unless the cache is exact, as it is here.
        assert error(found, exact_logits(native, ids)) < EXACT_TOLERANCE
    path = tiny_models.shared(V3)
    with localrun.load(path, device="cuda", unproven=True, gpu_experts=0, ctx=CTX, threads=2) as on_gpu:
        assert on_gpu.device == "cuda"
        with localrun.load(path, device="cpu", ctx=CTX, threads=2) as on_cpu:
            assert error(on_gpu.logits(ids), on_cpu.logits(ids)) < EXACT_TOLERANCE


@pytest.mark.usefixtures("dense")
def test_steps_of_any_length() -> None:
    """Give what one token after the other does, and the hidden states."""
    ids = ids_of(MOST_TOKENS)
    with opened() as (model, _):
        model.keep_hidden = True
        cache, rows, hidden = model.new_cache(CTX), [], []
        for token in ids:
            rows.append(model.forward([token], cache))
            hidden.append(model.hidden)
        for n_tokens in (1, 2, MOST_TOKENS):
            for all_logits in (False, True):
                cache.truncate(0)
                found = model.forward(ids[:n_tokens], cache, all_logits)
                expected = np.concatenate(rows[:n_tokens]) if all_logits else rows[n_tokens - 1]
                assert found.shape == expected.shape and found.dtype == np.float32
                # What differs is the order of torch's sums; that may tip the rounding of a cache row's value.
                assert error(found, expected) < STEP_TOLERANCE
                assert error(model.hidden, np.concatenate(hidden[:n_tokens])) < STEP_TOLERANCE


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("tune", [lambda model: None, two_batches, stream], ids=["one batch", "two", "streamed"])
def test_prompts_in_chunks(tune: Callable[[HybridModel], None]) -> None:
    ids = ids_of(21)
    with opened() as (model, native):
        tune(model)
        model.keep_hidden = True
        cache, expected = model.new_cache(CTX), exact_logits(native, ids)
        for first, last in ((0, 9), (9, 21)):
            found = model.forward(ids[first:last], cache, all_logits=True)
            assert error(found, expected[first:last]) < MANY_TOLERANCE  # streamed experts have float16 operands
            assert model.hidden.shape == (last - first, 64)
        assert error(model.forward(ids[:9], model.new_cache(CTX)), expected[8:9]) < MANY_TOLERANCE


@pytest.mark.usefixtures("dense")
def test_what_is_forgotten_leaves_no_trace() -> None:
    ids = ids_of(14)
    with opened() as (model, _):
        cache = model.new_cache(CTX)
        expected = model.forward(ids[:10], cache), model.forward(ids[10:11], cache)
        model.forward(ids[11:], cache)
        cache.truncate(10)
        assert error(model.forward(ids[10:11], cache), expected[1]) == 0
        cache.truncate(0)
        assert error(model.forward(ids[:10], cache), expected[0]) == 0


@pytest.mark.usefixtures("dense")
def test_a_full_context_is_refused_and_left_alone() -> None:
    ids = ids_of(CTX + 1)
    with opened() as (model, _):
        cache = model.new_cache(8)
        for n_tokens in (9, CTX):
            with pytest.raises(ContextFullError, match="room for 8"):
                model.forward(ids[:n_tokens], cache)
        model.forward(ids[:6], cache)
        with pytest.raises(ContextFullError):
            model.forward(ids[:3], cache)
        assert cache.length == 6


@pytest.mark.usefixtures("in_torch")
def test_a_step_is_recorded_once_for_a_number_of_tokens() -> None:
    """Whatever the contexts."""
    device, ids = Recording(), ids_of(8)
    with opened(device=device) as (model, _):
        first, second = model.new_cache(CTX), model.new_cache(CTX)
        for token in ids[:3]:
            model.forward([token], first)
        model.forward(ids[:1], second)
        assert device.n_recorded == 1
        model.forward(ids[1:3], second, all_logits=True)
        model.forward(ids[3:5], first)
        model.forward_each(ids[5:7], [second, first])
        del first
        model.forward_each(ids[:2], [model.new_cache(CTX), second])
        assert device.n_recorded == 2
