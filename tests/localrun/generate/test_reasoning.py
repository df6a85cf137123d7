"""Reasoning and content, in whatever pieces the text comes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.generate.reasoning import CONTENT, REASONING, ReasoningSplitter

CASES = {
    "tagged": (None, "<think>\nHm, 1 < 2.\n</think>\n\nYes.", "Hm, 1 < 2.", "Yes."),
    "opened by the prompt": ("<think>", "\nHm.</think>Yes.", "Hm.", "Yes."),
    "never closed": ("<think>", "Hm, </thi", "Hm, </thi", ""),
    "nothing thought": (None, "<think>\n\n</think>\n\nYes.", "", "Yes."),
    "no reasoning": (None, "  Yes <think>no</think>", "", "  Yes <think>no</think>"),
    "the beginning of a tag": (None, " <thin", "", " <thin"),
    "only space": (None, " \n", "", " \n"),
    "another tag": (None, "[THINK]a</think>b[/THINK]c", "a</think>b", "c"),
    "a longer tag": (None, "<think:opensource>a</think>b</think:opensource>c", "a</think>b", "c"),
    "a second one": (None, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
}


def split(opened: str | None, pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter(opened)
    parts = [part for piece in pieces for part in splitter.push(piece)] + list(splitter.flush())
    return tuple("".join(text for kind, text in parts if kind == wanted) for wanted in (REASONING, CONTENT))


@pytest.mark.parametrize(("opened", "text", "reasoning", "content"), CASES.values(), ids=CASES)
def test_by_hand(opened: str | None, text: str, reasoning: str, content: str) -> None:
    assert split(opened, [text]) == (reasoning, content)
    assert split(opened, list(text)) == (reasoning, content)


@given(
    st.sampled_from([None, "<think>"]),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/think>", "\n", " ", "a", "[THINK]"]), max_size=8),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_pieces_do_not_matter(opened: str | None, words: list[str], cuts: list[int]) -> None:
    text = "".join(words)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:stop] for start, stop in itertools.pairwise(edges)]
    assert split(opened, pieces) == split(opened, [text])
