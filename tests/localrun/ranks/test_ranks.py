"""Whole models whose experts are shared among ranks, against the same model in one process.

Ranks are threads here (ranks_in_process.py), but for test_under_mpi. Only the order of float32 sums differs with f32
messages. Tolerances on logits are fractions of their range.
"""

from __future__ import annotations

import math
import mmap
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import numpy as np
import pytest
import tiny_deepseek4
import tiny_models
from caches import rows_of
from cases import slow_but
from closeness import QUANTIZED_TOLERANCE, SESSION_TOLERANCE, error
from ranks_in_process import Post, in_process

import localrun
from localrun import engine, hardware, opening
from localrun.convert import Options, convert, make_plan
from localrun.cpu import model as cpu_model
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from localrun.models.summary import group_of
from localrun.placement.memory_table import EXPERTS as ROUTED
from localrun.placement.memory_table import RAM
from localrun.ranks import remote, speed
from localrun.ranks.sharing import AUTO, EXPERTS, SLICES, Division, Ranks, Share, Sharing, laid_out
from localrun.ranks.world import RankError, World
from quant.batch import MOST_TOKENS
from quant.decode.message_sizes import HEADER_BYTES, back_bytes, message_bytes
from quant.formats import registry
from quant.matrix import quant_matrix
from quant.target import tuning

EXACT = Sharing("f32")
GREEDY = Sampling(temperature=0.0)
ROUNDING_TOLERANCE = 3e-6  # of the order of sums: up to 3e-7 here
# Rounding each vector to 8 bits of mantissa (2^-9 of it) on three layers' way out and back: up to 1.5e-3 here.
BF16_TOLERANCE = 5e-3
# Of files whose activations are rounded to 8 bits: where a sum's last place tips a rounding, what lies behind is that
# of another rounding, up to 6.5e-3 off in 12 prompts of each of three files.
TIPPED_TOLERANCE = 1e-2


@contextmanager
def shared(
    path: Path, n_ranks: int = 2, sharing: Sharing = EXACT, post: Post | None = None, cache_bits: int = 16
) -> Iterator[Engine]:
    with in_process(path, n_ranks, sharing, post) as ranks:
        model = localrun.load(path, threads=2, ctx=160, ranks=ranks, cache_bits=cache_bits)
        with model:
            yield model


def by_steps(model: Engine, ids: list[int]) -> np.ndarray:
    """float32 (T, vocab): of single tokens, then of MOST_TOKENS at once."""
    cache = model.model.new_cache(len(ids))
    rows = [model.model.forward([token], cache) for token in ids[:-MOST_TOKENS]]
    return np.concatenate([*rows, model.model.forward(ids[-MOST_TOKENS:], cache, all_logits=True)])


def both_ways(path: Path, ids: list[int], **options: object) -> tuple[np.ndarray, np.ndarray]:
    """Logits of steps, and of many tokens with an exact cache."""
    with shared(path, **options) if options else localrun.load(path, threads=2, ctx=160) as model:
        return by_steps(model, ids), model.logits(ids)


# Latents with groups of experts; grouped queries; biases and bounds of the activation; streams and hashed choices.
VARIANTS = ["v3-odd", "qwen3moe", "gpt-oss", "v2", "v3-fused-gate-up", "deepseek32", "glm4moe", "deepseek4"]
SHARES = {"v3-odd": (3, (1.0, 3.0, 2.0)), "qwen3moe": (2, (1.0, 2.0))}  # ranks and sizes; others have two equal ones


@pytest.mark.parametrize("variant", slow_but(VARIANTS, {"v3-odd", "gpt-oss"}))
def test_logits_are_those_of_one_process(variant: str) -> None:
    if variant == "deepseek4":
        path, ids = tiny_deepseek4.shared(), list(range(40))
    else:
        path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    n_ranks, sizes = SHARES.get(variant, (2, ()))
    step, many = both_ways(path, ids)
    found_step, found_many = both_ways(path, ids, n_ranks=n_ranks, sharing=Sharing("f32", sizes))
    assert error(found_many, many) < ROUNDING_TOLERANCE
    assert error(found_step, step) < SESSION_TOLERANCE  # rows of the cache are rounded to 16 bits
    assert not np.array_equal(found_many, many)  # or nothing is shared


