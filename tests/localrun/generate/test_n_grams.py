"""Drafts of what followed the same tokens before."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.generate.drafts import NGramDraft


def longest_match(ids: list[int], n: int, longest: int, shortest: int) -> list[int]:
    """What NGramDraft is to propose, by looking at every place."""
    best = None
    for place in range(len(ids) - 1, 0, -1):
        length = 0
        while length < min(longest, place) and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= shortest and (best is None or length > best[0]):
            best = length, place
    if best is None:
        return []
    text = list(ids)
    for i in range(n):
        text.append(text[best[1] + i])
    return text[len(ids) :]


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_n_grams_are_the_longest_latest_match(ids: list[int], n: int, shortest: int) -> None:
    draft = NGramDraft(longest=5, shortest=shortest, most_places=100)
    assert draft.propose(ids, n) == longest_match(ids, n, 5, shortest)


def test_n_grams_of_a_text_that_is_taken_back() -> None:
    draft = NGramDraft()
    assert draft.propose([1, 2, 3, 4, 1, 2], 2) == [3, 4]
    draft.forget(3)
    assert draft.propose([1, 2, 3, 5, 6, 2, 3], 2) == [5, 6]
    assert draft.propose([1, 2, 3, 5, 6, 2, 3, 7, 6, 2], 1) == [3]


def test_n_grams_repeat_a_loop() -> None:
    assert NGramDraft().propose([9, 1, 2, 1, 2], 4) == [1, 2, 1, 2]
    assert NGramDraft().propose([9, 5, 5, 5], 3) == [5, 5, 5]
    assert NGramDraft().propose([1, 2, 3], 3) == []
