"""Calls in the forms that models write, in pieces of every size; what is none is content to the letter."""

from __future__ import annotations

import json
from typing import Any

import pytest
from chats import TEMPLATES
from hypothesis import given
from hypothesis import strategies as st

from localrun.generate.reasoning import CONTENT
from localrun.serve.tools import forms
from localrun.serve.tools.form import CallParser, Form
from localrun.serve.tools.source import Arguments, CallStart
from localrun.serve.tools.xml_form import XMLForm

SCHEMAS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"type": ["string", "null"]}},
    },
    "now": {"type": "object", "properties": {}},
}
PARIS = {"city": 'Pa"}ri\\s\n', "days": 2, "unit": None}
PLAIN = '{"city": "Pa\\"}ri\\\\s\\n", "days": 2, "unit": null}'
# What a model writes: some words, then weather(PARIS), then now().
TEXTS = {
    "DEEPSEEK_V3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    + PLAIN + "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n"
    "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DEEPSEEK_V31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + PLAIN + "<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "DSML": '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="'
    'true">Pa"}ri\\s\n</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="unit" string="false">null</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "KIMI": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    + PLAIN + "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}"
    "<|tool_call_end|><|tool_calls_section_end|>",
    "GLM": "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>" + 'Pa"}ri\\s\n' + "</arg_value>\n<arg_key>days"
    "</arg_key>\n<arg_value>2</arg_value>\n<arg_key>unit</arg_key>\n<arg_value>null</arg_value>\n</tool_call>"
    "\n<tool_call>now\n</tool_call>",
    "HUNYUAN": "<tool_calls:opensource>\n<tool_call:opensource>weather<tool_sep:opensource>\n<arg_key:opensource>city"
    "</arg_key:opensource>\n<arg_value:opensource>" + 'Pa"}ri\\s\n' + "</arg_value:opensource>\n<arg_key:opensource>"
    "days</arg_key:opensource>\n<arg_value:opensource>2</arg_value:opensource>\n<arg_key:opensource>unit"
    "</arg_key:opensource>\n<arg_value:opensource>null</arg_value:opensource>\n</tool_call:opensource>\n"
    "<tool_call:opensource>now<tool_sep:opensource>\n</tool_call:opensource>\n</tool_calls:opensource>",
    "QWEN3": '\n<tool_call>\n{"name": "weather", "arguments": ' + PLAIN + "}\n</tool_call>\n<tool_call>\n"
    '{"name": "now", "arguments": {}}\n</tool_call>',
    "QWEN3_CODER": '\n\n<tool_call>\n<function=weather>\n<parameter=city>\nPa"}ri\\s\n\n</parameter>\n<parameter=days>'
    "\n2\n</parameter>\n<parameter=unit>\nnull\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n"
    "</function>\n</tool_call>",
    "MINIMAX": '\n<minimax:tool_call>\n<invoke name="weather"><parameter name="city">Pa"}ri\\s\n</parameter>\n'
    '<parameter name="days">2</parameter>\n<parameter name="unit">null</parameter>\n</invoke>\n<invoke name="now">'
    "</invoke>\n</minimax:tool_call>",
    "GENERIC": '<tool_call>{"name": "weather", "parameters": ' + PLAIN + '}</tool_call><tool_call>{"name": "now", '
    '"arguments": {}}</tool_call>\n',
}  # fmt: skip
FORMS = {name: getattr(forms, name) for name in TEXTS}


