"""DeepSeek-V4 on a device and on the CPU at once against the model on the CPU: as test_gpu_hybrid.py.

Choices among pooled rows are compared over rows of 16 bits on both sides: others might choose others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import gpu_launches
import gpu_proofs
import numpy as np
import pytest
import tiny_deepseek4
import tiny_dspark
import torch
from closeness import error
from gpu_dense import use_dense
from gpu_device import DEVICE, HAS_GPU
from gpu_torch import use_torch
from tiny_deepseek4 import SHARED, Deepseek4, token_ids

pytest.importorskip("triton", reason="localrun.gpu needs Triton")

import localrun
from localrun.cpu.model import NativeModel
from localrun.generate.sampling import Sampling
from localrun.gguf.file import open_gguf
from localrun.gpu import hybrid, streams, tiles
from localrun.gpu.attention import compressed_decoding, compressed_rows
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.experts import router
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.prefill import LayerTimes, Seconds
from localrun.gpu.proof import parts, prove, verdict
from localrun.gpu.proof.task import Findings, Task
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.network import dspark, hyper
from localrun.network.moe import choose_experts
from localrun.placement import available
from localrun.placement.placement import Request, lay_out
from localrun.plan import launches
from localrun.runtime import KVCache

# As those of gpu_models.py, found: 3e-4, 4e-4, 5e-7.
STEP_TOLERANCE, MANY_TOLERANCE, EXACT_TOLERANCE = 2e-3, 5e-3, 1e-5
CTX = 400
# Half as wide, with fewer experts: for the interpreter.
SMALL = replace(
    SHARED, hidden_size=64, num_attention_heads=3, head_dim=32, qk_rope_head_dim=8, q_lora_rank=32, o_groups=3,
    sliding_window=6, index_head_dim=16, index_topk=3, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32,
)  # fmt: skip


@contextmanager
def opened(m: Deepseek4 = SHARED, ctx: int = CTX) -> Iterator[tuple[HybridModel, NativeModel]]:
    """The same model both ways, experts in RAM."""
    with open_gguf(tiny_deepseek4.shared(m)) as file:
        config, much = read_config(file), 1 << 40
        placement = lay_out(Request(tuple(file.tensors.values()), config, ctx, much, much, much, gpu_experts=0))
        device = Cuda() if HAS_GPU else StandIn()
        with (
            closing(HybridModel(config, file, 2, placement, device)) as model,
            closing(NativeModel(config, file, 2)) as native,
        ):
            model.tuning.few = 1 << 30  # nothing is measured
            yield model, native


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels on the device are torch's."""
    use_torch(monkeypatch)


def two_batches(model: HybridModel) -> None:
    """As if it had been measured that two are faster."""
    model.tuning.use(LayerTimes(Seconds(0.0, 1.0), Seconds(0.0, 1.0), Seconds(0.0, 0.0), float("inf")))


def cpus_logits(native: NativeModel, ids: list[int]) -> np.ndarray:
    """By the CPU's network, over rows of 16 bits."""
    cache = native.new_cache(len(ids))
    return np.concatenate([native.forward(ids[first : first + 128], cache, True) for first in range(0, len(ids), 128)])


# ---- between the kernels ---------------------------------------------------------------------------------------------


def test_prompts_and_steps_are_the_cpus(in_torch: None) -> None:
    """Beyond the window, top_k pooled rows, and a row of 128 tokens; taken back, saved, gone on from."""
    ids = token_ids(300)
    with opened() as (model, native):
        expected, cache = cpus_logits(native, ids), model.new_cache(CTX)
        for first, last in ((0, 3), (3, 11), (11, 126), (126, 130), (130, 131), (131, 260), (260, 268)):
            if first == 131:
                two_batches(model)
            most = STEP_TOLERANCE if last - first <= 8 else MANY_TOLERANCE
            assert error(model.forward(ids[first:last], cache, True), expected[first:last]) < most, first
        cache.mark()
        assert cache.kept(262) == 262 and cache.kept(200) == 0
        cache.truncate(262)
        assert error(model.forward(ids[262:300], cache, True), expected[262:]) < MANY_TOLERANCE
        assert cache.kept(266) == 262  # by the mark: rings have gone on
        cache.truncate(266)
        assert error(model.forward(ids[262:266], cache, True), expected[262:266]) < STEP_TOLERANCE
        there, again, copied = native.new_cache(CTX), model.new_cache(CTX), model.new_cache(CTX)
        there.load(cache.save(), 266)
        again.load(there.save(), 266)
        copied.copy(cache, 266)
        for by, each in ((model, cache), (model, again), (model, copied), (native, there)):
            assert error(by.forward(ids[266:269], each, True), expected[266:269]) < STEP_TOLERANCE


