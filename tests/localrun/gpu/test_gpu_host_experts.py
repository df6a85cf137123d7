"""Routed experts for a device's steps and prefill, on the stand-in and on a device that takes its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import gpu_device
import kernels
import numpy as np
import pytest
import torch

from localrun.cpu.bridge import Experts
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts.on_host import PrefillExperts, StepExperts
from quant.decode.program import MOST_TOKENS
from quant.matrix import ExpertMatrices
from quant.ops import experts as quant_experts
from quant.threads.pool import Pool

HIDDEN, N_EXPERTS, TOP_K = 64, 8, 3


def random_experts(type_: str = "F32", inner: int = 32) -> ExpertMatrices:
    rng = np.random.default_rng(inner)
    shapes = (N_EXPERTS, inner, HIDDEN), (N_EXPERTS, inner, HIDDEN), (N_EXPERTS, HIDDEN, inner)
    return ExpertMatrices(*(kernels.random_weight(type_, shape, rng)[0] for shape in shapes))


def random_inputs(n_tokens: int, device: torch.device, here: float = 0.8) -> tuple[torch.Tensor, ...]:
    """x, ids and weights; the fraction `here` of the experts is here."""
    generator = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(n_tokens, HIDDEN, generator=generator) / HIDDEN**0.5
    ids = torch.rand(n_tokens, N_EXPERTS, generator=generator).argsort(-1)[:, :TOP_K]
    ids = torch.where(torch.rand(n_tokens, TOP_K, generator=generator) < here, ids, -1)
    return x.to(device), ids.to(device), torch.rand(n_tokens, TOP_K, generator=generator).to(device)


def assert_sum(found: torch.Tensor, pool: Pool, layer: ExpertMatrices, inputs: tuple[torch.Tensor, ...]) -> None:
    """Equal to what the CPU's network has."""
    expected = Experts(pool, layer).begin(*(x.cpu() for x in inputs))()
    integer = layer.gate.format.integer
    # Float32 sums in another order; where that tips an 8-bit rounding of `inner`, one step of 1/127 in one of 32 terms.
    tolerance = (2e-3 if integer else 2**-20) * max(float(expected.abs().max()), 1e-9)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=tolerance)


# ---- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_tokens", range(1, MOST_TOKENS + 1))
def test_steps_of_layers_of_different_types(pool: Pool, n_tokens: int) -> None:
    layers, device = {3: random_experts(), 4: random_experts("Q8_0", 96), 9: random_experts("Q4_0", 64)}, StandIn()
    experts = StepExperts(device, pool, layers, TOP_K)
    for index, layer in layers.items():
        inputs = random_inputs(n_tokens, device.torch)
        with pool.exclusive():
            found = experts.layer(index).begin(*inputs)()
        assert_sum(found, pool, layer, inputs)


class Noted(StandIn):
    """A stand-in that notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    @contextmanager
    def side(self) -> Iterator[None]:
        self.log.append("side")
        yield
        self.log.append("main")

    def join(self, branch: None) -> None:
        self.log.append("join")

    def call(self, function: int, argument: int) -> None:
        super().call(function, argument)
        self.log.append("call")


def test_the_node_is_on_a_branch_that_finish_joins(pool: Pool) -> None:
    """What is done between begin and finish, such as the shared experts, is beside it."""
    device = Noted()
    experts = StepExperts(device, pool, {0: random_experts()}, TOP_K).layer(0)
    with pool.exclusive():
        finish = experts.begin(*random_inputs(2, device.torch))
        device.log.append("shared experts")
        finish()
    assert device.log == ["side", "call", "main", "shared experts", "join"]


def test_a_step_keeps_its_inputs_until_it_has_joined(pool: Pool) -> None:
    """Or a device's allocator could hand their memory out before the branch has read it."""
    import weakref

    experts = StepExperts(StandIn(), pool, {0: random_experts()}, TOP_K).layer(0)
    inputs = random_inputs(2, torch.device("cpu"))
    seen = [weakref.ref(x) for x in inputs]
    with pool.exclusive():
        finish = experts.begin(*inputs)
        del inputs
        assert all(ref() is not None for ref in seen)
        finish()
    del finish
    assert all(ref() is None for ref in seen)


def test_a_captured_step_computes_what_is_in_its_buffers_now(pool: Pool) -> None:
    device, layer = StandIn(), random_experts("Q8_0")
    experts, inputs = StepExperts(device, pool, {0: layer}, TOP_K).layer(0), random_inputs(3, device.torch)
    out = torch.empty(3, HIDDEN)
    replay = device.capture(lambda: out.copy_(experts.begin(*inputs)()))
    for seed in (7, 8):
        for x, new in zip(inputs, random_inputs(seed, device.torch), strict=True):
            x.copy_(new[:3])
        with pool.exclusive():
            replay()
        assert_sum(out, pool, layer, inputs)


