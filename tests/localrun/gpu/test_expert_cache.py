"""VRAM as a cache of experts, on the stand-in: results do not depend on what it holds, whatever copies do.

Letters: T tokens, K experts per token, E experts of a layer, L layers with experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace

import kernels
import numpy as np
import pytest
import tiny_models
import torch
from closeness import error
from gpu_dense import use_dense
from gpu_device import HAS_GPU
from gpu_torch import begin_from_slots
from tiny_models import SMALLEST as V3

from localrun.cpu import bridge
from localrun.cpu.model import NativeModel
from localrun.gguf.file import open_gguf
from localrun.gpu.device import StandIn
from localrun.gpu.experts import cache as expert_cache
from localrun.gpu.experts.in_vram import Experts
from localrun.gpu.experts.policy import Policy
from localrun.gpu.experts.routed import Mode, Routed
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.prefill import LayerTimes, Seconds
from localrun.gpu.weights import spans_in_ram
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.placement.memory_table import RAM
from localrun.placement.placement import Request, lay_out
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool

pytestmark = pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")

MODEL = replace(V3, first_k_dense_replace=0)  # two layers with experts
CTX = 24
SLOTS, N_EXPERTS = 3, 8
# As gpu_models.py has it: the device's cache rows have 16 bits. Where experts are adds 1e-5, the order of sums.
STEP_TOLERANCE, MANY_TOLERANCE = 2e-3, 5e-3


class Gated(StandIn):
    """Copies to the cache wait until they are let through, or fail."""

    def __init__(self, n_free: int = 0) -> None:
        super().__init__()
        self.free = threading.Semaphore(n_free)
        self.fails = False
        self.waits: list[tuple[str, str]] = []  # whose work was waited for, and by which thread

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.free.acquire()
        if self.fails:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    def mark(self) -> Callable[[], None]:
        of = threading.current_thread().name
        return lambda: self.waits.append((of, threading.current_thread().name))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts come as soon as they were chosen a little more often than others."""
    monkeypatch.setattr(expert_cache, "Policy", lambda n, held: Policy(n, held, window=8, margin=0.1))


@contextmanager
def opened(device: StandIn, **options: object) -> Iterator[tuple[HybridModel, NativeModel]]:
    """The same model with the cache and on the CPU."""
    with open_gguf(tiny_models.shared(MODEL)) as file:
        config, much = read_config(file), 1 << 40
        request = Request(tuple(file.tensors.values()), config, CTX, much, much, gpu_experts=SLOTS, expert_cache=True)
        with (
            closing(HybridModel(config, file, 2, lay_out(request), device, **options)) as model,
            closing(NativeModel(config, file, 2)) as native,
        ):
            try:
                yield model, native
            finally:
                if isinstance(device, Gated):
                    device.free.release(99)


def held(model: HybridModel) -> list[list[int]]:
    """The table on the device; each expert in it is in its slot, to the byte."""
    cache = model.routed.cache
    assert not cache.misplaced()
    for row, here in zip(cache._table, cache.in_vram.values(), strict=True):
        assert here.slot_of.data_ptr() == row.data_ptr()
    return cache._table.tolist()


def ids_of(n_tokens: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, V3.vocab_size, n_tokens).tolist()


def logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    return native.forward(ids, native.new_cache(len(ids), exact=True), all_logits=True)


# ---- a layer ---------------------------------------------------------------------------------------------------------


def rounded_bound(experts: ExpertMatrices, values: list[np.ndarray], x: np.ndarray, expert: int) -> np.ndarray:
    """How far the CPU's result of one expert may be from the exact one: it rounds x, and silu(g) * u, to 8 bits.

    That is half a step of 1/127 of the largest of 32 values each; of gate and up through their rows' sums, through
    SwiGLU by at most 1.1 (silu's slope) and its size, and through down's. Float32 sums are nothing beside that.
    """

    def step(v: np.ndarray) -> np.ndarray:
        return np.repeat(np.abs(v.reshape(-1, 32)).max(1) / 254, 32)

    gate, up, down = (np.asarray(each[expert], np.float64) for each in values)
    g, u = gate @ x, up @ x
    off_g, off_u = np.abs(gate) @ step(x), np.abs(up) @ step(x)
    silu = g / (1 + np.exp(-g))
    off_h = 1.1 * off_g * (np.abs(u) + off_u) + np.abs(silu) * off_u
    return np.abs(down) @ (off_h + step(np.abs(silu * u) + off_h))


