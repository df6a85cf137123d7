"""The model on a device and on the CPU at once against the model on the CPU.

Without a GPU the device is its stand-in. A few tests run every kernel, through Triton's interpreter; in the others, of
what goes on between kernels, the quantised matrices on the device are dense ones that torch multiplies (`dense`).
Tolerances are fractions of the range of the logits. Letters: T tokens, G groups.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from cases import slow_but
from closeness import error
from gpu_dense import use_dense
from gpu_device import HAS_GPU
from gpu_torch import TorchExperts, use_torch
from tiny_models import SMALLEST as V3
from tiny_models import Deepseek2

import localrun
from localrun.cpu import bridge
from localrun.cpu.model import NativeModel
from localrun.errors import ContextFullError, LocalrunError
from localrun.generate.drafts import MOST
from localrun.generate.sampling import Sampling
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gpu import hybrid
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts import routed
from localrun.gpu.experts.routed import Mode, Routed
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.matrices.matrix import Matrix
from localrun.gpu.prefill import LayerTimes, Seconds
from localrun.gpu.tuning import Tuning
from localrun.gpu.weights import spans_in_ram, spans_on_device
from localrun.models import config as models
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.placement import available
from localrun.placement.available import Gpu
from localrun.placement.memory_table import RAM
from localrun.placement.placement import Placement, Request, lay_out
from localrun.placement.sizes import activation_bytes
from localrun.serve import job
from localrun.serve.scheduler import Scheduler
from quant.decode.program import MOST_TOKENS
from quant.ops import experts as quant_experts
from quant.simd.gated import Activation
from quant.threads.pool import Pool

# Matrices of a few tokens are exact products of float32; the cache's rows are rounded to 16 bits, 2^-11 of a value, on
# the device only. On a GPU attention's products have 16 bits, too. Found: 4e-4.
STEP_TOLERANCE = 2e-3
# Those of many tokens have float16 operands: 2^-12 of each weight and activation, through all layers. Found: 1.2e-3.
MANY_TOLERANCE = 5e-3
# Both sides multiply in float32; what differs is the order of sums.
EXACT_TOLERANCE = 1e-5
# The CPU rounds activations to 8 bits for quantised matrices, the device does not: up to 2^-8 of each, through all
# layers (test_engine.py: 1e-2 for two different roundings).
QUANTISED_TOLERANCE = 0.03

CTX = 48
CARD = Gpu("Acme 5000", (8, 9), 24 << 30, 20 << 30, "570.86", "12.8")

MODELS = {
    "V3": V3,
    "V3 with a joint kv_b and fused gate and up": replace(V3, split_kv_b=False, fused_gate_up=True),
    "V3 without YaRN, groups and bias, head tied": replace(
        V3, yarn_factor=None, n_group=None, topk_group=None, e_score_correction_bias=False, norm_topk_prob=False,
        routed_scaling_factor=None, tie_word_embeddings=True,
    ),
    "V2": replace(
        V3, scoring_func="softmax", e_score_correction_bias=False, norm_topk_prob=False, mscale_all_dim=0.707,
        n_shared_experts=2, routed_scaling_factor=4.0,
    ),
    "V2-Lite": replace(
        V3, scoring_func="softmax", e_score_correction_bias=False, norm_topk_prob=False, q_lora_rank=None,
        n_shared_experts=2, routed_scaling_factor=1.0, n_group=1, topk_group=1, num_hidden_layers=3,
    ),
    "all layers with experts": replace(V3, first_k_dense_replace=0),
    "with a layer for multi-token prediction": replace(V3, num_nextn_predict_layers=1),
}  # fmt: skip
_GROUPED = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "qk_rope_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS |= {
    "GLM-4.5": tiny_models.glm4moe(**_GROUPED),
    "Ling": tiny_models.bailingmoe2(**_GROUPED | {"num_attention_heads": 4}),
    "MiniMax-M2": tiny_models.minimax_m2(**_GROUPED | {"intermediate_size": 32}),
    "Mixtral": tiny_models.mixtral(**_GROUPED | {"intermediate_size": 32, "qk_rope_head_dim": 16}),
    # With a window in its first layer, sinks, biases, and bounds in its experts.
    "gpt-oss": tiny_models.gpt_oss(**_GROUPED | {"intermediate_size": 32, "qk_rope_head_dim": 16, "sliding_window": 5}),
}
_INDEXER = {"index_n_heads": 5, "index_head_dim": 16, "index_topk": 8}
MODELS |= {
    "V3.2": tiny_models.sparse(**_INDEXER),
    "GLM-5.2": tiny_models.sparse(
        **_INDEXER,
        architecture="glm-dsa",
        num_hidden_layers=4,
        indexer_types="FSFS",
        yarn_factor=None,
        rms_norm_eps=1e-5,
    ),
}
MTP = MODELS["with a layer for multi-token prediction"]


# Found by search: with router logits off by 1e-2 of their size, all tokens choose the same experts.
_SEEDS = {"V2-Lite": 2, "all layers with experts": 5}


def ids_of(n_tokens: int, name: str = "V3") -> list[int]:
    seed = _SEEDS.get(name, 1)
    return np.random.default_rng(seed).integers(0, V3.vocab_size, n_tokens).tolist()


def new_device() -> Cuda | StandIn:
    return Cuda() if HAS_GPU else StandIn()


def placed(file: GGUFFile, config: Config, gpu_experts: int = 0, drafts: bool = False) -> Placement:
    """On a card with room for everything."""
    tensors, much = tuple(file.tensors.values()), 1 << 40
    return lay_out(Request(tensors, config, CTX, much, much, much, gpu_experts=gpu_experts, mtp=drafts))


@contextmanager
def opened(
    shape: Deepseek2 = V3,
    type_: str = "F32",
    gpu_experts: int = 0,
    device: Cuda | StandIn | None = None,
    in_vram: dict[int, tuple[int, ...]] | None = None,
) -> Iterator[tuple[HybridModel, NativeModel]]:
    """The same model both ways; in_vram: layer -> experts, where not as many of each layer."""
    with open_gguf(tiny_models.shared(shape, type=type_)) as file:
        config = read_config(file)
        placement = placed(file, config, gpu_experts)
        if in_vram is not None:
            placement = replace(placement, experts=in_vram)
        with (
            closing(HybridModel(config, file, 2, placement, device or new_device())) as model,
            closing(NativeModel(config, file, 2)) as native,
        ):
            yield model, native


def exact_logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    return native.forward(ids, native.new_cache(len(ids), exact=True), all_logits=True)


# ---- every kernel ----------------------------------------------------------------------------------------------------


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


# ---- between the kernels ---------------------------------------------------------------------------------------------


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices on the device are dense float32 ones; the other kernels are what they are."""
    use_dense(monkeypatch)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on the device are torch's, too."""
    use_torch(monkeypatch)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings have 8 rows more than a window: drafts can be taken back, and tokens of these tests go round."""
    monkeypatch.setattr(models, "WINDOW_SPARE", 8)


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


def two_batches(model: HybridModel) -> None:
    """As if it had been measured that two are faster, however few tokens."""
    model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 1.0), Seconds(0.0, 0.0), float("inf")))
    assert model.tuning.choose(2) == (Mode.PREFILL, 2)


def stream(model: HybridModel) -> None:
    """As if it had been measured that uploading experts is faster."""
    model.routed.allow_streaming()
    model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 9.0), Seconds(0.0, 0.0), 0.0))
    assert model.tuning.choose(2) == (Mode.STREAM, 1)


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


class Recording(Cuda if HAS_GPU else StandIn):
    """Counts what is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.n_recorded = 0

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        self.n_recorded += 1
        return super().capture(step)


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


