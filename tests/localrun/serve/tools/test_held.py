"""Replies held to calls: random texts of each form's grammar are calls whose arguments their schemas accept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from vocabularies import CHATML, write_vocabulary

from localrun.bundled import model_path
from localrun.generate.constraint import Constraint, Guide
from localrun.serve.errors import APIError
from localrun.serve.reply import Reply, ReplyParser
from localrun.serve.tools import forms
from localrun.serve.tools.form import CallParser
from localrun.serve.tools.held import Holding
from localrun.serve.tools.xml_form import XMLForm
from localrun.text.harmony import MARKS
from localrun.text.tokenizer import Tokenizer

NAMES = ["DEEPSEEK_V3", "DEEPSEEK_V31", "DSML", "MINIMAX", "KIMI", "GLM", "HUNYUAN", "QWEN3_CODER", "QWEN3", "GENERIC"]
SHORT = {"type": "string", "minLength": 2, "maxLength": 6}
WEATHER = {
    "type": "object",
    "properties": {
        "city": SHORT,
        "unit": {"enum": ["C", "deg F"], "type": "string"},
        "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "near": {"anyOf": [SHORT, {"enum": ["a", "bc"]}, {"type": "string", "const": "d"}, {"type": "null"}]},
        "at": {"$ref": "#/$defs/at"},
    },
    "required": ["city", "unit", "code"],
    "additionalProperties": False,
    "$defs": {
        "at": {
            "type": "object",
            "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}, "is_old": {"type": "boolean"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "now": NOW}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
TEXT_OR_NOT = {"anyOf": [{"properties": {"x": kind}} for kind in ({"type": "integer"}, {"type": "string"})]}
ANY_OF = {
    "type": "object",
    "properties": {"kind": {"type": "string"}, "is_old": {"type": "boolean"}},
    "required": ["kind"],
    "anyOf": [
        {"properties": {"kind": {"const": "file"}, "path": SHORT}, "required": ["path"]},
        {"properties": {"kind": {"const": "line"}, "at": {"type": "integer", "minimum": 0, "maximum": 9}}},
        {"properties": {"kind": {"const": "never"}}, "required": ["x"], "additionalProperties": False},
        {"type": "null"},
    ],
}
ANSWER = NOW | {"properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def marks(name: str) -> list[str]:
    """Marks that some of the families' vocabularies have as control tokens."""
    form = getattr(forms, name)
    found = [*(mark for section in form.sections for mark in section), form.begin, form.end]
    own = {"DSML": ["｜DSML｜"], "KIMI": [*found, "<|tool_call_argument_begin|>"], "GLM": ["</arg_value>"]}
    return own.get(name, found)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """The bundled model's, where marks are text; or bytes, and a form's marks as control tokens."""
    folder, plain = tmp_path_factory.mktemp("vocabularies"), Tokenizer(model_path("miniature"))

    def get(name: str) -> Tokenizer:
        return Tokenizer(write_vocabulary(folder / f"{name}.gguf", [*CHATML, *marks(name)])) if name else plain

    return get


def said(tokenizer: Tokenizer, constraint: Constraint, seed: int, begin: str = "", prompt: str = "") -> str | None:
    """A text of tokens at random, where the end is likely; None if it does not end. begin: what it begins with."""
    constraint = replace(constraint, after_reasoning=bool(prompt))
    rng, text = np.random.default_rng(seed), b""
    guide = Guide(constraint, tokenizer, tokenizer.encode(prompt, add_special=False, parse_special=True))
    given = tokenizer.encode(begin, add_special=False, parse_special=True)
    for _ in range(1000):
        logits = rng.standard_normal(tokenizer.n_vocab)
        logits[list(tokenizer.eog_ids)] += 9
        if given:
            logits[given.pop(0)] += 99
        guide.restrict(logits)
        id = int(logits.argmax())
        if id in tokenizer.eog_ids:
            return text.decode()
        guide.accept(id)
        text += tokenizer.piece(id, special=True)
        if guide.is_complete:
            return text.decode()
    return None


def parsed(name: str, text: str, opened: str | None = None) -> Reply:
    parser, reply = ReplyParser(opened, CallParser(getattr(forms, name), SCHEMAS)), Reply()
    for part in (*parser.parts(text), *parser.parts(None)):
        reply.add(part)
    return reply


