"""Threads on one engine, and iterators that are left: what each gets is what it would get alone, or a LocalrunError."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from forced_draft import ForcedDraft
from small_engines import GREEDY, alone, opened, prompts, side_by_side

from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation


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