def test_a_tokens_result_depends_on_where_its_experts_are_by_the_cpus_rounding_alone() -> None:
    """Every expert alone, in VRAM and in RAM: they differ by what the CPU's 8-bit activations may be off, and do."""
    rng, dims = np.random.default_rng(0), (64, 32)
    shapes = ((N_EXPERTS, dims[1], dims[0]),) * 2 + ((N_EXPERTS, *dims),)
    made = [kernels.random_weight("Q8_0", shape, rng) for shape in shapes]
    experts, values = ExpertMatrices(*(weight for weight, _ in made)), [values for _, values in made]
    x, weights = torch.from_numpy(rng.standard_normal((1, dims[0])).astype(np.float32)), torch.ones(1, 1)
    differences = []
    with closing(Pool(1)) as pool, torch.inference_mode():
        for expert in range(3):
            found = []
            for here in ((expert,), ((expert + 1) % N_EXPERTS,)):
                routed = Routed(StandIn(), pool, {0: experts}, {0: here}, 1, is_cache=True)
                found.append(routed.layer(0).begin(x, torch.tensor([[expert]]), weights)()[0].numpy())
                routed.close()
            bound = rounded_bound(experts, values, x[0].numpy().astype(np.float64), expert)
            assert (np.abs(found[0] - found[1]) <= bound).all()
            differences.append(np.abs(found[0] - found[1]).max() / bound.max())
    assert 1e-3 < max(differences) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "n_tokens"), [(Mode.STEP, 3), (Mode.PREFILL, 9), (Mode.STREAM, 9)])
def test_a_layer_in_each_way(mode: Mode, n_tokens: int) -> None:
    """With slots that hold other experts from call to call."""
    with open_gguf(tiny_models.shared(V3)) as file, closing(Pool(2)) as pool, torch.inference_mode():
        layer = GGUFTensors(file).expert_matrices(1)
        routed = Routed(StandIn(), pool, {1: layer}, {1: (0, 1, 2)}, 2, is_cache=True)
        routed.allow_streaming()
        generator, tables = torch.Generator().manual_seed(0), set()
        for _ in range(6):
            x, weights = torch.randn(n_tokens, 64, generator=generator), torch.rand(n_tokens, 2, generator=generator)
            ids = torch.rand(n_tokens, N_EXPERTS, generator=generator).argsort(-1)[:, :2]
            expected = bridge.Experts(pool, layer).begin(x, ids, weights)()
            routed.mode = mode
            routed.start()
            with pool.exclusive() if mode is Mode.STEP else nullcontext():
                found = routed.layer(1).begin(x, ids, weights)()
            assert error(found.numpy(), expected.numpy()) < (MANY_TOLERANCE if n_tokens > 8 else 1e-5)
            routed.end()
            assert routed.cache._counts_on_host[0].tolist() == ids.flatten().bincount(minlength=N_EXPERTS).tolist()
            routed.settle(n_tokens)
            routed.cache.wait()
            assert not routed.cache.failure
            tables.add(str(routed.cache._table.tolist()))
        routed.close()
    assert len(tables) > 2