# ---- prefill ---------------------------------------------------------------------------------------------------------


class Late(StandIn):
    """A device whose queue is done a while after it was filled."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self.delay_s = delay_s

    def mark(self) -> Callable[[], None]:
        return lambda: time.sleep(self.delay_s)


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
def test_prefill_of_two_micro_batches(pool: Pool, delay_s: float) -> None:
    layers, device = [random_experts(), random_experts("Q8_0", 96)], Late(delay_s)
    with closing(PrefillExperts(device, pool)) as experts:
        for _ in range(2):  # the second time in memory that is there
            for layer in layers:
                batches = [random_inputs(n_tokens, device.torch) for n_tokens in (40, 33)]
                finishes = [experts.layer(layer).begin(*inputs) for inputs in batches]
                sums = [finish() for finish in finishes]  # all of them, before anybody else has jobs for the pool
                for inputs, found in zip(batches, sums, strict=True):
                    assert_sum(found, pool, layer, inputs)
        assert len(experts._free) == 2


def test_begin_does_not_wait(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    device, done, came = StandIn(), threading.Event(), []
    monkeypatch.setattr(device, "mark", lambda: lambda: came.append(done.wait(10)))
    with closing(PrefillExperts(device, pool)) as experts:
        finish = experts.layer(random_experts()).begin(*random_inputs(9, device.torch))
        assert not came
        done.set()
        finish()
        assert came == [True]


def test_what_goes_wrong_comes_out_of_finish(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    error = MemoryError("no room for the experts' sums")

    def fail(*arguments: object) -> None:
        raise error

    with closing(PrefillExperts(StandIn(), pool)) as experts:
        layer, inputs = experts.layer(random_experts()), random_inputs(9, torch.device("cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(quant_experts, "run", fail)
            finish = layer.begin(*inputs)
            with pytest.raises(MemoryError) as raised:
                finish()
        assert raised.value is error
        assert_sum(layer.begin(*inputs)(), pool, random_experts(), inputs)  # the next one is unharmed


def test_cancel_waits_for_what_runs_and_drops_the_rest(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, computed = threading.Event(), threading.Event(), []

    def slow(*arguments: object) -> None:
        begun.set()
        go_on.wait(10)
        computed.append(arguments)

    monkeypatch.setattr(quant_experts, "run", slow)
    with closing(PrefillExperts(StandIn(), pool)) as experts:
        layer = experts.layer(random_experts())
        for _ in range(3):
            layer.begin(*random_inputs(4, torch.device("cpu")))
        assert begun.wait(10)
        timer = threading.Timer(0.1, go_on.set)
        timer.start()
        experts.cancel()
        assert go_on.is_set() and len(computed) == 1
        timer.join()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@gpu_device.gpu
@pytest.mark.parametrize("n_tokens", [1, MOST_TOKENS])
def test_captured_steps_on_a_gpu(pool: Pool, n_tokens: int) -> None:
    device, layers = Cuda(), {0: random_experts(), 1: random_experts("Q8_0", 96)}
    experts, inputs = StepExperts(device, pool, layers, TOP_K), random_inputs(n_tokens, device.torch)
    outs = [torch.empty_like(inputs[0]) for _ in layers]

    def step() -> None:
        for index, out in enumerate(outs):
            out.copy_(experts.layer(index).begin(*inputs)())

    with pool.exclusive():
        replay = device.capture(step)
    for seed in (11, 12, 13):
        for x, new in zip(inputs, random_inputs(seed, device.torch), strict=True):
            x.copy_(new[:n_tokens])
        with pool.exclusive():
            replay()
            device.synchronize()
        for index, out in enumerate(outs):
            assert_sum(out, pool, layers[index], inputs)


@gpu_device.gpu
def test_prefill_on_a_gpu(pool: Pool) -> None:
    device, layer = Cuda(), random_experts("Q8_0", 96)
    with closing(PrefillExperts(device, pool)) as experts:
        for _ in range(5):
            batches = [random_inputs(n_tokens, device.torch) for n_tokens in (64, 57)]
            finishes = [experts.layer(layer).begin(*inputs) for inputs in batches]
            sums = [finish() for finish in finishes]
            for inputs, found in zip(batches, sums, strict=True):
                assert_sum(found, pool, layer, inputs)