WHOLE = [("v3-odd", 3, (1.0, 3.0, 2.0), 3), ("v3-odd", 2, (), 0), ("gpt-oss", 2, (), 1), ("deepseek4", 3, (), 0)]


@pytest.mark.parametrize(("variant", "n_ranks", "sizes", "copies"), slow_but(WHOLE, {WHOLE[0]}))
def test_whole_experts(variant: str, n_ranks: int, sizes: tuple[float, ...], copies: int) -> None:
    path = tiny_deepseek4.shared() if variant == "deepseek4" else tiny_models.shared(variant)
    ids, sharing = list(range(40)), Sharing("f32", sizes, EXPERTS, copies=copies)
    step, many = both_ways(path, ids)
    found_step, found_many = both_ways(path, ids, n_ranks=n_ranks, sharing=sharing)
    assert error(found_many, many) < ROUNDING_TOLERANCE
    assert error(found_step, step) < SESSION_TOLERANCE
    assert not np.array_equal(found_many, many)


@pytest.mark.parametrize(
    ("variant", "mix"), slow_but([("v3-odd", "Q8_0"), ("v3-odd", "Q4_0"), ("gpt-oss", "MXFP4_MOE")], {})
)
def test_quantised_logits(variant: str, mix: str) -> None:
    """Blocks of 32 columns: what is rounded to 8 bits is rounded alike, but where a sum's last place tips it.

    That happens in one of ten tokens alone, then in all that see it. Experts are chosen by the token alone:
    a tipped choice could be 0.28 of the range off.
    """
    steady = replace(tiny_models.VARIANTS[variant], steady_routing=True)
    path, ids = tiny_models.shared(steady, type=tiny_models.MIXES[mix]), tiny_models.prompt(variant)
    with localrun.load(path, threads=2, ctx=160) as one, shared(path, 3) as three:
        for way in (by_steps, Engine.logits):
            assert error(way(three, ids), way(one, ids)) < TIPPED_TOLERANCE
        singly = [[model.model.forward([i], model.model.new_cache(1)) for i in ids] for model in (three, one)]
    assert np.median([error(*pair) for pair in zip(*singly, strict=True)]) < ROUNDING_TOLERANCE


def test_rounded_messages() -> None:
    """bf16 by default; fp8 rounds more, which may choose other experts."""
    path, ids = tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd")
    step, many = both_ways(path, ids)
    found_step, found_many = both_ways(path, ids, sharing=Sharing())
    assert 1e-5 < error(found_step, step) < BF16_TOLERANCE and 1e-5 < error(found_many, many) < BF16_TOLERANCE
    with shared(path, sharing=Sharing("fp8")) as model:
        first = model.model.forward(ids[:1], model.model.new_cache(8))
    assert BF16_TOLERANCE / 5 < error(first[0], step[0]) < 0.1


def test_steps_of_many_kinds() -> None:
    """Drafts, several contexts and forgotten tokens are rank 0's matter: bits are those of single tokens."""
    path = tiny_models.shared("v3-odd")
    texts = [tiny_models.token_ids("v3-odd", 12 + n, seed=n) for n in range(3)]
    with shared(path, sharing=Sharing()) as model:
        caches = [model.model.new_cache(32) for _ in texts]
        for text, cache in zip(texts, caches, strict=True):
            model.model.forward(text[:-2], cache)
        alone, rows = [], []
        for text, cache in zip(texts, caches, strict=True):
            alone.append(np.concatenate([model.model.forward([token], cache) for token in text[-2:]]))
            rows.append(rows_of(cache))
            cache.truncate(len(text) - 2)
        together = np.stack([model.model.forward_each([text[i] for text in texts], caches) for i in (-2, -1)], 1)
        assert np.array_equal(together, np.stack(alone))
        for left, cache in zip(rows, caches, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(left, rows_of(cache), strict=True))
        plain = list(model.session("off").tokens(texts[0], GREEDY, max_tokens=24))
        assert list(model.session(3).tokens(texts[0], GREEDY, max_tokens=24)) == plain


