"""Prompts read by other ranks (threads here) against the same in one process: to the bit, since chunks are the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny_deepseek4
import tiny_models
from caches import rows_of
from cases import slow_but
from fake_engine import Tokenizer
from ranks_in_process import Post, in_process, reading_in_process

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.models import config
from localrun.network import cache as caches
from localrun.ranks.readers import Readers
from localrun.ranks.sharing import Sharing
from localrun.ranks.world import RankError
from localrun.serve.job import Job
from localrun.serve.scheduler import Scheduler

GREEDY = Sampling(temperature=0.0)
CTX = 900
LONG = 120  # tokens that do not go through the step
V3 = tiny_models.shared("v3-odd")


@contextmanager
def reading(path: Path, n_readers: int = 1, post: Post | None = None, cache_bits: int = 16) -> Iterator[Engine]:
    with (
        reading_in_process(path, n_readers, post) as world,
        localrun.load(path, threads=2, ctx=CTX, readers=world, cache_bits=cache_bits) as model,
    ):
        yield model


def conversation(model: Engine) -> tuple[list[np.ndarray], list[list[int]]]:
    """Logits and rows of a prompt of two chunks, one behind its reply, one that turns off, a short one that does, one
    behind that, and one that has nothing in common."""
    rng, session, found, replies = np.random.default_rng(3), model.session("off"), [], []
    for kept, n_new in ((0, 512 + LONG), (700, LONG), (300, LONG), (200, 5), (700, LONG), (0, LONG)):
        ids = session.ids[:kept] + rng.integers(0, model.model.vocab_size, n_new).tolist()
        replies.append(list(session.tokens(ids, GREEDY, max_tokens=5)))
        found += [session.advance(replies[-1][-1:]), *rows_of(session.cache)]
    return found, replies


# Latents; grouped queries; rings of windows; an indexer's keys; pooled rows, their open windows and rings.
VARIANTS = ["v3-odd", "qwen3moe", "gpt-oss", "deepseek32", "deepseek4"]


EIGHT = [(variant, 8) for variant in VARIANTS if variant != "deepseek4"]  # whose rows keep 16 bits
CASES = [*((variant, 16) for variant in VARIANTS), *EIGHT]
FAST = [("v3-odd", 16), ("gpt-oss", 16), ("deepseek4", 16), ("v3-odd", 8)]


@pytest.mark.parametrize(("variant", "cache_bits"), slow_but(CASES, FAST))
def test_what_is_read_elsewhere_is_as_if_read_here(variant: str, cache_bits: int) -> None:
    path = tiny_deepseek4.shared() if variant == "deepseek4" else tiny_models.shared(variant)
    with localrun.load(path, threads=2, ctx=CTX, cache_bits=cache_bits) as model:
        expected, replies = conversation(model)
    with reading(path, cache_bits=cache_bits) as model:
        found, found_replies = conversation(model)
        figures = model.reader_figures()
        assert model.model._network is None  # nothing was read here
    assert found_replies == replies
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert figures["chunks"] >= 6 and figures["tokens"] >= 512 + 4 * LONG


def test_rings_that_have_gone_on_are_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With little to spare, a reader's have lost what is gone back to; so have those here, which have their marks."""
    monkeypatch.setattr(config, "WINDOW_SPARE", 24)
    path, rng = tiny_models.shared("gpt-oss"), np.random.default_rng(4)
    first, second, third = (rng.integers(0, 100, LONG).tolist() for _ in range(3))

    def read(model: Engine) -> list[np.ndarray]:
        session = model.session("off")
        session.advance(first)
        session.cache.mark()
        found = [session.advance(second)]
        session.forget(LONG)
        return [*found, session.advance(third), *rows_of(session.cache)]

    with localrun.load(path, threads=2, ctx=CTX) as model:
        expected = read(model)
    with reading(path) as model:
        found = read(model)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_drafts_of_the_models_own_layer_read_what_comes_back() -> None:
    """`hidden` of each token of the prompt comes with the logits."""
    path, ids = tiny_models.shared("v3-nextn"), tiny_models.token_ids("v3-nextn", LONG)
    with localrun.load(path, threads=2, ctx=CTX) as model:
        session = model.session(2)
        expected = list(session.tokens(ids, GREEDY, max_tokens=20)), session.stats.accepted_tokens
    with reading(path) as model:
        session = model.session(2)
        assert (list(session.tokens(ids, GREEDY, max_tokens=20)), session.stats.accepted_tokens) == expected


def test_experts_may_be_shared_as_well() -> None:
    ids = tiny_models.token_ids("v3-odd", LONG)
    with localrun.load(V3, threads=2, ctx=CTX) as model:
        expected = list(model.session().tokens(ids, GREEDY, max_tokens=8))
    with (
        in_process(V3, 2, Sharing("f32")) as ranks,
        reading_in_process(V3) as world,
        localrun.load(V3, threads=2, ctx=CTX, ranks=ranks, readers=world) as model,
    ):
        assert list(model.session().tokens(ids, GREEDY, max_tokens=8)) == expected


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_rows_that_a_reader_has_are_not_sent_again(cache_bits: int) -> None:
    """After a reply the reply's alone; of another conversation all; of one that another reader follows none."""
    with reading(V3, n_readers=2, cache_bits=cache_bits) as model:
        row = sum(kind.stored_bytes(cache_bits) for layer in range(4) for kind in model.config.rows(layer))
        first, second = model.session("off"), model.session("off")
        sent = []
        for session, n_steps in ((first, 0), (first, 7), (second, 9), (first, 3), (second, 0)):
            for token in range(n_steps):
                session.advance([token])
            session.advance(list(range(LONG)))
            sent.append(model.reader_figures()["bytes_out"] / row)
    assert np.diff([0, *sent]).tolist() == [0, 7, 9, 3, 0]


