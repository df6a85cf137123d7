"""The endpoints over a scripted engine: forms of answers, refusals, turns, hanging up, overload."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engine import Cache, Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CALL, HELLO, REPLY, events, hang_up, serving
from starlette.testclient import TestClient

from localrun import limits
from localrun.generate.sampling import Sampling
from localrun.ranks.world import RankError
from localrun.serve import app as app_module
from localrun.serve import bodies, server
from localrun.serve import service as service_module
from localrun.serve.app import application
from localrun.serve.billing import without_billing
from localrun.serve.bodies import chat_messages
from localrun.serve.chunks import ChunkSize
from localrun.serve.job import Job
from localrun.serve.scheduler import Scheduler
from localrun.serve.service import Service, with_signs_of_life

BILLING = "x-anthropic-billing-header"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(REPLY) as fake:
        yield fake


@pytest.fixture
def client(engine: Engine) -> Iterator[TestClient]:
    with serving(engine) as (client, _):
        yield client


def ask(client: TestClient, path: str = CHAT, **body: Any) -> Any:
    base = {"messages": HELLO} if path == CHAT else {"prompt": "<|im_start|>assistant\n"}
    return client.post(path, json={**base, "temperature": 0, **body})


def test_a_chat(client: TestClient) -> None:
    answer = ask(client).json()
    assert (answer["object"], answer["model"]) == ("chat.completion", "model")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    prompt = len("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": len(REPLY),
        "total_tokens": prompt + len(REPLY),
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }
    assert (answer["timings"]["prompt_n"], answer["timings"]["predicted_n"]) == (prompt, len(REPLY))
    again = ask(client).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert again == prompt - 1


def test_a_stream_says_the_same(client: TestClient) -> None:
    response = ask(client, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last, done = events(response.text)
    assert done == "[DONE]" and last["choices"] == [] and last["usage"]["completion_tokens"] == len(REPLY)
    assert all(chunk["usage"] is None for chunk in chunks)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_stands_apart(engine: Engine, client: TestClient, stream: bool) -> None:
    engine.model.reply = "<think>\nHm.\n</think>\n\nAye."
    answer = ask(client, stream=stream, **({"stream_options": {"include_usage": True}} if stream else {}))
    last = events(answer.text)[-2] if stream else answer.json()
    thoughts = 1 + len("\nHm.\n</think>")  # a letter is a token; the tag is one once it is whole
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": thoughts}
    if stream:
        deltas = [chunk["choices"][0]["delta"] for chunk in events(answer.text)[:-2]]
        found = {key: "".join(delta.get(key, "") for delta in deltas) for key in ("reasoning_content", "content")}
    else:
        found = answer.json()["choices"][0]["message"]
    assert (found["reasoning_content"], found["content"]) == ("Hm.", "Aye.")


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_a_call_comes_as_one_and_its_result_goes_back(engine: Engine, client: TestClient) -> None:
    engine.model.reply = CALL
    choice = ask(client, tools=TOOLS).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    chunks = [chunk["choices"][0] for chunk in events(ask(client, tools=TOOLS, stream=True).text)[:-1]]
    deltas = [delta for chunk in chunks for delta in chunk["delta"].get("tool_calls", [])]
    assert deltas[0]["function"] == {"name": "weather", "arguments": ""} and chunks[-1]["finish_reason"] == "tool_calls"
    assert len(deltas) > 2 and "".join(delta["function"]["arguments"] for delta in deltas) == '{"city": "Paris"}'
    assert ask(client, tools=TOOLS, tool_choice="none").json()["choices"][0]["message"]["content"] == CALL
    messages = [*HELLO, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sun"}]
    prompt = client.post("/apply-template", json={"messages": messages, "tools": TOOLS}).json()["prompt"]
    assert f"assistant\n{CALL}<|im_end|>" in prompt and "user\n<tool_response>\nsun" in prompt


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_asked_for(engine: Engine, client: TestClient, choice: Any) -> None:
    """Of the function that there is, and nothing comes after it."""
    engine.model.reply = CALL.removeprefix("I look.\n").replace("weather", "another") + "\n\nIt is"
    answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).json()["choices"][0]
    (call,) = answer["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert answer["message"]["content"] is None and answer["finish_reason"] == "tool_calls"


STRICT = {"type": "object", "properties": {"city": {"const": "Milan"}}, "required": ["city"]}


def strict(schema: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "weather", "parameters": schema, "strict": True}}]


def test_a_call_that_is_held_to_its_schema(engine: Engine, client: TestClient) -> None:
    engine.model.reply = CALL
    message = ask(client, tools=strict(STRICT)).json()["choices"][0]["message"]
    assert message["content"] == "I look."
    assert message["tool_calls"][0]["function"]["arguments"] == '{"city": "Milan"}'
    engine.model.reply = "Aye."
    assert ask(client, tools=strict(STRICT)).json()["choices"][0]["message"]["content"] == "Aye."


@pytest.mark.parametrize("reply", ['{"ok": tree}', CALL.removeprefix("I look.\n")])
def test_an_answer_of_a_schema_or_a_call(engine: Engine, client: TestClient, reply: str) -> None:
    engine.model.reply = reply
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    message = ask(client, tools=TOOLS, response_format=form).json()["choices"][0]["message"]
    assert message["content"] == ('{"ok": true}' if "ok" in reply else None)
    assert ("tool_calls" in message) == ("ok" not in reply)


def test_settings_reach_the_template(engine: Engine, client: TestClient) -> None:
    engine.template.source = "{{ enable_thinking }} {{ reasoning_effort }} {{ x }} {{ messages[0].content }}"
    body = {"messages": HELLO, "reasoning_effort": "minimal", "chat_template_kwargs": {"x": 1}}
    assert client.post("/apply-template", json=body).json() == {"prompt": "True low 1 Hello"}
    body["enable_thinking"] = False
    assert client.post("/apply-template", json=body).json() == {"prompt": "False low 1 Hello"}
    body["chat_template_kwargs"] = {"x": 1, "enable_thinking": "so", "reasoning_effort": "mine"}
    assert client.post("/apply-template", json=body).json() == {"prompt": "so mine 1 Hello"}
    refused = client.post("/apply-template", json={"messages": HELLO, "chat_template_kwargs": {"tools": []}})
    assert refused.status_code == 400


SCHEMA = {"enum": ["Aye", "Nay"]}
HELD = {
    "a schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}}, '"Aye"'),
    "an object": ({"response_format": {"type": "json_object"}}, "{}"),
    "an object of a schema": ({"response_format": {"type": "json_object", "schema": SCHEMA}}, '"Aye"'),
    "text": ({"response_format": {"type": "text"}}, '"Aye'),
    "guided_json": ({"guided_json": json.dumps(SCHEMA)}, '"Aye"'),
    "guided_regex": ({"guided_regex": '"A[k-m]'}, '"Ak'),
    "guided_choice": ({"guided_choice": ["yes", '"Aye!']}, '"Aye!'),
    "guided_grammar": ({"guided_grammar": 'root ::= "\\"" [A-C]'}, '"A'),
    "structured_outputs": ({"structured_outputs": {"choice": ["no", '"Ayes']}}, '"Ayes'),
    "any object": ({"structured_outputs": {"json_object": True}}, "{}"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("name", HELD)
def test_a_reply_is_what_it_has_to_be(engine: Engine, client: TestClient, name: str, path: str) -> None:
    """Where the model's own word may not come, all others are alike to the fake: the lowest byte is taken."""
    fields, reply = HELD[name]
    engine.model.reply = "{}" if reply == "{}" else '"Aye'
    choice = ask(client, path, **fields).json()["choices"][0]
    assert (choice["message"]["content"] if path == CHAT else choice["text"]) == reply
    assert choice["finish_reason"] == "stop"