@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_a_world_of_one(share: str) -> None:
    """It has all the experts, and nobody to send anything to: bits are those of one process."""
    path, ids = tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd")
    found = both_ways(path, ids, n_ranks=1, sharing=Sharing("fp8", share=share))
    assert all(np.array_equal(a, b) for a, b in zip(found, both_ways(path, ids), strict=True))
    with shared(path, 1, Sharing(share=share)) as model:
        model.model.forward(ids[:1], model.model.new_cache(8))
        figures = model.rank_figures()
    assert (figures["bytes_out"], figures["bytes_back"]) == (0, 0) and figures["exchanges"] == 3


# A row that a sum's last place tips is a 127th of its largest value off: up to 1.5e-3 and 2.4e-3 of the range here.
@pytest.mark.parametrize("variant", slow_but(["v3-odd", "glm4moe"], {"v3-odd"}))
def test_a_cache_of_8_bits(variant: str) -> None:
    path, ids = tiny_models.shared(variant), tiny_models.token_ids(variant, 130)

    def ways(model: Engine) -> list[np.ndarray]:
        session = model.session("off")
        return [session.advance(ids[:120]), *(session.advance([token]) for token in ids[120:])]

    with localrun.load(path, threads=2, ctx=160, cache_bits=8) as model:
        expected = ways(model)
    with shared(path, 2, cache_bits=8) as model:
        for found, logits in zip(ways(model), expected, strict=True):
            assert error(found, logits) < QUANTIZED_TOLERANCE


def test_bytes_of_deepseek_v3() -> None:
    """docs/hosts.md says them."""
    assert message_bytes("bf16", 7168, 8, n_tokens=1) == 14_496 and back_bytes("bf16", 7168, n_tokens=1) == 14_400


@pytest.mark.parametrize("message", ["f32", "bf16", "fp8"])
def test_bytes_of_prompts_are_those_of_the_formula(message: str) -> None:
    """A header and one message a layer out, one without a header back."""
    n, post, config = 120, Post(), tiny_models.VARIANTS["v3-odd"]
    n_layers = config.num_hidden_layers - 1
    with shared(tiny_models.shared("v3-odd"), 2, Sharing(message), post) as model:
        before, n_before = post.n_sent.copy(), post.n_messages.copy()
        model.model.forward(list(range(n)), model.model.new_cache(n))
        assert post.n_sent[0, 1] - before[0, 1] == n_layers * message_bytes(message, 256, 4, n)
        assert post.n_sent[1, 0] - before[1, 0] == n_layers * (back_bytes(message, 256, n) - HEADER_BYTES)
        assert post.n_messages[0, 1] - n_before[0, 1] == 2 * n_layers
        assert post.n_messages[1, 0] - n_before[1, 0] == n_layers


