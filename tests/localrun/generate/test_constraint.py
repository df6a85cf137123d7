"""Constraints: masks against all texts of small languages, replies of the bundled model, reasoning, what is refused."""

from __future__ import annotations

import itertools
import json
import re
import runpy
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from paths import DATA, SCRIPTS
from vocabularies import CHATML, write_vocabulary

import localrun
from localrun.bundled import model_path
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.constraint import Constraint, Guide, _vocabulary
from localrun.generate.reasoning_end import reasoning_end
from localrun.generate.sampling import Sampling
from localrun.text.harmony import MARKS
from localrun.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with localrun.load("miniature", device="cpu", threads=2, ctx=512) as model:
        yield model


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokenizer]:
    """Ids of bytes are the bytes; <think> and </think> are the last two."""
    with closing(Tokenizer(write_vocabulary(tmp_path_factory.mktemp("thinker") / "v.gguf"))) as tokenizer:
        yield tokenizer


# ------------------------------------------------------------------------------------------------------ vocabularies


@pytest.mark.parametrize("name", ["miniature", "ggml-vocab-llama-spm.gguf"])
def test_tokens_mean_to_llguidance_what_the_detokenizer_gives(name: str) -> None:
    """Byte pairs and SentencePiece: every token's bytes; control tokens are none that text can spell.

    The byte 0xff is llguidance's mark of a special token; no text in UTF-8 has it.
    """
    tokenizer = Tokenizer(model_path(name) if name == "miniature" else DATA / "vocab" / name)
    vocabulary = _vocabulary(tokenizer)
    inner, special = vocabulary._llguidance, set(vocabulary.special_token_ids)
    assert inner.eos_tokens == sorted(tokenizer.eog_ids) and tokenizer.eog_ids
    for id in range(tokenizer.n_vocab):
        assert inner.is_special_token(id) == (id in special or tokenizer.piece(id) == b"\xff")
        if not inner.is_special_token(id):
            assert inner.decode_bytes([id]) == tokenizer.piece(id)
    for text in ('{"a": [1, 2]}', " hello", "日本 \U0001f642", "\n\n", "hello"):
        ids = vocabulary(text.encode())
        assert b"".join(tokenizer.piece(id) for id in ids) == text.encode() and len(ids) < len(text.encode()) + 1


def test_a_vocabulary_is_made_once_and_freed_with_its_tokenizer(thinker: Tokenizer) -> None:
    assert _vocabulary(thinker) is _vocabulary(thinker)
    tokenizer = Tokenizer(thinker.path)
    freed = _vocabulary(tokenizer)._tokenizer
    tokenizer.close()
    del tokenizer
    with pytest.raises(ReferenceError):
        freed.n_vocab  # noqa: B018


# ------------------------------------------------------------------------------------------------------------- masks

