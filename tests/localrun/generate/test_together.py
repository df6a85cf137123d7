"""Contexts that share steps: each has the bits that it has alone, whoever its neighbours are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models
from caches import rows_of
from cases import slow_but
from fake_engine import Engine as FakeEngine
from forced_draft import ForcedDraft

import localrun
from localrun.engine import Engine
from localrun.errors import ContextFullError, LocalrunError
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation
from localrun.generate.together import step_together
from localrun.network.cache import Cache
from quant.batch import MOST_TOKENS

GREEDY = Sampling(temperature=0.0)
LENGTHS = [3, 70, 1, 33, 0, 64, 5, 100]  # with a piece of attention's more than others, and without a token
STEPS = 4
# Latents and grouped queries; a joint kv_b, an indexer that chooses, rings and sinks, biases, norms of whole rows.
VARIANTS = ["v3", "llama", "v3-legacy-kv-b", "deepseek32", "glm-dsa-shared", "gpt-oss", "glm4moe", "minimax-m2"]


def quantised(variant: str) -> Path:
    return tiny_models.shared(variant, type=tiny_models.Q4_K_M)


def filled(model: Engine, prompt: list[int], capacity: int) -> Cache:
    cache = model.model.new_cache(capacity)
    if prompt:
        model.model.forward(prompt, cache)
    return cache


@pytest.mark.parametrize("variant", slow_but(VARIANTS, {"v3", "llama"}))
def test_contexts_together_are_contexts_alone(variant: str) -> None:
    """Bits of logits and rows, whatever the neighbours' lengths and room; after tokens were forgotten as well, and
    with a chunk of another's prompt between the steps."""
    with localrun.load(quantised(variant), threads=2, ctx=32) as model:
        texts = [tiny_models.token_ids(variant, n + STEPS, seed=seed) for seed, n in enumerate(LENGTHS)]
        alone, rows = [], []
        for n, text in zip(LENGTHS, texts, strict=True):
            cache = filled(model, text[:n], 160)
            alone.append([model.model.forward([token], cache)[0] for token in text[n:]])
            rows.append(rows_of(cache))
        for count in (2, 3, 5, MOST_TOKENS):
            chosen = range(count) if count % 2 else range(len(LENGTHS) - count, len(LENGTHS))
            caches = [filled(model, texts[i][: LENGTHS[i]], LENGTHS[i] + STEPS + i) for i in chosen]
            for step in [0, 1, 2, 1, 2, 3]:  # two are taken back
                for i, cache in zip(chosen, caches, strict=True):
                    cache.truncate(LENGTHS[i] + step)
                found = model.model.forward_each([texts[i][LENGTHS[i] + step] for i in chosen], caches)
                assert all(np.array_equal(row, alone[i][step]) for row, i in zip(found, chosen, strict=True))
                filled(model, texts[1][:20], 32)
            for i, cache in zip(chosen, caches, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(rows_of(cache), rows[i], strict=True))


def test_a_full_neighbour_leaves_all_as_they_are() -> None:
    with localrun.load(quantised("llama"), threads=2, ctx=32) as model:
        caches = [filled(model, [1, 2, 3], 4), filled(model, [1, 2, 3], 3)]
        with pytest.raises(ContextFullError, match="4 tokens, room for 3"):
            model.model.forward_each([4, 4], caches)
        assert [cache.length for cache in caches] == [3, 3]
        logits = model.model.forward([4], caches[0])
        assert np.array_equal(logits, model.model.forward([1, 2, 3, 4], model.new_cache()))


@pytest.mark.parametrize("variant", slow_but(["llama", "qwen3moe", "gpt-oss", "glm4moe", "minimax-m2"], {"llama"}))
def test_a_prompt_in_pieces_is_the_prompt(variant: str) -> None:
    """Of grouped-query attention: pieces of least_chunk tokens or more have the bits of a chunk.

    Latent attention rebuilds keys where a chunk is long, and rounds differently then.
    """
    with localrun.load(quantised(variant), threads=2, ctx=32) as model:
        least, prompt = model.model.least_chunk, tiny_models.token_ids(variant, 500)
        whole = model.model.new_cache(512)
        expected = model.model.forward(prompt, whole)
        for sizes in ([least, least + 1, least + 2, 500 - 3 * least - 3], [300, 200]):
            cache, first = model.model.new_cache(512), 0
            for size in sizes:
                logits = model.model.forward(prompt[first : first + size], cache)
                first += size
            assert np.array_equal(logits, expected)
            assert all(np.array_equal(a, b) for a, b in zip(rows_of(cache), rows_of(whole), strict=True))