@pytest.mark.parametrize("message", ["f32", "bf16", "fp8"])
def test_bytes_are_those_of_the_formula(message: str) -> None:
    """Two messages a layer and rank: one out, one back."""
    post, path, config = Post(), tiny_models.shared("v3-odd"), tiny_models.VARIANTS["v3-odd"]
    hidden, top_k, n_layers = config.hidden_size, config.num_experts_per_tok, config.num_hidden_layers - 1
    with shared(path, 3, Sharing(message), post) as model:
        cache = model.model.new_cache(32)
        before, n_before = post.n_sent.copy(), post.n_messages.copy()
        for n_tokens in (1, 3):
            model.model.forward(list(range(n_tokens)), cache)
        expected = sum(message_bytes(message, hidden, top_k, n) for n in (1, 3)) * n_layers
        expected_back = sum(back_bytes(message, hidden, n) for n in (1, 3)) * n_layers
        found = model.model.remote.figures()
        for rank in (1, 2):
            assert post.n_sent[0, rank] - before[0, rank] == expected
            assert post.n_sent[rank, 0] - before[rank, 0] == expected_back
            for way in ((0, rank), (rank, 0)):
                assert post.n_messages[way] - n_before[way] == 2 * n_layers
        assert (found["exchanges"], found["bytes_out"]) == (2 * n_layers, 2 * expected)
        assert found["bytes_back"] == 2 * expected_back and 0 < found["overlap"] < 1
        assert model.model.remote.times.any(1).all() and len(model.model.remote.times) == 2 * n_layers
        assert found["message_us_median"] >= 0 and found["wait_us_p90"] >= found["wait_us_median"]


@pytest.mark.parametrize("n_tokens", [1, 120], ids=["step", "many"])
def test_a_rank_that_does_not_answer(n_tokens: int) -> None:
    """An error within the limit that names it; the cache is as before; nothing goes on afterwards."""
    post, ids = Post(), tiny_models.token_ids("v3-odd", n_tokens)
    with in_process(tiny_models.shared("v3-odd"), 3, Sharing(), post) as ranks:
        ranks.world.limit_s = 1.0  # the other one answers in that time, on a busy machine, too
        with localrun.load(tiny_models.shared("v3-odd"), threads=1, ctx=160, ranks=ranks) as model:
            cache = model.model.new_cache(160)
            model.model.forward([1, 2, 3], cache)
            post.dead.add(2)
            for _ in range(2):
                began = time.monotonic()
                with pytest.raises(RankError, match=r"^rank 2: no answer in 1 s$") as raised:
                    model.model.forward(ids, cache)
                assert (raised.value.rank, cache.length) == (2, 3)
                assert time.monotonic() - began < 5


def test_somebody_knows_that_a_rank_is_gone() -> None:
    """Its watcher says so from another thread: waits end with that."""
    post = Post()
    with shared(tiny_models.shared("v3-odd"), post=post) as model:
        cache = model.model.new_cache(8)
        model.model.forward([1], cache)
        post.dead.add(1)
        model.ranks.world.fail(1, "host b (rank 1): was killed")
        with pytest.raises(RankError, match=r"^host b \(rank 1\): was killed$"):
            model.model.forward([2], cache)


def test_nothing_is_sent_once_a_rank_is_gone() -> None:
    """No step, no prompt, no end: MPI may crash where the other is gone."""
    post = Post()
    with shared(tiny_models.shared("v3-odd"), 3, post=post) as model:
        cache = model.model.new_cache(160)
        model.model.forward([1], cache)
        before = post.n_messages.copy()
        model.ranks.world.fail(1, "host b (rank 1): was killed")
        for n_tokens in (1, 120):
            with pytest.raises(RankError, match="was killed"):
                model.model.forward([2] * n_tokens, cache)
    assert all(post.n_messages[0, rank] == before[0, rank] for rank in (1, 2))


@pytest.mark.parametrize("n_tokens", [1, 120], ids=["step", "many"])
def test_nothing_is_sent_once_a_connection_has_closed(n_tokens: int) -> None:
    """Before anybody has said so: what has watched it is waited for."""
    post, (here, there) = Post(), socket.socketpair()
    with in_process(tiny_models.shared("v3-odd"), 2, Sharing(), post) as ranks, here:
        ranks.world.links.watch([here.fileno()])
        with localrun.load(tiny_models.shared("v3-odd"), threads=1, ctx=240, ranks=ranks) as model:
            cache = model.model.new_cache(240)
            model.model.forward([1] * n_tokens, cache)
            before = post.n_messages.copy()
            there.close()
            threading.Timer(0.2, lambda: ranks.world.fail(1, "host b (rank 1): was killed")).start()
            with pytest.raises(RankError, match="was killed"):
                model.model.forward([1] * n_tokens, cache)
        assert post.n_messages[0, 1] == before[0, 1]


