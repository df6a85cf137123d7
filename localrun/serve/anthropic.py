"""Anthropic's protocol: requests to the server's own form of a chat, replies to its messages and events.

Fields and events: https://docs.anthropic.com/en/api/messages and /streaming. Thoughts are blocks of thinking with an
empty signature; those that come back are what the model thought, if its template takes that.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from localrun.generate.reasoning import REASONING
from localrun.serve.bodies import Chat
from localrun.serve.errors import APIError, invalid, unsupported
from localrun.serve.job import Job
from localrun.serve.messages import Message
from localrun.serve.reply import Reply, ReplyParser
from localrun.serve.service import Replies
from localrun.serve.tools.source import Arguments, CallStart, Part

Document = dict[str, Any]

PATH = "/v1/messages"
PING: Document = {"type": "ping"}
_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Counted(Struct, forbid_unknown_fields=True, kw_only=True):
    """/v1/messages/count_tokens, and what both paths take."""

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    # Of no effect here.
    cache_control: dict[str, Any] | None = None
    context_management: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    betas: list[str] | None = None

    def chat(self) -> Chat:
        """The same as this server has it. Raises APIError for what it has not."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": _texts(self.system, "system")})
        for index, message in enumerate(self.messages):
            messages += _messages(message, f"messages.{index}")
        choice, parallel = _choice(self.tool_choice or {})
        return Chat(
            messages=messages,
            model=self.model,
            tools=[_tool(tool, f"tools.{index}") for index, tool in enumerate(self.tools or ())] or None,
            tool_choice=choice if self.tools else None,
            parallel_tool_calls=parallel,
            enable_thinking=_thinks(self.thinking),
        )


class Request(Counted, kw_only=True):
    """/v1/messages."""

    max_tokens: Annotated[int, Meta(ge=1)]
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # Of no effect here.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    container: str | None = None
    inference_geo: str | None = None

    def chat(self) -> Chat:
        """The same request in OpenAI's form. Raises APIError."""
        chat = super().chat()
        chat.max_tokens, chat.stop, chat.stream = self.max_tokens, self.stop_sequences, self.stream
        chat.temperature, chat.top_p, chat.top_k = self.temperature, self.top_p, self.top_k
        return chat


def error_body(error: APIError) -> Document:
    """An error in this protocol's words."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    return {"type": "error", "error": {"type": _KINDS.get(error.status, usual), "message": str(error)}}


async def whole(replies: Replies, parser: ReplyParser, model: str, stops: Sequence[str]) -> Document:
    """The answer, once the reply has ended."""
    reply = Reply()
    async for _, piece in replies.events():
        for part in parser.parts(piece):
            reply.add(part)
    (job,) = replies.jobs
    content: list[Document] = []
    if reply.reasoning is not None:
        content.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.content:
        content.append({"type": "text", "text": reply.content})
    for call in reply.calls:
        if (arguments := _object(call.arguments)) is not None:  # else it was cut off
            content.append({"type": "tool_use", "id": call.id, "name": call.name, "input": arguments})
    return {**_message(model), "content": content, **_ending(job, parser, stops), "usage": usage(job)}


async def events(replies: Replies, parser: ReplyParser, model: str, stops: Sequence[str]) -> AsyncIterator[Document]:
    """The answer in pieces, as they come."""
    start = {**_message(model), "content": [], "stop_reason": None, "stop_sequence": None}
    start["usage"] = {"input_tokens": len(replies.jobs[0].ids), "output_tokens": 0}
    yield {"type": "message_start", "message": start}
    yield PING
    blocks = Blocks()
    async for _, piece in replies.events():
        for part in parser.parts(piece):
            for event in blocks.events(part):
                yield event
    for event in blocks.close():
        yield event
    (job,) = replies.jobs
    yield {"type": "message_delta", "delta": _ending(job, parser, stops), "usage": usage(job)}
    yield {"type": "message_stop"}


class Blocks:
    """Parts in, events of content blocks out: a block each of thinking, text, and calls."""

    def __init__(self) -> None:
        self._index, self._kind = -1, ""

    def events(self, part: Part) -> Iterator[Document]:
        """What tells of a part."""
        if isinstance(part, CallStart):
            yield from self._open("tool_use", {"id": part.id, "name": part.name, "input": {}})
        elif isinstance(part, Arguments):
            yield self._delta({"type": "input_json_delta", "partial_json": part.text})
        elif part[0] == REASONING:
            if self._kind != "thinking":
                yield from self._open("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": part[1]})
        else:
            if self._kind != "text":
                yield from self._open("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": part[1]})

    def close(self) -> Iterator[Document]:
        """The end of the block that is open."""
        if self._kind == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        if self._kind:
            yield {"type": "content_block_stop", "index": self._index}

    def _open(self, kind: str, block: Document) -> Iterator[Document]:
        yield from self.close()
        self._index, self._kind = self._index + 1, kind
        yield {"type": "content_block_start", "index": self._index, "content_block": {"type": kind, **block}}

    def _delta(self, delta: Document) -> Document:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def usage(job: Job) -> Document:
    """Tokens: those of the prompt that were read, those that were not read again, and the reply's."""
    cached = job.usage.cached_tokens
    return {
        "input_tokens": job.usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": job.usage.stats.generated_tokens,
        "output_tokens_details": {"thinking_tokens": job.usage.reasoning_tokens},
    }


