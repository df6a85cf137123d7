"""One reply that a client waits for: what was asked, and the work of it in small units."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from localrun.engine import Engine
from localrun.generate.reasoning import ReasoningSplitter
from localrun.generate.reply_text import ReplyText
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session, Stats
from localrun.serve.logprobs import entry

if TYPE_CHECKING:
    from localrun.ranks.readers import Readers


@dataclass
class Usage:
    """What a reply took: tokens, and seconds of computing, in which others' turns do not count.

    Attributes:
        reasoning_tokens: of those generated, the thoughts' and their tags'.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_s: float = 0.0
    reasoning_tokens: int = 0
    stats: Stats = field(default_factory=Stats)


@dataclass(frozen=True)
class Progress:
    """How many of a prompt's tokens are there by now, with those that were cached, and seconds of computing."""

    prompt_tokens: int
    cached_tokens: int
    read_tokens: int
    prompt_s: float


@dataclass(eq=False)
class Job:
    """A prompt and the reply to it.

    Attributes:
        ids: the prompt.
        max_tokens: of the reply; None for as many as come.
        stop: texts that end it.
        spelled: control tokens that are part of the text, with their texts.
        deliver: called with each piece of text as it is certain, and in the end with None; before with the Progress of
            reading the prompt; it must not wait.
        thoughts: tells thoughts from what is said, to count their tokens; None where there are none.
        after: another job on the same prompt, whose reading of it this one waits for.
        logprobs: of the reply's tokens, as serve.logprobs has them, if they are asked for.
        has_read: the prompt is read.
        finish_reason: why the reply ended, as Session says; None if it was cancelled or failed.
        stopped_by: the stop text that ended it.
        error: what it failed of.
        cancelled: it is to end at the next turn. Any thread may set this.
        is_elsewhere: what it does at its turns is to look whether another host has read.
    """

    ids: list[int]
    sampling: Sampling
    max_tokens: int | None
    stop: Sequence[str]
    spelled: Mapping[int, str]
    deliver: Callable[[str | Progress | None], None]
    thoughts: ReasoningSplitter | None = None
    after: Job | None = None
    usage: Usage = field(default_factory=Usage)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    has_read: bool = False
    finish_reason: str | None = None
    stopped_by: str | None = None
    error: Exception | None = None
    cancelled: bool = False
    ended: bool = False
    is_elsewhere: bool = False

    @property
    def can_start(self) -> bool:
        """Nothing to wait for."""
        return self.after is None or self.after.has_read or self.after.ended

    def units(
        self, engine: Engine, session: Session, how_many: Callable[[int], int], patience_s: Callable[[], float]
    ) -> Iterator[None]:
        """The work: at each next() a piece of a chunk of the prompt, or a token.

        how_many: tokens to read at the next one, of those that are left of a chunk.
        patience_s: that a look for what another host reads may take.
        """
        usage, ids = self.usage, self.ids
        session.forget(session.shared(ids))
        usage.prompt_tokens, usage.cached_tokens = len(ids), len(session.ids)
        rest = ids[len(session.ids) :]
        self._has_read(len(session.ids))
        readers = engine.readers
        chunks = _least_chunks(engine, len(rest))
        whole = (lambda n_left: n_left if readers.takes(n_left) else how_many(n_left)) if readers else how_many
        for n_tokens in _pieces(chunks, whole):
            if readers:
                yield from self._wait_for(readers, rest[:n_tokens], session, patience_s)
            started = time.perf_counter()
            session.advance(rest[:n_tokens])
            rest = rest[n_tokens:]
            usage.prompt_s += time.perf_counter() - started
            self._has_read(len(session.ids))
            yield
        if readers:
            yield from self._wait_for(readers, rest, session, patience_s)
        text = ReplyText(engine.tokenizer, self.stop, self.spelled)
        with closing(session.tokens(ids, self.sampling, max_tokens=self.max_tokens)) as tokens:
            for token in tokens:
                self._note(session)
                new = session.reply_logprobs[len(self.logprobs) :]
                self.logprobs += [entry(engine.tokenizer, each) for each in new]
                piece = text.push(token)
                self._count(piece)
                if piece:
                    self.deliver(piece)
                if text.found:
                    self.finish_reason, self.stopped_by = "stop", text.stop
                    return
                yield
        self._note(session)
        if rest_of_text := text.flush():
            self.deliver(rest_of_text)
        self.finish_reason = session.finish_reason

    def _wait_for(
        self, readers: Readers, ids: list[int], session: Session, patience_s: Callable[[], float]
    ) -> Iterator[None]:
        """Units in which another host reads a chunk of the prompt, if that is where it is read."""
        if not readers.takes(len(ids)):
            return
        started, self.is_elsewhere = time.perf_counter(), True
        try:
            while not readers.has_read(ids, session.cache, patience_s()):
                yield
        except GeneratorExit:
            readers.drop(session.cache)
            raise
        self.usage.prompt_s += time.perf_counter() - started
        self.is_elsewhere = False

    def _count(self, piece: str) -> None:
        """A token that is certain to say this: whether it is one of the thoughts'."""
        if self.thoughts:
            is_thought = self.thoughts.is_reasoning
            for _ in self.thoughts.push(piece):
                pass
            self.usage.reasoning_tokens += is_thought or self.thoughts.is_reasoning

    def _note(self, session: Session) -> None:
        if not self.has_read:
            self.usage.prompt_s += session.stats.prefill_s
            self._has_read(self.usage.prompt_tokens)
        self.has_read, self.usage.stats = True, session.stats

    def _has_read(self, n_tokens: int) -> None:
        usage = self.usage
        self.deliver(Progress(usage.prompt_tokens, usage.cached_tokens, n_tokens, usage.prompt_s))


def _least_chunks(engine: Engine, n_tokens: int) -> list[int]:
    """The chunks of a prompt, each cut as a prompt of its own is until none is cut further: others wait for them."""
    chunks = engine.model.chunks(n_tokens)
    return chunks if len(chunks) < 2 else [n for chunk in chunks for n in _least_chunks(engine, chunk)]


def _pieces(chunks: Sequence[int], how_many: Callable[[int], int]) -> Iterator[int]:
    """What is read of a prompt's chunks at a time, but for the last piece, which is read with the first token.

    Pieces end where chunks do: which way tokens are evaluated goes by the chunk.
    """
    for i, n_left in enumerate(chunks, 1):
        while n_left:
            n_tokens = how_many(n_left)
            n_left -= n_tokens
            if n_left or i < len(chunks):
                yield n_tokens
