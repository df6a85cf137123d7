"""The Python interface in other hands: threads, iterators that are left, closing at any moment, wrong arguments.

Nothing is ever mixed in silence: what a thread or an iterator gets is what it would get alone, or a LocalrunError.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from forced_draft import ForcedDraft

import localrun
from localrun.bundled import MINIATURE
from localrun.engine import Engine
from localrun.errors import ClosedError, LocalrunError
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation
from localrun.text.chat_template import CHATML, ChatTemplate
from localrun.text.prompt import chat_ids

GREEDY = Sampling(temperature=0.0)
CTX = 96
MODELS = {"native": "v3", "llama.cpp": "llama"}  # backend: variant


def opened(backend: str = "native", **options: Any) -> Engine:
    settings = {"threads": 1, "ctx": CTX, "speculative": "off"} | options
    return localrun.load(tiny_models.shared(MODELS[backend]), backend=backend, **settings)


@pytest.fixture(scope="module", params=MODELS)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with opened(request.param) as model:
        yield model


@pytest.fixture
def fresh(engine: Engine) -> Iterator[Engine]:
    """The same model, for a test that closes it."""
    with opened(engine.backend) as model:
        yield model


def prompts(n: int, length: int = 20) -> list[list[int]]:
    return [tiny_models.token_ids("v3", length, seed=seed) for seed in range(n)]


def alone(engine: Engine, ids: list[int], n: int) -> list[int]:
    return list(engine.generate(ids, GREEDY, max_tokens=n))


def side_by_side(work: Callable[[int], Any], n: int) -> list[Any]:
    """What work gives for 0 to n - 1 in a thread each, or the error that it raises."""
    results: list[Any] = [None] * n

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    return results


# ------------------------------------------------------------------------------------------------ threads and iterators


@pytest.mark.parametrize("setting", ["off", 2])
def test_threads_on_one_engine_get_what_each_gets_alone(engine: Engine, setting: str | int) -> None:
    ids = prompts(4)
    expected = [alone(engine, each, 30) for each in ids]
    for _ in range(3):
        found = side_by_side(lambda i: list(engine.session(setting).tokens(ids[i], GREEDY, max_tokens=30)), 4)
        assert found == expected


def test_logits_and_replies_in_threads(engine: Engine) -> None:
    ids = prompts(4, 40)
    expected = [engine.logits(each) for each in ids]
    found = side_by_side(lambda i: alone(engine, ids[i], 9) if i % 2 else engine.logits(ids[i]), 4)
    assert all(np.array_equal(found[i], expected[i]) for i in (0, 2))
    assert [found[i] for i in (1, 3)] == [alone(engine, ids[i], 9) for i in (1, 3)]


def test_threads_that_share_a_draft_model() -> None:
    with opened(draft=tiny_models.shared("v3", seed=1), speculative=3) as engine, opened() as plain:
        ids = prompts(3)
        assert side_by_side(lambda i: alone(engine, ids[i], 30), 3) == [alone(plain, each, 30) for each in ids]


def test_a_new_reply_ends_the_one_before(engine: Engine) -> None:
    first, second = prompts(2)
    session = engine.session()
    left = session.tokens(first, GREEDY, max_tokens=9)
    taken = [next(left), next(left)]
    other = session.tokens(second, GREEDY, max_tokens=9)
    assert taken == alone(engine, first, 2)
    found = [next(other)]
    with pytest.raises(LocalrunError, match="this reply has ended: another one of its session has begun"):
        next(left)
    assert [*found, *other] == session.reply_ids == alone(engine, second, 9)
    assert session.ids == [*second, *session.reply_ids[:-1]] and session.finish_reason == "length"


@pytest.mark.parametrize("setting", [None, 1, 4])
def test_an_iterator_that_is_dropped_late_takes_nothing_away(setting: int | None) -> None:
    """Its drafts lie in the cache, and it cuts them off when it ends."""
    first, second = prompts(2)
    with opened() as engine:
        truth = [*first, *alone(engine, first, 40)]
        session = Session(engine, setting and Speculation(ForcedDraft(truth, 1.0, 320), setting))
        left = session.tokens(first, GREEDY, max_tokens=30)
        taken = [next(left) for _ in range(3)]
        reply = session.tokens([*first, *taken[:2]], GREEDY, max_tokens=9)  # shares what the drafts stand in
        found = [next(reply), next(reply)]
        left.close()
        assert [*found, *reply] == alone(engine, [*first, *taken[:2]], 9)
        assert list(session.tokens(second, GREEDY, max_tokens=5)) == alone(engine, second, 5)


def test_threads_on_one_session(engine: Engine) -> None:
    """One of them may lose its turn; whatever comes is right as far as it goes."""
    ids = prompts(4)
    expected, session = [alone(engine, each, 30) for each in ids], engine.session()

    def work(i: int) -> list[int]:
        found = []
        with suppress(LocalrunError):
            for token in session.tokens(ids[i], GREEDY, max_tokens=30):
                found.append(token)
        return found

    for _ in range(5):
        found = side_by_side(work, 4)
        assert all(tokens == expected[i][: len(tokens)] for i, tokens in enumerate(found))
        assert max(map(len, found)) == 30
    assert list(session.tokens(ids[0], GREEDY, max_tokens=30)) == expected[0]


def test_a_saved_session_has_no_drafts_in_it(tmp_path: Path) -> None:
    ids = prompts(1)[0]
    with opened() as engine:
        truth = [*ids, *alone(engine, ids, 40)]
        session = Session(engine, Speculation(ForcedDraft(truth, 1.0, 320), 4))
        reply = session.tokens(ids, GREEDY, max_tokens=30)
        taken = [next(reply), next(reply)]
        reply.close()
        session.save(tmp_path / "saved")
        again = engine.session()
        again.load(tmp_path / "saved")
        assert again.ids == [*ids, *taken[:1]]


def test_loading_ends_a_reply(engine: Engine, tmp_path: Path) -> None:
    session, ids = engine.session(), prompts(1)[0]
    list(session.tokens(ids, GREEDY, max_tokens=3))
    session.save(tmp_path / "saved")
    reply = session.tokens(ids, GREEDY, max_tokens=9)
    next(reply)
    session.load(tmp_path / "saved")
    with pytest.raises(LocalrunError, match="this reply has ended"):
        next(reply)
    assert len(session.ids) == len(ids) + 2


# ------------------------------------------------------------------------------------------------------------- closing


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


# ----------------------------------------------------------------------------------------------------------- arguments

HUGE = 10**5000  # Python refuses to write it out


def name_of(value: Any) -> str:
    return "huge" if isinstance(value, int) and abs(value) == HUGE else str(value)[:20]


WRONG_IDS = {
    "text": "abc",
    "bytes": b"abc",
    "fractions": [1.0, 2.5],
    "an array of fractions": np.array([1.0, 2.0]),
    "a truth": [True],
    "texts": ["1", "2"],
    "none": None,
    "nothing in it": [None],
    "a number": 5,
    "an array without dimensions": np.array(5),
    "rows": np.ones((2, 2), np.int64),
    "a set": {1, 2},
    "negative": [1, -1],
    "beyond the vocabulary": [10**6],
    "beyond all": [HUGE],
    "no ids": [],
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_wrong_ids(engine: Engine, name: str) -> None:
    ids = WRONG_IDS[name]
    for use in (engine.logits, engine.generate, engine.session().tokens, engine.session().reply):
        with pytest.raises(LocalrunError, match=r"ids|token id|prompt") as caught:
            use(ids)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ids",
    [(1, 2), np.array([1, 2]), np.array([1, 2], np.uint16), [np.int64(1), np.int8(2)], range(1, 3)],
    ids=str,
)
def test_ids_of_all_kinds(engine: Engine, ids: Any) -> None:
    assert list(engine.generate(ids, GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)
    assert list(engine.generate(iter(ids), GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)


def test_ids_in_a_torch_tensor(engine: Engine) -> None:
    assert list(engine.generate(torch.tensor([1, 2]), GREEDY, max_tokens=4)) == alone(engine, [1, 2], 4)


WRONG_REPLIES: list[tuple[str, Any]] = [
    *(("max_tokens", value) for value in (-1, 1.5, 2.0, "5", True, float("nan"), -HUGE, [1])),
    *(("sampling", value) for value in (0.7, {"temperature": 1}, "greedy", Sampling)),
    *(("stop", value) for value in (5, b"x", ["a", 5], [None], {"a": 1}, True)),
    *(("progress", value) for value in (5, "x", True)),
]


@pytest.mark.parametrize(("name", "value"), WRONG_REPLIES, ids=name_of)
def test_wrong_arguments_of_a_reply(engine: Engine, name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        engine.session().reply([1, 2], **{name: value})
    assert len(str(caught.value)) < 200


@pytest.fixture(scope="module")
def story_model() -> Iterator[Engine]:
    """One with a vocabulary."""
    with localrun.load(MINIATURE, threads=1, ctx=64) as model:
        yield model


def test_one_stop_text(story_model: Engine) -> None:
    """A text is not a list of letters."""
    session, ids = story_model.session(), story_model.tokenizer.encode("Once upon a time")
    whole = "".join(session.reply(ids, GREEDY, max_tokens=30))
    found = "".join(session.reply(ids, GREEDY, max_tokens=30, stop=whole[4:8]))
    assert found == whole[: whole.index(whole[4:8])] and session.finish_reason == "stop"


WRONG_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", "0.5"),
    ("temperature", None),
    ("temperature", True),
    ("temperature", HUGE),
    ("temperature", 1j),
    ("temperature", np.float32("nan")),
    ("top_p", [0.5]),
    ("min_p", "x"),
    ("repeat_penalty", None),
    ("top_k", 5.5),
    ("top_k", 5.0),
    ("top_k", "5"),
    ("top_k", None),
    ("repeat_last_n", 1.5),
    ("seed", 1.5),
    ("seed", "x" * 10_000),
    ("seed", -HUGE),
    ("seed", True),
    ("presence_penalty", None),
    ("logit_bias", None),
    ("constraint", {"type": "object"}),
    ("top_logprobs", 1.0),
]


@pytest.mark.parametrize(("name", "value"), WRONG_SAMPLING, ids=name_of)
def test_wrong_settings(name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        Sampling(**{name: value})
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_settings_from_numpy_and_of_any_size(engine: Engine) -> None:
    sampling = Sampling(np.float32(0.5), np.int64(5), np.float64(0.5), 0, np.float16(1), np.int32(5), np.uint8(5))
    assert sampling == Sampling(0.5, 5, 0.5, 0.0, 1.0, 5, 5)
    large = Sampling(1e308, HUGE, 1, 0, 1e308, HUGE, HUGE)
    tiny = Sampling(5e-324, 1, 5e-324, 1, 5e-324, -1, 0)
    for extreme in (large, tiny):
        assert len(list(engine.generate([1, 2], extreme, max_tokens=3))) <= 3


WRONG_LOADS: list[tuple[str, Any]] = [
    *(("path", value) for value in (None, 5, ["x"], True)),
    *(("draft", value) for value in (5, ["x"])),
    *(("device", value) for value in ("gpu", None, 5, np.array(["cpu", "cuda"]))),
    *(("threads", value) for value in (0, -1, 1.5, "2", True, 513, HUGE)),
    *(("ctx", value) for value in (0, "128", 1.5, 2**31, HUGE, float("nan"))),
    *(("backend", value) for value in ("cuda", None, 5)),
    *(("vram", value) for value in ("8", 0, float("nan"), HUGE, True)),
    *(("gpu_experts", value) for value in ("x", None, 1.5, -1, True)),
    *(("cache_bits", value) for value in (4, "16", None, 12, 16.0)),
    *(("expert_usage", value) for value in (5, True)),
    *(("repack", value) for value in ("no", None, 1)),
    *(("dense_attention", value) for value in ("no", None, 1)),
    *(("speculative", value) for value in (None, 0, 5, 2.0, True, "on", np.array([1, 2]))),
    *((name, value) for name in ("progress", "notice", "placed") for value in (5, "x")),
]


@pytest.mark.parametrize(("name", "value"), WRONG_LOADS, ids=name_of)
def test_wrong_arguments_of_load(name: str, value: Any) -> None:
    with pytest.raises(LocalrunError, match=rf"^{name} is ") as caught:
        localrun.load(**{"path": MINIATURE} | {name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [0, 5, "on", True])
def test_wrong_settings_of_a_session(engine: Engine, value: Any) -> None:
    with pytest.raises(LocalrunError, match=r"^speculative is "):
        engine.session(value)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda tokenizer: tokenizer.encode(5), "text"),
        (lambda tokenizer: tokenizer.encode(None), "text"),
        (lambda tokenizer: tokenizer.encode(["a"]), "text"),
        (lambda tokenizer: tokenizer.decode("abc"), "ids"),
        (lambda tokenizer: tokenizer.decode(5), "ids"),
        (lambda tokenizer: tokenizer.decode([1.5]), r"ids\[0\]"),
        (lambda tokenizer: tokenizer.decode([HUGE]), "token id"),
        (lambda tokenizer: tokenizer.piece(1.5), "id"),
        (lambda tokenizer: tokenizer.piece(-1), "token id"),
    ],
)
def test_wrong_arguments_of_the_tokenizer(story_model: Engine, use: Callable[[Any], Any], name: str) -> None:
    with pytest.raises(LocalrunError, match=f"^{name} ") as caught:
        use(story_model.tokenizer)
    assert len(str(caught.value)) < 300  # one names the file


@pytest.mark.parametrize(
    ("messages", "name"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ({"role": "user", "content": "hi"}, "messages"),
        (["hi"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\]\['content'\]"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 5}], r"messages\[1\]\['content'\]"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\]\['content'\]"),
        ([{"content": "x"}], r"messages\[0\]\['role'\]"),
    ],
)
def test_wrong_messages(story_model: Engine, messages: Any, name: str) -> None:
    template = ChatTemplate(CHATML, bos_token="", eos_token="")
    with pytest.raises(LocalrunError, match=f"^{name} is "):
        chat_ids(template, story_model.tokenizer, messages)
    with pytest.raises(LocalrunError):
        template.render(messages)


@pytest.mark.parametrize("value", [5, None, ["x"]])
def test_wrong_paths_of_a_session(engine: Engine, value: Any) -> None:
    for use in (engine.session().save, engine.session().load):
        with pytest.raises(LocalrunError, match=r"^path is "):
            use(value)


def test_load_takes_what_the_command_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ok.gguf").symlink_to(MINIATURE)
    for path in (
        "miniature",
        "Miniature",
        "~/ok.gguf",
        Path("~/ok.gguf"),
        tmp_path / "ok.gguf",
        os.fsencode(MINIATURE),
    ):
        with localrun.load(path, threads=1, ctx=16) as engine:
            assert engine.file.path.resolve() == MINIATURE
    for path in ("nosuchmodel", "x\0y", "~/nosuchfile.gguf"):
        with pytest.raises(LocalrunError, match=r"no such file|is no file name"):
            localrun.load(path)


def test_threads_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ulimit -v: one line, and those that did start have ended."""
    start, begun = threading.Thread.start, []

    def few(thread: threading.Thread) -> None:
        if len(begun) == 5:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", few)
    with pytest.raises(LocalrunError, match="20 threads can't be started here, for want of memory; ask for fewer"):
        localrun.load(MINIATURE, threads=20)
    assert len(begun) == 5 and not any(thread.is_alive() for thread in begun)
