"""What is refused, over a scripted engine: bodies, prompts that are too long, keys, pages of other sites."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import CHAT, COMPLETION, ask, serving
from starlette.testclient import TestClient

from localrun.serve import app as app_module

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
