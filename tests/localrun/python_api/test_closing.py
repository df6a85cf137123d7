"""Closing at any moment: what is used afterwards says so, and nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_engines import CTX, GREEDY, alone, opened, prompts, side_by_side

from localrun.engine import Engine
from localrun.errors import ClosedError, LocalrunError
from localrun.generate.session import Session

CLOSED: dict[str, Callable[[Engine, Session], Any]] = {
    "generate": lambda engine, session: engine.generate([1, 2], GREEDY),
    "logits": lambda engine, session: engine.logits([1]),
    "logits of a long prompt": lambda engine, session: engine.logits(list(range(CTX))),
    "session": lambda engine, session: engine.session(),
    "a cache": lambda engine, session: engine.new_cache(),
    "encode": lambda engine, session: engine.tokenizer.encode("x"),
    "decode": lambda engine, session: engine.tokenizer.decode([1]),
    "describe": lambda engine, session: engine.describe(),
    "with": lambda engine, session: engine.__enter__(),
    "reply of a session": lambda engine, session: list(session.reply([1, 2], GREEDY)),
    "save": lambda engine, session: session.save("x"),
    "load": lambda engine, session: session.load("x"),
    "forget": lambda engine, session: session.forget(0),
}


def test_nothing_works_after_close(fresh: Engine) -> None:
    session = fresh.session()
    reply = session.tokens([1, 2], GREEDY)
    next(reply)
    for _ in range(2):
        fresh.close()
    for name, use in CLOSED.items():
        with pytest.raises(ClosedError, match="the model is closed; load it again"):
            use(fresh, session)
            raise AssertionError(name)
    with pytest.raises(ClosedError):
        next(reply)


@pytest.mark.parametrize("way", ["dropped", "closed"])
def test_an_iterator_outlives_its_engine(fresh: Engine, way: str) -> None:
    """Its cache is freed by then: to llama.cpp, another look at it would be a crash."""
    session = fresh.session()
    reply = session.tokens([1, 2], GREEDY)
    next(reply)
    fresh.close()
    if way == "closed":
        reply.close()
    del reply, session
    gc.collect()


def test_closed_while_another_thread_generates(engine: Engine) -> None:
    for wait_s in (0, 0.002, 0.02):
        fresh, started = opened(engine.backend), threading.Event()

        def work(i: int, fresh: Engine = fresh, started: threading.Event = started, wait_s: float = wait_s) -> Any:
            if i == 0:
                started.wait(10)
                time.sleep(wait_s)
                return fresh.close()
            for reply in iter(lambda: fresh.generate([1, 2, i], GREEDY, max_tokens=50), None):
                for _ in reply:
                    started.set()

        found = side_by_side(work, 3)
        assert found[0] is None and [type(error) for error in found[1:]] == [ClosedError] * 2, found


def test_closed_between_two_chunks_of_a_prompt(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh.model, "chunks", lambda n: [4] * (n // 4))
    with pytest.raises(ClosedError):
        next(fresh.session().tokens(prompts(1)[0], GREEDY, progress=lambda done, total: fresh.close()))


def test_closed_by_a_signal_while_it_computes(fresh: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = fresh.model.forward

    def interrupted(*arguments: Any, **options: Any) -> np.ndarray:
        fresh.close()
        return forward(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fresh.model, "forward", interrupted)
        with pytest.raises(LocalrunError, match="the model is at work in this thread; close it afterwards"):
            fresh.logits([1, 2])
    assert fresh.logits([1, 2]).shape[0] == 2


def test_a_context_manager_entered_again(fresh: Engine) -> None:
    with fresh:
        with fresh as same:
            assert same is fresh and len(alone(fresh, [1, 2], 3)) == 3
        with pytest.raises(ClosedError):
            fresh.session()


def test_an_engine_that_is_dropped_leaves_nothing(engine: Engine) -> None:
    def counts() -> tuple[int, int]:
        names = [thread.name for thread in threading.enumerate()]
        return len([name for name in names if name.startswith("localrun-")]), len(os.listdir("/proc/self/fd"))

    alone(opened(engine.backend, threads=2), [1, 2], 3)
    gc.collect()
    before = counts(), torch.get_num_threads()
    for _ in range(3):
        model = opened(engine.backend, threads=3)
        reply = model.generate([1, 2], GREEDY)
        next(reply)
        model.logits([1, 2])
        del model, reply
    gc.collect()
    assert (counts(), torch.get_num_threads()) == before


def test_a_forked_process_is_refused(engine: Engine) -> None:
    """Threads and locks of the parent don't come along: without a check the child hangs, or computes alone."""
    reply = engine.session().tokens([1, 2], GREEDY)
    next(reply)
    pid = os.fork()
    if pid == 0:
        answers = 0
        for use in (lambda: engine.logits([1]), engine.session, lambda: next(reply), opened):
            try:
                use()
            except ClosedError as error:
                answers += "forked" in str(error)
        reply.close()
        engine.close()
        os._exit(answers)
    deadline = time.monotonic() + 20
    while (status := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert status[0] == pid and os.waitstatus_to_exitcode(status[1]) == 4
    assert len(list(zip(range(3), reply, strict=False))) == 3