# ---- contexts that share steps ---------------------------------------------------------------------------------------

LENGTHS = [3, 9, 0, 17]


def check_together(model: HybridModel, name: str, n_contexts: int, n_steps: int) -> None:
    """Bits of logits, hidden states and rows, whoever the neighbours are and how long; one after the other ends."""
    lengths, model.keep_hidden = LENGTHS[:n_contexts], True
    texts = [ids_of(40, name)[i:][: n + n_steps] for i, n in enumerate(lengths)]
    alone, caches = [], []
    for n, text in zip(lengths, texts, strict=True):
        for found in (alone, caches):
            cache = model.new_cache(n + n_steps + len(caches))  # of other sizes, too
            if n:
                model.forward(text[:n], cache)
            found.append(cache)
    rows = [[(model.forward([token], cache), model.hidden) for token in text[n:]]
            for n, text, cache in zip(lengths, texts, alone, strict=True)]  # fmt: skip
    for step in [0, *range(n_steps)]:  # one is taken back
        here = [i for i in range(n_contexts) if i + step < n_contexts + n_steps - 2]
        for i in here:
            caches[i].truncate(lengths[i] + step)
        found = model.forward_each([texts[i][lengths[i] + step] for i in here], [caches[i] for i in here])
        for i, logits, hidden in zip(here, found, model.hidden, strict=True):
            assert np.array_equal(logits, rows[i][step][0][0]) and np.array_equal(hidden, rows[i][step][1][0])
            assert caches[i].length == lengths[i] + step + 1
    assert all(np.array_equal(a, b) for a, b in zip(*(c.save().values() for c in (caches[0], alone[0])), strict=True))