def parsed(form: Form, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content; and names and arguments of the calls."""
    parser = CallParser(form, SCHEMAS)
    parts = [part for piece in pieces for part in parser.push(piece)] + list(parser.flush())
    content = "".join(part[1] for part in parts if part[0] == CONTENT and type(part) is tuple)
    starts = [part for part in parts if isinstance(part, CallStart)]
    assert [start.index for start in starts] == list(range(parser.count))
    assert len({start.id for start in starts}) == len(starts)
    said = ["".join(p.text for p in parts if isinstance(p, Arguments) and p.index == i) for i in range(len(starts))]
    return content, [(start.name, text) for start, text in zip(starts, said, strict=True)]


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


@pytest.mark.parametrize("name", TEXTS)
def test_calls_in_pieces_of_every_size(name: str) -> None:
    text = "Let me <look>." + TEXTS[name]
    for size in range(1, len(text) + 1):
        content, calls = parsed(FORMS[name], cut(text, size))
        assert content == "Let me <look>."
        assert [(name, json.loads(arguments)) for name, arguments in calls] == [("weather", PARIS), ("now", {})]


@pytest.mark.parametrize("name", TEXTS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    """A long text is passed on before its end; a reply that is cut off keeps what came."""
    text = TEXTS[name][: TEXTS[name].index("ri\\")]
    parser = CallParser(FORMS[name], SCHEMAS)
    parts = [part for letter in text for part in parser.push(letter)]
    said = "".join(part.text for part in parts if isinstance(part, Arguments))
    assert said == '{"city": "Pa\\"}' and (*parts, *parser.flush())[len(parts) :] == ()


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("broken", ["weather", '"days"', "days", "<tool_call", "｜>", "="])
def test_what_is_no_call_is_content(name: str, broken: str) -> None:
    """However the text is broken, nothing gets lost or is said twice, and its pieces do not matter."""
    whole, calls = parsed(FORMS[name], [text := "a \n" + TEXTS[name].replace(broken, "< {x ")])
    assert all(parsed(FORMS[name], cut(text, size)) for size in (1, 2, 7))
    assert [parsed(FORMS[name], cut(text, size)) for size in (1, 2, 7)] == [(whole, calls)] * 3
    if not calls:
        assert whole == text


@pytest.mark.parametrize("name", [name for name in TEXTS if isinstance(FORMS[name], XMLForm)])
def test_the_end_of_a_value_within_its_json(name: str) -> None:
    form = FORMS[name]
    value = json.dumps(["a", form.value_ends[-1], '\\"' + form.value_ends[-1]])
    text = TEXTS[name].replace(">\n2\n<", f">\n{value}\n<").replace(">2<", f">{value}<")
    for size in (1, 5, len(text)):
        _, ((_, arguments), _) = parsed(form, cut(text, size))
        assert json.loads(arguments)["days"] == json.loads(value)


@given(st.sampled_from(list(TEXTS)), st.text(alphabet="<>/{}[]`\"'\n\\ ab:=_|｜▁", max_size=60), st.integers(1, 9))
def test_any_text_is_content(name: str, text: str, size: int) -> None:
    assert parsed(FORMS[name], cut(text, size)) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weather", "parameters": {"city": "x"}}',
        '```json\n{"name": "weather", "arguments": {"city": "x"}}\n```',
        '[{"name": "weather", "arguments": {"city": "x"}}]',
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "x"}}]',
    ],
)
def test_a_call_without_marks(text: str) -> None:
    """At the beginning of a reply, and of a function that there is; other JSON is an answer."""
    for size in (1, 3, 1000):
        assert parsed(forms.GENERIC, cut(text, size)) == ("", [("weather", '{"city": "x"}')])
        for other in (text.replace("weather", "other"), f"a {text}", text.replace("name", "named")):
            assert parsed(forms.GENERIC, cut(other, size)) == (other, [])


def test_every_template_has_its_form() -> None:
    found = {path.stem: forms.form_of(path.read_text(encoding="utf-8")) for path in TEMPLATES}
    expected = {
        "DeepSeek-R1": "DEEPSEEK_V3",
        "DeepSeek-V2": "GENERIC",
        "GLM-4.6": "GLM",
        "GLM-4.7-Flash": "GLM",
        "Kimi-K2-Instruct": "KIMI",
        "MiniMax-M2": "MINIMAX",
        "Qwen-Qwen3-0.6B": "QWEN3",
        "Qwen3-Coder": "QWEN3_CODER",
        "deepseek-ai-DeepSeek-V3.1": "DEEPSEEK_V31",
        "deepseek-ai-DeepSeek-V3.2": "DSML",
        "llama-cpp-deepseek-r1": "DEEPSEEK_V3",
        "moonshotai-Kimi-K2": "KIMI",
        "openai-gpt-oss-120b": "HARMONY",
        "tencent-Hy3": "HUNYUAN",
    }
    assert found == {name: getattr(forms, form) for name, form in expected.items()}
