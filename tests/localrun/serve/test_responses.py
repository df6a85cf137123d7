"""/v1/responses by the official client over a scripted engine: items, events in their order, refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_engine import Engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import REPLY, THOUGHTFUL_CALL, serving
from starlette.testclient import TestClient

from localrun.serve.kept_responses import KeptResponses

TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(REPLY, ctx=2000) as fake:
        yield fake


@pytest.fixture
def http(engine: Engine) -> Iterator[TestClient]:
    with serving(engine) as (client, _):
        yield client


@pytest.fixture
def client(http: TestClient) -> openai.OpenAI:
    return openai.OpenAI(api_key="x", base_url="http://testserver/v1", http_client=http, max_retries=0)


def test_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="x", instructions="Be short.", input="Hello")
    assert (answer.output_text, answer.status, answer.usage.output_tokens) == (REPLY, "completed", len(REPLY))
    cut = client.responses.create(model="x", instructions="Be short.", input="Hello", max_output_tokens=3)
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == (
        REPLY[:3],
        "incomplete",
        "max_output_tokens",
    )
    assert cut.usage.input_tokens_details.cached_tokens == cut.usage.input_tokens - 1


def test_a_stream_of_reasoning_text_and_a_call(engine: Engine, client: openai.OpenAI) -> None:
    engine.model.reply = THOUGHTFUL_CALL
    events = list(client.responses.create(model="x", input="Hello", tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event.type.removeprefix("response.") for event in events))
    assert kinds == [
        *["created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta"],
        *["reasoning_text.done", "content_part.done", "output_item.done", "output_text.delta", "output_text.done"],
        *["function_call_arguments.delta", "function_call_arguments.done", "completed"],
    ]
    assert [event.output_index for event in events if event.type == "response.output_item.done"] == [0, 1, 2]
    reasoning, message, call = events[-1].response.output
    assert events[-1].response.usage.output_tokens_details.reasoning_tokens > 0
    assert (reasoning.content[0].text, message.content[0].text) == ("Hm.", "I look.")
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Paris"}', "completed")
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(deltas) > 1 and "".join(deltas) == call.arguments
    engine.model.reply = "Sunny."
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
    items = [{"role": "user", "content": "Hello"}, *(item.model_dump() for item in events[-1].response.output), result]
    tools = [{"type": "web_search"}, *TOOLS]  # which no model here can call: it is left out
    assert client.responses.create(model="x", input=items, tools=tools).output_text == "Sunny."


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on_from_a_response_that_is_kept(
    engine: Engine, client: openai.OpenAI, stream: bool
) -> None:
    engine.model.reply = "<think>Hm.</think>Aye."
    asked = {"model": "x", "input": "Hello", "instructions": "Be short.", "stream": stream}
    answer = client.responses.create(**asked)
    first = list(answer)[-1].response if stream else answer
    assert first.store and client.responses.retrieve(first.id) == first
    again = client.responses.create(model="x", input="Again", previous_response_id=first.id, instructions="Be long.")
    assert again.previous_response_id == first.id
    said = [("system", "Be long."), ("user", "Hello"), ("assistant", "Aye."), ("user", "Again")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    assert engine.heard().startswith(f"{prompt}<|im_start|>assistant\n")
    client.responses.delete(first.id)
    for gone in (first.id, client.responses.create(model="x", input="Hello", store=False).id, "resp_1"):
        with pytest.raises(openai.NotFoundError, match=f"'{gone}' not found"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(gone)
        with pytest.raises(openai.BadRequestError, match=f"'{gone}' not found"):
            client.responses.create(model="x", input="Hello", previous_response_id=gone)
    third = client.responses.create(model="x", input="Once more", previous_response_id=again.id)
    assert third.usage.input_tokens > again.usage.input_tokens  # what goes on from one that is deleted is whole


def test_responses_go_where_there_is_no_room() -> None:
    kept = KeptResponses(1000)
    for number in range(20):
        kept.add({"id": f"{number}", "output": []}, [{"content": "a" * 100}])
        assert kept.document("0") == {"id": "0", "output": []}  # used: it stays
    assert kept.items("18") == [{"content": "a" * 100}] and kept.items("10") is None
    kept.add({"id": "large", "output": ["a" * 2000]}, [])
    assert kept.document("large") is None and kept.document("0") is None


REFUSED = {
    "an earlier one": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "unknown field": ({"foo": 1}, "foo"),
    "an image": ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0]"),
    "an item": ({"input": [{"type": "x"}]}, "input[0]"),
    "nothing": ({"input": []}, "messages"),
    "a format": ({"text": {"format": {"type": "x"}}}, "response_format"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_refusals(http: TestClient, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/responses", json={"input": "Hello"} | body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "format"]), inner),
    max_leaves=4,
)
KINDS = st.sampled_from(["message", "reasoning", "function_call", "function_call_output"])
ITEMS = st.lists(
    st.fixed_dictionaries(
        {"type": KINDS | VALUES},
        optional={"role": st.sampled_from(["user", "assistant"]), "content": VALUES, "call_id": VALUES, "name": VALUES},
    ),
    max_size=2,
)
FIELDS = [
    "instructions",
    "tools",
    "tool_choice",
    "reasoning",
    "text",
    "max_output_tokens",
    "top_p",
    "metadata",
    "other",
]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(input=ITEMS | VALUES, rest=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_no_body_is_an_error_of_the_server(http: TestClient, input: Any, rest: dict) -> None:
    body = json.dumps({"input": input, "max_output_tokens": 2, **rest})
    assert http.post("/v1/responses", content=body).status_code in (200, 400)
