"""What all requests share: the model, its scheduler, its prompts; and a request's replies as the event loop sees them.

The event loop never computes: templates and tokens are work for a few threads, the model's for the scheduler's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread

from localrun.engine import Engine
from localrun.errors import ContextFullError, LocalrunError
from localrun.generate.reasoning import ReasoningSplitter, open_tag, spelled_tags
from localrun.generate.sampling import Sampling
from localrun.serve.bodies import Chat, Conversation, Generation
from localrun.serve.errors import APIError, failed, invalid
from localrun.serve.job import Job, Progress
from localrun.serve.messages import chat_messages
from localrun.serve.reply import ReplyParser
from localrun.serve.scheduler import QueueFullError, Scheduler
from localrun.serve.tools.conversation import Dialect
from localrun.serve.tools.form import CallParser
from localrun.serve.tools.held import without_bare_calls
from localrun.text.chat_template import OWN_VARIABLES, ChatTemplate, chatml, stops_of
from localrun.text.prompt import Offer, chat_ids, chat_text, raw_ids
from localrun.text.template_variables import thinking, thinking_effort

MOST_UNREAD = 1 << 16  # characters that a slow reader may be behind: some 15 minutes of a fast model
PING_S = 5.0  # between two signs of life
_MOST_AT_ONCE = 4  # conversations that are templated and tokenized; each takes a process

_TOO_LONG = "context_length_exceeded"

Result = TypeVar("Result")


class Service:
    """A model and what is needed to answer for it.

    Attributes:
        engine, scheduler: the model, and whose turn it is.
        name: of the model, for clients.
        template: of conversations; None where the model has none and its vocabulary lacks ChatML's marks.
        usual: the sampling where a request sets none.
        spelled: control tokens that are part of replies, with their texts.

    Args:
        variables: of the template, where a request sets none.
    """

    def __init__(self, engine: Engine, scheduler: Scheduler, name: str, variables: Mapping[str, Any] | None = None):
        self.engine, self.scheduler, self.name = engine, scheduler, name
        self.template: ChatTemplate | None = engine.template or chatml(engine.tokenizer)
        self.usual = Sampling.recommended(engine.file.metadata)
        self.spelled = spelled_tags(engine.tokenizer)
        self._stop, self._variables = stops_of(self.template), dict(variables or {})
        self._dialect: Dialect | None = None
        self._limiter = CapacityLimiter(_MOST_AT_ONCE)

    async def in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        """What a function returns that would hold the loop. A LocalrunError of it is the request's fault."""
        try:
            return await to_thread.run_sync(partial(function, *args), limiter=self._limiter)
        except ContextFullError as error:
            raise invalid(str(error), code=_TOO_LONG) from None
        except LocalrunError as error:
            raise invalid(str(error)) from None

    async def sampling(self, body: Generation) -> Sampling:
        """That of a request, ready for this model. Raises APIError where it is out of its range."""
        return await self.in_thread(self._ready, body)

    def _ready(self, body: Generation) -> Sampling:
        sampling, most = body.sampling(self.usual), self.engine.model.vocab_size - 1
        if max(sampling.logit_bias, default=0) > most:
            raise invalid(f"logit_bias has token ids beyond this model's, 0 to {most}", "logit_bias")
        if sampling.constraint:
            sampling.constraint.check(self.engine.tokenizer)  # here, as the engine's thread is not to wait for it
        return sampling

    async def chat(self, body: Chat) -> tuple[Replies, list[ReplyParser]]:
        """Have a conversation answered; the replies, and what reads each one. Raises APIError if it can't be."""
        body.check()
        sampling, functions = await self.sampling(body), body.functions_offered()
        ids = await self.chat_ids(body)
        opened = open_tag(self.engine.tokenizer, ids)
        thoughts = partial(ReasoningSplitter, opened)
        if not functions:
            parsers = [ReplyParser(opened) for _ in range(body.choices)]
            return self.replies([ids], body.choices, sampling, body.limit, body.stops, thoughts=thoughts), parsers
        form = (await self._dialect_of()).form
        if holding := body.holding(functions, sampling.constraint):
            form = without_bare_calls(form)
            held = await self.in_thread(holding.constraint, form, body.callable(functions), self.engine.tokenizer)
            sampling = replace(sampling, constraint=held)
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in functions}
        parsers = [ReplyParser(opened, CallParser(form, schemas)) for _ in range(body.choices)]
        spelled = self.spelled | form.spelled(self.engine.tokenizer.controls)
        stops = [*body.stops, form.end] if body.calls_once and not sampling.constraint else body.stops
        return self.replies([ids], body.choices, sampling, body.limit, stops, spelled, thoughts), parsers

    async def chat_ids(self, body: Chat) -> list[int]:
        """The prompt of a conversation, which fits the context. Raises APIError if there is none."""
        return self._fitting(await self._rendered(partial(chat_ids, room=self.engine.ctx), body), "messages")

    async def chat_text(self, body: Conversation) -> str:
        """The text of that prompt."""
        return await self._rendered(chat_text, body)

    async def _rendered(self, render: Callable[..., Result], body: Chat | Conversation) -> Result:
        """What a function of text.prompt makes of a conversation."""
        messages, functions, offer = chat_messages(body.messages), body.functions_offered(), Offer()
        template = self._template()
        settings = self._variables | template_settings(template.source, body)
        if functions or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            dialect = await self._dialect_of()
            messages, offer = dialect.messages(messages, functions), dialect.offer(functions)
        return await self.in_thread(render, template, self.engine.tokenizer, messages, settings, offer)

    async def _dialect_of(self) -> Dialect:
        """The template's way with tools, which is found out when it is first needed."""
        if self._dialect is None:
            self._dialect = await self.in_thread(Dialect.of, self._template())
        return self._dialect

    async def text_ids(self, prompt: str | list[int]) -> list[int]:
        """The ids of a text that is continued as it is."""
        if isinstance(prompt, list):
            ids = prompt
        else:
            ids = await self.in_thread(raw_ids, self.engine.tokenizer, prompt, self.engine.ctx)
        self._check_ids(ids)
        return self._fitting(ids, "prompt")

    def _check_ids(self, ids: Sequence[int]) -> None:
        """As Engine.check_ids, but for what it waits for: the engine's turn."""
        if not ids:
            raise invalid("the prompt is empty", "prompt")
        most = self.engine.model.vocab_size - 1
        if not 0 <= min(ids) <= max(ids) <= most:
            raise invalid(f"prompt has token ids beyond this model's, 0 to {most}", "prompt")

    def _template(self) -> ChatTemplate:
        if self.template is None:
            raise invalid("this model has no chat template: it continues texts, at /v1/completions")
        return self.template

    def _fitting(self, ids: list[int], param: str) -> list[int]:
        if len(ids) > self.engine.ctx:
            raise invalid(
                f"the prompt has {len(ids)} tokens; the context holds {self.engine.ctx}",
                param,
                _TOO_LONG,
            )
        return ids

    def replies(
        self,
        prompts: Sequence[list[int]],
        choices: int,
        sampling: Sampling,
        limit: int | None,
        stop: Sequence[str],
        spelled: Mapping[int, str] | None = None,
        thoughts: Callable[[], ReasoningSplitter] | None = None,
    ) -> Replies:
        """Have prompts answered, each `choices` times. Raises APIError if too much waits already.

        Args:
            spelled: control tokens that are part of the replies, with their texts; None for the usual ones.
            thoughts: makes what tells thoughts apart; None where there are none.
        """
        replies, spelled = Replies(), self.spelled if spelled is None else spelled
        for ids in prompts:
            first = None
            for choice in range(choices):
                seed = None if sampling.seed is None else sampling.seed + choice
                settings, stops = replace(sampling, seed=seed), [*stop, *self._stop]
                hear, apart = replies.hear(len(replies.jobs)), thoughts() if thoughts else None
                job = Job(ids, settings, limit, stops, spelled, hear, apart, first)
                first = first or job
                replies.jobs.append(job)
        try:
            self.scheduler.submit(replies.jobs)
        except QueueFullError as error:
            raise APIError(
                429, str(error), kind="rate_limit_error", headers={"retry-after": str(error.retry_after_s)}
            ) from None
        except LocalrunError as error:
            raise APIError(503, str(error), kind="server_error") from None
        return replies


