"""Answers in the form of the OpenAI API: https://platform.openai.com/docs/api-reference/chat and /completions.

reasoning_content is DeepSeek's name for what a model thought (https://api-docs.deepseek.com/guides/reasoning_model),
timings llama.cpp's for what a reply took.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Protocol

from localrun.generate.reasoning import CONTENT, REASONING
from localrun.serve.job import Job, Progress
from localrun.serve.logprobs import Told, Writer, of_chat, of_text
from localrun.serve.reply import Reply, ReplyParser
from localrun.serve.service import Replies
from localrun.serve.tools.source import Arguments, CallStart, Part

Document = dict[str, Any]


class Form(Protocol):
    """How one of the two kinds of completion is written."""

    prefix: str
    object: str
    chunk_object: str
    logprobs: Writer

    def first(self, index: int) -> Iterator[Document]:
        """Choices of a stream before anything is said."""

    def parts(self, index: int, piece: str | None) -> Iterator[Part]:
        """A piece of a reply, None at its end, split into what it is."""

    def delta(self, index: int, part: Part | None, reason: str | None) -> Document:
        """A choice of a stream: a part, or the end."""

    def choice(self, index: int, reply: Reply, reason: str) -> Document:
        """A whole choice."""

    def finish_reason(self, index: int, job: Job) -> str:
        """Why it ended."""


class ChatForm:
    """/v1/chat/completions."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    logprobs = staticmethod(of_chat)

    def __init__(self, parsers: Sequence[ReplyParser]):
        """parsers: of the choices."""
        self._parsers = parsers

    def first(self, index: int) -> Iterator[Document]:
        """What a stream begins with for a reply: its role."""
        yield self._delta(index, {"role": "assistant", "content": ""}, None)

    def parts(self, index: int, piece: str | None) -> Iterator[Part]:
        """What a piece of a reply's text becomes: thoughts, content, calls. None: the text has ended."""
        return self._parsers[index].parts(piece)

    def delta(self, index: int, part: Part | None, reason: str | None) -> Document:
        """A part, or a reply's end by its reason, as a stream has it."""
        delta: Document = {}
        if isinstance(part, CallStart):
            function = {"name": part.name, "arguments": ""}
            delta["tool_calls"] = [{"index": part.index, "id": part.id, "type": "function", "function": function}]
        elif isinstance(part, Arguments):
            delta["tool_calls"] = [{"index": part.index, "function": {"arguments": part.text}}]
        elif part:
            delta[part[0]] = part[1]
        return self._delta(index, delta, reason)

    def choice(self, index: int, reply: Reply, reason: str) -> Document:
        """A whole reply."""
        content = reply.content or (None if reply.calls else "")
        message: Document = {"role": "assistant", "content": content, "refusal": None}
        if reply.reasoning is not None:
            message[REASONING] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in reply.calls
            ]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}

    def finish_reason(self, index: int, job: Job) -> str:
        """Why a reply ended: tool_calls where it called a function."""
        reason = finish_reason(job)
        return "tool_calls" if reason == "stop" and self._parsers[index].has_calls else reason

    def _delta(self, index: int, delta: Document, reason: str | None) -> Document:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}


