"""Sessions over tiny random models: the cache gives the same logits however it came to hold its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llama_cpp_oracle
import naive
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from closeness import QUANTIZED_TOLERANCE, SESSION_TOLERANCE, error

import localrun
from localrun import ContextFullError, LocalrunError, Sampling

# Every form of attention: q_lora or not, split or legacy kv_b, YaRN or none, GQA, 27 layers, quantized weights.
MODELS = {
    "v2-lite": "F32",
    "v3": "F32",
    "v3-legacy-kv-b": "F32",
    "moonlight": "F32",
    "llama": "F32",
    "wide": "Q4_K_M",
}
GREEDY = Sampling(temperature=0.0)

# With 32-bit keys and values only the order of float32 sums differs between one token and many.
EXACT_TOLERANCE = 1e-5


def path_of(variant: str) -> Path:
    mix = tiny_models.Q4_K_M if MODELS[variant] == "Q4_K_M" else MODELS[variant]
    return tiny_models.shared(variant, type=mix)


def prompt_of(variant: str) -> list[int]:
    """40 tokens whose experts are sure to be the same whatever the rounding."""
    if MODELS[variant] == "F32":
        return tiny_models.prompt(variant)
    return naive.steady_prompt(path_of(variant), 40)


@pytest.fixture(params=MODELS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(variant: str) -> Iterator[localrun.engine.Engine]:
    with localrun.load(path_of(variant), device="cpu", threads=2, ctx=64) as engine:
        yield engine


def evaluate(model: localrun.engine.Engine, cache: object, ids: list[int], chunk: int) -> np.ndarray:
    """float32 (T, vocab): `ids` after the cache's tokens, `chunk` at a time."""
    parts = [ids[i : i + chunk] for i in range(0, len(ids), chunk)]
    return np.concatenate([model.model.forward(part, cache, all_logits=True) for part in parts])


def tolerance(variant: str, exact: bool) -> float:
    if MODELS[variant] != "F32":
        return QUANTIZED_TOLERANCE
    return EXACT_TOLERANCE if exact else SESSION_TOLERANCE


@pytest.mark.parametrize("exact", [True, False], ids=["32-bit cache", "16-bit cache"])
@pytest.mark.parametrize("chunk", slow_but([1, 3, 16, 39], [3, 16]))
def test_prefill_in_chunks(model: localrun.engine.Engine, variant: str, chunk: int, exact: bool) -> None:
    ids = prompt_of(variant)
    cache = model.model.new_cache(len(ids), exact=exact)
    assert error(evaluate(model, cache, ids, chunk), model.logits(ids)) < tolerance(variant, exact)
    assert cache.length == len(ids)


# Quantized models: the rounding of activations is compared in test_logits.py.
@pytest.mark.parametrize("variant", [variant for variant in MODELS if MODELS[variant] == "F32"])
@pytest.mark.parametrize("chunk", [1, 40])
def test_session_logits_equal_llama_cpps(model: localrun.engine.Engine, variant: str, chunk: int) -> None:
    ids = prompt_of(variant)
    expected = llama_cpp_oracle.logits(path_of(variant), ids)
    assert error(evaluate(model, model.new_cache(), ids, chunk), expected) < SESSION_TOLERANCE


def test_truncated_cache_forgets(model: localrun.engine.Engine, variant: str) -> None:
    ids = prompt_of(variant)
    cache = model.new_cache()
    evaluate(model, cache, ids[:17], 16)
    evaluate(model, cache, ids[::-1], 16)
    cache.truncate(17)
    found = evaluate(model, cache, ids[17:], 16)
    untouched = model.new_cache()
    evaluate(model, untouched, ids[:17], 16)
    # The same rows in the same places, evaluated in the same chunks: not even rounding may differ.
    assert np.array_equal(found, evaluate(model, untouched, ids[17:], 16))
    assert error(found, model.logits(ids)[17:]) < tolerance(variant, exact=False)


def test_next_turn_reuses_the_common_prefix(model: localrun.engine.Engine, variant: str) -> None:
    ids = prompt_of(variant)
    session = model.session()
    first = list(session.tokens(ids[:20], GREEDY, max_tokens=5))
    assert session.ids == ids[:20] + first[:-1]  # the last token is not evaluated before it is needed
    assert session.reply_ids == first
    assert session.finish_reason == "length"

    second = list(session.tokens(ids[:12] + ids[30:], GREEDY, max_tokens=5))
    assert session.stats.reused_tokens == 12
    assert session.stats.prompt_tokens == 22
    assert second == list(model.generate(ids[:12] + ids[30:], GREEDY, max_tokens=5))


