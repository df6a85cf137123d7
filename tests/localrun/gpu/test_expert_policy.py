"""Which experts come to VRAM and which make room, without a device. Letters: L layers, E experts, N slots."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.gpu.experts.policy import Policy, Swap


def chosen(n_experts: int, *layers: list[int]) -> np.ndarray:
    counts_LE = np.zeros((len(layers), n_experts))
    for layer, experts in enumerate(layers):
        counts_LE[layer, experts] = 1
    return counts_LE


def seen(policy: Policy, n_tokens: int, *layers: list[int], n_experts: int = 6) -> list[Swap]:
    """What it asks for after so many tokens with the same experts, one at a time; it asks for no more in between."""
    for _ in range(n_tokens):
        policy.observe(chosen(n_experts, *layers), 1)
    return policy.swaps(99)


def test_an_expert_comes_once_it_was_chosen_often_enough() -> None:
    """3 times more often than the least recently used one, whose two times are already a little forgotten."""
    policy = Policy(6, np.array([[0, 1]]))
    assert seen(policy, 2, [0, 1]) == []
    assert seen(policy, 4, [1, 4]) == []
    assert seen(policy, 1, [1, 4]) == [Swap(0, 0, 4)]


def test_the_least_recently_used_one_makes_room() -> None:
    policy = Policy(6, np.array([[0, 1, 2]]), margin=0)
    for experts in ([1], [0], [2], [0]):
        assert seen(policy, 1, experts) == []
    assert seen(policy, 2, [5]) == [Swap(0, 1, 5)]


def test_of_slots_that_were_used_at_the_same_time_the_one_that_was_used_less() -> None:
    policy = Policy(6, np.array([[0, 1, 2]]), margin=0)
    assert seen(policy, 3, [0, 2]) == []
    assert seen(policy, 1, [0, 1, 2]) == []
    assert seen(policy, 2, [5]) == [Swap(0, 1, 5)]


def test_what_is_coming_makes_no_room() -> None:
    policy = Policy(6, np.array([[0, 1]]))
    assert seen(policy, 4, [5]) == [Swap(0, 0, 5)]
    assert seen(policy, 3, [1]) == []
    assert seen(policy, 9, [4]) == [Swap(0, 1, 4)]
    assert seen(policy, 20, [3]) == []


def test_the_table_is_of_what_has_arrived() -> None:
    policy = Policy(6, np.array([[3, 1], [0, -1]]))
    assert policy.table().tolist() == [[-1, 1, -1, 0, -1, -1], [0, -1, -1, -1, -1, -1]]
    swaps = seen(policy, 5, [5], [5])
    assert swaps == [Swap(0, 0, 5), Swap(1, 1, 5)]
    assert policy.table().tolist() == [[-1, 1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert seen(policy, 9, [5], [5]) == []  # they are coming
    policy.finish(swaps[0], arrived=True)
    policy.finish(swaps[1], arrived=False)
    assert policy.table().tolist() == [[-1, 1, -1, -1, -1, 0], [0, -1, -1, -1, -1, -1]]
    assert seen(policy, 1, [5], [5]) == [Swap(1, 1, 5)]  # it is asked for again


def test_what_gains_most_comes_first() -> None:
    policy = Policy(4, np.array([[0], [0], [0]]))
    for layers in [([1], [1], [1])] * 4 + [([0], [1], [1])] + [([1], [0], [1])] * 3:
        policy.observe(chosen(4, *layers), 1)
    assert policy.swaps(0) == []
    assert policy.swaps(1) == [Swap(2, 0, 1)]
    assert policy.swaps(9) == [Swap(0, 0, 1)]  # 7 to 1; of layer 1 the last token's expert is there


def test_a_prompt_counts_as_its_tokens_do() -> None:
    rng, (one, many) = np.random.default_rng(0), (Policy(8, np.array([[0, 1]])) for _ in range(2))
    tokens = [chosen(8, rng.choice(8, 2, replace=False)) for _ in range(64)]
    for token in tokens:
        one.observe(token, 1)
    many.observe(np.sum(tokens, axis=0), len(tokens))
    # The first of 64 tokens weighs (255 / 256)^64 = 0.78 of the last; in a prompt all weigh the same.
    np.testing.assert_allclose(many._count_LE, one._count_LE, rtol=0.15)
    assert many._count_LE.sum() == pytest.approx(one._count_LE.sum())


@pytest.mark.parametrize("n_slots", [1, 3, 8])
def test_no_slot_is_used_twice_whatever_comes(n_slots: int) -> None:
    """Copies that arrive late, in any order, or not at all."""
    rng, n_layers, n_experts = np.random.default_rng(n_slots), 3, 12
    held_LN = np.stack([rng.permutation(n_experts)[:n_slots] for _ in range(n_layers)])
    policy, under_way, n_swaps = Policy(n_experts, held_LN, window=16, margin=0.5), [], 0
    for _ in range(300):
        policy.observe(chosen(n_experts, *(rng.choice(n_experts, 3, replace=False) for _ in range(n_layers))), 1)
        swaps = policy.swaps(4 - len(under_way))
        table_LE = policy.table()
        for swap in [*under_way, *swaps]:
            assert table_LE[swap.layer, swap.expert] == -1 and swap.slot not in table_LE[swap.layer]
        under_way, n_swaps = under_way + swaps, n_swaps + len(swaps)
        assert len({(swap.layer, swap.slot) for swap in under_way}) == len(under_way) <= 4
        for layer in table_LE:
            slots = layer[layer >= 0].tolist()
            assert len(slots) == len(set(slots)) and set(slots) <= set(range(n_slots))
        for swap in [swap for swap in under_way if rng.random() < 0.3]:
            policy.finish(swap, arrived=rng.random() < 0.8)
            under_way.remove(swap)
    assert n_swaps > 20