class Replies:
    """The replies to one request. All but `hear` is the event loop's.

    Attributes:
        jobs: in the order of the choices.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | Progress | None]] = asyncio.Queue()
        self._unread, self._is_too_slow = 0, False

    def hear(self, index: int) -> Callable[[str | Progress | None], None]:
        """What a job calls from its thread."""

        def deliver(piece: str | Progress | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._arrived, index, piece)

        return deliver

    def _arrived(self, index: int, piece: str | Progress | None) -> None:
        self._unread += _length(piece)
        if self._unread > MOST_UNREAD:
            self._is_too_slow, piece = True, None
            self.cancel()
        self._events.put_nowait((index, piece))

    def cancel(self) -> None:
        """End what is not over, at the engine's next turn."""
        for job in self.jobs:
            job.cancelled = True

    async def events(self, progress: bool = False) -> AsyncIterator[tuple[int, Any]]:
        """(index of a job, a piece of its text, or None at its end) until all have ended; if asked for, its Progress.

        Leaving the iterator ends the jobs. Raises APIError if one failed, or the reader was too slow.
        """
        left = len(self.jobs)
        try:
            while left:
                index, piece = await self._events.get()
                if self._is_too_slow:
                    raise failed("the reply was not read as fast as it came")
                self._unread -= _length(piece)
                if piece is None:
                    left -= 1
                    self._check(self.jobs[index])
                if progress or not isinstance(piece, Progress):
                    yield index, piece
        finally:
            self.cancel()

    def _check(self, job: Job) -> None:
        if job.error is not None:
            known = isinstance(job.error, LocalrunError)
            raise failed(str(job.error) if known else f"internal error: {type(job.error).__name__}: {job.error}")
        if job.finish_reason is None:
            raise failed("the server is shutting down")


def _length(piece: str | Progress | None) -> int:
    return len(piece) if isinstance(piece, str) else 0


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Callable[[], Coroutine[Any, Any, Any]], work: Coroutine[Any, Any, Result]) -> Result:
    """What work returns. Raises ClientGoneError, and work is cancelled, as soon as the client closes the connection."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientGoneError
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def with_signs_of_life(items: AsyncIterator[Result], ping_s: float = PING_S) -> AsyncIterator[Result | None]:
    """What an iterator gives, and None where nothing has come for so many seconds."""
    coming: asyncio.Future[Result] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(items))
            if not (await asyncio.wait([coming], timeout=ping_s))[0]:
                yield None
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield item
    finally:
        if coming:
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await coming


def template_settings(source: str, body: Chat | Conversation) -> dict[str, Any]:
    """The variables of a template, given by its source, that a request sets; those of its own words win.

    Raises APIError for one that is not its to set.
    """
    given = body.chat_template_kwargs or {}
    for name in OWN_VARIABLES:
        if name in given:
            raise invalid(f"chat_template_kwargs.{name} is not to be set", f"chat_template_kwargs.{name}")
    settings = {} if body.reasoning_effort is None else thinking_effort(source, body.reasoning_effort)
    if body.enable_thinking is not None:
        settings = {**settings, **(thinking(source, body.enable_thinking) or {})}
    return {**settings, **given}
