"""A layer's router and experts in a decode step: random ones, and what they should give.

Letters: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

import dataclasses

import kernels
import naive
import numpy as np
from expert_cases import gated, random_biases
from kernels import floats
from routers import CONFIG

from quant.decode.experts import expert_phases
from quant.decode.linear import Input, rows_phase
from quant.decode.program import MOST_TOKENS, Program
from quant.decode.router import (
    ROUTER,
    SIGMOID,
    SOFTMAX,
    SOFTMAX_AFTER_TOPK,
    SQRT_SOFTPLUS,
    Choice,
    Router,
    choose_for,
    new_choice,
)
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.simd.gated import SWIGLU, Activation
from quant.simd.memory import store_f32, store_i64
from quant.target.jit import kernel
from quant.threads.pool import Pool, aligned_bytes

SCORING = {
    SOFTMAX: "softmax",
    SIGMOID: "sigmoid",
    SOFTMAX_AFTER_TOPK: "softmax_after_topk",
    SQRT_SOFTPLUS: "sqrtsoftplus",
}
BASE = Router(
    logits=0, bias=0, n_routed_experts=32, num_experts_per_tok=6, n_group=1, topk_group=1, scoring=SOFTMAX,
    norm_topk_prob=False, routed_scaling_factor=1.0,
)  # fmt: skip


def router(scoring: int, n_experts: int, top_k: int, n_group: int = 1, topk_group: int = 1, **more: object) -> Router:
    return dataclasses.replace(
        BASE, scoring=scoring, n_routed_experts=n_experts, num_experts_per_tok=top_k, n_group=n_group,
        topk_group=topk_group, **more,
    )  # fmt: skip


@kernel("void(int64, int64, int64, int64, int64, int64)")
def _choose_all(router, n_tokens, choices, choice_bytes, ids, weights):
    """One choice a token, in rows of choice_bytes, each as the first token's; then all ids and weights."""
    r = ROUTER(router)
    for t in range(n_tokens):
        c = new_choice(r, choices + choice_bytes * t)
        choose_for(r, 0, c)
        for k in range(r.top_k):
            store_i64(ids + 8 * (r.top_k * t + k), c.ids[k])
            store_f32(weights + 4 * (r.top_k * t + k), c.weights[k])
        r.logits = r.logits + r.n_experts


def choose(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 (T, K) and weights float32 (T, K), by the step."""
    logits_TE, top_k = np.ascontiguousarray(logits_TE, np.float32), settings.num_experts_per_tok
    bias_E = None if bias_E is None else np.ascontiguousarray(bias_E, np.float32)
    bias = 0 if bias_E is None else bias_E.ctypes.data
    settings = dataclasses.replace(settings, logits=logits_TE.ctypes.data, bias=bias)
    rows = aligned_bytes(settings.choice_bytes * (len(logits_TE) + 1))
    rows[-settings.choice_bytes :] = 171  # what a choice writes behind its memory would show here
    ids_TK, weights_TK = np.zeros((len(logits_TE), top_k), np.int64), np.zeros((len(logits_TE), top_k), np.float32)
    kernels.call(_choose_all, settings.struct, len(logits_TE), rows, settings.choice_bytes, ids_TK, weights_TK)
    assert np.all(rows[-settings.choice_bytes :] == 171)
    return ids_TK, weights_TK


def torch_choice(settings: Router, logits_TE: np.ndarray, bias_E: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """By localrun.network.moe.choose_experts."""
    import torch

    from localrun.network.moe import choose_experts

    fields = (
        "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
    )  # fmt: skip
    same = {field: getattr(settings, field) for field in fields}
    config = dataclasses.replace(CONFIG, scoring_func=SCORING[settings.scoring], **same)
    bias = None if bias_E is None else torch.from_numpy(bias_E)
    ids_TK, weights_TK = choose_experts(torch.from_numpy(logits_TE), bias, config)
    return ids_TK.numpy(), weights_TK.numpy()


@dataclasses.dataclass
class Layer:
    """Random experts, a shared one, and their router; every matrix with its values in float64."""

    types: tuple[str, str, str, str]  # gate, up, down, and of the shared expert
    hidden: int
    inner: int
    shared_inner: int
    settings: Router
    n_tokens: int = 6
    biased: bool = False  # the routed experts; their activation is bounded then

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
        self.biases = random_biases(n_experts, self.inner, self.hidden, rng) if self.biased else None
        self.activation = Activation(1.702, 1.5) if self.biased else SWIGLU
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
        router, gate_out, up_out = (program.vector(n) for n in (self.settings.n_routed_experts, n_inner, n_inner))
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
        experts = ExpertMatrices(w["gate"], w["up"], w["down"], self.biases, self.activation)
        for phase in expert_phases(input_, settings, experts, gate_out, up_out, shared, program.x, pool.n_workers):
            program.add(phase)
        program.finish()
        x, rows = floats(program.x, together, self.hidden), []
        for first in range(0, self.n_tokens, together):
            ids = range(self.n_tokens)[first : first + together]
            if given is not None:
                ids_TK[: len(ids)], weights_TK[: len(ids)] = (part[first : first + together] for part in given)
            program.run(ids, range(len(ids)), np.zeros(1, np.int64))
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
        biases = [bias[expert] for bias in self.biases] if self.biases and not name else [0, 0, 0]
        g, u = self.values[gate][expert] @ seen + biases[0], self.values[up][expert] @ seen + biases[1]
        inner = gated(SWIGLU if name else self.activation, g, u).astype(np.float32)
        return self.values[down][expert] @ kernels.rounded(inner, self.weights[down].format) + biases[2]

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