# ---- sessions --------------------------------------------------------------------------------------------------------


def drafting(engine: Engine, kind: str, prompt: list[int], reply: list[int]) -> Session:
    """A session that drafts in this way, or none."""
    if kind == "some right":
        return Session(engine, Speculation(ForcedDraft([*prompt, *reply], 0.6, engine.model.vocab_size), 3))
    return engine.session("off" if kind == "off" else 2)


@pytest.mark.parametrize("kind", ["off", "some right", "own head"])
def test_replies_that_share_steps_are_replies_alone(kind: str) -> None:
    """With neighbours that come and go; drafts that are on their way are out before a step is shared."""
    variant = "v3-nextn"
    with localrun.load(quantised(variant), threads=2, ctx=64) as engine:
        prompts = [tiny_models.token_ids(variant, n, seed=n) for n in (20, 3, 9)]
        limits = [24, 12, 60]  # the last one's ends with the context
        expected = [
            list(engine.session("off").tokens(prompt, GREEDY, max_tokens=limit))
            for prompt, limit in zip(prompts, limits, strict=True)
        ]
        sessions = [drafting(engine, kind, *pair) for pair in zip(prompts, expected, strict=True)]
        tokens = [
            session.tokens(prompt, GREEDY, max_tokens=limit)
            for session, prompt, limit in zip(sessions, prompts, limits, strict=True)
        ]
        replies: list[list[int]] = [[], [], []]
        shared = 0
        for turn in range(70):
            ready = [session for session in sessions if session.next_id is not None]
            if turn % 7 < 5 and len(ready) > 1:
                step_together(ready)
                shared += 1
            for i in range(len(sessions)):
                if turn >= 3 * i:  # they begin one after the other
                    replies[i] += [token for token in [next(tokens[i], None)] if token is not None]
        assert replies == expected and shared > 8
        assert [session.finish_reason for session in sessions] == ["length", "length", "context"]
        for session, prompt, reply in zip(sessions, prompts, expected, strict=True):
            assert session.ids == [*prompt, *reply][: len(session.ids)]
            assert len(session.ids) >= len(prompt) + len(reply) - 1
            assert session.stats.generated_tokens == len(reply)
            assert session.stats.steps + session.stats.accepted_tokens == len(reply) - 1
            again = session.tokens([*prompt, *reply[:-2]], GREEDY, max_tokens=2)
            assert list(again) == reply[-2:]


def test_a_token_of_each_session() -> None:
    prompt = tiny_models.token_ids("v3-nextn", 12)
    with localrun.load(quantised("v3-nextn"), threads=2, ctx=64) as engine:
        alone, *sessions = (engine.session(2) for _ in range(MOST_TOKENS + 3))
        for session in sessions:
            session.advance(prompt)
        found = engine.step_many([(session, token) for token, session in enumerate(sessions)])
        for token, (session, row) in enumerate(zip(sessions, found, strict=True)):
            alone.forget(0)
            alone.advance(prompt)
            assert np.array_equal(row, alone.advance([token])) and session.ids == [*prompt, token]
            ours, theirs = (each.speculation.draft._hidden for each in (session, alone))
            assert np.array_equal(ours, theirs)  # what the head for the token after the next goes on from
        for contexts in ([(alone, 1), (alone, 2)], [(FakeEngine().session(), 1)], [], [(alone, 10**6)]):
            with pytest.raises(LocalrunError):
                engine.step_many(contexts)
        assert alone.ids == [*prompt, len(sessions) - 1]


def test_models_that_share_no_steps_take_turns() -> None:
    with FakeEngine("Aye.") as fake:
        sessions = [fake.session(), fake.session()]
        replies = [session.tokens(list(b"<|im_start|>assistant\n"), GREEDY) for session in sessions]
        assert [next(reply) for reply in replies] == list(b"AA")
        step_together(sessions)
        assert [bytes(reply) for reply in replies] == [b"ye."] * 2
