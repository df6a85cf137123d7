"""Sampling against llama.cpp's own samplers, run on the same logits: which tokens survive, and how likely each is."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest

from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampler, Sampling, _likeliest

N_VOCAB = 500
DAMAGED = "the model's output is not a finite number: the file's weights are damaged"
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "seed": 0}


def logits_of(seed: int, spread: float = 2.0) -> np.ndarray:
    return (spread * np.random.default_rng(seed).standard_normal(N_VOCAB)).astype(np.float32)


def seen_of(seed: int, n: int = 100) -> list[int]:
    """Tokens with repetitions."""
    return np.random.default_rng([seed, 1]).integers(0, 60, n).tolist()


class LlamaCppChain:
    """llama.cpp's samplers in its order (common/sampling.cpp): bias, penalties, top-k, top-p, min-p, temperature."""

    def __init__(self, s: Sampling, seen: Sequence[int]):
        import llama_cpp

        self.lib, self.n_vocab = llama_cpp, N_VOCAB
        self.chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        last_n = len(seen) + 100 if s.repeat_last_n < 0 else s.repeat_last_n  # -1 is the program's word for "all"
        biases = (llama_cpp.llama_logit_bias * len(s.logit_bias))(*s.logit_bias.items())
        for sampler in (
            llama_cpp.llama_sampler_init_logit_bias(N_VOCAB, len(biases), biases),
            llama_cpp.llama_sampler_init_penalties(
                N_VOCAB, last_n, s.repeat_penalty, s.frequency_penalty, s.presence_penalty
            ),
            llama_cpp.llama_sampler_init_top_k(s.top_k),
            llama_cpp.llama_sampler_init_top_p(s.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(s.min_p, 1),
            llama_cpp.llama_sampler_init_temp(s.temperature),
        ):
            llama_cpp.llama_sampler_chain_add(self.chain, sampler)
        for token in seen:
            self.accept(token)

    def accept(self, token: int) -> None:
        self.lib.llama_sampler_accept(self.chain, token)

    def survivors(self, logits: np.ndarray) -> dict[int, float]:
        """Token -> probability, of the tokens that the chain leaves."""
        data = (self.lib.llama_token_data * self.n_vocab)()
        for token, logit in enumerate(logits.tolist()):
            data[token].id, data[token].logit = token, logit
        array = self.lib.llama_token_data_array(data=data, size=self.n_vocab, selected=-1, sorted=False)
        self.lib.llama_sampler_apply(self.chain, ctypes.byref(array))
        left = {array.data[i].id: array.data[i].logit for i in range(array.size) if array.data[i].logit > -math.inf}
        top = max(left.values())
        weights = {token: math.exp(logit - top) for token, logit in left.items()}
        return {token: weight / math.fsum(weights.values()) for token, weight in weights.items()}

    def close(self) -> None:
        self.lib.llama_sampler_free(self.chain)


class Recorder:
    """Stands in for the random generator: keeps what it is to choose from, and takes the likeliest."""

    def __init__(self) -> None:
        self.survivors: dict[int, float] = {}

    def choice(self, ids: np.ndarray, p: np.ndarray) -> int:
        self.survivors = dict(zip(ids.tolist(), p.tolist(), strict=True))
        return int(ids[p.argmax()])


def survivors(sampling: Sampling, logits: np.ndarray, seen: Sequence[int] = ()) -> dict[int, float]:
    sampler = Sampler(sampling, seen)
    sampler._random = Recorder()
    sampler(logits)
    return sampler._random.survivors


def assert_like_llama_cpp(sampling: Sampling, logits: np.ndarray, seen: Sequence[int] = ()) -> dict[int, float]:
    chain = LlamaCppChain(sampling, seen)
    expected = chain.survivors(logits)
    chain.close()
    found = survivors(sampling, logits, seen)
    assert found.keys() == expected.keys()
    # llama.cpp's logits are float32: up to 10 after the temperature, so 1e-6 absolute and as much of the probability.
    assert [found[token] for token in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("settings", "n_left"),
    [
        ({}, (500, 500)),
        ({"top_k": 1}, (1, 1)),
        ({"top_k": 40}, (40, 40)),
        ({"top_k": 500}, (500, 500)),
        ({"top_k": 9999}, (500, 500)),
        ({"top_p": 0.9}, (50, 400)),
        ({"top_p": 0.3}, (2, 50)),
        ({"top_p": 1e-6}, (1, 1)),
        ({"min_p": 0.05}, (10, 200)),
        ({"min_p": 0.5}, (1, 20)),
        ({"min_p": 1.0}, (1, 1)),
        ({"temperature": 0.3}, (500, 500)),
        ({"temperature": 5.0}, (500, 500)),
        ({"repeat_penalty": 1.3}, (500, 500)),
        ({"repeat_penalty": 0.8}, (500, 500)),
        ({"repeat_penalty": 1.3, "repeat_last_n": 5}, (500, 500)),
        ({"repeat_penalty": 1.3, "repeat_last_n": -1}, (500, 500)),
        ({"repeat_penalty": 1.3, "repeat_last_n": 0}, (500, 500)),
        ({"presence_penalty": 1.5, "repeat_last_n": 10}, (500, 500)),
        ({"presence_penalty": -1.5}, (500, 500)),
        ({"frequency_penalty": 0.7, "repeat_last_n": -1}, (500, 500)),
        ({"frequency_penalty": 0.7, "repeat_last_n": 0}, (500, 500)),
        ({"frequency_penalty": -0.7}, (500, 500)),
        ({"logit_bias": {3: 5.0, 4: -100.0, 30: 1.5}, "repeat_penalty": 1.3}, (500, 500)),
    ],
    ids=str,
)
def test_each_filter_is_llama_cpps(settings: dict[str, float], n_left: tuple[int, int], seed: int) -> None:
    left = assert_like_llama_cpp(Sampling(**OFF | settings), logits_of(seed), seen_of(seed))
    assert n_left[0] <= len(left) <= n_left[1]  # or the filter was not put to the test


@pytest.mark.parametrize("seed", range(20))
def test_the_whole_chain_is_llama_cpps(seed: int) -> None:
    rng = np.random.default_rng([seed, 2])
    sampling = Sampling(
        temperature=float(rng.uniform(0.2, 2)),
        top_k=int(rng.integers(0, 100)),
        top_p=float(rng.uniform(0.3, 1)),
        min_p=float(rng.uniform(0, 0.2)),
        repeat_penalty=float(rng.uniform(0.9, 1.6)),
        repeat_last_n=int(rng.integers(-1, 80)),
        presence_penalty=float(rng.uniform(-2, 2)),
        frequency_penalty=float(rng.uniform(-1, 1)),
        logit_bias={int(token): float(rng.uniform(-9, 9)) for token in rng.integers(0, N_VOCAB, 20)},
        seed=0,
    )
    assert_like_llama_cpp(sampling, logits_of(seed, float(rng.uniform(0.5, 5))), seen_of(seed))


def test_the_defaults_are_llama_cpps() -> None:
    assert asdict(Sampling()) == {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0, "repeat_last_n": 64,
        "seed": None, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "constraint": None,
        "top_logprobs": None,
    }  # fmt: skip
    assert_like_llama_cpp(Sampling(seed=0), logits_of(0))


def test_filters_look_at_probabilities_before_temperature() -> None:
    """Hot enough, all tokens are alike; min-p would keep more of them if it came after."""
    hot, cold = (survivors(Sampling(**OFF | {"min_p": 0.1, "temperature": t}), logits_of(0)) for t in (50.0, 0.1))
    assert hot.keys() == cold.keys()


@pytest.mark.parametrize("repeat_last_n", [-1, 3, 64])
def test_the_penalty_follows_what_is_generated(repeat_last_n: int) -> None:
    """Token by token, llama.cpp being told of each."""
    seen = seen_of(0, 10)
    sampling = Sampling(**OFF | {"repeat_penalty": 1.5, "repeat_last_n": repeat_last_n})
    chain, sampler = LlamaCppChain(sampling, seen), Sampler(sampling, seen)
    sampler._random = Recorder()
    logits, chosen = logits_of(1), []
    for _ in range(20):
        expected = chain.survivors(logits)
        chosen.append(sampler(logits))
        assert sampler._random.survivors == pytest.approx(expected, rel=1e-5)
        chain.accept(chosen[-1])
    chain.close()
    assert len(set(chosen)) > 1


def test_logits_are_left_alone() -> None:
    logits = logits_of(0)
    before = logits.copy()
    Sampler(Sampling(repeat_penalty=2.0, seed=0), seen_of(0))(logits)
    assert np.array_equal(logits, before)


# --------------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("seed", range(5))
def test_greedy_takes_the_likeliest(seed: int) -> None:
    logits = logits_of(seed)
    sampler = Sampler(Sampling(temperature=0.0, top_k=3, top_p=0.1, seed=seed))
    assert [sampler(logits) for _ in range(3)] == [int(logits.argmax())] * 3


def test_greedy_minds_the_penalty() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    sampler = Sampler(Sampling(temperature=0.0, repeat_penalty=1.5))
    assert [sampler(logits) for _ in range(4)] == [0, 1, 0, 0]  # 2, 1.9; then 1.33 and 1.27 for good
    assert Sampler(Sampling(temperature=0.0, repeat_penalty=1.5), [0])(logits) == 1


def draws(n: int, **settings: float | None) -> list[int]:
    sampler = Sampler(Sampling(**{"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0} | settings))
    logits = logits_of(0)
    return [sampler(logits) for _ in range(n)]


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draws(50, seed=7) == draws(50, seed=7)
    assert draws(50, seed=7) != draws(50, seed=8)
    assert draws(50, seed=0) == draws(50, seed=0)


def test_no_seed_draws_anew() -> None:
    assert draws(50, seed=None) != draws(50, seed=None)  # equal once in more than 10^50 times


def test_draws_follow_the_probabilities() -> None:
    n, logits = 20_000, np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(**OFF | {"seed": 3}))
    counts = np.bincount([sampler(logits) for _ in range(n)], minlength=4)
    p = np.array([0.5, 0.3, 0.15, 0.05])
    assert (np.abs(counts - n * p) < 4 * np.sqrt(n * p * (1 - p))).all()  # 4 standard deviations


def test_only_survivors_are_drawn() -> None:
    assert set(draws(300, top_k=2, seed=0)) == set(np.argsort(-logits_of(0))[:2].tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_output_that_is_no_number(temperature: float) -> None:
    logits = logits_of(0)
    logits[17] = np.nan
    with pytest.raises(LocalrunError, match=DAMAGED):
        Sampler(Sampling(temperature=temperature, seed=0))(logits)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_infinite_output(value: float, temperature: float) -> None:
    """One +inf, or nothing but -inf."""
    logits = logits_of(0) if value > 0 else np.full(N_VOCAB, -np.inf, np.float32)
    logits[17] = value
    with pytest.raises(LocalrunError, match=DAMAGED):
        Sampler(Sampling(temperature=temperature, seed=0))(logits)


def test_next_to_no_temperature() -> None:
    """Dividing by 1e-310 gives infinity."""
    assert Sampler(Sampling(**OFF | {"temperature": 1e-310}))(logits_of(0)) == int(logits_of(0).argmax())


def test_tokens_ruled_out_are_never_drawn() -> None:
    """-inf is how a model or a grammar says never."""
    logits = np.full(N_VOCAB, -np.inf, np.float32)
    logits[[3, 5]] = 0.5
    sampler = Sampler(Sampling(**OFF))
    assert {sampler(logits) for _ in range(50)} == {3, 5}


@pytest.mark.parametrize("spread", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("n", [1, 7, N_VOCAB - 1, N_VOCAB, N_VOCAB + 1])
def test_the_likeliest_are_those_of_a_stable_sort(spread: float, n: int) -> None:
    """With many equal ones, and some ruled out."""
    logits = np.round(logits_of(0, spread).astype(np.float64), 1)
    logits[::7] = -np.inf
    assert _likeliest(logits, n).tolist() == np.argsort(-logits, kind="stable")[:n].tolist()


def test_logprobs_are_the_models_own() -> None:
    """Of its softmax, whatever bias, penalties, filters and temperature make of it."""
    sampling = Sampling(temperature=2.0, top_k=5, repeat_penalty=1.5, logit_bias={9: 50}, top_logprobs=3, seed=0)
    sampler, logits = Sampler(sampling, seen_of(0)), logits_of(0)
    tokens = [sampler(logits) for _ in range(5)]
    expected = logits.astype(np.float64) - math.log(math.fsum(math.exp(logit) for logit in logits.tolist()))
    assert [each.id for each in sampler.logprobs] == tokens and 9 in tokens
    best = np.argsort(-logits, kind="stable")[:3].tolist()
    for each in sampler.logprobs:
        assert each.logprob == pytest.approx(expected[each.id], abs=1e-9)  # float64
        assert [id for id, _ in each.top] == best
        assert [logprob for _, logprob in each.top] == pytest.approx(expected[best].tolist(), abs=1e-9)


def test_a_logprob_is_a_number_that_json_can_hold() -> None:
    logits = np.array([0, -np.inf, -1e9], np.float32)
    sampler = Sampler(Sampling(temperature=0.0, top_logprobs=3))
    sampler(logits)
    assert sampler.logprobs[0].top == [(0, 0.0), (1, -9999.0), (2, -9999.0)]
    assert not (quiet := Sampler(Sampling(seed=0))).logprobs and quiet(logits) == 0 and not quiet.logprobs


# --------------------------------------------------------------------------------------------------------- settings

INVALID = [
    ("temperature", -0.1, "temperature is -0.1; expected 0 or more"),
    ("temperature", math.inf, "temperature is inf; expected 0 or more"),
    ("temperature", math.nan, "temperature is nan; expected 0 or more"),
    ("top_k", -1, "top_k is -1; expected 0 (all) or more"),
    ("top_p", 0.0, "top_p is 0.0; expected above 0 and at most 1"),
    ("top_p", 1.01, "top_p is 1.01; expected above 0 and at most 1"),
    ("top_p", math.nan, "top_p is nan; expected above 0 and at most 1"),
    ("min_p", -0.01, "min_p is -0.01; expected between 0 and 1"),
    ("min_p", 1.5, "min_p is 1.5; expected between 0 and 1"),
    ("min_p", math.nan, "min_p is nan; expected between 0 and 1"),
    ("repeat_penalty", 0.0, "repeat_penalty is 0.0; expected above 0"),
    ("repeat_penalty", -1.0, "repeat_penalty is -1.0; expected above 0"),
    ("repeat_penalty", math.inf, "repeat_penalty is inf; expected above 0"),
    ("repeat_last_n", -2, "repeat_last_n is -2; expected -1 (all), 0 (none) or more"),
    ("seed", -1, "seed is -1; expected 0 or more"),
    ("presence_penalty", 2.1, "presence_penalty is 2.1; expected -2 to 2"),
    ("frequency_penalty", -2.1, "frequency_penalty is -2.1; expected -2 to 2"),
    ("logit_bias", [1], "logit_bias is of type list; expected a mapping of token ids to numbers"),
    ("logit_bias", {"1": 1}, "a token of logit_bias is '1'; expected a token id, 0 or more"),
    ("logit_bias", {-1: 1}, "a token of logit_bias is -1; expected a token id, 0 or more"),
    ("logit_bias", {1: 101}, "logit_bias[1] is 101; expected -100 to 100"),
    ("logit_bias", {1: "x"}, "logit_bias[1] is 'x'; expected -100 to 100"),
    ("constraint", "start: a", "constraint is 'start: a'; expected a localrun.Constraint, or None"),
    ("top_logprobs", 21, "top_logprobs is 21; expected 0 to 20, or None"),
]


@pytest.mark.parametrize(("name", "value", "message"), INVALID)
def test_invalid_settings(name: str, value: float, message: str) -> None:
    with pytest.raises(LocalrunError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("top_k", 0), ("top_p", 1), ("min_p", 0), ("min_p", 1), ("repeat_last_n", -1), ("seed", 0)],
)
def test_the_ends_of_the_ranges_are_valid(name: str, value: float) -> None:
    assert 0 <= Sampler(Sampling(**{"seed": 0} | {name: value}))(logits_of(0)) < N_VOCAB


def test_recommended_settings_of_a_file() -> None:
    """The keys that llama.cpp's converter writes from generation_config.json."""
    metadata = {
        "general.sampling.temp": 0.6, "general.sampling.top_k": 20, "general.sampling.top_p": 0.95,
        "general.sampling.min_p": 0.01, "general.sampling.penalty_repeat": 1.05,
        "general.sampling.penalty_last_n": 128, "general.sampling.mirostat": 0, "general.name": "x",
    }  # fmt: skip
    assert Sampling.recommended(metadata) == Sampling(0.6, 20, 0.95, 0.01, 1.05, 128, None)


def test_recommended_without_recommendations() -> None:
    assert Sampling.recommended({}) == Sampling()
    assert Sampling.recommended({"general.sampling.temp": 0.0}) == Sampling(temperature=0.0)
    assert Sampling.recommended({"general.sampling.temp": "hot", "general.sampling.top_k": True}) == Sampling()


def test_a_recommended_top_k_below_0_means_all() -> None:
    """As in llama.cpp (include/llama.h: k <= 0 makes top-k a no-op)."""
    assert Sampling.recommended({"general.sampling.top_k": -1}).top_k == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(key, value) for key in ("top_k", "penalty_last_n", "temp") for value in (math.nan, math.inf)],
        *[("temp", -1.0), ("top_p", 0.0), ("top_p", 1.5), ("min_p", -0.1), ("penalty_repeat", 0.0)],
        ("penalty_last_n", -2),
    ],
)
def test_a_recommendation_out_of_its_range_is_not_followed(key: str, value: float) -> None:
    """They are hints: a file with an odd one answers as one without."""
    lines: list[str] = []
    metadata = {"general.sampling.temp": 0.5, "general.sampling.min_p": 0.25, f"general.sampling.{key}": value}
    sound = {name: each for name, each in metadata.items() if not name.endswith("." + key)}
    assert Sampling.recommended(metadata, lines.append) == Sampling.recommended(sound)
    assert len(lines) == 1 and lines[0].startswith(f"key 'general.sampling.{key}' is not followed: ")


def test_the_recommended_keys_are_ggufs() -> None:
    import gguf

    keys = gguf.Keys.General
    names = {
        keys.SAMPLING_TEMP: "temperature", keys.SAMPLING_TOP_K: "top_k", keys.SAMPLING_TOP_P: "top_p",
        keys.SAMPLING_MIN_P: "min_p", keys.SAMPLING_PENALTY_REPEAT: "repeat_penalty",
        keys.SAMPLING_PENALTY_LAST_N: "repeat_last_n",
    }  # fmt: skip
    for key, name in names.items():
        assert getattr(Sampling.recommended({key: 1}), name) == 1