class TextForm:
    """/v1/completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    logprobs = staticmethod(of_text)

    def first(self, index: int) -> Iterator[Document]:
        """Nothing."""
        yield from ()

    def parts(self, index: int, piece: str | None) -> Iterator[Part]:
        """The piece as it is."""
        if piece:
            yield CONTENT, piece

    def delta(self, index: int, part: Part | None, reason: str | None) -> Document:
        """As ChatForm.delta."""
        return {"index": index, "text": part[1] if part else "", "logprobs": None, "finish_reason": reason}

    def choice(self, index: int, reply: Reply, reason: str) -> Document:
        """A whole reply."""
        return {"index": index, "text": reply.content, "logprobs": None, "finish_reason": reason}

    def finish_reason(self, index: int, job: Job) -> str:
        """Why a reply ended: stop or length."""
        return finish_reason(job)


async def whole(replies: Replies, form: Form, model: str) -> Document:
    """The answer, once all replies have ended."""
    said = [Reply() for _ in replies.jobs]
    async for index, piece in replies.events():
        for part in form.parts(index, piece):
            said[index].add(part)
    choices = [
        Told(job.logprobs, form.logprobs).into(form.choice(i, said[i], form.finish_reason(i, job)))
        for i, job in enumerate(replies.jobs)
    ]
    head = _head(form, form.object, model)
    return {**head, "choices": choices, "usage": usage(replies.jobs), "timings": timings(replies.jobs)}


async def chunks(
    replies: Replies, form: Form, model: str, includes_usage: bool, progress: bool = False
) -> AsyncIterator[Document]:
    """The answer in pieces, as they come; with progress also chunks that tell how much of the prompt is read."""
    head = _head(form, form.chunk_object, model)
    empty = {"usage": None} if includes_usage else {}
    told = [Told(job.logprobs, form.logprobs) for job in replies.jobs]
    for index in range(len(replies.jobs)):
        for choice in form.first(index):
            yield {**head, "choices": [choice], **empty}
    async for index, piece in replies.events(progress):
        if isinstance(piece, Progress):
            yield {**head, "choices": [form.delta(index, None, None)], **empty, "prompt_progress": _progress(piece)}
            continue
        for part in form.parts(index, piece):
            yield {**head, "choices": [told[index].into(form.delta(index, part, None))], **empty}
        if piece is None:
            job = replies.jobs[index]
            last = told[index].into(form.delta(index, None, form.finish_reason(index, job)))
            yield {**head, "choices": [last], **empty, "timings": timings([job])}
    if includes_usage:
        yield {**head, "choices": [], "usage": usage(replies.jobs)}


def finish_reason(job: Job) -> str:
    """In the API's words: a full context is a limit like any other."""
    return "stop" if job.finish_reason == "stop" else "length"


def usage(jobs: list[Job]) -> Document:
    """Tokens of a request: each prompt counts once, whatever the number of its replies."""
    firsts = [job for job in jobs if job.after is None]
    prompt = sum(job.usage.prompt_tokens for job in firsts)
    generated = sum(job.usage.stats.generated_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(job.usage.cached_tokens for job in firsts)},
        "completion_tokens_details": {"reasoning_tokens": sum(job.usage.reasoning_tokens for job in jobs)},
    }


def _progress(now: Progress) -> Document:
    """In llama.cpp's form."""
    return {
        "total": now.prompt_tokens,
        "cache": now.cached_tokens,
        "processed": now.read_tokens,
        "time_ms": round(1e3 * now.prompt_s, 3),
    }


def timings(jobs: list[Job]) -> Document:
    """What was read and written, and in how much time of computing."""
    cached = sum(job.usage.cached_tokens for job in jobs)
    read = sum(job.usage.prompt_tokens for job in jobs) - cached
    written = sum(job.usage.stats.generated_tokens for job in jobs)
    read_s = sum(job.usage.prompt_s for job in jobs)
    write_s = sum(job.usage.stats.decode_s for job in jobs)
    document = {
        "cache_n": cached,
        "prompt_n": read,
        "prompt_ms": round(1e3 * read_s, 3),
        "prompt_per_second": _rate(read, read_s),
        "predicted_n": written,
        "predicted_ms": round(1e3 * write_s, 3),
        "predicted_per_second": _rate(written, write_s),
    }
    if drafted := sum(job.usage.stats.drafted_tokens for job in jobs):
        document |= {"draft_n": drafted, "draft_n_accepted": sum(job.usage.stats.accepted_tokens for job in jobs)}
    return document


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if seconds > 0 else 0.0


def _head(form: Form, kind: str, model: str) -> Document:
    return {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