def judge(reply: Reply, text: str, functions: set[str]) -> None:
    for call in reply.calls:
        assert call.name in functions, text
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.mark.parametrize("own_marks", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_must_call(vocabulary: Callable[[str], Tokenizer], name: str, own_marks: bool) -> None:
    tokenizer, ended = vocabulary(name if own_marks else ""), 0
    for tools, several in ((TOOLS, True), (TOOLS[:1], False)):
        constraint = Holding(True, several).constraint(getattr(forms, name), tools, tokenizer)
        for seed in range(2):
            text = said(tokenizer, constraint, seed)
            if text is not None:
                reply, ended = parsed(name, text), ended + 1
                assert reply.calls and (several or len(reply.calls) == 1) and not reply.content, text
                judge(reply, text, {tool["function"]["name"] for tool in tools})
    assert ended == 4


@pytest.mark.parametrize("own_marks", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("name", NAMES)
def test_a_reply_that_may_call(vocabulary: Callable[[str], Tokenizer], name: str, own_marks: bool) -> None:
    """Free up to the mark of a call, in text or in control tokens; with or without the mark of a section."""
    tokenizer, form = vocabulary(name if own_marks else ""), getattr(forms, name)
    constraint = Holding(False, False).constraint(form, TOOLS, tokenizer)
    assert said(tokenizer, constraint, 0, free := "It is <b>mild</b>.\n") == free
    for seed, mark in enumerate([form.begin, *(begin for begin, _ in form.sections)]):
        text = said(tokenizer, constraint, seed, f"I look </.\n{mark}")
        assert text is not None
        reply = parsed(name, text)
        assert reply.content == "I look </." and len(reply.calls) == 1, text
        judge(reply, text, {"weather", "now"})


@pytest.mark.parametrize("own_marks", [False, True], ids=["text", "control tokens"])
@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(getattr(forms, name), XMLForm)])
def test_a_text_ends_with_its_mark(vocabulary: Callable[[str], Tokenizer], name: str, own_marks: bool) -> None:
    """However long it may be. Where the vocabulary has a token for the mark, it is not to be spelled by others."""
    tokenizer, form = vocabulary(name if own_marks else ""), getattr(forms, name)
    schema = {"type": "object", "properties": {"note": {"type": "string"}}, "required": ["note"]}
    tools = [{"type": "function", "function": {"name": "note", "parameters": schema}}]
    constraint = Holding(False, False).constraint(form, tools, tokenizer)
    begin, value = form.opening.format(name="note"), form.parameter.format(key="note", string="true")
    text = said(tokenizer, constraint, 0, f"{begin}{value}a </b>{form.value_ends[0]}")
    assert text is not None
    (call,) = parsed(name, text).calls
    assert json.loads(call.arguments) == {"note": "a </b>"}
    if own_marks and any(mark in form.value_ends[0] for mark in marks(name)):
        ids = list(f"{begin}{value}a{form.value_ends[0]}".encode())  # a byte each
        assert len(Guide(constraint, tokenizer, []).possible(ids)) < len(ids)


def test_a_call_after_reasoning(vocabulary: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocabulary("GLM")
    constraint = Holding(True, False).constraint(forms.GLM, TOOLS, tokenizer)
    text = said(tokenizer, constraint, 0, "Hm <tool_call>.</think>\n\n", "<think>\n")
    assert text is not None
    assert "</think>\n\n<tool_call>" in text
    reply = parsed("GLM", text, "<think>")
    assert (reply.reasoning, reply.content, len(reply.calls)) == ("Hm <tool_call>.", "", 1)
    judge(reply, text, {"weather", "now"})


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("must_call", "answer", "begin", "expected"),
    [
        (True, None, "", "call"),
        (True, None, THOUGHT, "call"),
        (True, None, f"{THOUGHT}<|channel|>f", "call"),
        (False, None, f"{THOUGHT}<|channel|>final<|message|>Aye.", "Aye."),
        (False, None, f"{THOUGHT.replace('analysis', 'commentary')}<|channel|>commentary to", "call"),
        (False, ANSWER, f"{THOUGHT}<|channel|>final<|message|>", "answer"),
        (False, ANSWER, "<|channel|>commentary t", "call"),
    ],
)
def test_channels(tmp_path: Path, must_call: bool, answer: dict[str, Any] | None, begin: str, expected: str) -> None:
    """gpt-oss: any of the functions in a message of its own, after thoughts and words, or an answer."""
    controls = [*CHATML, *MARKS, "<|constrain|>", "<|return|>", "<|call|>"]
    tokenizer = Tokenizer(write_vocabulary(tmp_path / "v.gguf", controls))
    of_answer = Constraint.json_schema(answer) if answer else None
    constraint = Holding(must_call, False, (), of_answer).constraint(forms.HARMONY, TOOLS, tokenizer)
    assert not constraint.after_reasoning
    for seed in range(3):
        text = said(tokenizer, constraint, seed, begin)
        assert text is not None
        decoder = tokenizer.reply_decoder()
        ids = tokenizer.encode(text, add_special=False, parse_special=True)
        reply = parsed("HARMONY", "".join(map(decoder.push, ids)) + decoder.flush())
        assert len(reply.calls) == (expected == "call"), text
        judge(reply, text, {"weather", "now"})
        assert reply.reasoning == "Hm." or not begin.startswith(THOUGHT)
        if expected == "answer":
            jsonschema.validate(json.loads(reply.content), ANSWER)
        elif expected != "call":
            assert reply.content == expected