@pytest.mark.slow
def test_exact_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that takes all pooled rows: of some, near ties are chosen by the last place of a sum."""
    use_torch(monkeypatch)
    ids = token_ids(150)
    with opened(replace(SHARED, index_topk=64)) as (model, native):
        cache, exact = model.new_cache(160, exact=True), native.new_cache(160, exact=True)
        for first, last in ((0, 5), (5, 150)):
            right = native.forward(ids[first:last], exact, True)
            assert error(model.forward(ids[first:last], cache, True), right) < EXACT_TOLERANCE


def test_contexts_together_are_contexts_alone(in_torch: None) -> None:
    """Bits of logits and of streams, whoever the neighbours are and how long; after tokens were taken back, too."""
    lengths, ids = (2, 13, 0, 127), token_ids(140)
    with opened() as (model, _):
        model.keep_hidden, alone, caches = True, [], []
        for n in lengths:
            for found in (alone, caches):
                cache = model.new_cache(n + 9)
                if n:
                    model.forward(ids[:n], cache)
                found.append(cache)
        rows = [
            [(model.forward([token], cache), model.hidden) for token in ids[n : n + 4]]
            for n, cache in zip(lengths, alone, strict=True)
        ]
        for step in (0, 1, 0, 1, 2, 3):
            here = range(4 if step < 3 else 2)
            for i in here:
                caches[i].truncate(lengths[i] + step)
            found = model.forward_each([ids[lengths[i] + step] for i in here], [caches[i] for i in here])
            for i, logits, hidden in zip(here, found, model.hidden, strict=True):
                assert np.array_equal(logits, rows[i][step][0][0]) and np.array_equal(hidden, rows[i][step][1][0])


def test_drafts_take_the_streams_of_the_cpu(in_torch: None) -> None:
    """What the head for multi-token prediction takes."""
    ids = token_ids(40)
    with opened() as (model, native):
        found = []
        for each in (model, native):
            each.keep_hidden = True
            each.forward(ids[:30], cache := each.new_cache(CTX))
            each.forward(ids[30:34], cache)
            found.append(each.hidden)
        assert error(*found) < STEP_TOLERANCE and found[0].shape == (4, 4 * SHARED.hidden_size)


def test_blocks_read_the_means_of_the_cpu(in_torch: None, tmp_path: Path) -> None:
    """Of a prompt in two batches, of steps, of contexts in one step, and again; and draft what the CPU's do of them."""
    ids, shape = token_ids(44), (len(tiny_dspark.TARGET) * SHARED.hidden_size,)
    with opened() as (model, native), open_gguf(tiny_dspark.write(tmp_path / "x.gguf", SHARED)) as file:
        two_batches(model)
        found, drafts = [], []
        for each in (model, native):
            each.take_dspark(file)
            each.keep_hidden, rows, caches = True, [], [each.new_cache(CTX) for _ in range(2)]
            for n, cache in zip((30, 12), caches, strict=True):
                each.forward(ids[:n], cache)
                rows.append(each.hidden)
            each.forward(ids[30:34], caches[0])
            rows.append(each.hidden)
            each.forward_each([ids[34], ids[12]], caches)
            rows.append(each.hidden)
            caches[0].truncate(33)
            each.forward(ids[33:35], caches[0])
            rows.append(each.hidden)
            found.append(rows)
            cache = each.drafter.new_cache(CTX)
            each.drafter.keep(found[0][0], cache)
            drafts.append(each.drafter.draft(ids[30], 5, cache))
        assert [rows.shape for rows in found[0]] == [(n, *shape) for n in (30, 12, 4, 2, 2)]
        for by_device, by_cpu, most in zip(*found, [MANY_TOLERANCE] * 2 + [STEP_TOLERANCE] * 3, strict=True):
            assert error(by_device, by_cpu) < most
        assert drafts[0] == drafts[1]