def test_asking_the_same_again_evaluates_one_token(model: localrun.engine.Engine, variant: str) -> None:
    ids = prompt_of(variant)
    session = model.session()
    first = list(session.tokens(ids, GREEDY, max_tokens=4))
    assert list(session.tokens(ids, GREEDY, max_tokens=4)) == first
    assert session.stats.reused_tokens == len(ids) - 1


def test_sessions_do_not_share_a_cache(model: localrun.engine.Engine, variant: str) -> None:
    ids = prompt_of(variant)
    alone = [list(model.generate(prompt, GREEDY, max_tokens=6)) for prompt in (ids, ids[::-1])]
    iterators = [model.session().tokens(prompt, GREEDY, max_tokens=6) for prompt in (ids, ids[::-1])]
    together = list(zip(*iterators, strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_reply_closed_early_keeps_what_was_evaluated(model: localrun.engine.Engine, variant: str) -> None:
    ids = prompt_of(variant)[:10]
    session = model.session()
    tokens = session.tokens(ids, GREEDY, max_tokens=20)
    first = [next(tokens) for _ in range(3)]
    tokens.close()
    assert session.ids == ids + first[:2]
    assert session.reply_ids == first
    assert list(session.tokens(ids + first, GREEDY, max_tokens=2)) == list(
        model.generate(ids + first, GREEDY, max_tokens=2)
    )


def test_saved_session_continues(model: localrun.engine.Engine, variant: str, tmp_path: Path) -> None:
    ids = prompt_of(variant)
    session = model.session()
    list(session.tokens(ids[:20], GREEDY, max_tokens=1))
    session.save(tmp_path / "session")
    expected = list(session.tokens(ids, GREEDY, max_tokens=4))

    restored = model.session()
    restored.load(tmp_path / "session")
    assert restored.ids == ids[:20]
    assert list(restored.tokens(ids, GREEDY, max_tokens=4)) == expected
    assert restored.stats.reused_tokens == 20


def test_session_of_another_model_is_refused(tmp_path: Path) -> None:
    with localrun.load(path_of("v3"), device="cpu", threads=2, ctx=64) as model:
        session = model.session()
        list(session.tokens([1, 2, 3], GREEDY, max_tokens=1))
        session.save(tmp_path / "session")
    same_shapes = tiny_models.shared("v3", seed=1)
    with localrun.load(same_shapes, device="cpu", threads=2, ctx=64) as other:
        fresh = other.session()
        with pytest.raises(LocalrunError, match="another model"):
            fresh.load(tmp_path / "session")
        assert fresh.ids == []


def test_full_context(model: localrun.engine.Engine, variant: str) -> None:
    ids = (prompt_of(variant) * 2)[: model.ctx + 1]
    session = model.session()
    with pytest.raises(ContextFullError, match=r"65 tokens.*64"):
        next(session.tokens(ids, GREEDY))
    tokens = list(session.tokens(ids[:60], GREEDY))
    assert session.finish_reason == "context"
    assert len(tokens) == 5  # the fifth is known from the logits of the 64th position
    assert tokens == list(model.generate(ids[:60], GREEDY, max_tokens=5))


def test_threads_do_not_change_the_logits(variant: str) -> None:
    ids = prompt_of(variant)
    answers = []
    for threads in (1, 2, 3):
        with localrun.load(path_of(variant), device="cpu", threads=threads, ctx=64) as model:
            answers.append(model.logits(ids))
    assert np.array_equal(answers[0], answers[1])
    assert np.array_equal(answers[0], answers[2])


@pytest.mark.parametrize("ids", [[], [-1], [1, 10**6]], ids=["none", "negative", "too large"])
def test_bad_ids_are_refused(ids: list[int]) -> None:
    with localrun.load(path_of("llama"), device="cpu", threads=2, ctx=64) as model:
        with pytest.raises(LocalrunError):
            model.logits(ids)
        with pytest.raises(LocalrunError):
            next(model.session().tokens(ids, GREEDY))


def test_too_little_address_space_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process where it finds too little for a kernel."""
    monkeypatch.setattr("localrun.hardware.free_addresses", lambda: 50 << 20)
    with pytest.raises(LocalrunError, match="the kernels need 128 MiB of address space, and 50 are left; raise ulimit"):
        localrun.load(tiny_models.shared("llama"), threads=1, ctx=32)


def test_a_number_of_experts_without_end() -> None:
    with pytest.raises(LocalrunError, match="gpu_experts is '9999"):
        localrun.load(tiny_models.shared("llama"), gpu_experts="9" * 5000)