def test_rows_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI counts bytes in 31 bits."""
    ids = tiny_models.token_ids("v3-odd", LONG + 9)

    def read(model: Engine) -> np.ndarray:
        session = model.session("off")
        for token in ids[:9]:
            session.advance([token])
        return session.advance(ids[9:])

    with localrun.load(V3, threads=2, ctx=CTX) as model:
        expected = read(model)
    monkeypatch.setattr(caches, "PART_BYTES", 2 * 2 * caches.row_widths(model.config, 0)[0])  # two rows, the last one
    with reading(V3) as model:
        assert np.array_equal(read(model), expected)


@contextmanager
def slow_readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Readers whose answers are not there before the event is set."""
    is_open, read = threading.Event(), Readers._read

    def late(self: Readers, *arguments: object) -> object:
        answer = read(self, *arguments)
        is_open.wait(20)
        return answer

    monkeypatch.setattr(Readers, "_read", late)
    yield is_open
    is_open.set()


def test_what_nobody_wants_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another prompt of the same session gets its own answer; a reader that is at work is waited for."""
    texts = [tiny_models.token_ids("v3-odd", LONG, seed=seed) for seed in range(2)]
    with localrun.load(V3, threads=2, ctx=CTX) as model:
        expected = model.session("off").advance(texts[1])
    with reading(V3) as model, slow_readers(monkeypatch) as is_open:
        session, other = model.session("off"), model.session("off")
        assert not model.readers.has_read(texts[0], session.cache, 0.0)
        assert not model.readers.has_read(texts[1], other.cache, 0.0)  # none is free
        model.readers.drop(session.cache)
        is_open.set()
        assert np.array_equal(session.advance(texts[1]), expected)
        assert np.array_equal(other.advance(texts[1]), expected)


def test_replies_go_on_while_a_prompt_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's: all of the first reply comes while the second one's prompt is away; then that has its own."""
    texts = [tiny_models.token_ids("v3-odd", n, seed=n) for n in (5, LONG + 512)]
    with localrun.load(V3, threads=2, ctx=CTX) as model:
        expected = [list(model.session("off").tokens(ids, GREEDY, max_tokens=30)) for ids in texts]
    with reading(V3) as model, slow_readers(monkeypatch) as is_open:
        scheduler = _scheduler(model)
        try:
            jobs = [_job(ids) for ids in texts]
            scheduler.submit(jobs[1:])
            _until(lambda: jobs[1].is_elsewhere)
            scheduler.submit(jobs[:1])
            _until(lambda: jobs[0].ended)
            assert not jobs[1].has_read and not jobs[1].ended
            is_open.set()
            _until(lambda: jobs[1].ended)
        finally:
            scheduler.close()
        assert [job.error for job in jobs] == [None, None]
        assert [_ids_of(job) for job in jobs] == expected


def test_a_prompt_that_is_cancelled_while_it_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader is free for the next one."""
    ids = tiny_models.token_ids("v3-odd", LONG)
    with reading(V3) as model, slow_readers(monkeypatch) as is_open:
        scheduler = _scheduler(model)
        try:
            first, second = _job(ids), _job(ids[1:])
            scheduler.submit([first, second])
            _until(lambda: first.is_elsewhere and second.is_elsewhere)
            first.cancelled = True
            _until(lambda: first.ended)
            is_open.set()
            _until(lambda: second.ended)
        finally:
            scheduler.close()
        assert (first.finish_reason, second.finish_reason, second.error) == (None, "length", None)
        assert model.reader_figures()["chunks"] == 2


def test_a_reader_that_is_gone() -> None:
    """One line that names it; the cache is as before, and nothing is read any more."""
    post, ids = Post(), tiny_models.token_ids("v3-odd", LONG)
    with reading(V3, post=post) as model:
        session = model.session("off")
        session.advance([1, 2, 3])
        post.dead.add(1)
        threading.Timer(0.3, lambda: model.readers.world.fail(1, "host b (reader 1): was killed")).start()
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(RankError, match=r"^host b \(reader 1\): was killed$"):
                session.advance(ids)
            assert session.cache.length == 3 and time.monotonic() - began < 5


def test_what_does_not_go_with_readers() -> None:
    with reading_in_process(V3) as world:
        for options, line in (
            ({"device": "cuda"}, "device 'cuda' does not go"),
            ({"backend": "llama.cpp"}, "backend"),
        ):
            with pytest.raises(LocalrunError, match=line):
                localrun.load(V3, readers=world, **options)
        localrun.load(V3, threads=1, readers=world).close()


def _scheduler(model: Engine) -> Scheduler:
    model.tokenizer = Letters()
    return Scheduler(model, 2, 1 << 30)


class Letters(Tokenizer):
    """An id a letter, none of which ends a reply."""

    eog_ids = frozenset()

    def close(self) -> None:
        pass


def _job(ids: list[int]) -> Job:
    pieces: list[object] = []
    return Job(ids, GREEDY, 30, [], {}, pieces.append)


def _ids_of(job: Job) -> list[int]:
    pieces = job.deliver.__self__  # type: ignore[attr-defined]
    return [ord(letter) for piece in pieces if isinstance(piece, str) for letter in piece]


def _until(is_so: Callable[[], bool]) -> None:
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to be")
