"""A device on the first rank, experts in RAM shared among ranks: against the same device with all of them.

Without a GPU the device is its stand-in, and other ranks are threads (ranks_in_process.py), but for
test_under_mpiexec. Only the order of float32 sums differs with f32 messages. Tolerances on logits are fractions of
their range.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_deepseek4
import tiny_models
from cases import slow_but
from closeness import QUANTIZED_TOLERANCE, SESSION_TOLERANCE, error
from gpu_models import GREEDY, MODELS, ids_of, new_device, placed, two_batches
from paths import ROOT, TESTS
from ranks_in_process import Post, in_process

import localrun
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.gpu import hybrid
from localrun.gpu.device import Cuda, StandIn
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.ways import STREAM_MEMORY
from localrun.gpu.weights import spans_in_ram
from localrun.models import names
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.placement.memory_table import EXPERTS as ROUTED
from localrun.placement.memory_table import RAM, VRAM
from localrun.placement.placement import GPU
from localrun.ranks.remote import Remote
from localrun.ranks.sharing import EXPERTS, SLICES, Sharing
from localrun.ranks.world import RankError
from quant.ops import experts as quant_experts
from quant.target import tuning

EXACT = Sharing("f32")
CTX = 160
ROUNDING_TOLERANCE = 3e-6  # as in test_ranks.py: of the order of sums
BF16_TOLERANCE = 5e-3  # the same: 2^-9 of each vector on layers' way out and back
# Inner columns in blocks of 32 enough for three ranks.
SHAPES = {name: replace(MODELS[name], moe_intermediate_size=96) for name in MODELS if name not in ("Mixtral", "Ling")}
# Its indexer takes all rows: which of equal scores torch takes may depend on the last place of others.
V4 = replace(tiny_deepseek4.SHARED, index_topk=64)
DRAFTING = "with a layer for multi-token prediction"


def path_of(name: str, type_: str = "F32") -> Path:
    return tiny_deepseek4.shared(V4) if name == "V4" else tiny_models.shared(SHAPES[name], type=type_)


@contextmanager
def opened(
    path: Path, n_ranks: int = 1, sharing: Sharing = EXACT, post: Post | None = None, in_vram: tuple[int, ...] = (),
    device: Cuda | StandIn | None = None, limit_s: float = 10.0,
) -> Iterator[HybridModel]:  # fmt: skip
    """A model on a device; in_vram: layers whose experts are all there."""
    with ExitStack() as stack:
        ranks = stack.enter_context(in_process(path, n_ranks, sharing, post)) if n_ranks > 1 else None
        if ranks:
            ranks.world.limit_s = limit_s
        file = stack.enter_context(open_gguf(path))
        config = read_config(file)
        placement = placed(file, config, drafts=True)
        all_of_them = tuple(range(config.n_routed_experts))
        experts = {index: all_of_them if index in in_vram else () for index in placement.experts}
        homes = {
            name: GPU if names.layer_of(name) in in_vram and "_exps" in name else home
            for name, home in placement.tensors.items()
        }
        placement = replace(placement, experts=experts, tensors=homes)
        # The model closes it as well, if it comes to be.
        remote = stack.enter_context(closing(Remote(file, config, ranks, 2, placement))) if ranks else None
        if remote:
            remote.get_ready()
        with closing(HybridModel(config, file, 2, placement, device or new_device(), remote=remote)) as model:
            model.tuning.few = 1 << 30  # nothing is measured
            yield model


def both_ways(model: HybridModel, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a prompt and of steps of one and of several tokens behind it, and of a prompt with an exact cache."""
    cache = model.new_cache(len(ids))
    rows = [model.forward(ids[:-11], cache)]
    rows += [model.forward([token], cache) for token in ids[-11:-8]]
    rows.append(model.forward(ids[-8:], cache, all_logits=True))
    return np.concatenate(rows), model.forward(ids, model.new_cache(len(ids), exact=True), all_logits=True)


