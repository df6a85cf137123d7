"""Which rank computes a step's pairs where experts have several owners, against the rule in NumPy."""

from __future__ import annotations

import kernels
import numpy as np
import pytest

from quant.decode.program import MOST_TOKENS
from quant.decode.router import CHOICE, PRECOMPUTED, ROUTER, _assign, _take_over, new_choice
from quant.target.jit import kernel

N_EXPERTS, TOP_K = 24, 6


@kernel("void(int64, int64, int64)")
def _assigned(router, memory, n_tokens):
    r = ROUTER(router)
    c = new_choice(r, memory)
    for t in range(n_tokens):
        _take_over(r, t, c)
    _assign(r, c, n_tokens)


def assigned(ids: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """int64 (pairs,): what the choice of (T, K) ids becomes."""
    weights, memory = np.ones(ids.shape, np.float32), np.zeros(1 << 16, np.uint8)
    router = ROUTER.pack(
        logits=0, has_bias=False, bias=0, table=0, ids=ids.ctypes.data, weights=weights.ctypes.data,
        n_experts=N_EXPERTS, top_k=TOP_K, n_group=1, topk_group=1, scoring=PRECOMPUTED, normalise=False,
        factor=1.0, owners=owners.ctypes.data, choose=0,
    )  # fmt: skip
    kernels.call(_assigned, router, memory, len(ids))
    return memory[CHOICE.size :].view(np.int64)[: ids.size].copy()


def expected_ranks(ids: np.ndarray, owners: np.ndarray, n_ranks: int) -> list[int]:
    """An expert's pairs go together; else to whom has fewest experts so far, of those that have it."""
    found: dict[int, int] = {}
    loads = [0] * n_ranks
    for expert in ids.ravel().tolist():
        if expert not in found:
            ranks = [rank for rank in range(n_ranks) if owners[expert] >> rank & 1]
            found[expert] = min(ranks, key=loads.__getitem__)
            loads[found[expert]] += 1
    return [found[expert] for expert in ids.ravel().tolist()]


@pytest.mark.parametrize("n_tokens", [1, 3, MOST_TOKENS])
@pytest.mark.parametrize("n_ranks", [2, 3, 5])
def test_pairs_go_to_who_has_fewest(n_ranks: int, n_tokens: int) -> None:
    rng = np.random.default_rng(n_ranks)
    for _ in range(20):
        owners = rng.integers(1, 1 << n_ranks, N_EXPERTS)
        ids = np.stack([rng.permutation(N_EXPERTS)[:TOP_K] for _ in range(n_tokens)]).astype(np.int64)
        chosen = assigned(ids, owners)
        expected = np.array(expected_ranks(ids, owners, n_ranks))
        assert np.array_equal(np.where(chosen >= 0, chosen, -1), np.where(expected == 0, ids.ravel(), -1))
        value = -1 - chosen
        assert np.array_equal(1 + value[chosen < 0] // N_EXPERTS, expected[chosen < 0])
        assert np.array_equal(value[chosen < 0] % N_EXPERTS, ids.ravel()[chosen < 0])


def test_pairs_without_an_expert_are_nobodys() -> None:
    """Below 0 they would be another rank's."""
    owners, ids = np.full(N_EXPERTS, 2), np.array([[3, -1, 5, N_EXPERTS, 7, -99]], np.int64)
    assert assigned(ids, owners).tolist() == [-4, N_EXPERTS, -6, N_EXPERTS, -8, N_EXPERTS]
