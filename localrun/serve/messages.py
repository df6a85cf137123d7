"""Messages and functions of a request, checked, as templates take them.

Their fields: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

import re
from typing import Any

from localrun.serve.billing import without_billing
from localrun.serve.errors import invalid

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_NAME = re.compile(r"[\w.-]{1,128}")

Message = dict[str, Any]


def chat_messages(given: list[Message]) -> list[Message]:
    """Messages as templates take them: contents as texts. Raises APIError if one is none, or holds more than text."""
    if not given:
        raise invalid("messages is empty", "messages")
    messages = [_message(message, f"messages[{index}]") for index, message in enumerate(given)]
    return [  # a system message of which nothing is left would only stand in the way of the next one
        new
        for new, old in zip(messages, given, strict=True)
        if new["role"] != "system" or new["content"] or not old["content"]
    ]


def function_offered(given: Message, name: str) -> Message:
    """A function, with all that templates may ask for."""
    function = given.get("function")
    if given.get("type") != "function" or not isinstance(function, dict):
        raise invalid(f"{name} is not of type function, all that this server takes", name)
    called, parameters = function.get("name"), function.get("parameters")
    if not isinstance(called, str) or not _NAME.fullmatch(called):
        raise invalid(f"{name}.function.name is not 1 to 128 letters, digits, _, . or -", f"{name}.function.name")
    if not isinstance(parameters, dict | None):
        raise invalid(f"{name}.function.parameters is no JSON schema, an object", f"{name}.function.parameters")
    if not isinstance(description := function.get("description"), str | None):
        raise invalid(f"{name}.function.description is not a text", f"{name}.function.description")
    schema = parameters or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": called, "description": description or "", "parameters": schema},
    }


def _message(given: Message, name: str) -> Message:
    role = given.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise invalid(f"{name}.role is not one of {', '.join(_ROLES)}", f"{name}.role")
    message = {"role": _ROLES[role], "content": _text(given.get("content"), role, f"{name}.content")}
    if role == "assistant" and given.get("tool_calls") is not None:
        calls = given["tool_calls"]
        if not isinstance(calls, list):
            raise invalid(f"{name}.tool_calls is not a list", f"{name}.tool_calls")
        if calls:
            message["tool_calls"] = [_call(call, f"{name}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if role == "tool" and not isinstance(given.get("tool_call_id"), str):
        raise invalid(f"{name}.tool_call_id is not a text", f"{name}.tool_call_id")
    for key in ("name", "reasoning_content", "tool_call_id"):
        value = given.get(key)
        if value is not None and not isinstance(value, str):
            raise invalid(f"{name}.{key} is not a text", f"{name}.{key}")
        if value is not None:
            message[key] = value
    return message


def _call(given: Any, name: str) -> Message:
    """A call of an earlier reply."""
    function = given.get("function") if isinstance(given, dict) else None
    if not isinstance(function, dict) or not isinstance(given.get("id"), str):
        raise invalid(f"{name} is not a call: an id, and a function with name and arguments", name)
    called, arguments = function.get("name"), function.get("arguments", "")
    if not isinstance(called, str) or not _NAME.fullmatch(called) or not isinstance(arguments, str | dict):
        raise invalid(f"{name}.function is not a name with arguments, a text of JSON", f"{name}.function")
    return {"id": given["id"], "type": "function", "function": {"name": called, "arguments": arguments}}


def _text(content: Any, role: str, name: str) -> str:
    """A message's content: a text, or parts of texts, which are joined."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise invalid(f"{name} is neither a text nor a list of parts", name)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise invalid(f"{name}[{index}] is not a part of type text, all that this server takes", f"{name}[{index}]")
        texts.append(part["text"])
    return "".join(without_billing(texts) if _ROLES[role] == "system" else texts)