@pytest.mark.slow
def test_contexts_together_are_contexts_alone_by_every_kernel() -> None:
    with opened(in_vram={1: (2, 5)}) as (model, _):
        check_together(model, "V3", 2, 2)


@pytest.mark.slow
@pytest.mark.usefixtures("dense")
def test_contexts_together_are_contexts_alone_by_grouped_attention() -> None:
    with opened(MODELS["GLM-4.5"]) as (model, _):
        check_together(model, "GLM-4.5", 2, 2)


@pytest.mark.parametrize(
    "name",
    slow_but(["V3", "V2-Lite", "GLM-4.5", "MiniMax-M2", "gpt-oss", "V3.2", "GLM-5.2"], {"V3"}),
)
def test_contexts_together_are_contexts_alone(name: str, in_torch: None, narrow: None) -> None:
    with opened(MODELS[name]) as (model, _):
        check_together(model, name, 4, 4)


@pytest.mark.usefixtures("in_torch")
def test_a_full_neighbour_leaves_all_as_they_are() -> None:
    ids = ids_of(4)
    with opened() as (model, _):
        caches = [model.new_cache(4), model.new_cache(3)]
        for cache in caches:
            model.forward(ids[:3], cache)
        with pytest.raises(ContextFullError, match="4 tokens, room for 3"):
            model.forward_each([4, 4], caches)
        assert [cache.length for cache in caches] == [3, 3]
        assert np.array_equal(model.forward([4], caches[0]), model.forward([*ids[:3], 4], model.new_cache(4)))


# ---- windows, sinks, bounds ------------------------------------------------------------------------------------------


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


# ---- indexers --------------------------------------------------------------------------------------------------------


def cpus_logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    """Over keys of 16 bits, as the device's: others might choose other rows."""
    return native.forward(ids, native.new_cache(len(ids)), all_logits=True)


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


# ---- failures --------------------------------------------------------------------------------------------------------


