"""The endpoints over a scripted engine: forms of answers, calls, what a reply is held to."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine import Engine
from serving import CALL, CHAT, COMPLETION, HELLO, REPLY, ask, events
from starlette.testclient import TestClient

from localrun.generate.sampling import Sampling
from localrun.serve import bodies
from localrun.serve.billing import without_billing
from localrun.serve.messages import chat_messages

BILLING = "x-anthropic-billing-header"


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