# Latents with groups of experts, and without; grouped queries; biases; an indexer; streams and hashed choices.
CASES = [
    ("V3", 3, SLICES), ("V3", 2, EXPERTS), ("V2-Lite", 2, SLICES), ("V2-Lite", 3, EXPERTS), ("GLM-4.5", 2, SLICES),
    ("GLM-4.5", 3, EXPERTS), ("gpt-oss", 2, SLICES), ("MiniMax-M2", 2, EXPERTS), ("V3.2", 2, SLICES), ("V4", 2, SLICES),
    ("V4", 3, EXPERTS),
]  # fmt: skip
FAST = {CASES[0], CASES[3], CASES[4], CASES[9]}


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize(("name", "n_ranks", "share"), slow_but(CASES, FAST))
def test_logits_are_those_of_one_process(name: str, n_ranks: int, share: str) -> None:
    ids = tiny_deepseek4.token_ids(40) if name == "V4" else ids_of(40, name)
    with opened(path_of(name)) as model:
        step, many = both_ways(model, ids)
        first = model.forward(ids[:8], model.new_cache(8))
    with opened(path_of(name), n_ranks, Sharing("f32", share=share)) as model:
        found_step, found_many = both_ways(model, ids)
        found_first = model.forward(ids[:8], model.new_cache(8))
        assert (model.remote.share.owners is None) == (share == SLICES) and model.remote.figures()["exchanges"] > 0
    assert error(found_many, many) < ROUNDING_TOLERANCE
    assert error(found_step, step) < SESSION_TOLERANCE  # rows of the cache are rounded to 16 bits
    assert not np.array_equal(found_many, many)  # or nothing is shared
    if (n_ranks, share) != (2, EXPERTS):  # of two experts a token, the order of whose sum is all the same
        assert not np.array_equal(found_first, first)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_prompts_in_two_batches(share: str) -> None:
    """Whose messages are under way at once."""
    ids = ids_of(CTX)
    with opened(path_of("V2-Lite")) as model:
        expected = model.forward(ids, model.new_cache(CTX, exact=True), all_logits=True)
    with opened(path_of("V2-Lite"), 3, Sharing("f32", share=share)) as model:
        model.tuning.few = 64
        assert model.tuning.measure().cpu_experts(np.array(100.0)) > 0  # ranks compute for what is measured, too
        two_batches(model)
        found = model.forward(ids, model.new_cache(CTX, exact=True), all_logits=True)
        assert model.remote.figures()["many_overlap"] > 0
        assert model.tuning.most == model.tuning.chunk and model.routed.streamable == 0  # no rank's part is uploaded
    assert error(found, expected) < ROUNDING_TOLERANCE


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_layers_in_vram_are_not_shared(share: str) -> None:
    """No rank has anything of them; this one has in RAM its part of the others, and of what drafts."""
    path, ids = path_of("V2-Lite"), ids_of(40)
    with opened(path, in_vram=(1,)) as model:
        step, many = both_ways(model, ids)
    with opened(path, 2, Sharing("f32", share=share), in_vram=(1,)) as model:
        found_step, found_many = both_ways(model, ids)
        share_of = model.remote.share
        assert list(share_of.layers) == [2] and list(model.routed.in_ram) == [2]
        spans = spans_in_ram(GGUFTensors(model.file), model.config, model._placement, share_of)
        assert spans == share_of.spans
        whole = model.file.tensors["blk.2.ffn_gate_exps.weight"].n_bytes
        assert 0.3 * 2 * whole < sum(n_bytes for _, n_bytes in spans) < 0.7 * 3 * whole
    assert error(found_many, many) < ROUNDING_TOLERANCE and error(found_step, step) < SESSION_TOLERANCE


@pytest.mark.usefixtures("in_torch")
def test_rounded_messages_and_blocks() -> None:
    """What is rounded to 8 bits is rounded alike, but where a sum's last place tips it; slices laid out anew."""
    ids = ids_of(40)
    with opened(path_of("V3")) as model:
        step, many = both_ways(model, ids)
    for sharing, least, most in ((Sharing(), 1e-5, BF16_TOLERANCE), (Sharing("fp8", share=EXPERTS), 1e-3, 0.1)):
        with opened(path_of("V3"), 2, sharing) as model:
            found_step, found_many = both_ways(model, ids)
        for found, expected in ((found_step[:4], step[:4]), (found_many[:4], many[:4])):
            assert least < error(found, expected) < most
    path = tiny_models.shared(
        replace(MODELS["V3"], hidden_size=256, moe_intermediate_size=512), type=tiny_models.MIXES["Q4_K_M"]
    )
    with opened(path) as model:
        expected = both_ways(model, ids)
    for repack in (False, True):
        pays = tuning.using(replace(tuning.current(), interleaving_pays=True))
        with pays, opened(path, 2, Sharing("f32", repack=repack)) as model:
            assert model.remote.share.layers[1].gate.format.name == ("Q4_K_R16" if repack else "Q4_K")
            for one, other in zip(both_ways(model, ids), expected, strict=True):
                assert error(one, other) < QUANTIZED_TOLERANCE


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_steps_of_many_kinds(share: str) -> None:
    """Several contexts and forgotten tokens have the bits of single tokens."""
    texts = [ids_of(20)[n:] for n in range(3)]
    with opened(path_of("V3"), 2, Sharing("f32", share=share)) as model:
        caches = [model.new_cache(32) for _ in texts]
        for text, cache in zip(texts, caches, strict=True):
            model.forward(text[:-2], cache)
        alone = []
        for text, cache in zip(texts, caches, strict=True):
            alone.append(np.concatenate([model.forward([token], cache) for token in text[-2:]]))
            cache.truncate(len(text) - 2)
        together = np.stack([model.forward_each([text[i] for text in texts], caches) for i in (-2, -1)], 1)
        assert np.array_equal(together, np.stack(alone))


