"""The native model: its step of a few tokens against the network in torch and other programs, over whole models.

Tolerances on logits are fractions of their range.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from pathlib import Path

import llama_cpp_oracle
import naive
import numpy as np
import pytest
import tiny_models
import torch
from caches import rows_of
from cases import mark_some, slow_but
from closeness import QUANTIZED_TOLERANCE, SESSION_TOLERANCE, error, rms_error
from programs import LATE, add_late

import localrun
from localrun.engine import Engine
from localrun.errors import ContextFullError
from localrun.network.cache import Cache
from quant.decode.program import FEW_UP_TO, MAX_SPLITS, MIN_SPLIT, MOST_TOKENS, Program
from quant.gemv.rows_i16 import LENGTH

# Between the step and torch on the same cache rows only the order of float32 sums differs: up to 8e-7 here.
ROUNDING_TOLERANCE = 3e-6
# Where it tips the rounding of an activation to 8 bits, cache rows differ by QUANTIZED_TOLERANCE of their range of 6.
ROW_TOLERANCE = 0.2


# ---- whole models ----------------------------------------------------------------------------------------------------

VARIANTS = list(tiny_models.VARIANTS)
AT_LEVELS = {"v3-odd", "v3-legacy-kv-b", "llama-mha", ("wide", "Q4_K_M"), ("llama-wide", "Q4_1")}
ALSO_AT_LEVELS = functools.partial(mark_some, chosen=AT_LEVELS, mark=pytest.mark.levels)
# How work is divided among workers depends on the kind of attention, on experts, and on sizes; not on what is scaled.
DIVIDED = {"v3-odd", "v2-lite", "llama-mha"}


FIRST = {*{tiny_models.type_name(tiny_models.VARIANTS[each]): each for each in reversed(VARIANTS)}.values()}


def marks_together(variant: str) -> list[pytest.MarkDecorator]:
    """Of tests that several tokens are computed as each alone: an architecture's first variant is in the fast suite."""
    slow = [] if variant in FIRST | DIVIDED else [pytest.mark.slow]
    return slow + ([pytest.mark.levels] if variant in AT_LEVELS else [])


QUANTISED = [
    ("wide", "Q4_K_M"), ("wide", "Q8_0"), ("wide", "MXFP4_MOE"), ("wide", "F16"), ("wide-odd", "Q4_K_M"),
    ("wide-odd", "IQ4_XS"), ("llama-wide", "Q4_K_M"), ("llama-wide", "Q4_1"), ("llama-wide", "Q5_0"),
    ("llama-wide", "IQ4_NL"), ("llama-wide", "BF16"), ("qwen3moe-wide", "Q4_K_M"), ("qwen3moe-wide", "Q8_0"),
]  # fmt: skip


def quantised(variant: str, mix: str) -> Path:
    return tiny_models.shared(variant, type=tiny_models.MIXES[mix])


def one_by_one(model: Engine, ids: list[int] | range, cache: Cache | None = None) -> np.ndarray:
    """float32 (T, vocab): the step's logits."""
    cache = cache or model.new_cache()
    assert not cache.is_exact
    return np.concatenate([model.model.forward([token], cache) for token in ids])