def test_what_a_reply_has_to_be_begins_after_its_reasoning(engine: Engine, client: TestClient) -> None:
    engine.template.source += "<think>"
    engine.model.turn, engine.model.reply = "<|im_start|>assistant\n<think>", 'Hm.</think>"Aye'
    message = ask(client, guided_json=SCHEMA).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", '"Aye"')


def test_logprobs(client: TestClient) -> None:
    """A token is a byte; the fake is certain of each, and all others are out of the question."""
    choice = ask(client, logprobs=True, top_logprobs=1, max_tokens=3).json()["choices"][0]
    chat = [{"token": letter, "bytes": [ord(letter)], "logprob": 0.0} for letter in REPLY[:3]]
    assert choice["logprobs"]["content"] == [{**each, "top_logprobs": [each]} for each in chat]
    stream = events(ask(client, logprobs=True, stream=True).text)[:-1]
    told = [chunk["choices"][0]["logprobs"] for chunk in stream]
    assert "".join(each["token"] for some in told if some for each in some["content"]) == REPLY
    for stream in (False, True):
        answer = ask(client, COMPLETION, logprobs=2, stream=stream)
        chunks = events(answer.text)[:-1] if stream else [answer.json()]
        found = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
        assert [token for some in found for token in some["tokens"]] == list(REPLY[:16])
        assert [offset for some in found for offset in some["text_offset"]] == list(range(16))
        assert found[0]["token_logprobs"][0] == 0.0 and found[0]["top_logprobs"][0] == {"A": 0.0, "\0": -9999.0}
    assert ask(client).json()["choices"][0]["logprobs"] is None