@pytest.mark.usefixtures("in_torch")
def test_work_handed_over_by_words_in_memory() -> None:
    """The thread that polls sends the messages."""
    device, ids = StandIn(), ids_of(20)
    device.use(STREAM_MEMORY)
    with opened(path_of("V3")) as model:
        step, _ = both_ways(model, ids)
    with opened(path_of("V3"), 2, device=device) as model:
        assert error(both_ways(model, ids)[0], step) < SESSION_TOLERANCE


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize(("n_tokens", "by_words"), [(1, False), (1, True), (120, False)], ids=["step", "words", "many"])
def test_a_rank_that_does_not_answer(n_tokens: int, by_words: bool) -> None:
    """An error within the limit that names it; the cache is as before; nothing goes on; no thread stays."""
    before, device, post, ids = set(threading.enumerate()), StandIn(), Post(), ids_of(n_tokens)
    if by_words:
        device.use(STREAM_MEMORY)
    with opened(path_of("V2-Lite"), 3, Sharing(), post, device=device, limit_s=1.0) as model:
        two_batches(model)
        cache = model.new_cache(CTX)
        model.forward(ids_of(3), cache)
        post.dead.add(2)
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(RankError, match=r"^rank 2: no answer in 1 s$") as raised:
                model.forward(ids, cache)
            assert (raised.value.rank, cache.length) == (2, 3) and time.monotonic() - began < 5
        with pytest.raises(RankError):
            model.forward_each([1], [cache])
    if device._coordinator is not None:
        device._coordinator.close()
        device._coordinator._thread.join(5)
    assert set(threading.enumerate()) <= before


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("raised", [MemoryError("no room for the experts' sums"), KeyboardInterrupt()], ids=type)
def test_an_error_here_leaves_the_ranks_in_step(raised: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their answers to what was dropped are taken by nobody, and the next prompt gets its own."""
    compute = quant_experts.run

    def fail(*arguments: Any) -> None:
        if threading.current_thread().name.startswith("localrun-experts"):  # another rank's is not
            raise raised
        compute(*arguments)

    ids = ids_of(40)
    with opened(path_of("V2-Lite"), 2) as model:
        two_batches(model)
        cache = model.new_cache(CTX)
        expected = model.forward(ids, cache)
        cache.truncate(0)
        with monkeypatch.context() as patch:
            patch.setattr(quant_experts, "run", fail)
            with pytest.raises(type(raised)):
                model.forward(ids, cache)
        assert cache.length == 0
        assert np.array_equal(model.forward(ids, cache), expected)


@pytest.mark.usefixtures("in_torch")
@pytest.mark.parametrize("what", ["Pool", "DecodeStep"])
def test_an_error_while_loading_ends_all_threads(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hybrid, what, lambda *arguments: pytest.fail("no room"))
    before = set(threading.enumerate())
    with pytest.raises(pytest.fail.Exception, match="no room"), opened(path_of("V3"), 2):
        pass
    assert set(threading.enumerate()) <= before


# ---- through the engine ----------------------------------------------------------------------------------------------


@contextmanager
def loaded(path: Path, n_ranks: int = 1, sharing: Sharing = EXACT, **options: Any) -> Iterator[localrun.Engine]:
    with ExitStack() as stack:
        if n_ranks > 1:
            options["ranks"] = stack.enter_context(in_process(path, n_ranks, sharing))
        options = {"device": "cuda", "unproven": True, "gpu_experts": 0} | options
        yield stack.enter_context(localrun.load(path, threads=2, ctx=CTX, **options))


@pytest.mark.usefixtures("in_torch", "gpu")
@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_replies_are_those_of_one_process(share: str) -> None:
    """Greedy ones, with drafts by the model's own head, whose experts are shared as well, and without."""
    path, prompts = path_of(DRAFTING), [ids_of(40)[n:][: 5 + 7 * n] for n in range(4)]
    with loaded(path) as one:
        expected = [list(one.session("off").tokens(ids, GREEDY, max_tokens=16)) for ids in prompts]
    with loaded(path, 2, Sharing("f32", share=share)) as engine:
        assert engine.device == "cuda" and engine.describe()["ranks"] == 2
        exchanged = engine.rank_figures()["exchanges"]
        for setting in ("off", 3):
            sessions = [engine.session(setting) for _ in prompts]
            found = [
                list(session.tokens(ids, GREEDY, max_tokens=16)) for session, ids in zip(sessions, prompts, strict=True)
            ]
            assert found == expected
            assert engine.rank_figures()["exchanges"] > exchanged
        assert sessions[0].speculation.draft.name == "mtp" and sessions[0].stats.drafted_tokens > 0
        assert list(engine.model.remote.share.layers) == [1, 2]  # of which 2 drafts


@pytest.mark.usefixtures("in_torch", "gpu")
def test_what_is_placed_is_this_ranks_part() -> None:
    """In the table; experts of VRAM are whole layers, which others have nothing of."""
    path = path_of("V2-Lite")
    with loaded(path) as one, loaded(path, 2) as engine:
        assert engine.placement.n_bytes(RAM, ROUTED) == one.placement.n_bytes(RAM, ROUTED) * 2 / 3  # of three blocks
        assert engine.placement.n_bytes(VRAM, ROUTED) == 0
    with loaded(path, 3, Sharing("f32", (2.0, 1.0, 1.0), EXPERTS, copies=1), device="cpu", unproven=False,
                gpu_experts="auto") as engine:  # fmt: skip
        part = 1 / 2 + 1 / 8
        assert engine.placement.n_bytes(RAM, ROUTED) == one.placement.n_bytes(RAM, ROUTED) * part


@pytest.mark.usefixtures("in_torch", "gpu")
@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"gpu_experts": 2}, "routed experts of whole layers"),
        ({"gpu_experts": "cache"}, "routed experts of whole layers"),
        ({"expert_usage": "counts.gguf"}, "routed experts of whole layers"),
        ({}, "VRAM holds all routed experts"),
    ],
)
def test_what_cannot_be_shared_is_refused(options: dict[str, Any], line: str) -> None:
    path = path_of("V3")
    with in_process(path, 1, EXACT) as ranks, pytest.raises(LocalrunError, match=line):
        localrun.load(path, device="cuda", unproven=True, ranks=ranks, **options)