class Failing(StandIn):
    """A device that is lost when something waits for it, once `good` waits are over."""

    def __init__(self) -> None:
        super().__init__()
        self.good = 1 << 30

    def _wait(self) -> None:
        self.good -= 1
        if self.good < 0:
            raise LocalrunError("the GPU failed: CUDA error: unspecified launch failure")

    def mark(self) -> Callable[[], None]:
        return self._wait

    def synchronize(self, progress: Callable[[], int] | None = None) -> None:
        self._wait()


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("n_tokens", [2, 9])
def test_a_lost_device_is_an_error_and_no_tokens(n_tokens: int) -> None:
    device, ids = Failing(), ids_of(12)
    with opened(device=device) as (model, native):
        two_batches(model)
        cache, expected = model.new_cache(CTX), exact_logits(native, ids)
        model.forward(ids[:3], cache)
        device.good = 0
        with pytest.raises(LocalrunError, match="the GPU failed"):
            model.forward(ids[3 : 3 + n_tokens], cache)
        assert cache.length == 3
        device.good = 1 << 30
        assert error(model.forward(ids[3 : 3 + n_tokens], cache), expected[2 + n_tokens][None]) < STEP_TOLERANCE


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
@pytest.mark.usefixtures("dense")
def test_workers_that_may_never_come_back_are_not_waited_for() -> None:
    device = StandIn()
    with opened(device=device) as (model, _):
        device.is_stuck = True
        model.close()
        assert all(thread.is_alive() for thread in model.pool._threads)
        device.is_stuck = False


@pytest.mark.usefixtures("dense")
@pytest.mark.parametrize("raised", [MemoryError("no room for the experts' sums"), KeyboardInterrupt()], ids=type)
def test_an_error_on_the_cpu_is_an_error_and_no_tokens(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise raised

    ids = ids_of(12)
    with opened() as (model, native):
        cache = model.new_cache(CTX)
        model.forward(ids[:3], cache)
        with monkeypatch.context() as patch:
            patch.setattr(quant_experts, "run", fail)
            with pytest.raises(type(raised)):
                model.forward(ids[3:], cache)
        assert cache.length == 3
        assert error(model.forward(ids[3:], cache), exact_logits(native, ids)[-1:]) < STEP_TOLERANCE


@pytest.mark.usefixtures("dense")
def test_closing_ends_all_threads() -> None:
    before = set(threading.enumerate())
    with opened(MTP) as (model, _):
        model.forward(ids_of(9), model.new_cache(CTX))
        model.mtp.forward(ids_of(40), np.zeros((40, 64), np.float32), model.mtp.new_cache(CTX))
        assert len(threading.enumerate()) > len(before)
    assert set(threading.enumerate()) == before


def test_an_error_while_loading_ends_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid, "DecodeStep", lambda *arguments: pytest.fail("no room"))
    before = set(threading.enumerate())
    with pytest.raises(pytest.fail.Exception, match="no room"), opened():
        pass
    assert set(threading.enumerate()) == before


# ---- through the engine ----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is the stand-in where there is none."""
    if not HAS_GPU:
        monkeypatch.setattr(available, "find", lambda *at: CARD)
        monkeypatch.setattr(hybrid, "Cuda", StandIn)


def load(shape: Deepseek2 = V3, device: str = "cuda", **options: object) -> localrun.Engine:
    if device == "cuda":
        options = {"gpu_experts": 0, "unproven": True} | options
    return localrun.load(tiny_models.shared(shape), device=device, ctx=CTX, threads=2, **options)


GREEDY = Sampling(temperature=0.0, repeat_penalty=1.0)


@pytest.mark.usefixtures("dense", "gpu")
def test_replies_are_the_cpus() -> None:
    with load() as on_gpu, load(device="cpu") as on_cpu:
        ids = ids_of(11)
        replies = [list(engine.generate(ids, GREEDY, 8)) for engine in (on_gpu, on_cpu)]
        assert replies[0] == replies[1] and len(replies[0]) == 8


@pytest.mark.usefixtures("dense", "gpu")
def test_a_cache_of_8_bits() -> None:
    ids = ids_of(12)
    with load(cache_bits=8) as engine:
        cache = engine.new_cache()
        assert cache.bits == 8
        found = np.concatenate([engine.model.forward(part, cache, True) for part in (ids[:10], ids[10:])])
        # Latents are rounded by up to 2^-4 of a value, each by itself, in two layers. Found: 1e-2.
        assert 1e-4 < error(found, engine.logits(ids)) < 0.05