@pytest.mark.parametrize("name", ["DEEPSEEK_V31", "QWEN3_CODER", "QWEN3"])
def test_an_answer_or_a_call(vocabulary: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer, form = vocabulary(""), getattr(forms, name)
    constraint = Holding(False, False, (), Constraint.json_schema(ANSWER)).constraint(form, TOOLS, tokenizer)
    answer = said(tokenizer, constraint, 0, "\n{")
    assert answer is not None
    jsonschema.validate(json.loads(answer), ANSWER)
    call = said(tokenizer, constraint, 0, (form.sections[0][0] if form.sections else form.begin)[:4])
    assert call is not None and len(parsed(name, call).calls) == 1
    judge(parsed(name, call), call, {"weather", "now"})


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_a_loose_function(vocabulary: Callable[[str], Tokenizer], name: str) -> None:
    """Beside a strict one: anything in the form of a call, but no function that there is not."""
    tokenizer, form = vocabulary(""), getattr(forms, name)
    constraint = Holding(False, False, {"weather"}).constraint(form, TOOLS, tokenizer)
    arguments = '{"any": [1]}'
    if isinstance(form, XMLForm):
        arguments = f"{form.parameter.format(key='any', string='true')}</x>{form.value_ends[0]}"
    before, after = form.sections[0] if form.sections else ("", "")
    for called, is_free in (("weather", True), ("now", False), ("other", False)):
        call = f"{form.opening.format(name=called, index=0)}{arguments}{form.closing}"
        ids = tokenizer.encode(f"Well.{before}{call}{after}", add_special=False)
        assert (Guide(constraint, tokenizer, []).possible(ids) == ids) == is_free


@pytest.mark.parametrize("name", ["GLM", "QWEN3_CODER", "DSML", "QWEN3"])
def test_alternatives_of_a_schema(vocabulary: Callable[[str], Tokenizer], name: str) -> None:
    """Each of them comes, and nothing that is none of them."""
    tokenizer, kinds = vocabulary(""), set()
    tools = [{"type": "function", "function": {"name": "go", "parameters": ANY_OF}}]
    constraint = Holding(True, False).constraint(getattr(forms, name), tools, tokenizer)
    for seed in range(12):
        text = said(tokenizer, constraint, seed)
        if text is not None:
            parser, reply = CallParser(getattr(forms, name), {"go": ANY_OF}), Reply()
            for part in (*parser.push(text), *parser.flush()):
                reply.add(part)
            found = json.loads(reply.calls[0].arguments)
            jsonschema.validate(found, ANY_OF)
            kinds.add(found["kind"])
    assert kinds == {"file", "line"}


def test_what_is_refused(vocabulary: Callable[[str], Tokenizer]) -> None:
    tokenizer = vocabulary("")
    cases = [
        ("QWEN3", {"type": "string"}, "the schema is not of an object"),
        ("QWEN3", {"type": "object", "properties": {"a": {"type": "strin"}}}, "Invalid type: strin"),
        ("GLM", {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, "uniqueItems"),
        ("GLM", {"oneOf": [{"type": "object"}]}, "the schema has oneOf, which calls in this model's form can't be"),
        ("GLM", {"anyOf": [{"type": "null"}]}, "no object satisfies the schema's anyOf"),
        ("GLM", {"anyOf": {}}, "the schema's anyOf is not a list of objects"),
        ("GLM", TEXT_OR_NOT, "the property 'x' is text by one schema of anyOf and not by another"),
        ("MINIMAX", TEXT_OR_NOT, "calls in this model's form don't tell apart"),
        ("GLM", {"anyOf": [NOW], "additionalProperties": SHORT}, "anyOf and a schema of additionalProperties"),
        ("GLM", ANY_OF | {"anyOf": [{"anyOf": 9 * [{}]}] * 9}, "more than 64 alternatives"),
        (
            "GLM",
            ANY_OF | {"anyOf": [{"properties": {"kind": {"type": "null"}}}]},
            "another schema of the property 'kind'",
        ),
        ("GLM", {"properties": {"a<b": {}}}, "the property 'a<b' can't be written"),
        ("GLM", {"properties": {"a": {"type": "string", "not": {}}}}, "a string with not can't be held to"),
        ("GLM", {"properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "look-around"),
        ("GLM", {"properties": {"a": {"type": "string", "enum": ["</arg_value>"]}}}, "has no string that this model's"),
        ("GLM", {"properties": {"a": {"type": "string", "anyOf": {"x": 1}}}}, "none says that it is for"),
        ("GLM", {"properties": []}, "the schema's properties are no object"),
    ]
    for name, schema, message in cases:
        tools = [TOOLS[0], {"type": "function", "function": {"name": "bad", "parameters": schema}}]
        with pytest.raises(APIError, match="a call of bad can't be held to its parameters: ") as caught:
            Holding(True, True).constraint(getattr(forms, name), tools, tokenizer)
        assert message in str(caught.value)
