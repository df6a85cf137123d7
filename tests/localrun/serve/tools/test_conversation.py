"""Calls and results through the templates of published models, and back out of what these write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chats import TEMPLATES, template
from vocabularies import write_vocabulary

from localrun.serve.reply import Reply, ReplyParser
from localrun.serve.tools.conversation import Dialect
from localrun.serve.tools.form import CallParser
from localrun.serve.tools.forms import GENERIC, HARMONY
from localrun.text.chat_template import CHATML
from localrun.text.prompt import chat_prompt
from localrun.text.tokenizer import Tokenizer

SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in TEMPLATES} | {"chatml": CHATML}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Says {name}.", "parameters": PARAMETERS}}
    for name in ("weather", "climate")
]
CITY = {"city": 'Pa"ris <|im_end|>', "days": 2}


def call(id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


MESSAGES = [
    {"role": "user", "content": "How is it?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [call("functions.weather:0", "weather", CITY), call("functions.climate:1", "climate", {})],
    },
    {"role": "tool", "tool_call_id": "functions.weather:0", "content": "It is sunny."},
    {"role": "tool", "tool_call_id": "functions.climate:1", "content": "It is mild."},
]
CONTROLS = re.compile(r"<\|im_end\|>")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With Harmony's marks."""
    marks = ["<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>"]
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.gguf", [*marks, "<|call|>"]))


@pytest.mark.parametrize("name", SOURCES)
def test_a_template_writes_what_its_parser_reads(name: str, tokenizer: Tokenizer) -> None:
    """Tools are declared; calls come out as they were, and results; what they spell is no control token."""
    ours = template(SOURCES[name])
    dialect = Dialect.of(ours)
    messages, offer = dialect.messages(MESSAGES, TOOLS), dialect.offer(TOOLS)
    prompt = chat_prompt(ours, messages, CONTROLS, None, offer)
    assert all(word in prompt.text for word in ("Says weather.", "Says climate.", "It is sunny.", "It is mild."))
    assert prompt.spelled and all(prompt.text[a:b] == "<|im_end|>" for a, b in prompt.spelled)
    said = prompt.text[prompt.text.index("How is it?") + len("How is it?") :]
    if dialect.form is HARMONY:
        texts = [text.partition("<|call|>")[0] for text in said.split("<|start|>assistant")[1:3]]
        texts = [f"<|channel|>commentary{text.partition('<|channel|>commentary')[0]} {text.partition('commentary')[2]}"
                 for text in texts]  # fmt: skip
        said = "\n".join(_decoded(tokenizer, text) for text in texts)
    reply = Reply()
    parser = CallParser(dialect.form, {"weather": PARAMETERS, "climate": PARAMETERS})
    for part in (*parser.push(said), *parser.flush()):
        reply.add(part)
    assert [(each.name, json.loads(each.arguments)) for each in reply.calls] == [("weather", CITY), ("climate", {})]


def _decoded(tokenizer: Tokenizer, text: str) -> str:
    decoder = tokenizer.reply_decoder()
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    return "".join(map(decoder.push, ids)) + decoder.flush()


def test_a_template_without_tools_gets_them_as_messages() -> None:
    dialect = Dialect.of(template(CHATML))
    assert (dialect.form, dialect.declares, dialect.writes) == (GENERIC, False, False)
    system, user, reply, results = dialect.messages(MESSAGES, TOOLS)
    assert system["role"] == "system" and "Says climate." in system["content"] and user == MESSAGES[0]
    assert reply["content"].count("<tool_call>") == 2 and "tool_calls" not in reply
    assert results["role"] == "user" and results["content"].count("<tool_response>") == 2
    assert '{"name": "FUNCTION_NAME", "arguments": ARGUMENTS}' in dialect.offer(TOOLS).notes


def test_harmony(tokenizer: Tokenizer) -> None:
    """A thought, words, and a call that ends the reply."""
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "x"}'
    )
    parser, reply = ReplyParser(None, CallParser(HARMONY, {"weather": PARAMETERS})), Reply()
    for part in (*parser.parts(_decoded(tokenizer, text)), *parser.parts(None)):
        reply.add(part)
    assert (reply.reasoning, reply.content) == ("Hm.", "I look.")
    assert [(each.name, each.arguments) for each in reply.calls] == [("weather", '{"city": "x"}')]


def test_paths_are_there() -> None:
    assert all(isinstance(path, Path) for path in TEMPLATES) and len(SOURCES) == 15
