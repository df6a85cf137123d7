"""Tools, calls and results as a chat template takes them.

What a template can do is found out by rendering a conversation with a call: whether it declares tools, whether it
writes calls, with arguments as a text or as an object, and results. A template that cannot gets the same as plain
messages, in GENERIC's form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localrun.serve.errors import invalid
from localrun.serve.tools.form import Form
from localrun.serve.tools.forms import GENERIC, HARMONY, form_of
from localrun.serve.tools.json_form import JSONForm
from localrun.text.chat_template import ChatTemplate, Message
from localrun.text.prompt import REASONING, THINKING, Offer

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

_TOOL, _NAME, _RESULT = "probe_tool", "probe_name", "probe_result"
_ARGUMENTS = '{"probe_key":"probe_value"}'  # without the spaces that a template's own JSON has


@dataclass(frozen=True)
class Dialect:
    """What a template does with tools.

    Attributes:
        form: of calls.
        declares: it tells the model of tools.
        writes: it writes calls and their results.
        as_objects: a call's arguments are an object to it, not a text.
    """

    form: Form
    declares: bool
    writes: bool
    as_objects: bool

    @staticmethod
    def of(template: ChatTemplate) -> Dialect:
        """A template's. Renders it."""
        form, tools = form_of(template.source), [_tool(_TOOL)]
        probes = [_probe(_ARGUMENTS), _probe(json.loads(_ARGUMENTS))]
        answers = template.answers([*probes, *probes], tools=[None, None, tools, tools])
        texts = [answer.get("text", "") for answer in answers]
        as_text = _ARGUMENTS in texts[0]
        written = texts[0] if as_text else texts[1]
        writes = all(word in written for word in (_NAME, "probe_key", "probe_value", _RESULT))
        declares = any(_TOOL in text for text in texts[2:])
        is_known = declares or (writes and isinstance(form, JSONForm))  # else its own form would need an example
        return Dialect(form if is_known else GENERIC, declares, writes, not as_text)

    def offer(self, tools: list[Tool]) -> Offer:
        """What the model is told of tools."""
        if not tools:
            return Offer()
        return Offer(tools) if self.declares else Offer(notes=_how_to_call(self.form))

    def messages(self, given: list[Message], tools: list[Tool]) -> list[Message]:
        """Messages for the template. Raises APIError if a call's arguments are no object."""
        messages = [self._reply(message) if message.get("tool_calls") else message for message in given]
        if not self.writes:
            messages = _as_plain(messages)
        elif self.form is HARMONY:
            messages = _one_call_each(messages)
        return messages if self.declares or not tools else _with_declaration(messages, tools)

    def _reply(self, message: Message) -> Message:
        calls = []
        for call in message["tool_calls"]:
            function = call["function"]
            arguments = function["arguments"]
            if self.as_objects or not self.writes:
                arguments = _object(arguments, function["name"])
            elif not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            calls.append({**call, "function": {"name": function["name"], "arguments": arguments}})
        return {**message, "tool_calls": calls}


def _tool(name: str) -> Tool:
    properties = {"probe_key": {"type": "string", "description": ""}}
    parameters = {"type": "object", "properties": properties, "required": ["probe_key"]}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def _probe(arguments: Any) -> list[Message]:
    call = {"id": "call_0", "type": "function", "function": {"name": _NAME, "arguments": arguments}}
    return [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": _RESULT},
    ]


def _object(arguments: Any, name: str) -> Mapping[str, Any]:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise invalid(f"the arguments of an earlier call of {name} are no JSON object", "messages")
    return value


def _as_plain(messages: list[Message]) -> list[Message]:
    """Calls as text of the reply, results of one reply's calls as one message of the user's."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("is_results"):
                plain[-1]["content"] += f"\n{text}"
            else:
                plain.append({"role": "user", "content": text, "is_results": True})
        elif calls := message.get("tool_calls"):
            texts = [_written(call["function"]) for call in calls]
            rest = {key: value for key, value in message.items() if key != "tool_calls"}
            plain.append({**rest, "content": "\n".join([text for text in (message["content"], *texts) if text])})
        else:
            plain.append(message)
    return [{key: value for key, value in message.items() if key != "is_results"} for message in plain]


def _written(function: Mapping[str, Any]) -> str:
    document = {"name": function["name"], "arguments": function["arguments"]}
    return f"<tool_call>\n{json.dumps(document, ensure_ascii=False)}\n</tool_call>"


def _one_call_each(messages: list[Message]) -> list[Message]:
    """Harmony's template writes one call a message, and its result must follow. What was thought has its own key."""
    split: list[Message] = []
    results = {message.get("tool_call_id"): message for message in messages if message["role"] == "tool"}
    asked: set[Any] = set()
    for message in messages:
        if message["role"] == "tool" and message.get("tool_call_id") in asked:
            continue
        calls = message.get("tool_calls")
        if not calls:
            split.append({key: value for key, value in message.items() if key != REASONING})
            continue
        thought = {} if message["content"] else {THINKING: message[REASONING]} if message.get(REASONING) else {}
        for index, call in enumerate(calls):
            head = {"content": message["content"], **thought} if index == 0 else {"content": ""}
            split.append({"role": "assistant", **head, "tool_calls": [call]})
            if call["id"] in results:
                asked.add(call["id"])
                split.append(results[call["id"]])
    return split


def _with_declaration(messages: list[Message], tools: list[Tool]) -> list[Message]:
    """The functions at the end of the system message; it is made where there is none."""
    described = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        f"# Tools\n\nYou may call functions. These are there, with the JSON schemas of their parameters:\n{described}"
    )
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _how_to_call(form: Form) -> str:
    """With an example in the form's own marks."""
    return (
        "To call a function, write exactly this, with its name and an object of its arguments, and nothing after it:\n"
        f"{form.example('FUNCTION_NAME')}"
    )
