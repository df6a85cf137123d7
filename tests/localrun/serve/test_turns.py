"""Whose turn it is, over a scripted engine: steps and chunks side by side, hanging up, overload, failures."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engine import Cache, Engine
from serving import CHAT, HELLO, REPLY, ask, events, hang_up, serving
from starlette.testclient import TestClient

from localrun import limits
from localrun.generate.sampling import Sampling
from localrun.ranks.world import RankError
from localrun.serve import app as app_module
from localrun.serve import server
from localrun.serve import service as service_module
from localrun.serve.app import application
from localrun.serve.chunks import ChunkSize
from localrun.serve.job import Job
from localrun.serve.scheduler import Scheduler
from localrun.serve.service import Service, with_signs_of_life


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_ends_the_work_within_a_step(engine: Engine, stream: bool) -> None:
    engine.model.reply, engine.ctx = "a" * 900, 1000
    steps, gone = [], asyncio.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def before_step(cache: Cache) -> None:
            steps.append(time.monotonic())
            if len(steps) == 5:
                loop.call_soon_threadsafe(gone.set)
            time.sleep(0.01 if len(steps) < 5 else 0.3)  # long beside what a busy machine keeps the loop waiting

        engine.model.before_step = before_step
        app = application(Service(engine, scheduler, "model"))
        await hang_up(app, CHAT, {"messages": HELLO, "stream": stream}, gone)

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
        wait_until(lambda: scheduler.totals.cancelled == 1)
        assert 5 <= len(steps) <= 8  # the loop and the engine may each be a step behind
        assert scheduler.running == 0
    finally:
        scheduler.close()


@pytest.mark.parametrize("most_together", [1, 8])
def test_conversations_take_turns(engine: Engine, most_together: int) -> None:
    """Two replies on two slots: neither is ever more than a step ahead once both run; a third waits for a slot."""
    order: list[int] = []
    engine.model.reply, engine.model.most_together = "a" * 20, most_together
    engine.model.before_step = lambda cache: order.append(id(cache))

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        ids = list(b"<|im_start|>assistant\n")
        three = service.replies([ids, [1, *ids], [2, *ids]], 1, service.usual, None, [])
        return [event async for event in three.events()]

    scheduler = Scheduler(engine, 2, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()
    first, second = dict.fromkeys(order[1:3])
    assert order[:39] == [first, *[first, second] * 19]
    assert len(order) == 3 * 21 + 2  # beside a reply a prompt is read in two pieces


def test_a_job_is_done_in_units(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 of chunks of 20 tokens, the last with the first token."""
    ids, lengths, pieces = list(b"To you.<|im_start|>assistant\n"), [], []
    session = engine.session()
    engine.model.before_step = lambda cache: lengths.append(cache.length)
    job = Job(ids, Sampling(temperature=0), 3, [], {}, pieces.append)
    monkeypatch.setattr(limits, "PREFILL_CHUNK", 20)
    turns = [len(lengths) for _ in job.units(engine, session, lambda n_left: min(7, n_left), lambda: 0.0)]
    assert lengths == [0, 7, 14, 20, 27, 29, 30] and turns == [1, 2, 3, 4, 5, 6, 7]
    assert [piece for piece in pieces if isinstance(piece, str)] == list(REPLY[:3])
    assert session.ids == [*ids, *REPLY[:2].encode()]
    assert (job.usage.prompt_tokens, job.usage.cached_tokens, job.finish_reason) == (29, 0, "length")