def nearly_right(reply: list[int], n_before: int, last: int, n: int, cache: KVCache) -> list[int]:
    """Drafts, as a drafter's: the reply's tokens but for every third."""
    at = cache.length - n_before + 1
    return [token if i % 3 else token ^ 1 for i, token in enumerate(reply[at : at + n], at)]


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="of the stand-in")
@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_layers_in_a_file_of_their_own_draft(
    kind: str, in_torch: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Through the engine: replies are the same with drafts, without, and by the CPU; of a text that goes back, too."""
    monkeypatch.setattr(available, "find", lambda *at: gpu_proofs.GPU)
    monkeypatch.setattr(hybrid, "Cuda", StandIn)
    monkeypatch.setattr(dspark, "LEAST_CONFIDENCE", 0.0)  # random blocks are rarely sure of a draft
    m, ids, found, draft = replace(SHARED, num_nextn_predict_layers=1), token_ids(50), [], tmp_path / "draft.gguf"
    if kind == "mtp":
        tiny_deepseek4.write(draft, m, leave_out=r"blk\.[0-3]\.")
    else:
        tiny_dspark.write(draft, SHARED)
    greedy = Sampling(temperature=0.0)
    for options in ({"device": "cuda", "unproven": True, "gpu_experts": 0}, {"device": "cpu"}):
        path = tiny_deepseek4.shared()
        with localrun.load(path, draft=draft, speculative=3, threads=2, ctx=128, **options) as engine:
            assert engine.device == options["device"]
            in_ram = engine.placement.n_bytes("RAM", "multi-token prediction")
            assert in_ram == sum(tensor.n_bytes for tensor in engine._mtp_file.tensors.values())
            reads_head = engine.placement.n_bytes("RAM", "head, for multi-token prediction") > 0
            assert reads_head == (kind == "dspark" and engine.device == "cuda")
            session, plain = engine.session(), engine.session("off")
            assert session.speculation.draft.name == kind
            for n in (20, 50, 30):
                for each in (session, plain):
                    found.append((n, list(each.tokens(ids[:n], greedy, max_tokens=12))))
                assert session.stats.drafted_tokens > 10
            if kind == "dspark":
                session = engine.session()
                monkeypatch.setattr(engine.model.drafter, "draft", partial(nearly_right, found[-1][1], 30))
                found.append((30, list(session.tokens(ids[:30], greedy, max_tokens=12))))
                assert 0 < session.stats.accepted_tokens < session.stats.drafted_tokens
    replies = dict(found)
    assert all(reply == replies[n] for n, reply in found) and all(len(reply) == 12 for reply in replies.values())


# ---- every kernel ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "small tiles"])
def test_logits_by_every_kernel(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps over all kinds of rows; a row of 128 tokens comes to be in one."""
    ids = token_ids(140)
    if variant:
        use_dense(monkeypatch)
    if variant == "small tiles":  # without tensor cores
        monkeypatch.setattr(tiles, "of", lambda device: tiles.named({}, tiles.SMALL))
    with opened(SMALL) as (model, native):
        expected, cache = cpus_logits(native, ids), model.new_cache(CTX)
        there = native.new_cache(CTX)
        native.forward(ids[:118], there)
        cache.load(there.save(), 118)
        for first, last in ((118, 127), (127, 128), (128, 133), (133, 134)):
            found = model.forward(ids[first:last], cache, True)
            assert error(found, expected[first:last]) < (MANY_TOLERANCE if last - first > 8 else STEP_TOLERANCE)


# ---- the proof -------------------------------------------------------------------------------------------------------


def task(path: Path, longest: int) -> Task:
    effort = replace(gpu_proofs.SMALL, contexts=(9, longest))
    return Task(str(path), 1, 300, effort=effort, make_device="gpu_proofs:stand_in")


@pytest.mark.slow
@pytest.mark.parametrize("as_published", [False, True])
def test_the_stand_in_passes_its_proof(as_published: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers of all ratios, with and without a table of experts.

    Where the CPU rounds activations to 8 bits it would choose other rows: as many are chosen as there are.
    """
    path = tiny_deepseek4.shared(replace(SHARED, index_topk=40) if as_published else SHARED, 0, as_published)
    with open_gguf(path) as file:
        identity = verdict.identity(gpu_proofs.CARD, read_config(file), file)
    with gpu_proofs.kernels_in_torch(monkeypatch):
        found = prove.prove(identity, task(path, 260), lambda line: None, run=prove.here)
    assert found.fault == "" and found.complete


FAULTS = {
    "no sinks": (
        compressed_decoding,
        "attend_at",
        lambda right, how, *rest: right(replace(how, sinks_H=0 * how.sinks_H), *rest),
    ),
    "no weights by place": (
        compressed_rows,
        "append",
        lambda right, kv, norm, of, *rest: right(kv, norm, [replace(each, bias=0 * each.bias) for each in of], *rest),
    ),
    "no norm": (compressed_rows, "append", lambda right, kv, norm, *rest: right(kv, 0 * norm + 1, *rest)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, change = FAULTS[name]
    with gpu_proofs.kernels_in_torch(monkeypatch):
        right, findings = getattr(module, function), Findings()
        monkeypatch.setattr(module, function, partial(change, right))
        parts.carry_out("kernels", task(tiny_deepseek4.shared(), 40), findings)
    assert findings.faults and findings.faults[0].startswith("attention" if name == "no sinks" else "rows")


CONFIG = Config(
    architecture="deepseek4", attention="compressed", rope="pairs", hidden_size=40, intermediate_size=0,
    num_hidden_layers=1, num_attention_heads=1, vocab_size=1, max_position_embeddings=64, rms_norm_eps=1e-6,
    rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=4, v_head_dim=4, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6,
    n_routed_experts=12, num_experts_per_tok=3, scoring_func="sqrtsoftplus", norm_topk_prob=True,
    routed_scaling_factor=1.5,
)  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_streams_are_mixed_as_the_networks() -> None:
    computed, scale, base = random(3, 24), random(3, seed=1), random(24, seed=2)
    given, y = random(3, 4, 40, seed=3), random(3, 40, seed=4)
    inputs = computed, scale, base, given, 1 + random(40, seed=5) / 4
    right, right_expand = hyper.mix_streams(*inputs, CONFIG)
    found, expand = streams.mix_streams(*(x.to(DEVICE) for x in inputs), CONFIG)
    # Both add up four products of float32 in an order of their own, and squares for two norms.
    torch.testing.assert_close(found.cpu(), right, rtol=0, atol=1e-6)
    torch.testing.assert_close(expand(y.to(DEVICE)).cpu(), right_expand(y), rtol=0, atol=2e-6)


def test_the_router_by_roots_of_softplus() -> None:
    """Of small scores, too, of which few bits are left beside 1."""
    logits = 8 * random(5, 12)
    logits[0] -= 30
    ids, weights = router.choose_experts(logits.to(DEVICE), None, CONFIG)
    right_ids, right = choose_experts(logits, None, CONFIG)
    assert torch.equal(ids.cpu(), right_ids)
    torch.testing.assert_close(weights.cpu(), right, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(HAS_GPU, reason="counts in Triton's interpreter")
def test_a_layers_launches_are_what_the_planner_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """But that all matrices here are of one type: what compressors project is no product of its own."""
    with opened(SMALL) as (model, _):
        for index, found in enumerate(gpu_launches.of_layers(model, monkeypatch)):
            expected = launches.of_layer(model.config, index) - (model.config.compress_ratio(index) > 0)
            assert found.total() == expected, (index, found)
