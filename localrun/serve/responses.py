"""OpenAI's /v1/responses: requests to the server's own form of a chat, replies to its items and events.

Fields and events: https://platform.openai.com/docs/api-reference/responses and /responses-streaming. A conversation
comes whole, as input, or goes on from a response that is kept.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Any

from msgspec import Meta, Struct

from localrun.generate.reasoning import REASONING
from localrun.serve.bodies import Chat
from localrun.serve.errors import APIError, invalid, unsupported
from localrun.serve.job import Job
from localrun.serve.messages import Message
from localrun.serve.reply import ReplyParser
from localrun.serve.service import Replies
from localrun.serve.tools.source import Arguments, CallStart, Part

Document = dict[str, Any]

_TEXTS = ("input_text", "output_text", "text")


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """/v1/responses."""

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None  # true where it is not given
    # Of no effect here.
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    client_metadata: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    truncation: str | None = None
    # Supported only where they ask for nothing.
    conversation: Any = None
    background: bool | None = None
    prompt: dict[str, Any] | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None

    @property
    def items(self) -> list[Document]:
        """The input."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    def chat(self, earlier: Sequence[Document] = ()) -> Chat:
        """The same as this server has it. Raises APIError for what it has not.

        earlier: items of the conversation that it goes on from. Instructions are those of the request alone.
        """
        for name in ("conversation", "background", "prompt", "top_logprobs", "max_tool_calls"):
            if getattr(self, name):
                raise unsupported(name)
        if self.truncation not in (None, "disabled"):
            raise unsupported("truncation", "truncation other than disabled")
        messages: list[Message] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        effort = (self.reasoning or {}).get("effort")
        if not isinstance(effort, str | None):
            raise invalid("reasoning.effort is not a text", "reasoning.effort")
        # Others are the provider's own (a web search) or of no schema; agents offer them to whatever they talk to.
        tools = [_tool(tool) for tool in self.tools or () if tool.get("type") == "function"] or None
        return Chat(
            messages=messages + _messages(self.items, earlier),
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            tools=tools,
            tool_choice=_choice(self.tool_choice) if tools else None,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=effort,
            response_format=_format((self.text or {}).get("format")),
            stream=self.stream,
        )