def test_penalties_and_bias_reach_the_sampler() -> None:
    body = bodies.read(
        b'{"messages": [], "presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"5": -100}}', bodies.Chat
    )
    assert body.sampling(Sampling()) == Sampling(presence_penalty=0.5, frequency_penalty=-1, logit_bias={5: -100})


def test_a_completion(client: TestClient) -> None:
    answer = ask(client, COMPLETION, max_tokens=3, n=2).json()
    assert [choice["text"] for choice in answer["choices"]] == [REPLY[:3]] * 2
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    assert ask(client, COMPLETION).json()["usage"]["completion_tokens"] == 16  # as the API has it
    stopped = ask(client, COMPLETION, stop=["is", "well"], max_tokens=100).json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("Aye, all ", "stop")
    by_ids = ask(client, COMPLETION, prompt=[list(b"<|im_start|>assistant\n")] * 2, max_tokens=100).json()
    assert [choice["text"] for choice in by_ids["choices"]] == [REPLY] * 2
    chunks = events(ask(client, COMPLETION, stream=True, max_tokens=100).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == REPLY


def test_small_endpoints(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["meta"]) == (
        "model",
        {"n_ctx": 1000, "n_vocab": 256, "has_chat_template": True},
    )
    assert client.post("/tokenize", json={"content": "Aye"}).json() == {"tokens": list(b"Aye")}
    assert client.post("/detokenize", json={"tokens": list(b"Aye")}).json() == {"content": "Aye"}
    ask(client)
    figures = dict(line.split(" ") for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(figures["localrun_replies_total"]) == 1
    assert float(figures["localrun_generated_tokens_total"]) == len(REPLY)


REFUSED = {
    "unknown field": ({"foo": 1}, 400, "foo"),
    "unknown field within": ({"stream": True, "stream_options": {"foo": 1}}, 400, "stream_options.foo"),
    "type": ({"max_tokens": "x"}, 400, "max_tokens"),
    "range": ({"max_tokens": 0}, 400, "max_tokens"),
    "sampling": ({"top_p": 2}, 400, "top_p"),
    "no tool": ({"tools": [{}]}, 400, "tools[0]"),
    "a tool's name": (
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        *(400, "tools[0].function.name"),
    ),
    "a strict tool": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"$ref": "#/x"}}}]},
        *(400, "tools"),
    ),
    "a call of no tool": ({"tool_choice": {"type": "function", "function": {"name": "a"}}}, 400, "tool_choice"),
    "logprobs": ({"logprobs": 5}, 400, "logprobs"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "top_logprobs alone": ({"top_logprobs": 1}, 400, "top_logprobs"),
    "a penalty": ({"presence_penalty": 3}, 400, "presence_penalty"),
    "a bias": ({"logit_bias": {"65": 101}}, 400, "logit_bias"),
    "no token": ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    "no such token": ({"logit_bias": {"256": 1}}, 400, "logit_bias"),
    "a form": ({"response_format": {"type": "xml"}}, 400, "response_format"),
    "no schema": ({"response_format": {"type": "json_schema"}}, 400, "response_format.json_schema"),
    "a bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "x"}}}},
        *(400, "response_format.json_schema.schema"),
    ),
    "no JSON": ({"guided_json": "{"}, 400, "guided_json"),
    "a bad regex": ({"guided_regex": "("}, 400, "guided_regex"),
    "no choice": ({"guided_choice": []}, 400, "guided_choice"),
    "a bad grammar": ({"guided_grammar": "start: b"}, 400, None),
    "two": ({"guided_regex": "a", "guided_choice": ["a"]}, 400, "guided_choice"),
    "no such output": ({"structured_outputs": {"xml": 1}}, 400, "structured_outputs"),
    "no messages": ({"messages": []}, 400, "messages"),
    "a role": ({"messages": [{"role": "x", "content": "a"}]}, 400, "messages[0].role"),
    "a result of no call": ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].tool_call_id"),
    "a call": (
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
        *(400, "messages[0].tool_calls[0]"),
    ),
    "no text": ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]"),
    "too long": ({"messages": [{"role": "user", "content": "a" * 2000}]}, 400, "messages"),
}