@pytest.mark.parametrize("most_together", [1, 8])
def test_a_prompt_is_read_in_chunks_between_which_others_have_their_steps(engine: Engine, most_together: int) -> None:
    """Chunks begin small while a reply runs, and grow with the time there is; two prompts take turns."""
    events: list[tuple[bytes, int]] = []
    engine.model.reply, engine.model.most_together = "a" * 200, most_together
    forward, asked = engine.model.forward, threading.Event()

    def watched(ids: list[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        if events:  # the reply that runs is not to end before the others are asked for
            assert asked.wait(60)
        events.append((bytes([*cache.ids, *ids][:1]), len(ids)))
        return forward(ids, cache, all_logits)

    engine.model.forward = watched
    start = list(b"<|im_start|>assistant\n")

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        first = service.replies([[97, *start]], 1, service.usual, 60, []).events()
        await anext(first)
        others = service.replies([[98] * 200 + start, [99] * 300 + start], 1, service.usual, 1, [])
        asked.set()
        assert [event async for event in others.events()][-1][1] is None
        [event async for event in first]

    scheduler = Scheduler(engine, 3, 0, most_pause_s=1000.0)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()
    chunks = [(name, n) for name, n in events[1:] if n > 1 or name != b"a"]
    assert [chunks.count(chunk) for chunk in [(b"b", 8), (b"c", 16), (b"b", 32), (b"c", 64), (b"b", 128)]] == [1] * 5
    assert sum(n for name, n in chunks if name == b"b") == 222 and sum(n for name, n in chunks if name == b"c") == 322
    at = [i for i, (name, n) in enumerate(events) if name != b"a"]
    assert all(events[i + 1] == (b"a", 1) for i in at)  # each chunk is followed by a step of the reply


def test_chunks_fill_the_time_that_there_is() -> None:
    """A chunk of n takes a + b n seconds: sizes go up to what fits, never beyond, and down where it gets slow."""

    def sizes(chunk_size: ChunkSize, most_s: float, a: float, b: float, n: int) -> list[int]:
        found = []
        for _ in range(n):
            found.append(chunk_size.next(most_s, 10**6))
            chunk_size.record(found[-1], a + b * found[-1])
        return found

    chunk_size = ChunkSize(8)
    fast = sizes(chunk_size, 1.0, 0.3, 0.005, 12)
    assert fast[:4] == [8, 16, 32, 55] and all(0.3 + 0.005 * n <= 1.0 for n in fast)
    assert fast[-1] > 90  # 100 fill 0.8 s
    slow = sizes(chunk_size, 1.0, 0.3, 0.01, 12)
    assert all(0.3 + 0.01 * n <= 1.0 for n in slow[4:]) and slow[-1] > 45
    chunk_size.record(3, 10.0)  # a prompt's last tokens
    assert chunk_size.next(1.0, 10**6) == slow[-1]
    assert sizes(chunk_size, 0.2, 0.3, 0.01, 30)[-1] == 8 and sizes(ChunkSize(8), 100.0, 0.0, 0.001, 12)[-1] == 512
    for n_left in range(1, 60):  # no piece is less than the least, but where there is no more to begin with
        pieces = ChunkSize(10)
        for size in (20, 10, 10):
            pieces._size, left = size, n_left
            while left:
                n_tokens = pieces.next(1.0, left)
                assert min(10, n_left) <= n_tokens <= max(size, min(left, 19)) and (left == n_tokens or n_left >= 20)
                left -= n_tokens


def test_a_failed_step_ends_all_that_share_it(engine: Engine) -> None:
    def fail(ids: list[int], caches: list[Cache]) -> None:
        raise ValueError("broken")

    with serving(engine) as (client, scheduler):
        engine.model.most_together, works = 8, engine.model.forward_each
        engine.model.forward_each = fail
        assert "broken" in ask(client, n=2).json()["error"]["message"]
        engine.model.forward_each = works
        assert [choice["message"]["content"] for choice in ask(client, n=2).json()["choices"]] == [REPLY] * 2
        assert scheduler.running == 0


def test_hanging_up_within_a_body_is_no_error(engine: Engine) -> None:
    async def run() -> None:
        gone = asyncio.Event()
        gone.set()
        await hang_up(application(Service(engine, scheduler, "model")), CHAT, None, gone)

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()


def test_progress_is_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """In llama.cpp's form: tokens of the prompt, those that were cached, and those that are there by now."""
    monkeypatch.setattr(limits, "PREFILL_CHUNK", 20)
    chunks = events(ask(client, stream=True, return_progress=True).text)[:-1]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [(each["total"], each["cache"], each["processed"]) for each in told] == [
        (55, 0, n) for n in (0, 20, 40, 55)
    ]  # fmt: skip
    assert all(each["time_ms"] >= 0 for each in told) and "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks
    ) == REPLY  # fmt: skip
    assert "prompt_progress" not in ask(client, stream=True).text


def test_hanging_up_in_the_queue_leaves_it(engine: Engine) -> None:
    """The one before goes on; the model never sees the prompt of the one that left."""
    engine.model.reply, seen, looked = "a" * 40, [], threading.Event()

    def before_step(cache: Cache) -> None:
        seen.append(cache)
        time.sleep(0.005)
        if len(seen) == 30:  # the one before is not to end first
            assert looked.wait(60)

    engine.model.before_step = before_step

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        ids = list(b"<|im_start|>assistant\n")
        first, second = (service.replies([prompt], 1, service.usual, None, []) for prompt in (ids, [1, *ids]))
        second.cancel()
        while scheduler.waiting:
            await asyncio.sleep(0.001)
        assert scheduler.running == 1
        looked.set()
        return [event async for event in first.events()]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        assert len(asyncio.run(run())) == 41
        assert len({id(cache) for cache in seen}) == 1 and scheduler.totals.cancelled == 1
    finally:
        scheduler.close()


def test_a_full_queue_is_told(engine: Engine) -> None:
    engine.model.before_step = lambda cache: time.sleep(0.002)
    with serving(engine, slots=1, most_waiting=2) as (client, scheduler):
        answer = ask(client, n=4)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error" and scheduler.totals.refused == 4
        assert len(ask(client, n=3).json()["choices"]) == 3


def test_a_slow_reader_is_dropped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MOST_UNREAD", 5)

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        replies = service.replies([list(b"<|im_start|>assistant\n")], 1, service.usual, None, [])
        while not replies.jobs[0].cancelled:  # reads nothing
            await asyncio.sleep(0.01)
        with pytest.raises(app_module.APIError, match="not read as fast"):
            [event async for event in replies.events()]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()


def test_signs_of_life(engine: Engine) -> None:
    engine.model.before_step = lambda cache: time.sleep(0.5)

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        replies = service.replies([list(b"<|im_start|>assistant\n")], 1, service.usual, 1, [])
        return [event async for event in with_signs_of_life(replies.events(), ping_s=0.02)]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        found = asyncio.run(run())
    finally:
        scheduler.close()
    assert found[0] is None and found[-1] == (0, None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_told_and_the_next_reply_comes(
    engine: Engine, client: TestClient, stream: bool
) -> None:
    def fail(cache: Cache) -> None:
        raise ValueError("broken")

    engine.model.before_step = fail
    answer = ask(client, stream=stream)
    document = events(answer.text)[-1] if stream else answer.json()
    assert document["error"]["type"] == "server_error" and "broken" in document["error"]["message"]
    engine.model.before_step = lambda cache: None
    assert ask(client).json()["choices"][0]["message"]["content"] == REPLY


def test_closing_cancels_what_is_left(engine: Engine) -> None:
    engine.model.reply = "a" * 900
    engine.model.before_step = lambda cache: time.sleep(0.01)

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        replies = service.replies([[1, 2]], 1, service.usual, None, [])
        reader = replies.events()
        await asyncio.sleep(0.05)
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(app_module.APIError, match="shutting down"):
            [event async for event in reader]
        with pytest.raises(app_module.APIError, match="shutting down"):
            service.replies([[1, 2]], 1, service.usual, None, [])

    scheduler = Scheduler(engine, 1, 1 << 30)
    asyncio.run(run())


@pytest.mark.parametrize("others", ["ranks", "readers"])
def test_a_server_ends_when_a_rank_is_lost(engine: Engine, others: str) -> None:
    """By itself, with the error that says which; a waiting client does not hold it up."""
    world = SimpleNamespace(failure=None)
    setattr(engine, others, SimpleNamespace(world=world))
    raised: list[RankError] = []

    def serve(listener: Any, ready: threading.Event) -> None:
        with pytest.raises(RankError) as error:
            server.serve(engine, listener, name="m", api_key=None, slots=1, cache_bytes=0, ready=ready.set)
        raised.append(error.value)

    with pytest.MonkeyPatch.context() as patch, server.listen_on("127.0.0.1", 0) as listener:
        patch.setattr(server._Server, "capture_signals", nullcontext)  # of the main thread's
        ready = threading.Event()
        thread = threading.Thread(target=serve, args=(listener, ready))
        thread.start()
        assert ready.wait(60)
        lost = world.failure = RankError(1, "host b (rank 1): is gone")
        thread.join(30)
        assert not thread.is_alive() and raised == [lost]