class Answer:
    """A response as it grows: parts in, events out; `document` is what there is by now.

    Args:
        request: what was asked, of which the answer repeats a part.
        keep: called with the document once it is whole; None to keep it nowhere.
    """

    def __init__(self, request: Request, model: str, keep: Callable[[Document], None] | None = None):
        self._count, self._output_index, self._keep = 0, -1, keep
        self._item: Document | None = None  # that is being written
        self.document: Document = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": request.reasoning or {"effort": None, "summary": None},
            "store": request.store is not False,
            "temperature": request.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def event(self, kind: str, **fields: Any) -> Document:
        """The next event."""
        self._count += 1
        return {"type": f"response.{kind}", "sequence_number": self._count - 1, **fields}

    def begin(self) -> Iterator[Document]:
        """Before anything is said."""
        for kind in ("created", "in_progress"):
            yield self.event(kind, response=dict(self.document))

    def add(self, part: Part) -> Iterator[Document]:
        """What tells of a part."""
        if isinstance(part, CallStart):
            names = {"call_id": part.id, "name": part.name, "arguments": ""}
            yield from self._open("function_call", "fc", names)
        elif isinstance(part, Arguments):
            item = self._current()
            item["arguments"] += part.text
            yield self._of_item("function_call_arguments.delta", delta=part.text)
        elif part[0] == REASONING:
            yield from self._say("reasoning", "rs", {"summary": []}, {"type": "reasoning_text", "text": ""}, part[1])
        else:
            empty = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._say("message", "msg", {"role": "assistant"}, empty, part[1])

    def end(self, job: Job) -> Iterator[Document]:
        """After everything."""
        yield from self._close("completed" if job.finish_reason == "stop" else "incomplete")
        is_whole = job.finish_reason == "stop"
        self.document["status"] = "completed" if is_whole else "incomplete"
        self.document["incomplete_details"] = None if is_whole else {"reason": "max_output_tokens"}
        self.document["usage"] = usage(job)
        if self._keep:
            self._keep(self.document)
        yield self.event(self.document["status"], response=dict(self.document))

    def failed(self, error: APIError) -> Document:
        """Where it can't go on."""
        fault = {"code": "server_error", "message": str(error)}
        return self.event("failed", response={**self.document, "status": "failed", "error": fault})

    def _current(self) -> Document:
        assert self._item is not None
        return self._item

    def _say(self, kind: str, prefix: str, fields: Document, empty: Document, text: str) -> Iterator[Document]:
        """A piece of text, in an item of its kind."""
        if self._item is None or self._item["type"] != kind:
            yield from self._open(kind, prefix, {**fields, "content": []})
            self._current()["content"] = [dict(empty)]
            yield self._of_item("content_part.added", content_index=0, part=dict(empty))
        self._current()["content"][0]["text"] += text
        extra = {"logprobs": []} if kind == "message" else {}
        yield self._of_item(f"{empty['type']}.delta", content_index=0, delta=text, **extra)

    def _open(self, kind: str, prefix: str, fields: Document) -> Iterator[Document]:
        yield from self._close("completed")
        self._output_index += 1
        self._item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        yield self.event("output_item.added", output_index=self._output_index, item=dict(self._item))

    def _close(self, status: str) -> Iterator[Document]:
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            yield self._of_item("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            extra = {"logprobs": []} if item["type"] == "message" else {}
            yield self._of_item(f"{part['type']}.done", content_index=0, text=part["text"], **extra)
            yield self._of_item("content_part.done", content_index=0, part=part)
        item["status"] = status
        self.document["output"].append(item)
        yield self.event("output_item.done", output_index=self._output_index, item=item)
        self._item = None

    def _of_item(self, kind: str, **fields: Any) -> Document:
        return self.event(kind, item_id=self._current()["id"], output_index=self._output_index, **fields)


async def events(replies: Replies, parser: ReplyParser, answer: Answer) -> AsyncIterator[Document]:
    """The answer in pieces, as they come; then it is whole."""
    for event in answer.begin():
        yield event
    async for _, piece in replies.events():
        for part in parser.parts(piece):
            for event in answer.add(part):
                yield event
    for event in answer.end(replies.jobs[0]):
        yield event


async def whole(replies: Replies, parser: ReplyParser, answer: Answer) -> Document:
    """The answer, once the reply has ended."""
    async for _ in events(replies, parser, answer):
        pass
    return answer.document


def usage(job: Job) -> Document:
    """Tokens of a request."""
    read, written = job.usage.prompt_tokens, job.usage.stats.generated_tokens
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": job.usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": job.usage.reasoning_tokens},
        "total_tokens": read + written,
    }


def _messages(given: Sequence[Document], earlier: Sequence[Document]) -> list[Message]:
    """Items as messages. What a model thought, said and called in a row is one."""
    messages: list[Message] = []
    for index, item in enumerate([*earlier, *given], -len(earlier)):
        kind, where = item.get("type", "message"), f"input[{index}]"
        if kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": _texts(item.get("content"), where)})
        elif kind == "function_call_output":
            output = _texts(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind in ("message", "reasoning", "function_call"):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            _add_to(messages[-1], kind, item, where)
        else:
            raise invalid(f"{where} is not a message, reasoning, function_call or function_call_output", where)
    return messages


def _add_to(message: Message, kind: str, item: Document, where: str) -> None:
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        message["tool_calls"] = [*message.get("tool_calls", []), call]
    elif kind == "message":
        message["content"] += _texts(item.get("content"), where)
    else:
        parts = item.get("content") if isinstance(item.get("content"), list) else []
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        message[REASONING] = message.get(REASONING, "") + "".join(texts)


def _texts(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} has no text, and no list of parts", where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXTS or not isinstance(part.get("text"), str):
            raise invalid(f"{where} has a part that is no text, all that this server takes", where)
    return "".join(part["text"] for part in content)


def _tool(given: Document) -> Document:
    keys = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {key: given[key] for key in keys if key in given}}


def _choice(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type") == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    return given


def _format(given: Any) -> Document | None:
    """text.format as a chat's response_format."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise invalid("text.format is not an object", "text.format")
    if given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {key: value for key, value in given.items() if key != "type"}}