RANKS = """
import json, sys, threading, time
import psutil, pytest
import gpu_device
from gpu_torch import use_torch
from gpu_models import CARD, GREEDY
import localrun
from localrun.gpu import hybrid
from localrun.gpu.device import StandIn
from localrun.placement import available
from localrun.ranks.places import places_of
from localrun.ranks.sharing import Sharing
from localrun.ranks.start import sharing_ranks

patch = pytest.MonkeyPatch()
use_torch(patch)
patch.setattr(available, "find", lambda *at: CARD)
patch.setattr(hybrid, "Cuda", StandIn)
path, *ids = sys.argv[1:]
ids = [int(token) for token in ids]
options = {"device": "cuda", "unproven": True, "gpu_experts": 0, "threads": 1, "ctx": 64}
with localrun.load(path, **options) as model:
    expected = list(model.generate(ids, GREEDY, 12))
from pathlib import Path
with sharing_ranks(Path(path), places_of("3", None), Sharing("f32"), 1) as ranks:
    with localrun.load(path, ranks=ranks, **options) as model:
        found = list(model.generate(ids, GREEDY, 12))
        children = [p for p in psutil.Process().children(recursive=True) if "localrun.ranks.rank_child" in p.cmdline()]
        ranked = [p for p in children if "python" in p.name()]
        killed = []
        threading.Timer(0.5, lambda: killed.append(time.monotonic()) or ranked[0].kill()).start()
        line = ""
        try:
            while True:
                for token in model.generate(ids, GREEDY, 12):
                    pass
        except localrun.LocalrunError as error:
            line = str(error)
        took = time.monotonic() - killed[0]
threads = [t.name for t in threading.enumerate() if t.name.startswith("localrun")]
print(json.dumps({"same": found == expected, "line": line, "took": took, "threads": threads}))
"""


@pytest.mark.slow  # three processes that import torch or Numba
def test_under_mpiexec() -> None:
    """Replies are one process's; a rank that is killed meanwhile is one line, soon, and no thread stays."""
    pytest.importorskip("mpi4py", reason="no MPI: pip install localrun[cluster]")
    arguments = [str(path_of("V2-Lite")), *map(str, ids_of(20))]
    done = subprocess.run(
        [sys.executable, "-c", RANKS, *arguments], capture_output=True, text=True, timeout=120, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{TESTS / 'support'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and found["line"].startswith("rank ") and found["took"] < 10 and not found["threads"], found