# ---- the whole model -------------------------------------------------------------------------------------------------


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As conftest.py has it; experts in slots are multiplied by torch, too, from where their blocks lie."""
    use_dense(monkeypatch)
    monkeypatch.setattr(Experts, "begin", begin_from_slots)


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("lateness", [0.3, 0.8])
def test_logits_are_the_cpus_whatever_the_slots_hold(lateness: float) -> None:
    """Two contexts in turn, of prompts and steps of 1 to 4 tokens; copies arrive late. Table and memory agree."""
    device, rng = Gated(), np.random.default_rng(2)
    with opened(device) as (model, native):
        texts = [ids_of(CTX, seed) for seed in (1, 2)]
        expected, tables = [logits(native, ids) for ids in texts], set()
        caches = [model.new_cache(CTX) for _ in texts]
        while min(cache.length for cache in caches) < CTX:
            which = min((0, 1), key=lambda i: (caches[i].length, i))
            first = caches[which].length
            last = min(CTX, first + (9 if first == 0 else int(rng.integers(1, 5))))
            found = model.forward(texts[which][first:last], caches[which], all_logits=True)
            assert error(found, expected[which][first:last]) < STEP_TOLERANCE
            tables.add(str(held(model)))
            if rng.random() >= lateness:
                for _ in model.routed.cache._coming:
                    device.free.release()
                model.routed.cache.wait()
        assert len(tables) > 3


@pytest.mark.usefixtures("dense")
def test_a_copy_that_is_late_is_waited_for_by_nobody() -> None:
    device, ids = Gated(), ids_of(12)
    with opened(device) as (model, native):
        expected, cache = logits(native, ids), model.new_cache(CTX)
        for position, token in enumerate(ids[:11]):
            found = model.forward([token], cache)
            assert error(found, expected[position : position + 1]) < STEP_TOLERANCE
        coming = [swap for swap, _ in model.routed.cache._coming]
        assert coming and not any(job.done() for _, job in model.routed.cache._coming)
        place, expert, slot = coming[0].layer, coming[0].expert, coming[0].slot
        assert held(model)[place][expert] == -1 and slot not in held(model)[place]
        assert ("MainThread", "localrun-expert-cache_0") in device.waits  # the table is there before a copy begins
        assert not any("expert-cache" in of for of, _ in device.waits)
        device.free.release(99)
        model.routed.cache.wait()
        assert held(model)[place][expert] == -1  # only a forward pass changes the table
        model.routed.cache.failure = "no more"  # no more are asked for: what has arrived is used all the same
        model.forward(ids[11:], cache)
        assert held(model)[place][expert] == slot


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_a_copy_that_fails_leaves_its_expert_to_the_cpu() -> None:
    device, ids, told = Gated(99), ids_of(16), []
    with opened(device, notice=told.append) as (model, native):
        expected, cache = logits(native, ids), model.new_cache(CTX)
        told.clear()
        for position, token in enumerate(ids):
            device.fails = position >= 8
            found = model.forward([token], cache)
            assert error(found, expected[position : position + 1]) < STEP_TOLERANCE
            held(model)
            model.routed.cache.wait()
        assert len(told) == 1 and "could not be copied" in told[0] and "illegal memory access" in told[0]
        assert not model.routed.cache._coming
        assert any(len(set(slots)) <= SLOTS for slots in held(model))  # less than all of them, and -1


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_closing_drops_what_is_coming() -> None:
    before, device = set(threading.enumerate()), Gated()
    with opened(device) as (model, _):
        cache = model.new_cache(CTX)
        for token in ids_of(10):
            model.forward([token], cache)
        coming = [job for _, job in model.routed.cache._coming]
        assert len(coming) > 1
        threading.Timer(0.1, device.free.release).start()
        model.routed.cache.close()
        assert [job.cancelled() for job in coming] == [False] + [True] * (len(coming) - 1)
    assert set(threading.enumerate()) <= before


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_a_prompt_may_be_streamed_and_counts() -> None:
    """All experts lie in RAM, as they must for that."""
    ids = ids_of(21)
    with opened(StandIn()) as (model, native):
        model.routed.allow_streaming()
        model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 9.0), Seconds(0.0, 0.0), 0.0))
        assert model.tuning.choose(21) == (Mode.STREAM, 1)
        found = model.forward(ids, model.new_cache(CTX), all_logits=True)
        assert error(found, logits(native, ids)) < MANY_TOLERANCE
        assert model.routed.cache._counts_on_host.sum() == 21 * 2 * len(model.routed.in_ram)


def test_all_experts_stay_in_ram() -> None:
    with open_gguf(tiny_models.shared(V3)) as file:
        config, tensors, much = read_config(file), GGUFTensors(file), 1 << 40
        request = Request(tuple(file.tensors.values()), config, CTX, much, much, gpu_experts=SLOTS, expert_cache=True)
        placement = lay_out(request)
        other = ("KV cache", "work memory", "the runner itself")
        expected = sum(row.n_bytes for row in placement.rows if row.where == RAM and row.what not in other)
        assert sum(n_bytes for _, n_bytes in spans_in_ram(tensors, config, placement)) == expected
        experts = [t.n_bytes for name, t in file.tensors.items() if "_exps." in name]
        assert expected == sum(experts)