def _message(model: str) -> Document:
    return {"id": f"msg_{uuid.uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": model}


def _ending(job: Job, parser: ReplyParser, stops: Sequence[str]) -> Document:
    if job.finish_reason != "stop":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if parser.has_calls:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if job.stopped_by in stops:  # there are also some that the client knows nothing of
        return {"stop_reason": "stop_sequence", "stop_sequence": job.stopped_by}
    return {"stop_reason": "end_turn", "stop_sequence": None}


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _thinks(thinking: Document | None) -> bool | None:
    kind = None if thinking is None else thinking.get("type")
    if kind not in (None, "enabled", "disabled", "adaptive"):
        raise invalid("thinking.type is not enabled, disabled or adaptive", "thinking.type")
    return {"enabled": True, "disabled": False}.get(kind or "")


def _choice(given: Document) -> tuple[Any, bool | None]:
    """tool_choice and parallel_tool_calls."""
    kind, parallel = given.get("type", "auto"), False if given.get("disable_parallel_tool_use") else None
    if kind == "tool" and isinstance(name := given.get("name"), str):
        return {"type": "function", "function": {"name": name}}, parallel
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise invalid("tool_choice is not of type auto, any, none, or a tool with its name", "tool_choice")
    return _CHOICES[kind], parallel


def _tool(given: Document, name: str) -> Document:
    if given.get("type") not in (None, "custom"):
        raise unsupported(name, f"{name}: a tool of the API's own")
    function = {"name": given.get("name"), "parameters": given.get("input_schema"), "strict": given.get("strict")}
    return {"type": "function", "function": {**function, "description": given.get("description")}}


def _messages(given: Message, name: str) -> list[Message]:
    """A message as one or several: results of calls stand by themselves."""
    role, content = given.get("role"), given.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{name}.role is not user or assistant", name)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise invalid(f"{name}.content is neither a text nor a list of blocks", name)
    results: list[Message] = []
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(content):
        kind, where = block.get("type") if isinstance(block, dict) else None, f"{name}.content.{index}"
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "thinking" and role == "assistant" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "redacted_thinking" and role == "assistant":
            continue  # nobody here can read it
        elif kind == "tool_use" and role == "assistant":
            function = {"name": block.get("name"), "arguments": block.get("input") or {}}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result" and role == "user":
            text = _texts(block.get("content") or "", where)
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": text})
        else:
            raise invalid(f"{where} is no block of text, tool_use or tool_result that this server takes", where)
    message: Message = {"role": role, "content": "\n\n".join(texts)}
    if thoughts:
        message[REASONING] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return [*results, message] if texts or calls or thoughts or not results else results


def _texts(content: Any, name: str) -> Any:
    """A text, or blocks of text as a chat's parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{name} is neither a text nor a list of blocks", name)
    for index, block in enumerate(content):
        if not isinstance(block, dict) or block.get("type") != "text" or not isinstance(block.get("text"), str):
            raise invalid(f"{name}.{index} is not a block of text, all that this server takes", name)
    return [{"type": "text", "text": block["text"]} for block in content]