def torch_on_the_same_rows(model: Engine, token: int, cache: Cache, atol: float) -> np.ndarray:
    """float32 (vocab,): torch's logits of the cache's last token, over the rows that the step has left.

    Its own rows of that token are compared instead of written: rounding to 16 bits is 2^-11 of the value, and a sum
    near zero differs by what its terms had (`atol`; rows have a standard deviation of 1); integers are up to half a
    step off, whose size is less than twice what the length and the largest value ask for.
    """
    left, config = cache.save(), model.config

    def compare(layer: int, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kept = tuple(torch.from_numpy(left[f"{layer}.{part}"]) for part in range(len(rows)))
        for part, new, kind in zip(kept, rows, config.rows(layer), strict=True):
            half_step = max(float(new.norm()) / LENGTH, float(new.abs().max()) / 32767) if kind.is_scaled else 0.0
            torch.testing.assert_close(part[-1:].float(), new, rtol=2**-11 + 1e-5, atol=atol + half_step)
        return kept

    cache.truncate(cache.length - 1)
    cache.append, cache.is_exact = compare, True
    logits = model.model.forward([token], cache)[0]
    cache.is_exact = False
    del cache.append
    return logits


def both_ways(
    model: Engine, ids: list[int], cache: Cache | None = None, atol: float = 2e-5
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (T, vocab) twice: the step's logits, and torch's on the same cache."""
    cache = cache or model.new_cache()
    step, by_torch = [], []
    for token in ids:
        step.append(one_by_one(model, [token], cache)[0])
        by_torch.append(torch_on_the_same_rows(model, token, cache, atol))
    return np.stack(step), np.stack(by_torch)


@pytest.mark.parametrize("variant", ALSO_AT_LEVELS(VARIANTS))
def test_the_step_is_the_network(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=64) as model:
        assert error(*both_ways(model, tiny_models.prompt(variant))) < ROUNDING_TOLERANCE


SLOW = [
    *[("wide-odd", "IQ4_XS"), ("llama-wide", "Q5_0"), ("llama-wide", "BF16"), ("llama-wide", "IQ4_NL")],
    *[("qwen3moe-wide", "Q8_0"), ("wide", "F16")],
]


@pytest.mark.parametrize(
    ("variant", "mix"), [*ALSO_AT_LEVELS(q for q in QUANTISED if q not in SLOW), *slow_but(SLOW, ())], ids=str
)
def test_the_step_is_the_network_quantised(variant: str, mix: str) -> None:
    path = quantised(variant, mix)
    with localrun.load(path, threads=2, ctx=64) as model:
        ids = naive.steady_prompt(path, 40, like=tiny_models.shared(variant))
        if mix in ("F16", "BF16"):
            assert error(*both_ways(model, ids)) < ROUNDING_TOLERANCE
        else:
            assert error(*both_ways(model, ids, atol=ROW_TOLERANCE)) < QUANTIZED_TOLERANCE


def test_the_step_is_the_network_with_a_quantised_joint_kv_b() -> None:
    """Its k_b is multiplied from the other side, in float32."""
    path = tiny_models.shared("v3-legacy-kv-b", type={"attn_kv_b": "Q8_0"})
    ids, reference = tiny_models.token_ids("v3-legacy-kv-b", 64), naive.Naive(path)
    reference.logits(ids)
    sure = reference.margins > 0.003  # where rounding the mix to 8 bits does not choose other experts
    assert sure.sum() >= 20
    with localrun.load(path, threads=2, ctx=64) as model:
        step, by_torch = both_ways(model, ids, atol=ROW_TOLERANCE)
    assert error(step[sure], by_torch[sure]) < QUANTIZED_TOLERANCE


@pytest.mark.parametrize(
    "variant",
    [
        "v2", "v2-no-groups", "v3-all-moe", "v3-fused-gate-up", "v3-tied", "kimi-k2", "yarn-no-log-multiplier",
        "llama-mha", "llama-rope-freqs", "llama-linear-rope", "qwen3moe", "qwen3moe-yarn",
    ],
)  # fmt: skip
def test_logits_equal_the_float64_reference(variant: str) -> None:
    path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    with localrun.load(path, threads=2, ctx=64) as model:
        assert error(one_by_one(model, ids), naive.Naive(path).logits(ids)) < SESSION_TOLERANCE


@pytest.mark.parametrize("variant", ["v3-odd", "v3-no-bias", "llama-tied", "qwen3moe"])
def test_logits_equal_llama_cpps(variant: str) -> None:
    path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    with localrun.load(path, threads=2, ctx=64) as model:
        assert error(one_by_one(model, ids), llama_cpp_oracle.logits(path, ids)) < SESSION_TOLERANCE


@pytest.mark.parametrize(("variant", "mix"), [("wide", "Q4_K_M"), ("llama-wide", "Q4_1")])
def test_quantised_logits_are_as_exact_as_llama_cpps(variant: str, mix: str) -> None:
    """As in test_logits.py; the 16-bit cache costs a hundredth of what rounding activations does."""
    path = quantised(variant, mix)
    twin = tiny_models.shared_twin(path)
    ids = naive.steady_prompt(twin, 96, like=tiny_models.shared(variant))
    truth = llama_cpp_oracle.logits(twin, ids)
    theirs = rms_error(llama_cpp_oracle.logits(path, ids), truth)
    with localrun.load(path, threads=2, ctx=128) as model:
        assert rms_error(one_by_one(model, ids), truth) <= 1.2 * theirs


@pytest.mark.parametrize("mix", ["F32", "quantised"])
@pytest.mark.parametrize("variant", slow_but([each for each in VARIANTS if each in FIRST | DIVIDED], DIVIDED))
def test_workers_do_not_change_the_logits(variant: str, mix: str) -> None:
    """Nor does doing it again."""
    path = tiny_models.shared(variant, type=tiny_models.Q4_K_M if mix == "quantised" else "F32")
    ids, answers = tiny_models.token_ids(variant, 6), []
    for threads in (1, 2, 3):
        with localrun.load(path, threads=threads, ctx=16) as model:
            answers += [one_by_one(model, ids) for _ in range(2)]
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@pytest.mark.parametrize("variant", ["wide", "llama", "llama-mha"])
def test_far_into_the_context(variant: str) -> None:
    """4200 tokens by prefill, then steps: pieces of the context are longer than a tile."""
    path, n_before = tiny_models.shared(variant), 4200
    assert n_before > MAX_SPLITS * MIN_SPLIT
    with localrun.load(path, threads=2, ctx=64) as model:
        cache, ids = model.model.new_cache(n_before + 8), tiny_models.token_ids(variant, n_before)
        for first in range(0, n_before, 600):
            model.model.forward(ids[first : first + 600], cache)
        step, by_torch = both_ways(model, [1, 2, 3, 4, 5, 6, 7, 8], cache)
        assert cache.length == n_before + 8
    assert error(step, by_torch) < ROUNDING_TOLERANCE


# ---- a few tokens together -------------------------------------------------------------------------------------------


def check_few(model: Engine, ids: list[int], cache: Cache) -> None:
    """Steps of 2 to MOST_TOKENS tokens give the bits of steps of one, and leave the same rows."""
    start = cache.length
    expected = one_by_one(model, ids, cache)
    expected_rows = rows_of(cache)
    for n_tokens in range(2, MOST_TOKENS + 1):
        cache.truncate(start)
        few = [model.model.forward(ids[i : i + n_tokens], cache, all_logits=True) for i in range(0, len(ids), n_tokens)]
        assert np.array_equal(np.concatenate(few), expected)
        assert all(np.array_equal(a, b) for a, b in zip(rows_of(cache), expected_rows, strict=True))


@pytest.mark.parametrize("mix", ["F32", "quantised"])
@pytest.mark.parametrize("variant", [pytest.param(each, marks=marks_together(each)) for each in VARIANTS])
def test_tokens_together_are_tokens_alone(variant: str, mix: str) -> None:
    """From an empty cache, and over the end of the first piece of the context."""
    path = tiny_models.shared(variant, type=tiny_models.Q4_K_M if mix == "quantised" else "F32")
    with localrun.load(path, threads=2, ctx=128) as model:
        cache, ids = model.new_cache(), tiny_models.token_ids(variant, 70)
        check_few(model, ids[:10], cache)
        model.model.forward(ids[10:60], cache)
        check_few(model, ids[60:70], cache)


@pytest.mark.parametrize(("variant", "mix"), ALSO_AT_LEVELS(QUANTISED), ids=lambda value: value)
def test_tokens_together_are_tokens_alone_in_every_type(variant: str, mix: str) -> None:
    with localrun.load(quantised(variant, mix), threads=2, ctx=64) as model:
        check_few(model, tiny_models.token_ids(variant, 20), model.new_cache())


@pytest.mark.parametrize("variant", ["v3", "v3-legacy-kv-b", "llama"])
def test_tokens_together_where_pieces_get_shorter(variant: str) -> None:
    """Some of a step's tokens have more and shorter pieces than the others."""
    with localrun.load(tiny_models.shared(variant, type=tiny_models.Q4_K_M), threads=2, ctx=64) as model:
        cache, ids = model.model.new_cache(FEW_UP_TO + 16), tiny_models.token_ids(variant, FEW_UP_TO - 10)
        for first in range(0, len(ids), 509):
            model.model.forward(ids[first : first + 509], cache)
        check_few(model, tiny_models.token_ids(variant, 20, seed=1), cache)


def test_short_prompts_give_the_last_tokens_logits() -> None:
    with localrun.load(tiny_models.shared("v3"), threads=2, ctx=64) as model:
        ids = tiny_models.token_ids("v3", 23)
        expected = one_by_one(model, ids)
        for n_tokens in range(1, 24):
            found = model.model.forward(ids[:n_tokens], model.new_cache())
            assert np.array_equal(found, expected[n_tokens - 1 : n_tokens])
        found = model.model.forward(ids, model.new_cache(), all_logits=True)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("variant", ["v3", "llama-tied"])
def test_hidden_states_are_what_the_head_reads(variant: str) -> None:
    """Of all tokens, by steps (three here) and by the network."""
    path, ids = tiny_models.shared(variant), tiny_models.token_ids(variant, 120)
    _, tensors = tiny_models.read(path)
    head = tensors.get("output.weight", tensors["token_embd.weight"]).astype(np.float64)
    with localrun.load(path, threads=2, ctx=128) as model:
        model.model.keep_hidden = True
        for n_tokens in (1, 12, 120):
            logits = model.model.forward(ids[:n_tokens], model.new_cache(), all_logits=True)
            hidden = model.model.hidden
            assert (model.model._network is not None) == (n_tokens == 120)
            model.model.forward(ids[:n_tokens], model.new_cache())
            assert hidden.shape == (n_tokens, head.shape[1]) and hidden.dtype == np.float32
            assert np.array_equal(model.model.hidden, hidden)
            assert error(hidden.astype(np.float64) @ head.T, logits) < ROUNDING_TOLERANCE


# ---- what a step leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_a_full_context_is_left_as_it_is(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=2, ctx=8) as model:
        cache = model.new_cache()
        expected = one_by_one(model, range(8), cache)
        before = {name: np.array(rows) for name, rows in cache.save().items()}
        with pytest.raises(ContextFullError, match="the context is full: 9 tokens, room for 8"):
            model.model.forward([3], cache)
        assert cache.length == 8
        assert all(np.array_equal(rows, before[name]) for name, rows in cache.save().items())
        cache.truncate(7)
        assert np.array_equal(one_by_one(model, [7], cache)[0], expected[7])


def test_a_step_writes_one_row_of_each_block() -> None:
    with localrun.load(tiny_models.shared("llama"), threads=2, ctx=8) as model:
        cache = model.new_cache()
        cache.advance(8)
        blocks = list(cache.save().values())  # views of the whole memory
        cache.truncate(0)
        for block in blocks:
            block[:] = 0.5
        one_by_one(model, [1], cache)
        one_by_one(model, [2], cache)
        assert all((block[:2] != 0.5).any(1).all() and (block[2:] == 0.5).all() for block in blocks)


def test_logits_stay_after_the_next_step() -> None:
    with localrun.load(tiny_models.shared("llama"), threads=1, ctx=8) as model:
        cache = model.new_cache()
        first = model.model.forward([1], cache)
        kept = first.copy()
        model.model.forward([2], cache)
        assert np.array_equal(first, kept)


def test_two_caches_in_turn() -> None:
    prompts = ([1, 2, 3, 4], [5, 6, 7, 8])
    with localrun.load(tiny_models.shared("v3"), threads=2, ctx=8) as model:
        alone = [one_by_one(model, ids) for ids in prompts]
        caches = [model.new_cache() for _ in prompts]
        for i in range(4):
            for ids, cache, expected in zip(prompts, caches, alone, strict=True):
                assert np.array_equal(one_by_one(model, [ids[i]], cache)[0], expected[i])


@pytest.mark.serial
def test_workers_sleep_after_a_reply_and_end_with_close() -> None:
    def workers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if re.fullmatch(r"localrun-\d+", thread.name)]

    before = workers()
    model = localrun.load(tiny_models.shared("v3"), threads=3, ctx=16)
    assert len(list(model.generate([1, 2, 3], localrun.Sampling(temperature=0.0), max_tokens=8))) == 8
    assert len(workers()) == len(before) + 2
    time.sleep(0.1)
    used = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used < 0.1  # a spinning worker would use all of the 0.3 s
    model.close()
    assert workers() == before


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("variant", ["v3", "llama", "wide"])
def test_late_workers_do_not_change_the_logits(variant: str, late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path, ids = quantised("wide", "Q4_K_M") if variant == "wide" else tiny_models.shared(variant), range(8)
    with localrun.load(path, threads=1, ctx=16) as model:
        expected = one_by_one(model, ids)
    missed = np.zeros(1, np.int64)
    monkeypatch.setattr(Program, "add", add_late(late, missed))
    with localrun.load(path, threads=4, ctx=16) as model:
        assert np.array_equal(one_by_one(model, ids), expected)
    assert missed[0] > 0
