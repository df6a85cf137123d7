"""What is kept of finished conversations, and the same replies whatever was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_models

import localrun
from localrun.engine import Engine
from localrun.generate.sampling import Sampling
from localrun.serve.prefixes import Prefixes

GREEDY = Sampling(temperature=0.0)
ids = tiny_models.prompt("llama")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with localrun.load(tiny_models.shared("llama"), threads=2, ctx=96) as model:
        yield model


def used(engine: Engine, prefixes: Prefixes, prompt: list[int], n: int = 4) -> tuple[int, list[int]]:
    """A reply on what the prefixes have: tokens reused, and the reply."""
    session = prefixes.take(prompt, [])
    reply = list(session.tokens(prompt, GREEDY, max_tokens=n))
    prefixes.keep(session)
    return session.stats.reused_tokens, reply


def test_the_longest_prefix_wins_and_a_short_question_costs_no_conversation(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30, 2)
    reused, reply = used(engine, prefixes, ids[:30])
    assert reused == 0
    aside = [*ids[:8], *ids[30:33]]  # shares eight tokens
    reused, answer = used(engine, prefixes, aside)
    assert reused == 8 and answer == list(engine.session().tokens(aside, GREEDY, max_tokens=4))
    on = [*ids[:30], *reply, 5]
    reused, after = used(engine, prefixes, on)
    assert reused == 33  # as if nobody had asked; the reply's last token was never evaluated
    assert after == list(engine.session().tokens(on, GREEDY, max_tokens=4))


def test_a_running_conversation_is_copied_from(engine: Engine) -> None:
    running = engine.session()
    tokens = running.tokens(ids[:20], GREEDY, max_tokens=6)
    begun = [next(tokens), next(tokens)]
    copy = Prefixes(engine, 1 << 30, 2).take(ids[:22], [running])
    assert copy.ids == ids[:20]
    assert [*begun, *tokens] == list(engine.session().tokens(ids[:20], GREEDY, max_tokens=6))
    assert list(copy.tokens(ids[:22], GREEDY, max_tokens=4)) == list(
        engine.session().tokens(ids[:22], GREEDY, max_tokens=4)
    )


def test_those_used_least_recently_go(engine: Engine) -> None:
    room = 2 * 23 * engine.config.kv_bytes_per_token
    prefixes = Prefixes(engine, room, 2)
    other, third = [token ^ 1 for token in ids[:20]], [token ^ 2 for token in ids[:20]]
    for prompt in (ids[:20], other, third):
        used(engine, prefixes, prompt)
        assert prefixes.n_bytes <= room
    assert used(engine, prefixes, third)[0] == 19
    assert used(engine, prefixes, other)[0] == 19
    assert used(engine, prefixes, ids[:20])[0] == 0


def test_nothing_is_kept_where_there_is_no_room(engine: Engine) -> None:
    prefixes = Prefixes(engine, 0, 2)
    used(engine, prefixes, ids[:20])
    assert prefixes.n_bytes == 0 and used(engine, prefixes, ids[:20])[0] == 0
