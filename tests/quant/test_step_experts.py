"""The step's router against network.moe and a float64 one, and its two phases of experts against their formula.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import closing

import kernels
import naive
import numpy as np
import pytest
from test_step_attention import floats

from quant.decode import experts as step_experts
from quant.decode.experts import SIGMOID, SOFTMAX, SOFTMAX_AFTER_TOPK, Choice, Router, expert_phases
from quant.decode.linear import Input, rows_phase
from quant.decode.program import ARGUMENTS, MOST_TOKENS, PHASE_BYTES, Program
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.simd.core import load_i64, store_i64
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes

SCORING = {SOFTMAX: "softmax", SIGMOID: "sigmoid", SOFTMAX_AFTER_TOPK: "softmax_after_topk"}
BASE = Router(
    logits=0, bias=0, n_routed_experts=32, num_experts_per_tok=6, n_group=1, topk_group=1, scoring=SOFTMAX,
    norm_topk_prob=False, routed_scaling_factor=1.0,
)  # fmt: skip


def router(scoring: int, n_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1, **more: object) -> Router:
    return dataclasses.replace(
        BASE, scoring=scoring, n_routed_experts=n_experts, num_experts_per_tok=top_k, n_group=n_group,
        topk_group=topk_group, **more,
    )  # fmt: skip


ROUTERS = {
    "V2-Lite": router(SOFTMAX, 64, 6),
    "V2": router(SOFTMAX, 160, 6, 8, 3, routed_scaling_factor=16.0),
    "softmax, normalised": router(SOFTMAX, 160, 8, norm_topk_prob=True),
    "V3": router(SIGMOID, 256, 8, 8, 4, norm_topk_prob=True, routed_scaling_factor=2.5),
    "Kimi-K2": router(SIGMOID, 384, 8, norm_topk_prob=True, routed_scaling_factor=2.827),
    "sigmoid, not normalised": router(SIGMOID, 64, 6, 4, 2),
    "groups of one": router(SIGMOID, 32, 4, 32, 7, norm_topk_prob=True),
    "all of the kept groups": router(SIGMOID, 32, 8, 8, 2, norm_topk_prob=True),
    "all experts": router(SIGMOID, 32, 32, norm_topk_prob=True),
    "one expert": router(SOFTMAX, 8, 1, norm_topk_prob=True),
    "after top-k": router(SOFTMAX_AFTER_TOPK, 32, 4),
    "after top-k, normalised": router(SOFTMAX_AFTER_TOPK, 128, 4, norm_topk_prob=True, routed_scaling_factor=2.0),
    "after top-k, groups": router(SOFTMAX_AFTER_TOPK, 64, 4, 8, 3),
}


@kernel("void(int64, int64, int64, int64)")
def _choose_all(phase, n_tokens, choices, choice_bytes):
    """One choice a token, in rows of choice_bytes; `phase` holds the logits' address, of the first token's."""
    n_bytes, first = 4 * load_i64(phase + step_experts.N_EXPERTS), load_i64(phase + step_experts.LOGITS)
    for t in range(n_tokens):
        store_i64(phase + step_experts.LOGITS, first + n_bytes * t)
        step_experts._choose_for(phase, 0, choices + choice_bytes * t)


def choose(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 (T, K) and weights float32 (T, K), by the step."""
    logits_TE, top_k = np.ascontiguousarray(logits_TE, np.float32), settings.num_experts_per_tok
    bias_E = None if bias_E is None else np.ascontiguousarray(bias_E, np.float32)
    bias = 0 if bias_E is None else bias_E.ctypes.data
    settings = dataclasses.replace(settings, logits=logits_TE.ctypes.data, bias=bias)
    phase = np.zeros(PHASE_BYTES // 8, np.int64)
    phase[ARGUMENTS // 8 :][: len(settings.words)] = settings.words
    rows = aligned_bytes(settings.choice_bytes * (len(logits_TE) + 1))
    rows[-settings.choice_bytes :] = 171  # what a choice writes behind its memory would show here
    kernels.call(_choose_all, phase, len(logits_TE), rows, settings.choice_bytes)
    assert np.all(rows[-settings.choice_bytes :] == 171)
    rows = rows.reshape(-1, settings.choice_bytes)[:-1]
    at = 24 * MOST_TOKENS * top_k + 8
    ids, weights = rows[:, : 8 * top_k], rows[:, at : at + 4 * top_k]
    return np.ascontiguousarray(ids).view(np.int64), np.ascontiguousarray(weights).view(np.float32)


def dense(ids_TK: np.ndarray, weights_TK: np.ndarray, n_experts: int) -> np.ndarray:
    """(T, E): each expert's weight; one that is chosen twice counts twice."""
    out_TE = np.zeros((len(ids_TK), n_experts))
    np.add.at(out_TE, (np.arange(len(ids_TK))[:, None], ids_TK), weights_TK)
    return out_TE


def torch_choice(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """By localrun.network.moe.choose_experts."""
    import torch
    from test_moe import BASE as CONFIG

    from localrun.network.moe import choose_experts

    fields = (
        "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    )  # fmt: skip
    same = {field: getattr(settings, field) for field in fields}
    config = dataclasses.replace(CONFIG, scoring_func=SCORING[settings.scoring], **same)
    bias = None if bias_E is None else torch.from_numpy(bias_E)
    ids_TK, weights_TK = choose_experts(torch.from_numpy(logits_TE), bias, config)
    return ids_TK.numpy(), weights_TK.numpy()


def is_sure(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None) -> np.ndarray:
    """(T,): whether the float64 choice leads by more than float32 rounding of scores up to 5 in all."""
    if settings.scoring == SOFTMAX_AFTER_TOPK:  # naive.route knows no such scores; the logits are exact
        return np.ones(len(logits_TE), bool)
    routing = naive.Routing(
        SCORING[settings.scoring], settings.num_experts_per_tok, False, 1.0, settings.n_group, settings.topk_group,
        "best" if settings.scoring == SOFTMAX or settings.n_group == settings.n_routed_experts else "best two",
    )  # fmt: skip
    return np.array([naive.route(row.astype(np.float64), bias_E, routing)[2] > 1e-6 for row in logits_TE])


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_choice_is_the_torch_routers(name: str, with_bias: bool) -> None:
    settings, n_tokens, rng = ROUTERS[name], 2000, np.random.default_rng(0)
    n_experts = settings.n_routed_experts
    logits_TE = (rng.standard_normal((n_tokens, n_experts)) * rng.uniform(0.1, 4, (n_tokens, 1))).astype(np.float32)
    scale = 3 / n_experts if settings.scoring == SOFTMAX else 0.3  # of the size of the scores that it moves
    bias_E = (scale * rng.standard_normal(n_experts)).astype(np.float32) if with_bias else None
    sure = is_sure(settings, logits_TE, bias_E)
    assert sure.mean() > 0.98
    ids_TK, weights_TK = choose(settings, logits_TE, bias_E)
    torch_ids_TK, torch_weights_TK = torch_choice(settings, logits_TE, bias_E)
    assert np.array_equal(np.sort(ids_TK[sure]), np.sort(torch_ids_TK[sure]))
    found, expected = (
        dense(ids[sure], weights[sure], n_experts)
        for ids, weights in ((ids_TK, weights_TK), (torch_ids_TK, torch_weights_TK))
    )
    # Sums of up to 384 exponentials in float32, one after the other: 384 roundings at worst, some sqrt(384) here.
    np.testing.assert_allclose(found, expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("name", ["V2-Lite", "V2", "V3", "Kimi-K2"])
def test_weights_are_in_the_choices_order(name: str) -> None:
    """Best first, each beside its id."""
    settings = ROUTERS[name]
    logits_TE = np.random.default_rng(1).standard_normal((200, settings.n_routed_experts)).astype(np.float32)
    ids_TK, weights_TK = choose(settings, logits_TE)
    chosen_TK = np.take_along_axis(logits_TE, ids_TK, 1)
    assert np.all(np.diff(chosen_TK, axis=1) <= 0)
    assert np.all(np.diff(weights_TK, axis=1) <= 0)


@pytest.mark.parametrize("scoring", SCORING, ids=SCORING.values())
def test_of_equals_the_first_is_chosen(scoring: int) -> None:
    ids_TK, weights_TK = choose(router(scoring, 32, 6, norm_topk_prob=True), np.full((3, 32), 0.7))
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    np.testing.assert_allclose(weights_TK, 1 / 6, rtol=1e-6)
    logits_E = np.zeros(32)
    logits_E[[30, 7, 19]] = 1
    ids_TK, _ = choose(router(scoring, 32, 4), logits_E[None])
    assert ids_TK.tolist() == [[7, 19, 30, 0]]


@pytest.mark.parametrize("scoring", SCORING, ids=SCORING.values())
def test_of_equal_groups_the_first_are_kept(scoring: int) -> None:
    ids_TK, _ = choose(router(scoring, 32, 8, 8, 2), np.zeros((1, 32)))
    assert ids_TK.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_groups_count_two_experts_but_for_softmax() -> None:
    """One group has the best expert, another the two best together."""
    logits_E = np.full(16, -4.0)
    logits_E[1], logits_E[[8, 10]] = 3.0, 2.0
    assert choose(router(SOFTMAX, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[1]]
    assert choose(router(SIGMOID, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[8]]
    assert choose(router(SOFTMAX_AFTER_TOPK, 16, 1, 4, 1), logits_E[None])[0].tolist() == [[8]]


def test_the_bias_moves_the_choice_and_not_the_weights() -> None:
    logits_E, bias_E = np.linspace(-1, 1, 8, dtype=np.float32), np.zeros(8, np.float32)
    bias_E[0] = 10
    ids_TK, weights_TK = choose(router(SIGMOID, 8, 2), logits_E[None], bias_E)
    assert ids_TK.tolist() == [[0, 7]]
    np.testing.assert_allclose(weights_TK[0], 1 / (1 + np.exp(-logits_E[[0, 7]].astype(np.float64))), rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_large_logits(name: str, size: float) -> None:
    """Saturated scores: finite weights, none of them negative."""
    settings = ROUTERS[name]
    signs_TE = np.sign(np.random.default_rng(2).standard_normal((50, settings.n_routed_experts)))
    ids_TK, weights_TK = choose(settings, size * signs_TE)
    assert ids_TK.min() >= 0 and ids_TK.max() < settings.n_routed_experts
    assert np.all(np.isfinite(weights_TK)) and weights_TK.min() >= 0
    everywhere_negative = choose(settings, np.full((1, settings.n_routed_experts), -size))
    assert np.all(np.isfinite(everywhere_negative[1]))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("name", ROUTERS)
def test_nan_logits_give_experts_that_exist(name: str, with_bias: bool) -> None:
    """Whatever is computed from them, no memory outside the experts is read."""
    settings, rng = ROUTERS[name], np.random.default_rng(3)
    n_experts = settings.n_routed_experts
    logits_TE = rng.standard_normal((100, n_experts))
    logits_TE[0] = np.nan
    logits_TE[1:50][rng.random((49, n_experts)) < 0.5] = np.nan
    logits_TE[50] = np.inf
    logits_TE[51] = -np.inf
    logits_TE[52:][rng.random((48, n_experts)) < 0.2] = np.inf
    ids_TK, weights_TK = choose(settings, logits_TE, rng.standard_normal(n_experts) if with_bias else None)
    assert ids_TK.min() >= 0 and ids_TK.max() < n_experts
    assert np.all(np.isnan(weights_TK[0]))  # a NaN in the network stays one


# ---- groups ----------------------------------------------------------------------------------------------------------


@kernel("void(int64, int64, int64)")
def _group(phase, choice, n_tokens):
    step_experts._group(phase, choice, n_tokens)


def groups(ids_TK: np.ndarray) -> list[list[tuple[int, int]]]:
    """(token, slot) of each group's pairs."""
    n_tokens, top_k = ids_TK.shape
    n_pairs = MOST_TOKENS * top_k
    phase, choice = np.zeros(PHASE_BYTES // 8, np.int64), np.full(3 * n_pairs + 1, -1, np.int64)
    phase[step_experts.TOP_K // 8] = top_k
    phase[step_experts.N_EXPERTS // 8] = ids_TK.max() + 1
    choice[: ids_TK.size] = ids_TK.ravel()
    kernels.call(_group, phase, choice, n_tokens)
    members, starts = choice[n_pairs : 2 * n_pairs].tolist(), choice[2 * n_pairs :][: ids_TK.size + 1].tolist()
    spans = [span for span in itertools.pairwise(starts) if span[0] < span[1]]
    assert starts[: len(spans) + 1] == [0, *(end for _, end in spans)]  # those without work come last
    return [[divmod(pair, top_k) for pair in members[begin:end]] for begin, end in spans]


@pytest.mark.parametrize("n_experts", [8, 12, 256])
@pytest.mark.parametrize("n_tokens", range(1, MOST_TOKENS + 1))
def test_groups_are_the_union_of_the_choices(n_tokens: int, n_experts: int) -> None:
    rng = np.random.default_rng(n_tokens)
    for _ in range(50):
        ids_TK = np.stack([rng.permutation(n_experts)[:8] for _ in range(n_tokens)])
        found = groups(ids_TK)
        assert sorted(pair for group in found for pair in group) == [*np.ndindex(n_tokens, 8)]
        experts = [{int(ids_TK[pair]) for pair in group} for group in found]
        assert all(len(group) == 1 for group in experts)
        assert len(experts) == len(np.unique(ids_TK))


def test_an_expert_that_a_token_chose_twice_is_in_two_groups() -> None:
    """gemv_few takes each token once."""
    ids_TK = np.array([[3, 3, 3, 5], [3, 7, 5, 3], [0, 0, 0, 0], [3, 3, 3, 3], [0, 3, 5, 7]])
    found = groups(ids_TK)
    assert sorted(pair for group in found for pair in group) == [*np.ndindex(5, 4)]
    assert all(len({token for token, _ in group}) == len(group) for group in found)
    assert all(len({int(ids_TK[pair]) for pair in group}) == 1 for group in found)


# ---- the two phases --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with closing(Pool(2)) as two_workers:
        yield two_workers


@dataclasses.dataclass
class Layer:
    """Random experts, a shared one, and their router; every matrix with its values in float64."""

    types: tuple[str, str, str, str]  # gate, up, down, and of the shared expert
    hidden: int
    inner: int
    shared_inner: int
    settings: Router
    n_tokens: int = 6

    def __post_init__(self) -> None:
        rng, n_experts = np.random.default_rng(self.hidden), self.settings.n_routed_experts
        gate, up, down, shared = self.types
        shapes = {
            "gate": (gate, (n_experts, self.inner, self.hidden)),
            "up": (up, (n_experts, self.inner, self.hidden)),
            "down": (down, (n_experts, self.hidden, self.inner)),
            "shared gate": (shared, (1, self.shared_inner, self.hidden)),
            "shared up": (shared, (1, self.shared_inner, self.hidden)),
            "shared down": (shared, (1, self.hidden, self.shared_inner)),
            "router": ("F32", (1, n_experts, self.hidden)),
            "tokens": ("F32", (1, self.n_tokens, self.hidden)),
        }
        self.weights: dict[str, QuantMatrix] = {}
        self.values: dict[str, np.ndarray] = {}
        for name, (type_, shape) in shapes.items():
            if shape[1] and shape[2]:
                self.weights[name], self.values[name] = kernels.random_weight(type_, shape, rng)
        self.norm = (1 + 0.1 * rng.standard_normal(self.hidden)).astype(np.float32) / np.float32(np.sqrt(self.hidden))

    def router_logits(self, pool: Pool) -> np.ndarray:
        """float32 (T, E), as the program has them."""
        rows: list[np.ndarray] = []
        self.run(pool, logits=rows)
        return np.concatenate(rows)

    def run(
        self,
        pool: Pool,
        together: int = 1,
        given: tuple[np.ndarray, np.ndarray] | None = None,
        logits: list[np.ndarray] | None = None,
    ) -> np.ndarray:
        """float32 (T, hidden): each token's vector after the layer, by steps of so many tokens.

        Args:
            given: ids int64 and weights float32 (T, K) for the phases, instead of what they would choose.
            logits: is given the router's.
        """
        program = Program(pool, self.weights["tokens"], np.ones(1), 1.0, 1)
        w, n_inner = self.weights, self.settings.num_experts_per_tok * self.inner
        input_ = Input(program.x, program.keep(self.norm), 1e-6)
        router, gated, upped = (program.vector(n) for n in (self.settings.n_routed_experts, n_inner, n_inner))
        first, shared = [(w["router"], router)], None
        if self.shared_inner:
            shared = program.vector(self.shared_inner), program.vector(self.shared_inner), w["shared down"]
            first += [(w["shared gate"], shared[0]), (w["shared up"], shared[1])]
        program.add(rows_phase(input_, first, pool.n_workers))
        settings = dataclasses.replace(self.settings, logits=router)
        if given is not None:
            top_k = self.settings.num_experts_per_tok
            ids_TK, weights_TK = np.zeros((MOST_TOKENS, top_k), np.int64), np.zeros((MOST_TOKENS, top_k), np.float32)
            settings = Choice(program.keep(ids_TK), program.keep(weights_TK), self.settings.n_routed_experts, top_k)
        experts = ExpertMatrices(w["gate"], w["up"], w["down"])
        for phase in expert_phases(input_, settings, experts, gated, upped, shared, program.x, pool.n_workers):
            program.add(phase)
        program.finish()
        x, rows = floats(program.x, together, self.hidden), []
        for first in range(0, self.n_tokens, together):
            ids = range(self.n_tokens)[first : first + together]
            if given is not None:
                ids_TK[: len(ids)], weights_TK[: len(ids)] = (part[first : first + together] for part in given)
            program.run(ids, 0, np.zeros(1, np.int64))
            if logits is not None:
                logits.append(floats(router, len(ids), self.settings.n_routed_experts).copy())
            rows.append(x[: len(ids)].copy())
        return np.concatenate(rows)

    def _mlp(self, name: str, expert: int, x: np.ndarray) -> np.ndarray:
        """down(silu(gate x) * up x) as the formats see their inputs."""
        gate, up, down = (f"{name}{part}" for part in ("gate", "up", "down"))
        # With one integer format of the two both read rounded columns.
        rounding = next((w.format for w in (self.weights[gate], self.weights[up]) if w.format.integer), None)
        seen = (kernels.rounded(x, rounding) if rounding else x).astype(np.float64)
        g, u = self.values[gate][expert] @ seen, self.values[up][expert] @ seen
        inner = (g / (1 + np.exp(-g)) * u).astype(np.float32)
        return self.values[down][expert] @ kernels.rounded(inner, self.weights[down].format)

    def expected(self) -> np.ndarray:
        """float64 (T, hidden)."""
        x_TD = self.values["tokens"][0]
        normed_TD = naive.rms_norm(x_TD, self.norm, 1e-6).astype(np.float32)
        logits_TE = normed_TD.astype(np.float64) @ self.values["router"][0].T
        ids_TK, weights_TK = torch_choice(self.settings, logits_TE.astype(np.float32), None)
        out_TD = x_TD.copy()
        for t, k in np.ndindex(*ids_TK.shape):
            out_TD[t] += weights_TK[t, k] * self._mlp("", ids_TK[t, k], normed_TD[t])
        if self.shared_inner:
            out_TD += np.stack([self._mlp("shared ", 0, normed) for normed in normed_TD])
        return out_TD


SMALL = router(SIGMOID, 8, 3, norm_topk_prob=True, routed_scaling_factor=2.5)
LAYERS = {
    "float32": Layer(("F32", "F32", "F32", "F32"), 64, 48, 96, SMALL),
    "no shared expert": Layer(("F32", "F32", "F32", "F32"), 64, 48, 0, SMALL),
    "odd sizes": Layer(("F32", "F32", "F32", "F32"), 72, 20, 36, SMALL),
    "rows no multiple of 8": Layer(("F32", "F32", "F32", "F32"), 76, 13, 5, SMALL),
    "V2-Lite's types": Layer(("Q4_0", "Q4_0", "Q8_0", "Q5_0"), 128, 96, 192, SMALL),
    "K-quants": Layer(("Q4_K", "Q4_K", "Q6_K", "Q8_0"), 256, 256, 512, SMALL),
    "integer experts, float shared": Layer(("Q4_0", "Q4_1", "Q8_0", "F16"), 64, 96, 32, SMALL),
    "float experts, integer shared": Layer(("BF16", "F16", "BF16", "Q8_0"), 64, 80, 160, SMALL),
    "one of K": Layer(("F32", "F32", "F32", "F32"), 64, 32, 32, router(SOFTMAX, 4, 1)),
    "all of K": Layer(("F32", "F32", "F32", "F32"), 64, 32, 32, router(SOFTMAX_AFTER_TOPK, 4, 4)),
    "many rows": Layer(("F32", "F32", "Q8_0", "F32"), 1024, 608, 320, SMALL, n_tokens=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_experts(pool: Pool, name: str) -> None:
    layer = LAYERS[name]
    found, expected = layer.run(pool), layer.expected()
    # Float formats: rounding of float32 sums. Integer ones: that of an input may tip its rounding to 8 bits, one step
    # of 1/127 in one of some hundred terms.
    tolerance = 2e-3 if any(w.format.integer for w in layer.weights.values()) else 2**-20
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", LAYERS)
def test_workers_do_not_change_the_experts_sum(name: str) -> None:
    answers = []
    for n_workers in (1, 2, 3, 5):
        with closing(Pool(n_workers)) as pool:
            answers.append(LAYERS[name].run(pool))
    assert all(np.array_equal(answers[0], answer) for answer in answers[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_a_given_choice_is_as_good_as_the_routers(pool: Pool, name: str) -> None:
    """To the bit: with the router's own choice, made before."""
    layer = LAYERS[name]
    logits_TE = layer.router_logits(pool)
    assert np.array_equal(layer.run(pool, given=choose(layer.settings, logits_TE)), layer.run(pool))


@pytest.mark.parametrize("together", range(2, MOST_TOKENS + 1))
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_together_are_tokens_alone(pool: Pool, name: str, together: int) -> None:
    """Six tokens of 4 or 8 experts: most experts have several."""
    assert np.array_equal(LAYERS[name].run(pool, together), LAYERS[name].run(pool))