@pytest.mark.parametrize(("body", "status", "param"), REFUSED.values(), ids=REFUSED)
def test_refusals(client: TestClient, engine: Engine, body: dict[str, Any], status: int, param: str) -> None:
    engine.model.before_step = lambda cache: pytest.fail("work was done")
    answer = ask(client, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (status, "invalid_request_error", param)


def test_too_long_a_prompt_names_both_numbers(client: TestClient) -> None:
    error = ask(client, COMPLETION, prompt="a" * 1001).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == "the prompt has 1001 tokens; the context holds 1000"


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_far_too_long_a_prompt_is_not_tokenized_whole(
    engine: Engine, client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text, **rest: encoded.append(text) or encode(text, **rest))
    long = "a" * 100_000
    error = ask(
        client, path, **({"messages": [{"role": "user", "content": long}]} if path == CHAT else {"prompt": long})
    )
    assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert error.json()["error"]["message"] == "the prompt has more than 15999 tokens; the context holds 1000"
    assert max(map(len, encoded)) == 16_000


def test_bodies_that_are_none(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": NaN}', b'{"prompt": "\\ud800"}'):
        answer = client.post(COMPLETION, content=data)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"
    monkeypatch.setattr(app_module, "MOST_BODY_BYTES", 100)
    assert client.post(COMPLETION, content=b"a" * 101).status_code == 413
    assert client.post(COMPLETION, content=iter([b"a" * 60] * 2)).status_code == 413
    assert client.get(COMPLETION).status_code == 405 and "error" in client.get("/nowhere").json()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]) | VALUES, "content": VALUES}), max_size=3
)
FIELDS = [
    *["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "stream", "stream_options", "tools"],
    *["tool_choice", "parallel_tool_calls", "logit_bias", "logprobs", "model", "user", "response_format", "best_of"],
    *["presence_penalty", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"],
    *["repeat_penalty", "echo", "other"],
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from([CHAT, COMPLETION, "/tokenize", "/detokenize", "/apply-template"]),
    known=st.fixed_dictionaries({}, optional={"messages": MESSAGES, "prompt": VALUES, "content": VALUES}),
    rest=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
)
def test_no_body_is_an_error_of_the_server(client: TestClient, path: str, known: dict, rest: dict) -> None:
    body = json.dumps({**known, **rest})  # with Infinity and NaN, which are no JSON
    assert client.post(path, content=body).status_code in (200, 400)


def test_a_key(engine: Engine) -> None:
    with serving(engine, api_key="secret") as (client, _):
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 200


ORIGINS = {
    "no browser": ({}, 200),
    "its own page": ({"origin": "http://localhost:8080", "host": "localhost:8080"}, 200),
    "its own page, by number": ({"origin": "http://[::1]:8080", "host": "[::1]:8080"}, 200),
    "another page": ({"origin": "https://evil.example", "host": "localhost:8080"}, 403),
    "a page from a file": ({"origin": "null", "host": "localhost:8080"}, 403),
    "another port": ({"origin": "http://localhost:3000", "host": "localhost:8080"}, 403),
    "rebinding": ({"origin": "http://evil.example:8080", "host": "evil.example:8080"}, 403),
    "rebinding, reading": ({"host": "evil.example"}, 403),
    "no host": ({"host": "[::"}, 403),
    "an allowed page": ({"origin": "https://chat.example", "host": "localhost:8080"}, 200),
    "an allowed name": ({"host": "chat.example"}, 200),
}


@pytest.mark.parametrize(("headers", "status"), ORIGINS.values(), ids=ORIGINS)
def test_pages_of_other_sites_are_refused(engine: Engine, headers: dict[str, str], status: int) -> None:
    with serving(engine, origins=["https://chat.example"], is_local=True) as (client, _):
        answer = client.get("/v1/models", headers={"host": "127.0.0.1:8080", **headers})
    assert answer.status_code == status
    allowed = headers.get("origin") == "https://chat.example"
    assert answer.headers.get("access-control-allow-origin") == ("https://chat.example" if allowed else None)


def test_an_allowed_page_may_ask_first_and_a_key_lets_any_page_in(engine: Engine) -> None:
    asking = {
        **{"origin": "https://chat.example", "access-control-request-method": "POST"},
        "access-control-request-headers": "authorization, content-type",
    }
    with serving(engine, api_key="secret", origins=["https://chat.example"], is_local=True) as (client, _):
        answer = client.options(CHAT, headers=asking)
        assert answer.status_code == 200 and "authorization" in answer.headers["access-control-allow-headers"]
        other = {"origin": "https://other.example", "x-api-key": "secret"}
        assert client.get("/v1/models", headers=other).status_code == 200
        assert client.get("/v1/models", headers={"origin": "https://chat.example"}).status_code == 401


@pytest.mark.parametrize(
    ("texts", "left"),
    [
        ([f"{BILLING}: a=1; b=2;", "You are."], ["You are."]),
        ([f"{BILLING}: a=1;", f"{BILLING}: b", "Be", f"{BILLING}: c"], ["Be", f"{BILLING}: c"]),
        ([f"{BILLING}: a=1;\n\nYou are.\nBe."], ["You are.\nBe."]),
        ([f"{BILLING}: a=1;"], []),
        (["You are."], ["You are."]),
        ([], []),
    ],
)
def test_billing_headers_are_left_out(texts: list[str], left: list[str]) -> None:
    assert without_billing(texts) == left
    given = [*({"role": "system", "content": text} for text in texts[:1]), *HELLO]
    parts = [{"type": "text", "text": text} for text in texts]
    assert chat_messages(given) == [
        *({"role": "system", "content": text} for text in without_billing(texts[:1])), *HELLO
    ]  # fmt: skip
    if left:
        assert chat_messages([{"role": "system", "content": parts}])[0]["content"] == "".join(left)


# ------------------------------------------------------------------------------- turns, hanging up, overload


def wait_until(is_so: Any) -> None:
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_ends_the_work_within_a_step(engine: Engine, stream: bool) -> None:
    engine.model.reply, engine.ctx = "a" * 900, 1000
    steps, gone = [], asyncio.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def before_step(cache: Cache) -> None:
            steps.append(time.monotonic())
            if len(steps) == 5:
                loop.call_soon_threadsafe(gone.set)
            time.sleep(0.01)

        engine.model.before_step = before_step
        app = application(Service(engine, scheduler, "model"))
        await hang_up(app, CHAT, {"messages": HELLO, "stream": stream}, gone)

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
        wait_until(lambda: scheduler.totals.cancelled == 1)
        assert 5 <= len(steps) <= 8  # the loop and the engine may each be a step behind
        assert scheduler.running == 0
    finally:
        scheduler.close()


@pytest.mark.parametrize("most_together", [1, 8])
def test_conversations_take_turns(engine: Engine, most_together: int) -> None:
    """Two replies on two slots: neither is ever more than a step ahead once both run; a third waits for a slot."""
    order: list[int] = []
    engine.model.reply, engine.model.most_together = "a" * 20, most_together
    engine.model.before_step = lambda cache: order.append(id(cache))

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        ids = list(b"<|im_start|>assistant\n")
        three = service.replies([ids, [1, *ids], [2, *ids]], 1, service.usual, None, [])
        return [event async for event in three.events()]

    scheduler = Scheduler(engine, 2, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()
    first, second = dict.fromkeys(order[1:3])
    assert order[:39] == [first, *[first, second] * 19]
    assert len(order) == 3 * 21 + 2  # beside a reply a prompt is read in two pieces


def test_a_job_is_done_in_units(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 7 of chunks of 20 tokens, the last with the first token."""
    ids, lengths, pieces = list(b"To you.<|im_start|>assistant\n"), [], []
    session = engine.session()
    engine.model.before_step = lambda cache: lengths.append(cache.length)
    job = Job(ids, Sampling(temperature=0), 3, [], {}, pieces.append)
    monkeypatch.setattr(limits, "PREFILL_CHUNK", 20)
    turns = [len(lengths) for _ in job.units(engine, session, lambda n_left: min(7, n_left))]
    assert lengths == [0, 7, 14, 20, 27, 29, 30] and turns == [1, 2, 3, 4, 5, 6, 7]
    assert [piece for piece in pieces if isinstance(piece, str)] == list(REPLY[:3])
    assert session.ids == [*ids, *REPLY[:2].encode()]
    assert (job.usage.prompt_tokens, job.usage.cached_tokens, job.finish_reason) == (29, 0, "length")


@pytest.mark.parametrize("most_together", [1, 8])
def test_a_prompt_is_read_in_chunks_between_which_others_have_their_steps(engine: Engine, most_together: int) -> None:
    """Chunks begin small while a reply runs, and grow with the time there is; two prompts take turns."""
    events: list[tuple[bytes, int]] = []
    engine.model.reply, engine.model.most_together = "a" * 200, most_together
    forward, asked = engine.model.forward, threading.Event()

    def watched(ids: list[int], cache: Cache, all_logits: bool = False) -> np.ndarray:
        if events:  # the reply that runs is not to end before the others are asked for
            assert asked.wait(60)
        events.append((bytes([*cache.ids, *ids][:1]), len(ids)))
        return forward(ids, cache, all_logits)

    engine.model.forward = watched
    start = list(b"<|im_start|>assistant\n")

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        first = service.replies([[97, *start]], 1, service.usual, 60, []).events()
        await anext(first)
        others = service.replies([[98] * 200 + start, [99] * 300 + start], 1, service.usual, 1, [])
        asked.set()
        assert [event async for event in others.events()][-1][1] is None
        [event async for event in first]

    scheduler = Scheduler(engine, 3, 0, most_pause_s=1000.0)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()
    chunks = [(name, n) for name, n in events[1:] if n > 1 or name != b"a"]
    assert [chunks.count(chunk) for chunk in [(b"b", 8), (b"c", 16), (b"b", 32), (b"c", 64), (b"b", 128)]] == [1] * 5
    assert sum(n for name, n in chunks if name == b"b") == 222 and sum(n for name, n in chunks if name == b"c") == 322
    at = [i for i, (name, n) in enumerate(events) if name != b"a"]
    assert all(events[i + 1] == (b"a", 1) for i in at)  # each chunk is followed by a step of the reply


def test_chunks_fill_the_time_that_there_is() -> None:
    """A chunk of n takes a + b n seconds: sizes go up to what fits, never beyond, and down where it gets slow."""

    def sizes(chunk_size: ChunkSize, most_s: float, a: float, b: float, n: int) -> list[int]:
        found = []
        for _ in range(n):
            found.append(chunk_size.next(most_s, 10**6))
            chunk_size.record(found[-1], a + b * found[-1])
        return found

    chunk_size = ChunkSize(8)
    fast = sizes(chunk_size, 1.0, 0.3, 0.005, 12)
    assert fast[:4] == [8, 16, 32, 55] and all(0.3 + 0.005 * n <= 1.0 for n in fast)
    assert fast[-1] > 90  # 100 fill 0.8 s
    slow = sizes(chunk_size, 1.0, 0.3, 0.01, 12)
    assert all(0.3 + 0.01 * n <= 1.0 for n in slow[4:]) and slow[-1] > 45
    chunk_size.record(3, 10.0)  # a prompt's last tokens
    assert chunk_size.next(1.0, 10**6) == slow[-1]
    assert sizes(chunk_size, 0.2, 0.3, 0.01, 30)[-1] == 8 and sizes(ChunkSize(8), 100.0, 0.0, 0.001, 12)[-1] == 512
    for n_left in range(1, 60):  # no piece is less than the least, but where there is no more to begin with
        pieces = ChunkSize(10)
        for size in (20, 10, 10):
            pieces._size, left = size, n_left
            while left:
                n_tokens = pieces.next(1.0, left)
                assert min(10, n_left) <= n_tokens <= max(size, min(left, 19)) and (left == n_tokens or n_left >= 20)
                left -= n_tokens


def test_a_failed_step_ends_all_that_share_it(engine: Engine) -> None:
    def fail(ids: list[int], caches: list[Cache]) -> None:
        raise ValueError("broken")

    with serving(engine) as (client, scheduler):
        engine.model.most_together, works = 8, engine.model.forward_each
        engine.model.forward_each = fail
        assert "broken" in ask(client, n=2).json()["error"]["message"]
        engine.model.forward_each = works
        assert [choice["message"]["content"] for choice in ask(client, n=2).json()["choices"]] == [REPLY] * 2
        assert scheduler.running == 0


def test_hanging_up_within_a_body_is_no_error(engine: Engine) -> None:
    async def run() -> None:
        gone = asyncio.Event()
        gone.set()
        await hang_up(application(Service(engine, scheduler, "model")), CHAT, None, gone)

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()


def test_progress_is_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """In llama.cpp's form: tokens of the prompt, those that were cached, and those that are there by now."""
    monkeypatch.setattr(limits, "PREFILL_CHUNK", 20)
    chunks = events(ask(client, stream=True, return_progress=True).text)[:-1]
    told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
    assert [(each["total"], each["cache"], each["processed"]) for each in told] == [
        (55, 0, n) for n in (0, 20, 40, 55)
    ]  # fmt: skip
    assert all(each["time_ms"] >= 0 for each in told) and "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks
    ) == REPLY  # fmt: skip
    assert "prompt_progress" not in ask(client, stream=True).text


def test_hanging_up_in_the_queue_leaves_it(engine: Engine) -> None:
    """The one before goes on; the model never sees the prompt of the one that left."""
    engine.model.reply, seen = "a" * 40, []

    def before_step(cache: Cache) -> None:
        seen.append(cache)
        time.sleep(0.005)

    engine.model.before_step = before_step

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        ids = list(b"<|im_start|>assistant\n")
        first, second = (service.replies([prompt], 1, service.usual, None, []) for prompt in (ids, [1, *ids]))
        second.cancel()
        while scheduler.waiting:
            await asyncio.sleep(0.001)
        assert scheduler.running == 1
        return [event async for event in first.events()]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        assert len(asyncio.run(run())) == 41
        assert len({id(cache) for cache in seen}) == 1 and scheduler.totals.cancelled == 1
    finally:
        scheduler.close()


def test_a_full_queue_is_told(engine: Engine) -> None:
    engine.model.before_step = lambda cache: time.sleep(0.002)
    with serving(engine, slots=1, most_waiting=2) as (client, scheduler):
        answer = ask(client, n=4)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "rate_limit_error" and scheduler.totals.refused == 4
        assert len(ask(client, n=3).json()["choices"]) == 3


def test_a_slow_reader_is_dropped(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MOST_UNREAD", 5)

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        replies = service.replies([list(b"<|im_start|>assistant\n")], 1, service.usual, None, [])
        while not replies.jobs[0].cancelled:  # reads nothing
            await asyncio.sleep(0.01)
        with pytest.raises(app_module.APIError, match="not read as fast"):
            [event async for event in replies.events()]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        asyncio.run(run())
    finally:
        scheduler.close()


def test_signs_of_life(engine: Engine) -> None:
    engine.model.before_step = lambda cache: time.sleep(0.2)

    async def run() -> list[Any]:
        service = Service(engine, scheduler, "model")
        replies = service.replies([list(b"<|im_start|>assistant\n")], 1, service.usual, 1, [])
        return [event async for event in with_signs_of_life(replies.events(), ping_s=0.02)]

    scheduler = Scheduler(engine, 1, 1 << 30)
    try:
        found = asyncio.run(run())
    finally:
        scheduler.close()
    assert found[0] is None and found[-1] == (0, None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_model_is_told_and_the_next_reply_comes(
    engine: Engine, client: TestClient, stream: bool
) -> None:
    def fail(cache: Cache) -> None:
        raise ValueError("broken")

    engine.model.before_step = fail
    answer = ask(client, stream=stream)
    document = events(answer.text)[-1] if stream else answer.json()
    assert document["error"]["type"] == "server_error" and "broken" in document["error"]["message"]
    engine.model.before_step = lambda cache: None
    assert ask(client).json()["choices"][0]["message"]["content"] == REPLY


def test_closing_cancels_what_is_left(engine: Engine) -> None:
    engine.model.reply = "a" * 900
    engine.model.before_step = lambda cache: time.sleep(0.01)

    async def run() -> None:
        service = Service(engine, scheduler, "model")
        replies = service.replies([[1, 2]], 1, service.usual, None, [])
        reader = replies.events()
        await asyncio.sleep(0.05)
        await asyncio.to_thread(scheduler.close)
        with pytest.raises(app_module.APIError, match="shutting down"):
            [event async for event in reader]
        with pytest.raises(app_module.APIError, match="shutting down"):
            service.replies([[1, 2]], 1, service.usual, None, [])

    scheduler = Scheduler(engine, 1, 1 << 30)
    asyncio.run(run())


def test_a_server_ends_when_a_rank_is_lost(engine: Engine) -> None:
    """By itself, with the error that says which; a waiting client does not hold it up."""
    engine.ranks = SimpleNamespace(world=SimpleNamespace(failure=None))
    raised: list[RankError] = []

    def serve(listener: Any, ready: threading.Event) -> None:
        with pytest.raises(RankError) as error:
            server.serve(engine, listener, name="m", api_key=None, slots=1, cache_bytes=0, ready=ready.set)
        raised.append(error.value)

    with pytest.MonkeyPatch.context() as patch, server.listen_on("127.0.0.1", 0) as listener:
        patch.setattr(server._Server, "capture_signals", nullcontext)  # of the main thread's
        ready = threading.Event()
        thread = threading.Thread(target=serve, args=(listener, ready))
        thread.start()
        assert ready.wait(60)
        lost = engine.ranks.world.failure = RankError(1, "host b (rank 1): is gone")
        thread.join(5)
        assert not thread.is_alive() and raised == [lost]
