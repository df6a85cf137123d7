"""Speculative decoding: the reply is plain decoding's whatever the drafts are, and drafts are used while they pay."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import fake_engine
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from forced_draft import ForcedDraft
from speculating import CTX, GREEDY, N_VOCAB, SETTINGS, forced, plain, prompt

import localrun
from localrun.bundled import MINIATURE
from localrun.engine import Engine
from localrun.generate.drafts import Draft, MTPDraft, NGramDraft
from localrun.generate.model_draft import ModelDraft
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation


class Script(Draft):
    """Proposes what it is told, a list a step; then nothing."""

    name = "script"

    def __init__(self, steps: Sequence[Sequence[int]]):
        self.steps = iter(steps)

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        return list(next(self.steps, ()))[:n]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("acceptance", slow_but([0.0, 0.5, 0.85, 1.0], [0.0, 0.85]))
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_replies_are_plain_ones(engine: Engine, setting: str | int, acceptance: float, penalty: float) -> None:
    ids, sampling = prompt(engine), Sampling(temperature=0.0, repeat_penalty=penalty, repeat_last_n=16)
    expected, session = plain(engine, ids, 60, sampling), forced(engine, ids, acceptance, setting)
    session.speculation.draft.truth = [*ids, *expected]
    assert list(session.tokens(ids, sampling, max_tokens=60)) == expected
    assert session.ids == [*ids, *expected[:-1]] and session.finish_reason == "length"
    stats = session.stats
    assert stats.steps + stats.accepted_tokens == 59  # the first token comes with the prompt
    if setting != "auto":
        assert stats.drafted_tokens >= setting * (stats.steps - setting)  # all but near the end
        assert acceptance < 1 or stats.accepted_tokens == stats.drafted_tokens
        assert acceptance > 0 or stats.accepted_tokens == 0


def test_every_pattern_of_two_steps(engine: Engine) -> None:
    """Each of four drafts the first that is wrong, or none of them, twice."""
    ids = prompt(engine)
    expected = plain(engine, ids, 14)
    session = engine.session("off")
    patterns = [tuple(i != wrong for i in range(4)) for wrong in range(5)]  # what follows a wrong one is not looked at
    for first, second in itertools.product(patterns, repeat=2):
        draft = ForcedDraft([*ids, *expected], 1.0, N_VOCAB)
        rights = iter([first, second])
        draft.propose = lambda told, n, draft=draft, rights=rights: [
            token if right else token ^ 1
            for token, right in zip(draft.truth[len(told) : len(told) + n], next(rights, (True,) * 4), strict=False)
        ]
        session.speculation = Speculation(draft, 4)
        assert list(session.tokens(ids, GREEDY, max_tokens=14)) == expected
        wrong_at = [(*step, False).index(False) for step in (first, second)]
        assert session.stats.accepted_tokens >= sum(wrong_at) and session.ids == [*ids, *expected[:-1]]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["n-gram", "the same model", "another model"])
def test_drafts_of_all_kinds(engine: Engine, other: Engine, kind: str, setting: str | int) -> None:
    ids = prompt(engine, 12) * 2
    make = {
        "n-gram": NGramDraft,
        "the same model": lambda: ModelDraft(engine.session("off")),
        "another model": lambda: ModelDraft(other.session("off")),
    }
    session, expected = Session(engine, Speculation(make[kind](), setting)), plain(engine, ids, 60)
    assert list(session.tokens(ids, GREEDY, max_tokens=60)) == expected
    if kind == "the same model":  # not quite always: the prompt went through in pieces of other sizes
        assert session.stats.accepted_tokens > 0.7 * session.stats.drafted_tokens > 0


@pytest.mark.parametrize("prompt_seed", range(4))
def test_many_prompts(engine: Engine, prompt_seed: int) -> None:
    variant = "v3" if engine.config.kv_lora_rank else "llama"
    for n_prompt in (1, 2, 7, 30):
        ids = tiny_models.token_ids(variant, n_prompt, seed=prompt_seed)
        session = Session(engine, Speculation(NGramDraft(shortest=1), 4))
        assert list(session.tokens(ids, GREEDY, max_tokens=40)) == plain(engine, ids, 40)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_seed_gives_the_same_reply_with_and_without(engine: Engine, setting: str | int) -> None:
    ids = prompt(engine)
    for seed in range(5):
        sampling = Sampling(temperature=1.5, top_k=20, repeat_penalty=1.1, seed=seed)
        expected = plain(engine, ids, 30, sampling)
        draft = ForcedDraft([*ids, *expected], 0.7, N_VOCAB, seed)
        session = Session(engine, Speculation(draft, setting))
        assert list(session.tokens(ids, sampling, max_tokens=30)) == expected
        assert session.ids == [*ids, *expected[:-1]]


class Likeliest(Draft):
    """The likeliest tokens after any ids, by plain decoding."""

    name = "likeliest"

    def __init__(self, engine: Engine):
        self.engine, self.known = engine, {}

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        key = *ids, n
        if key not in self.known:
            self.known[key] = plain(self.engine, list(ids), n)
        return self.known[key]


def chi_square(sessions: Sequence[Session], ids: list[int], n: int) -> tuple[float, float, float]:
    """Of n sampled replies of three tokens, each one of 3, by each of two sessions with seeds of their own.

    Returns:
        Pearson's statistic of the two samples; its 99.9% quantile by Wilson and Hilferty's cube (Proc. Natl. Acad. Sci.
        17, 1931; 3.0902 is that of the normal distribution); what part of the drafts was accepted.
    """
    counts = [{}, {}]
    accepted = drafted = 0
    for which, session in enumerate(sessions):
        for i in range(n):
            sampling = Sampling(temperature=1.2, top_k=3, top_p=1.0, min_p=0.0, seed=i + which * n)
            reply = tuple(session.tokens(ids, sampling, max_tokens=3))
            counts[which][reply] = counts[which].get(reply, 0) + 1
            accepted, drafted = accepted + session.stats.accepted_tokens, drafted + session.stats.drafted_tokens
    pairs = [(counts[0].get(reply, 0), counts[1].get(reply, 0)) for reply in {*counts[0], *counts[1]}]
    freedom = len(pairs) - 1
    assert 10 <= freedom <= 26  # of 27 replies, rare ones may be missing
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3
    return statistic, quantile, accepted / drafted


def test_sampled_replies_are_distributed_like_plain_ones(engine: Engine) -> None:
    sessions = engine.session("off"), Session(engine, Speculation(Likeliest(engine), 3))
    statistic, bound, accepted = chi_square(sessions, prompt(engine, 8), 1000)
    assert 0.2 < accepted < 0.8 and statistic < bound


def test_sampled_stories_are_distributed_like_plain_ones() -> None:
    """The bundled model with the drafts of its own head."""
    with localrun.load(MINIATURE, threads=1, ctx=CTX) as model:
        sessions = model.session("off"), model.session(2)
        statistic, bound, accepted = chi_square(sessions, model.tokenizer.encode("Tom saw a"), 500)
        assert isinstance(sessions[1].speculation.draft, MTPDraft)
        assert 0.2 < accepted < 0.9 and statistic < bound


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n_prompt", slow_but(range(CTX - 7, CTX + 1), [CTX - 5, CTX - 2, CTX - 1, CTX]))
def test_the_context_ends_inside_of_drafts(engine: Engine, n_prompt: int, setting: str | int) -> None:
    ids = (tiny_models.prompt("v3") * 3)[:n_prompt]
    session = forced(engine, ids, 1.0, setting)
    found = list(session.tokens(ids, GREEDY))
    assert found == plain(engine, ids, CTX)
    assert len(found) == CTX - n_prompt + 1 and len(session.ids) == CTX and session.finish_reason == "context"
    assert list(session.tokens(ids[:10], GREEDY, max_tokens=4)) == plain(engine, ids[:10], 4)


@pytest.mark.parametrize("n", range(12))
def test_a_limit_inside_of_drafts(engine: Engine, n: int) -> None:
    ids = prompt(engine)
    session = forced(engine, ids, 1.0, 4)
    assert list(session.tokens(ids, GREEDY, max_tokens=n)) == plain(engine, ids, n)
    assert session.finish_reason == "length" and session.ids == [*ids, *session.reply_ids[:-1]]
    assert session.stats.drafted_tokens == session.stats.accepted_tokens  # none was in vain


@pytest.mark.parametrize("taken", range(1, 12))
def test_closed_inside_of_drafts(engine: Engine, taken: int) -> None:
    ids = prompt(engine)
    session = forced(engine, ids, 1.0, 4)
    reply = session.tokens(ids, GREEDY, max_tokens=40)
    found = [next(reply) for _ in range(taken)]
    reply.close()
    assert found == session.reply_ids == plain(engine, ids, taken)
    assert session.ids == [*ids, *found[:-1]]  # what else the cache holds does not count
    following = [*ids, *found, 3, 1, 4]
    assert list(session.tokens(following, GREEDY, max_tokens=12)) == plain(engine, following, 12)
    assert session.stats.reused_tokens == len(ids) + taken - 1


@pytest.mark.parametrize("kind", ["forced", "n-gram", "model"])
def test_interrupted_while_verifying(engine: Engine, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = prompt(engine) * 2
    make = {"n-gram": lambda: NGramDraft(shortest=1), "model": lambda: ModelDraft(engine.session("off"))}
    session = forced(engine, ids, 0.6, 3)
    if kind != "forced":
        session.speculation = Speculation(make[kind](), 3)
    reply = session.tokens(ids, GREEDY, max_tokens=40)
    found = [next(reply) for _ in range(6)]

    def interrupt(*arguments: object, **options: object) -> np.ndarray:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.model, "forward", interrupt)
        found += reply
    assert session.ids == [*ids, *found[:-1]]  # what else the cache holds does not count
    following = [*ids, *found, 3, 1, 4]
    assert list(session.tokens(following, GREEDY, max_tokens=12)) == plain(engine, following, 12)


PROMPT = list(b"<|im_start|>assistant\n")  # after which the fake engine says its text


def spoken(reply: str, drafts: Draft | None, setting: int = 4, **options: object) -> tuple[str, Session]:
    """What the fake engine says, and the session that said it."""
    fake = fake_engine.Engine(reply, template=False)
    session = Session(fake, Speculation(drafts, setting) if drafts else None)
    return "".join(session.reply(PROMPT, GREEDY, **options)), session


@pytest.mark.parametrize("stop", ["a", "all", "l is", "Aye", ".", "absent", "ll is well. "])
@pytest.mark.parametrize("acceptance", [0.5, 1.0])
def test_stop_strings_inside_of_drafts(stop: str, acceptance: float) -> None:
    text = "Aye, all is well."
    draft = ForcedDraft([*PROMPT, *text.encode()], acceptance, 256)
    expected, plain_session = spoken(text, None, stop=[stop])
    found, session = spoken(text, draft, stop=[stop])
    assert found == expected and session.stats.drafted_tokens
    assert (session.reply_ids, session.ids) == (plain_session.reply_ids, plain_session.ids)
    assert session.finish_reason == plain_session.finish_reason == "stop"


@pytest.mark.parametrize("n", range(1, 10))
def test_an_end_token_inside_of_drafts(n: int) -> None:
    """Drafted as it is said, and with what would come after it."""
    text = "123456789"[:n]
    plain_session = spoken(text, None)[1]
    said = plain_session.reply_ids
    draft = ForcedDraft([*PROMPT, *said, fake_engine.END, *b"more of it"], 1.0, 256)
    session = spoken(text, draft)[1]
    assert session.reply_ids == said and fake_engine.END not in session.ids
    assert session.ids == plain_session.ids and session.finish_reason == "stop"


def test_a_penalty_sees_only_what_was_said(engine: Engine) -> None:
    """Drafts that are not taken leave the sampler's memory alone."""
    ids, sampling = prompt(engine, 5), Sampling(temperature=0.0, repeat_penalty=2.0, repeat_last_n=-1)
    expected = plain(engine, ids, 30, sampling)
    wrong = [[(token + 7) % N_VOCAB] * 4 for token in expected]
    session = Session(engine, Speculation(Script(wrong), 4))
    assert list(session.tokens(ids, sampling, max_tokens=30)) == expected