def test_an_error_of_mpi_names_the_rank() -> None:
    post = Post()
    with shared(tiny_models.shared("v3-odd"), post=post) as model:
        for n_tokens in (1, 120):
            post.error = 15
            with pytest.raises(RankError, match=r"^rank 1: the connection is lost \(MPI's error 15\)$"):
                model.model.forward(list(range(n_tokens)), model.model.new_cache(160))


@pytest.mark.parametrize("by_speed", [False, True])
def test_others_get_ready_while_this_rank_does(by_speed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have their shares and kernels before this one asks for its first kernel, if it takes so long."""
    is_ready, send, warm_up = threading.Event(), World.send, opening.warm_up

    def sent(world: World, rank: int, data: bytes) -> None:
        send(world, rank, data)
        if data == remote.READY:
            is_ready.set()

    def after_others(*arguments: object) -> None:
        assert is_ready.wait(60), "rank 1 waits for rank 0's kernels"
        warm_up(*arguments)

    monkeypatch.setattr(World, "send", sent)
    monkeypatch.setattr(opening, "warm_up", after_others)
    with shared(tiny_models.shared("v3-odd"), sharing=Sharing("f32", by_speed=by_speed)) as model:
        model.model.forward([1], model.model.new_cache(8))


@pytest.mark.parametrize(
    ("module", "what"), [(engine, "Tokenizer"), (opening, "warm_up"), (cpu_model, "Pool"), (cpu_model, "decode_step")]
)
def test_an_error_while_loading_ends_all_threads(module: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, what, lambda *arguments, **options: pytest.fail("no room"))
    before = set(threading.enumerate())
    with pytest.raises(pytest.fail.Exception, match="no room"), shared(tiny_models.shared("v3-odd")):
        pass
    assert set(threading.enumerate()) <= before


def test_a_rank_without_room_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it copies anything."""
    monkeypatch.setattr(hardware, "free_ram", lambda: 1000)
    path, world = tiny_models.shared("v3-odd"), World(1, ["here", "host b (rank 1)"], Post().links(1))
    with open_gguf(path) as file, pytest.raises(LocalrunError, match=r"^this rank's columns .* 0\.0 are free$"):
        Share(file, read_config(file), world, EXACT, Division((1,), np.array([[1, 2]])))


def experts_of(model: Engine) -> int:
    """Bytes of all the file's routed experts."""
    return sum(tensor.n_bytes for name, tensor in model.file.tensors.items() if group_of(name) == ROUTED)


@pytest.mark.parametrize(
    ("here", "there", "exchange_s", "rows"),
    [
        (7e9, 2e9, 0.0, 64),  # of 96, in blocks of 32
        (1e9, 1e9, 0.0, 32),  # rank 0 has the shared expert as well
        (1e9, 1e9, 1.0, 64),  # the other would be done after all
    ],
)
def test_shares_by_time(
    here: float, there: float, exchange_s: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks cut alike by what each has measured; whole experts are divided by speeds alone."""
    path, ids = tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd")
    with localrun.load(path, threads=2, ctx=160) as model:
        expected = model.logits(ids)
    monkeypatch.setattr(speed, "read_speed", {1: there, 2: here}.__getitem__)  # rank 0 has two threads
    exchange = speed._exchange
    monkeypatch.setattr(speed, "_exchange", lambda *arguments: [exchange_s for _ in exchange(*arguments)])
    with shared(path, sharing=Sharing("f32", by_speed=True)) as model:
        assert model.model.remote.share.layers[1].gate.n_rows == rows
        assert model.placement.n_bytes(RAM, ROUTED) == math.ceil(rows / 96 * experts_of(model))  # what -v shows
        assert error(model.logits(ids), expected) < ROUNDING_TOLERANCE
    with shared(path, sharing=Sharing("f32", share=EXPERTS, by_speed=True)) as model:
        n_here, n_experts = int((model.model.remote.share.owners == 1).sum(1)[0]), model.config.n_routed_experts
        assert n_here == round(here / (here + there) * n_experts)
        assert model.placement.n_bytes(RAM, ROUTED) == math.ceil(n_here / n_experts * experts_of(model))


def test_each_rank_lays_out_its_slices() -> None:
    """--repack: 16 rows side by side, in RAM; that alone changes the order of sums, as in one process."""
    wide = replace(tiny_models.VARIANTS["wide"], moe_intermediate_size=512)
    path, ids = tiny_models.shared(wide, type=tiny_models.MIXES["Q4_K_M"]), tiny_models.token_ids("wide", 40)
    expected = both_ways(path, ids)
    pays = tuning.using(replace(tuning.current(), interleaving_pays=True))
    with pays, shared(path, 2, Sharing("f32", repack=True)) as model:
        own = model.model.remote.share.layers[1]
        assert [matrix.format.name for matrix in (own.gate, own.up, own.down)] == ["Q4_K_R16", "Q4_K_R16", "Q6_K_R16"]
        assert own.down.n_cols == own.gate.n_rows == 256
        assert not set(model.model.remote.share.spans)  # nothing of the map is read
        found = by_steps(model, ids), model.logits(ids)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < QUANTIZED_TOLERANCE


def test_what_a_rank_copies_goes_back_to_the_system() -> None:
    """As what --repack makes does: malloc would keep it for this process (test_torch_threads.py)."""
    with shared(tiny_models.shared("v3-odd")) as model:
        memory = model.model.remote.share.layers[1].down.owner
        while isinstance(memory, np.ndarray):
            memory = memory.base
        assert isinstance(memoryview(memory).obj, mmap.mmap)


@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_a_long_chunk_goes_in_several_messages(share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids, sent = tiny_models.shared("v3"), tiny_models.token_ids("v3", 40), []
    with localrun.load(path, threads=2, ctx=160) as model:
        expected = model.logits(ids)
    monkeypatch.setattr(remote, "PREFILL_CHUNK", 16)
    part = remote.many.Part
    monkeypatch.setattr(remote.many, "Part", lambda *of: sent.append(len(of[2])) or part(*of))
    with shared(path, 2, Sharing("f32", share=share)) as model:
        found = model.logits(ids)
    assert error(found, expected) < ROUNDING_TOLERANCE
    assert len(sent) > 1 and max(sent) <= 16


@pytest.mark.parametrize("type_", ["IQ1_S", "IQ1_M", "Q4_K"])
def test_what_is_widened_is_so_on_every_cpu(type_: str) -> None:
    shape, format_ = (2, 32, 512), registry.get(type_)
    data = np.random.default_rng(7).integers(0, 256, 2 * 32 * format_.row_bytes(512), np.uint8)
    with tuning.using(replace(tuning.current(), interleaving_pays=False)):
        laid = laid_out(quant_matrix(data, format_, shape))
    assert laid.format.name == (type_ if type_ == "Q4_K" else f"{type_}_R16")
    assert (laid.n_groups, laid.n_rows, laid.n_cols) == shape and laid.row_bytes == laid.format.row_bytes(512)


@pytest.mark.parametrize(
    ("variant", "n_ranks", "choices", "share"),
    [
        ("v3-odd", 3, {}, SLICES),
        ("v3-odd", 4, {}, EXPERTS),  # of 96 columns in blocks of 32
        ("v3-odd", 2, {"copies": 2}, EXPERTS),
    ],
)
def test_the_way_to_share_follows_from_the_model(variant: str, n_ranks: int, choices: dict, share: str) -> None:
    """Slices, unless there are too few blocks, or something is said that only whole experts have a use for."""
    ids = tiny_models.prompt(variant)
    with shared(tiny_models.shared(variant), n_ranks, Sharing("f32", share=AUTO, **choices)) as model:
        assert (model.model.remote.share.owners is None) == (share == SLICES)
        found = model.logits(ids)
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=160) as model:
        assert error(found, model.logits(ids)) < ROUNDING_TOLERANCE


def test_what_cannot_be_shared_is_refused() -> None:
    post = Post()
    with in_process(tiny_models.shared("v3-odd"), 1, Sharing(), post) as ranks:
        for options, line in (
            ({"device": "cuda", "gpu_experts": 2}, "several ranks"),
            ({"repack": True}, "lay out their own shares"),
            ({"backend": "llama.cpp"}, "llama.cpp"),
        ):
            with pytest.raises(LocalrunError, match=line):
                localrun.load(tiny_models.shared("v3-odd"), ranks=ranks, **options)
        with pytest.raises(LocalrunError, match="has no routed experts"):
            localrun.load(tiny_models.shared("llama"), ranks=ranks)
        with pytest.raises(LocalrunError, match="2 sizes of shares for 1 ranks"):
            localrun.load(tiny_models.shared("v3-odd"), ranks=Ranks(ranks.world, Sharing(sizes=(1.0, 2.0))))
    with pytest.raises(LocalrunError, match="'f16'; expected one of f32, bf16, fp8"):
        Sharing("f16")
    with pytest.raises(LocalrunError, match="must be above 0"):
        Sharing(sizes=(1.0, 0.0))
    with pytest.raises(LocalrunError, match="'rows'; expected slices, experts or auto"):
        Sharing(share="rows")
    with pytest.raises(LocalrunError, match="no use for counts or copies"):
        Sharing(copies=1)
    with pytest.raises(LocalrunError, match="--repack goes with slices"):
        Sharing(share=EXPERTS, repack=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [SLICES, EXPERTS])
def test_greedy_replies_are_those_of_one_process(share: str) -> None:
    """To the last token of 200, with f32 messages and weights: quantised ones meet activations rounded to 8 bits, where
    a sum's last place may tip one; of this random model one reply in ten turns off somewhere then."""
    path = tiny_models.shared("v3-odd")
    prompts = [tiny_models.token_ids("v3-odd", 5 + n % 7, seed=n) for n in range(200)]
    with localrun.load(path, threads=1, ctx=64) as model:
        expected = [list(model.session().tokens(ids, GREEDY, max_tokens=12)) for ids in prompts]
    with shared(path, 3, Sharing("f32", share=share)) as model:
        found = [list(model.session().tokens(ids, GREEDY, max_tokens=12)) for ids in prompts]
    assert found == expected


# A variant of each architecture with experts that tiny_models writes, V2-Lite's and Kimi-K2's choices among them.
EVERY = [
    *["v2-lite", "v2", "v3", "kimi-k2", "moonlight", "deepseek32", "glm-dsa", "deepseek4", "qwen3moe", "mixtral"],
    *["glm4moe", "glm4moe-air", "minimax-m2", "hy_v3", "bailingmoe2", "gpt-oss", "dots1", "ernie4_5-moe"],
]
CHECKPOINTS = {"dots1": ("Dots1", hf.DOTS1), "ernie4_5-moe": ("Ernie4_5_Moe", hf.ERNIE4_5_MOE)}  # converted, of those


def file_of(variant: str, folder: Path) -> Path:
    if variant == "deepseek4":
        return tiny_deepseek4.shared()
    if variant not in CHECKPOINTS:
        return tiny_models.shared(variant)
    path = folder / "model.gguf"
    convert(make_plan(hf.save(hf.make(*CHECKPOINTS[variant]), folder / "model"), path, Options(mix="F32")))
    return path


# Errors by message, of logits' range: of the median token up to 3e-3 and 0.03 (of 26 layers 0.066) here; of those for
# which rounded vectors tip a choice among these few experts, up to 0.113 and 0.32.
MESSAGE_TOLERANCES = {"bf16": (5e-3, 0.2), "fp8": (0.1, 0.5)}


def check_rounded(found: np.ndarray, expected: np.ndarray, message: str) -> None:
    most, worst = MESSAGE_TOLERANCES[message]
    assert error(found, expected) < worst
    assert np.median(np.abs(found - expected).max(1)) / np.ptp(expected) < most


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY)
def test_every_architecture_both_ways_to_share(variant: str, tmp_path: Path) -> None:
    """Two to four ranks, as many as there are blocks of columns, equal shares and odd ones in turn; all messages."""
    path = file_of(variant, tmp_path)
    ids = list(range(40)) if variant in (*CHECKPOINTS, "deepseek4") else tiny_models.prompt(variant)
    step, many = both_ways(path, ids)
    with open_gguf(path) as file:
        config = read_config(file)
    n_blocks = config.moe_intermediate_size // 32
    for n_ranks in (2, 3, 4):
        odd = tuple(float(1 + rank) for rank in range(n_ranks))
        for share, sizes in ((SLICES, ()), (EXPERTS, odd)) if n_ranks % 2 else ((SLICES, odd), (EXPERTS, ())):
            if share == SLICES and n_ranks > n_blocks:
                continue
            found_step, found_many = both_ways(path, ids, n_ranks=n_ranks, sharing=Sharing("f32", sizes, share))
            assert error(found_many, many) < ROUNDING_TOLERANCE, (n_ranks, share, sizes)
            assert error(found_step, step) < SESSION_TOLERANCE, (n_ranks, share, sizes)
    for message in ("bf16", "fp8"):
        for share in (SLICES, EXPERTS) if n_blocks > 1 else (EXPERTS,):
            found_step, found_many = both_ways(path, ids, n_ranks=2, sharing=Sharing(message, share=share))
            check_rounded(found_step, step, message)
            check_rounded(found_many, many, message)


@pytest.mark.slow
def test_drafts_of_the_models_own_layer() -> None:
    """Its experts are shared as well."""
    path, ids = tiny_models.shared("v3-nextn"), tiny_models.token_ids("v3-nextn", 9)
    with localrun.load(path, threads=1, ctx=64) as model:
        expected = list(model.session(2).tokens(ids, GREEDY, max_tokens=20))
    with shared(path) as model:
        assert list(model.session(2).tokens(ids, GREEDY, max_tokens=20)) == expected
        assert [*model.model.remote.share.layers] == [1, 2, 3, 4]


MPI_RANKS = """
import sys
import numpy as np
from mpi4py import MPI
import localrun
from localrun.gguf.file import open_gguf
from localrun.ranks.sharing import Ranks, Sharing
from localrun.ranks.worker import serve_share
from localrun.ranks.world import mpi_world

world = mpi_world(MPI.COMM_WORLD, [f"rank {rank}" for rank in range(MPI.COMM_WORLD.size)])
path, out, *ids = sys.argv[1:]
if world.rank:
    with open_gguf(path) as file:
        serve_share(file, world, Sharing("f32"), 1)
else:
    ids = [int(token) for token in ids]
    with localrun.load(path, threads=1, ctx=64, ranks=Ranks(world, Sharing("f32"))) as model:
        cache = model.model.new_cache(64)
        step = np.concatenate([model.model.forward([token], cache) for token in ids])
        np.savez(out, step=step, many=model.logits(ids))
"""


@pytest.mark.slow  # two processes that import torch
def test_under_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py", reason="no MPI: pip install localrun[cluster]")
    path, ids, out = tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd"), tmp_path / "logits.npz"
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [str(mpiexec), "-n", "2", sys.executable, "-c", MPI_RANKS, str(path), str(out), *map(str, ids)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with localrun.load(path, threads=1, ctx=64) as model, np.load(out) as found:
        cache = model.model.new_cache(64)
        step = np.concatenate([model.model.forward([token], cache) for token in ids])
        assert error(found["step"], step) < SESSION_TOLERANCE
        assert error(found["many"], model.logits(ids)) < ROUNDING_TOLERANCE
