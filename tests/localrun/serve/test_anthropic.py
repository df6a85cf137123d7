"""Anthropic's protocol: its official client over a scripted engine, its errors, its events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from fake_engine import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import HELLO, REPLY, THOUGHTFUL_CALL, serving
from starlette.testclient import TestClient

TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
BASE: dict[str, Any] = {"model": "x", "messages": HELLO, "max_tokens": 200}


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(REPLY, ctx=2000) as fake:
        yield fake


@pytest.fixture
def http(engine: Engine) -> Iterator[TestClient]:
    with serving(engine, api_key="secret") as (client, _):
        yield client


@pytest.fixture
def client(http: TestClient) -> anthropic.Anthropic:
    return anthropic.Anthropic(api_key="secret", base_url="http://testserver", http_client=http, max_retries=0)


def test_a_message(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="x", system="Be short.", messages=HELLO).input_tokens
    first = client.messages.create(**BASE, system="Be short.")
    assert (first.content[0].text, first.stop_reason, first.role) == (REPLY, "end_turn", "assistant")
    assert (first.usage.input_tokens, first.usage.output_tokens) == (count, len(REPLY))
    again = client.messages.create(**BASE | {"max_tokens": 3}, system=[{"type": "text", "text": "Be short."}])
    assert (again.content[0].text, again.stop_reason) == (REPLY[:3], "max_tokens")
    assert (again.usage.cache_read_input_tokens, again.usage.input_tokens) == (count - 1, 1)
    stopped = client.messages.create(**BASE, stop_sequences=["never", "is"])
    assert (stopped.content[0].text, stopped.stop_reason) == ("Aye, all ", "stop_sequence")
    assert stopped.stop_sequence == "is"


def test_a_stream_of_thinking_text_and_a_call(engine: Engine, client: anthropic.Anthropic) -> None:
    engine.model.reply = THOUGHTFUL_CALL
    with client.messages.stream(**BASE, tools=TOOLS) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = message.content
    assert message.usage.output_tokens_details.thinking_tokens > 0
    assert (thinking.thinking, text.text, call.name, call.input) == ("Hm.", "I look.", "weather", {"city": "Paris"})
    assert message.stop_reason == "tool_use" and message.usage.output_tokens == len(THOUGHTFUL_CALL)
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    whole = client.messages.create(**BASE, tools=TOOLS)
    assert [block.model_dump(exclude={"id"}) for block in whole.content] == [
        block.model_dump(exclude={"id"}) for block in message.content
    ]


def test_a_result_goes_back(engine: Engine, client: anthropic.Anthropic) -> None:
    engine.model.reply = THOUGHTFUL_CALL
    said = client.messages.create(**BASE, tools=TOOLS).content
    engine.model.reply = "Sunny."
    result = {"type": "tool_result", "tool_use_id": said[2].id, "content": [{"type": "text", "text": "sun"}]}
    messages = [*HELLO, {"role": "assistant", "content": said}, {"role": "user", "content": [result]}]
    assert client.messages.create(**BASE | {"messages": messages}, tools=TOOLS).content[0].text == "Sunny."


REFUSED = {
    "no length": ({"max_tokens": None}, "max_tokens"),
    "unknown field": ({"foo": 1}, "foo"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages.0.content.0",
    ),
    "a role": ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
    "a tool of the API's": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
    "a choice": ({"tool_choice": {"type": "x"}}, "tool_choice"),
    "too long": ({"messages": [{"role": "user", "content": "a" * 3000}]}, "the context holds 2000"),
}


@pytest.mark.parametrize(("body", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(http: TestClient, body: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/messages", json=BASE | body, headers={"x-api-key": "secret"})
    document = answer.json()
    assert (answer.status_code, document["type"], document["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message in document["error"]["message"]


def test_a_key(http: TestClient) -> None:
    answer = http.post("/v1/messages", json=BASE)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert http.post("/v1/messages", json=BASE, headers={"authorization": "Bearer secret"}).status_code == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "id"]), inner),
    max_leaves=4,
)
BLOCKS = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "thinking", "tool_use", "tool_result", "image"])},
        optional={"text": VALUES, "content": VALUES, "input": VALUES, "id": VALUES, "name": VALUES},
    ),
    max_size=2,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": VALUES | BLOCKS}), max_size=2
)
FIELDS = ["system", "tools", "tool_choice", "thinking", "stop_sequences", "temperature", "top_k", "metadata", "other"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/messages", "/v1/messages/count_tokens"]),
    messages=MESSAGES | VALUES,
    rest=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2),
)
def test_no_body_is_an_error_of_the_server(http: TestClient, path: str, messages: Any, rest: dict) -> None:
    body = {"messages": messages, "max_tokens": 2, **rest} if path == "/v1/messages" else {"messages": messages, **rest}
    answer = http.post(path, content=json.dumps(body), headers={"x-api-key": "secret"})
    assert answer.status_code in (200, 400)