@pytest.mark.usefixtures("dense", "gpu")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_saved_sessions_go_on_on_either_side(devices: tuple[str, str], tmp_path: Path) -> None:
    ids = ids_of(11)
    with load(device=devices[0]) as first, load(device=devices[1]) as second:
        session = first.session()
        reply = list(session.tokens(ids, GREEDY, max_tokens=4))
        session.save(tmp_path / "session")
        later = [*ids, *reply, 1, 2, 3]
        expected = list(session.tokens(later, GREEDY, max_tokens=6))
        other = second.session()
        other.load(tmp_path / "session")
        assert list(other.tokens(later, GREEDY, max_tokens=6)) == expected
        assert other.stats.reused_tokens == session.stats.reused_tokens > 11


@pytest.mark.slow
@pytest.mark.usefixtures("dense", "gpu")
def test_drafts_change_no_reply() -> None:
    """The model's own head drafts, on the CPU."""
    with load(MTP, speculative=MOST) as engine:
        ids = ids_of(9)
        session = engine.session()
        found = list(session.tokens(ids, GREEDY, max_tokens=9))
        assert session.speculation.draft.name == "mtp" and session.stats.drafted_tokens > 0
        assert found == list(engine.session("off").tokens(ids, GREEDY, max_tokens=9))


@pytest.mark.usefixtures("dense", "gpu")
def test_the_heads_predictions_are_the_cpus() -> None:
    with load(MTP) as on_gpu, load(MTP, "cpu") as on_cpu:
        rows = []
        for engine in (on_gpu, on_cpu):
            engine.model.keep_hidden = True
            cache, ids = engine.model.new_cache(CTX), ids_of(10)
            engine.model.forward(ids, cache)
            mtp = engine.model.mtp
            rows.append(mtp.forward(ids[1:], engine.model.hidden[:-1], mtp.new_cache(CTX))[0])
        assert error(rows[0], rows[1]) < STEP_TOLERANCE


class Spelled:
    """As ReplyText, of tokens without a vocabulary."""

    found = False

    def __init__(self, *_: object) -> None:
        pass

    def push(self, token: int) -> str:
        return f" {token}"

    def flush(self) -> str:
        return ""


def served(engine: localrun.Engine, slots: int, prompts: list[list[int]], limits: list[int]) -> list[list[Any]]:
    """What clients are sent, of all at once."""
    sent: list[list[Any]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def deliver(i: int, piece: Any) -> None:
        if isinstance(piece, str):
            sent[i].append(piece)
        elif piece is None:
            ended[i].set()

    jobs = [job.Job(prompts[i], GREEDY, limits[i], (), {}, partial(deliver, i)) for i in range(len(prompts))]
    scheduler = Scheduler(engine, slots, 0)
    scheduler.submit(jobs)
    assert all(event.wait(60) for event in ended) and [each.error for each in jobs] == [None] * len(jobs)
    scheduler.close()
    return sent


@pytest.mark.usefixtures("in_torch", "gpu")
def test_served_replies_share_steps_and_are_replies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths, prompts read between their steps; drafts are verified where a reply is alone."""
    monkeypatch.setattr(job, "ReplyText", Spelled)
    prompts, limits, shared = [ids_of(40)[:n] for n in (20, 3, 11)], [9, 4, 12], []
    with load(MTP, speculative=2) as engine:
        alone = [served(engine, 1, [ids], [n])[0] for ids, n in zip(prompts, limits, strict=True)]
        each = engine.model.forward_each
        engine.model.forward_each = lambda ids, caches: shared.append(len(ids)) or each(ids, caches)
        assert served(engine, 3, prompts, limits) == alone and [len(sent) for sent in alone] == limits
        assert {2, 3} <= set(shared)


# ---- memory ----------------------------------------------------------------------------------------------------------


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


# ---- measuring -------------------------------------------------------------------------------------------------------


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
