"""Layers with a window, whose cache is a ring: contexts far beyond both, in every way that tokens come and go.

Tolerances are fractions of the logit range.
"""

from __future__ import annotations

from pathlib import Path

import hf_oracle
import llama_cpp_oracle
import naive
import numpy as np
import pytest
import tiny_models
from caches import kinds
from closeness import SESSION_TOLERANCE, error

import localrun
from localrun.errors import LocalrunError
from localrun.models import config as model_config
from localrun.network.cache import Cache

VARIANT, WINDOW, SPARE = "gpt-oss", 16, 12
TOLERANCE = 1e-5  # as in test_logits.py
GREEDY = localrun.Sampling(temperature=0.0)


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings of 28 rows: they go round many times, and chunks are longer."""
    monkeypatch.setattr(model_config, "WINDOW_SPARE", SPARE)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """300 tokens whose experts no rounding of cached rows changes."""
    model = naive.Naive(tiny_models.shared(VARIANT))
    for seed in range(40):
        ids = tiny_models.token_ids(VARIANT, 300, seed=seed)
        model.logits(ids)
        if model.margins.min() > 4 * tiny_models.ROUTING_MARGIN:
            return ids
    raise AssertionError("no steady prompt among 40")


@pytest.fixture(scope="module")
def expected(ids: list[int]) -> np.ndarray:
    """float64 (300, vocab)."""
    return naive.Naive(tiny_models.shared(VARIANT)).logits(ids)


def load(ctx: int = 320) -> localrun.engine.Engine:
    return localrun.load(tiny_models.shared(VARIANT), device="cpu", threads=2, ctx=ctx)


def test_logits_far_beyond_the_window(small_rings: None, ids: list[int], expected: np.ndarray) -> None:
    path = tiny_models.shared(VARIANT)
    assert error(hf_oracle.logits(path, ids), expected) < TOLERANCE
    assert error(llama_cpp_oracle.logits(path, ids), expected) < TOLERANCE
    with load() as engine:
        assert error(engine.logits(ids), expected) < TOLERANCE


@pytest.mark.parametrize(
    "sizes", [[1] * 300, [300], [20, 1, 1, 5, 100, 3, 170], [129, 171]], ids=["one by one", "whole", "mixed", "two"]
)
def test_however_tokens_come(small_rings: None, ids: list[int], expected: np.ndarray, sizes: list[int]) -> None:
    """By steps of up to 5 tokens and, above 96, by the network in torch; chunks longer than a ring among them."""
    with load() as engine:
        cache, rows, done = engine.new_cache(), [], 0
        for size in sizes:
            rows.append(engine.model.forward(ids[done : done + size], cache, all_logits=True))
            done += size
        assert error(np.concatenate(rows), expected) < SESSION_TOLERANCE


def test_what_a_ring_still_holds_is_gone_back_to(small_rings: None, ids: list[int], expected: np.ndarray) -> None:
    """As far as the spare rows reach, whatever was drafted in between; beyond that all is forgotten."""
    with load() as engine:
        cache, model = engine.new_cache(), engine.model
        model.forward(ids[:100], cache)
        for length in (100, 99, 96, 95):
            model.forward([7, 8, 9, 10, 11], cache)  # drafts that come to nothing
            cache.truncate(length)
            assert cache.length == length
            rows = model.forward(ids[length : length + 3], cache, all_logits=True)
            assert error(rows, expected[length : length + 3]) < SESSION_TOLERANCE
        assert cache.length == 98
        cache.truncate(94)  # token 94 sees rows from 79 on; 108 tokens were written, so the ring begins at 80
        assert cache.length == 0
        assert error(model.forward(ids[:40], cache), expected[39:40]) < SESSION_TOLERANCE
        cache.truncate(27)  # token 27 sees rows from 12 on, where the ring of 40 tokens begins
        assert cache.length == 27
        assert error(model.forward(ids[27:60], cache), expected[59:60]) < SESSION_TOLERANCE


@pytest.mark.parametrize("shared", [290, 150, 3])
def test_a_session_evaluates_anew_what_it_cannot_go_back_to(small_rings: None, ids: list[int], shared: int) -> None:
    with load() as engine:
        session = engine.session()
        list(session.tokens(ids[:299], GREEDY, max_tokens=1))
        other = [*ids[:shared], 5, 6, 7]
        found = list(session.tokens(other, GREEDY, max_tokens=4))
        assert session.stats.reused_tokens == (290 if shared == 290 else 0)
        assert found == list(engine.session().tokens(other, GREEDY, max_tokens=4))


def test_speculative_replies_are_the_same(small_rings: None, ids: list[int]) -> None:
    """The prompt repeats itself, so that drafts come, right ones and wrong ones."""
    prompt = [*ids[:30] * 4]
    with load(ctx=256) as engine:
        session = engine.session("4")
        assert list(session.tokens(prompt, GREEDY, max_tokens=60)) == list(
            engine.session("off").tokens(prompt, GREEDY, max_tokens=60)
        )
        assert session.stats.drafted_tokens > 20


@pytest.mark.parametrize("n_tokens", [10, 250])
def test_saved_sessions_go_on(small_rings: None, ids: list[int], tmp_path: Path, n_tokens: int) -> None:
    with load() as engine:
        session, other = engine.session(), engine.session()
        list(session.tokens(ids[:n_tokens], GREEDY, max_tokens=1))
        session.save(tmp_path / "session")
        other.load(tmp_path / "session")
        n_bytes = sum(rows.nbytes for name, rows in session._cache.save().items() if "@" not in name)  # of no mark
        assert n_bytes == engine.config.kv_bytes(n_tokens)
        prompt = ids[: n_tokens + 20]
        assert list(other.tokens(prompt, GREEDY, max_tokens=4)) == list(session.tokens(prompt, GREEDY, max_tokens=4))
        assert other.stats.reused_tokens == n_tokens


# ---- the cache by itself ---------------------------------------------------------------------------------------------


def ring(capacity: int = 100) -> Cache:
    """A layer that sees 4 tokens and one that sees all."""
    return Cache([kinds(3, window=4), kinds(3)], capacity, np.float16)


def append(cache: Cache, first: int, count: int) -> list[float]:
    """What the layer with the window sees; row i holds first + i."""
    import torch

    rows = torch.arange(first, first + count, dtype=torch.float32)[:, None].repeat(1, 3)
    (seen,), _ = cache.append(0, rows), cache.append(1, rows)
    cache.advance(count)
    return seen[:, 0].tolist()


def test_rows_go_round(small_rings: None) -> None:
    cache = ring()
    assert append(cache, 0, 3) == [0, 1, 2]
    assert append(cache, 3, 2) == [0, 1, 2, 3, 4]
    assert append(cache, 5, 50) == [2, 3, 4, *range(5, 55)]  # more than the ring's 16 rows
    assert append(cache, 55, 1) == [52, 53, 54, 55]
    assert cache.n_rows.tolist() == [16, 100]


def test_a_ring_saves_what_it_holds(small_rings: None) -> None:
    cache = ring()
    append(cache, 0, 40)
    saved = {name: np.array(rows) for name, rows in cache.save().items()}
    assert saved["0.0"][:, 0].tolist() == list(range(24, 40)) and len(saved["1.0"]) == 40
    other = ring()
    other.load(saved, 40)
    other.truncate(27)
    assert other.length == 27 and append(other, 27, 1) == [24, 25, 26, 27]
    other.load(saved, 40)
    other.truncate(26)
    assert other.length == 0


@pytest.mark.parametrize("n_rows", [2, 17])
def test_too_few_or_too_many_rows_are_refused(small_rings: None, n_rows: int) -> None:
    cache = ring()
    append(cache, 0, 40)
    saved = cache.save()
    saved["0.0"] = np.zeros((n_rows, 3), np.float16)
    with pytest.raises(LocalrunError, match="does not hold 40 tokens"):
        ring().load(saved, 40)


def test_a_failed_chunk_counts_as_written(small_rings: None) -> None:
    """Its rows may have gone over others', so what they were needed for is evaluated anew."""
    cache = ring()
    append(cache, 0, 40)
    cache.check_room(30)
    cache.truncate(40)
    assert cache.length == 0