LANGUAGES: dict[str, tuple[Constraint, list[str]]] = {
    "choice": (Constraint.choice(["red", "read", "blue", 'a "b"', "he"]), ["red", "read", "blue", 'a "b"', "he"]),
    "regex": (
        Constraint.regex("(a|he){1,3}"),
        ["".join(parts) for n in (1, 2, 3) for parts in itertools.product(("a", "he"), repeat=n)],
    ),
    "schema": (Constraint.json_schema({"type": "integer", "minimum": 8, "maximum": 12}), ["8", "9", "10", "11", "12"]),
    "lark": (Constraint.lark('start: X "t" | "he"\nX: /[xy ]/'), ["xt", "yt", " t", "he"]),
    "GBNF": (Constraint.lark('root ::= "a" digit{1,2}\ndigit ::= [0-1]'), ["a0", "a1", "a00", "a01", "a10", "a11"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_mask_allows_what_leads_to_a_text_and_the_end_at_one(thinker: Tokenizer, name: str) -> None:
    """After every beginning of a text: all tokens that go on to one, or where the text is forced some of them."""
    constraint, language = LANGUAGES[name]
    for text in sorted({word[:length] for word in language for length in range(len(word) + 1)}):
        guide = Guide(constraint, thinker, [])
        guide.restrict(np.zeros(thinker.n_vocab))
        for byte in text.encode():
            guide.accept(byte)
        logits = np.zeros(thinker.n_vocab + 5)  # a model may have more rows than there are tokens
        guide.restrict(logits)
        found = set(np.flatnonzero(logits == 0).tolist()) - set(guide._reasoning.may_begin)
        pieces = {id: thinker.piece(id).decode("latin-1") for id in range(thinker.n_vocab)}
        going_on = {id for id, piece in pieces.items() if piece and any(w.startswith(text + piece) for w in language)}
        ends = set(thinker.eog_ids) if text in language else set()
        first = {pieces[id][0] for id in going_on}
        if len(first) + bool(ends) == 1:  # forced
            assert found and found <= going_on | ends
        else:
            assert found == going_on | ends
        assert guide.is_complete == (text in language and not going_on)


def test_only_drafts_that_may_come_are_verified(thinker: Tokenizer) -> None:
    guide = Guide(LANGUAGES["choice"][0], thinker, [])
    assert guide.possible(list(b"real")) == list(b"rea") and guide.possible(list(b"x")) == []
    guide.accept(ord("r"))
    assert guide.possible(list(b"ed")) == list(b"ed")


def test_where_the_model_rules_out_all_that_may_come(thinker: Tokenizer) -> None:
    logits = np.full(thinker.n_vocab, -np.inf)
    logits[ord("x")] = 0
    with pytest.raises(LocalrunError, match="leaves no token that the model could say"):
        Guide(LANGUAGES["choice"][0], thinker, []).restrict(logits)


# --------------------------------------------------------------------------------------------------------- reasoning


def answer_of(tokenizer: Tokenizer, prompt: str, reply: str) -> str:
    """What of a reply is under the constraint, a byte or a control token at a time."""
    end = reasoning_end(tokenizer, tokenizer.encode(prompt, parse_special=True))
    answer = b""
    for id in tokenizer.encode(reply, add_special=False, parse_special=True):
        if not end.is_over:
            logits = np.zeros(tokenizer.n_vocab)
            end.restrict(logits)
            assert logits[id] == 0 and np.isinf(logits[list(tokenizer.eog_ids)]).all()
        if not end.takes(id):
            answer += tokenizer.piece(id)
    return answer.decode()


@pytest.mark.parametrize(
    ("prompt", "reply", "answer"),
    [
        ("Hi", "{}", "{}"),
        ("Hi<think>", "Hm { </b></think>\n\n{}", "\n\n{}"),
        ("Hi<think>\n", "Hm</think>{}<think>", "{}<think>"),
        ("Hi", "<think>Hm</think>{}", "{}"),
        ("Hi", "\n<think>Hm</think>{}", "{}"),
        ("Hi<think>\n\n</think>\n\n", "\n{}", "\n{}"),
        ("Hi[THINK]", "Hm [/THINK[/THINK]{}", "{}"),
    ],
)
def test_reasoning_is_free(thinker: Tokenizer, prompt: str, reply: str, answer: str) -> None:
    assert answer_of(thinker, prompt, reply) == answer


def test_a_line_break_before_reasoning_is_followed_by_it(thinker: Tokenizer) -> None:
    end, think = reasoning_end(thinker, []), thinker.n_vocab - 2
    assert {ord("\n"), think} <= set(end.may_begin)
    assert end.takes(ord("\n")) and not end.is_over
    logits = np.zeros(thinker.n_vocab)
    end.restrict(logits)
    assert np.flatnonzero(logits == 0).tolist() == [think]


def test_a_tag_of_several_tokens_ends_where_a_token_ends() -> None:
    """Where "]" ends the tag, no token may bring more than spaces after it."""
    pieces = [*map(bytes, zip(range(256), strict=True)), b"]{", b"]\n", b"x]{"]
    stub = SimpleNamespace(
        controls={},
        n_vocab=len(pieces),
        eog_ids=frozenset({0}),
        piece=lambda id, special=False: pieces[id],
        decode=lambda ids, special=False: bytes(ids).decode(),
        encode=lambda text, **_: list(text.encode()),
    )
    end = reasoning_end(stub, list(b"[THINK]"))  # type: ignore[arg-type]
    for letter in b"a[/THINK":
        logits = np.zeros(len(pieces))
        end.restrict(logits)
        assert np.isinf(logits[[0]]).all() and (logits[[256]] == 0).all() == (letter in b"a[")
        assert end.takes(letter)
    logits = np.zeros(len(pieces))
    end.restrict(logits)
    assert np.flatnonzero(np.isinf(logits)).tolist() == [0, 256, 258]
    assert end.takes(257) and end.is_over


def test_channels(tmp_path: Path) -> None:
    """gpt-oss: a channel comes first, and the answer is in "final"."""
    tokenizer = Tokenizer(write_vocabulary(tmp_path / "v.gguf", controls=(*CHATML, *MARKS, "<|return|>", "<|call|>")))
    end = reasoning_end(tokenizer, [])
    logits = np.zeros(tokenizer.n_vocab)
    end.restrict(logits)
    assert np.flatnonzero(logits == 0).tolist() == [tokenizer.controls["<|channel|>"]]
    reply = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>{}"
    assert answer_of(tokenizer, "", reply) == "{}"


def test_texts_without_a_chat_have_no_reasoning(thinker: Tokenizer) -> None:
    guide = Guide(Constraint(LANGUAGES["choice"][0].grammar, after_reasoning=False), thinker, list(b"<think>"))
    logits = np.zeros(thinker.n_vocab)
    guide.restrict(logits)
    assert {thinker.piece(id)[:1] for id in np.flatnonzero(logits == 0).tolist()} == {b"r", b"b", b"a", b"h"}


# ----------------------------------------------------------------------------------------------------------- replies


def test_random_schemas_at_a_high_temperature(engine: Engine) -> None:
    """A sample of scripts/check_schemas.py: what ends by itself parses and validates, by jsonschema."""
    counts = runpy.run_path(str(SCRIPTS / "check_schemas.py"))["check"](engine, 25, 1.5, 3, max_tokens=80)
    assert counts.wrong == [] and counts.refused == 0 and counts.ended >= 15


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_drafts_change_nothing(engine: Engine, temperature: float) -> None:
    """Constraint, penalties, bias and log-probabilities, with and without drafts: the same to the bit."""
    ids = engine.tokenizer.encode("Once upon a time")
    sampling = Sampling(
        temperature, top_k=0, repeat_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, seed=5,
        logit_bias={320: 1.0}, constraint=Constraint.json_schema(PERSON), top_logprobs=2,
    )  # fmt: skip
    found = []
    for speculative in ("off", 3):
        session = engine.session(speculative)
        tokens = list(session.tokens(ids, sampling, max_tokens=60))
        assert len(session.reply_logprobs) == len(tokens) == session.stats.generated_tokens
        found.append((tokens, session.reply_logprobs, session.finish_reason))
    assert found[0] == found[1]
    assert session.stats.drafted_tokens > 0
    assert found[0][2] == "stop" and json.loads(engine.tokenizer.decode(tokens)).keys() == {"name", "age"}


def test_a_reply_that_is_cut_says_so(engine: Engine) -> None:
    session = engine.session()
    sampling = Sampling(1.5, seed=0, constraint=Constraint.json_schema(PERSON))
    list(session.reply([1, 2], sampling, max_tokens=5))
    assert session.finish_reason == "length"


def test_a_complete_reply_takes_no_step_for_its_end(engine: Engine) -> None:
    session = engine.session("off")
    text = "".join(session.reply([1, 2], Sampling(seed=0, constraint=Constraint.choice(["yes", "no"]))))
    assert text in ("yes", "no") and session.finish_reason == "stop"
    assert session.stats.steps == session.stats.generated_tokens - 1


def test_a_bias_for_a_token_that_there_is_not(engine: Engine) -> None:
    with pytest.raises(LocalrunError, match="logit_bias has the token id 4096; this model has ids 0 to 4095"):
        engine.session().tokens([1, 2], Sampling(logit_bias={4096: 1.0}))


# ----------------------------------------------------------------------------------------------------------- refused

DEEP: Any = {"type": "integer"}
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}
REFUSED = [
    (Constraint.json_schema, {"type": "strin"}, "the schema is not usable: Invalid type: strin"),
    (Constraint.json_schema, {"$ref": "#/x"}, "the schema is not usable: Pointer '/x' does not exist"),
    (Constraint.json_schema, {"uniqueItems": True, "type": "array"}, "Unimplemented keys: .*uniqueItems"),
    (Constraint.json_schema, {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema"),
    (Constraint.json_schema, {"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable schema"),
    (Constraint.json_schema, [], "the schema is of type list; expected a JSON object"),
    (Constraint.json_schema, {"const": float("nan")}, "the schema is not JSON"),
    (Constraint.json_schema, {"const": b""}, "the schema is not JSON"),
    (Constraint.json_schema, DEEP, "the schema is not usable: recursion limit"),
    (Constraint.json_schema, {"type": "string", "pattern": "(?=a)b"}, "look-around"),
    (Constraint.regex, "(a", "the regular expression is not usable: .*unclosed group"),
    (Constraint.regex, 5, "the regular expression is 5; expected a text"),
    (Constraint.choice, [], "the choice has no texts"),
    (Constraint.choice, ["a", ""], "the choice has no texts, or an empty one"),
    (Constraint.choice, [1], "the choice is of type list; expected a text, or a list of texts"),
    (Constraint.lark, "", "the grammar is ''; expected a text"),
    (Constraint.lark, 'root ::= "a', "the grammar is neither Lark with a rule 'start' nor GBNF"),
    (Constraint.lark, "root ::= a", "Rule 'a' not found"),
    (Constraint.lark, "root ::= " + 2000 * "(", "the grammar is neither"),
]


@pytest.mark.parametrize(("make", "given", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(make: Any, given: Any, message: str) -> None:
    with pytest.raises(LocalrunError, match=message) as caught:
        make(given)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_grammar_with_a_mistake_is_refused_before_anything_is_evaluated(engine: Engine) -> None:
    engine_ids, constraint = [1, 2], Constraint.lark('start: "a" b')
    with pytest.raises(LocalrunError, match=re.escape('the constraint is not usable: at 1(8): unknown name: "b"')):
        engine.session().tokens(engine_ids, Sampling(constraint=constraint))
    with pytest.raises(LocalrunError, match="unknown name"):
        constraint.check(engine.tokenizer)
