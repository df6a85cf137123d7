"""Prompts that other processes read, each with the whole model: rank 0's side (localrun.cpu.reader is theirs).

A reader's one cache follows one of this process's. For a chunk of a prompt it is sent the rows that it lacks of the
tokens before: after a reply the reply's, of another conversation all. It sends each layer's rows back as soon as they
are computed, and in the end the logits. A thread receives them into memory of their own while this process's steps go
on; they are written into the cache when forward() asks for them. Rows and chunks are those of a prompt that is read
here, so that results are, too.

Messages are parts: int64 (kind, bytes, end), then the bytes. A kind from 0 on is a block of the cache, whose rows end
at the position `end`. A prompt's chunk is ASK, rows, and back come rows, HIDDEN if it was asked for, LOGITS.
"""

from __future__ import annotations

import math
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from localrun.limits import READER_PAUSE_S
from localrun.network.cache import Cache
from localrun.ranks.remote import READY
from localrun.ranks.world import START_S, RankError, World

ASK, LOGITS, HIDDEN, END = -1, -2, -3, -4  # kinds of parts besides rows
_HEAD_TAG, _CONTENT_TAG = 11, 12
_END_S = 1.0
_MOVING_S = 5e-5  # between looks while bytes are on their way: looking is what moves them


class Asked(NamedTuple):
    """What ASK begins with, int64; the chunk's ids follow.

    Attributes:
        capacity, bits: of the cache.
        length: tokens before the chunk.
        n_parts: of rows that follow.
        wants_hidden: whether `hidden` is to come back.
    """

    capacity: int
    bits: int
    length: int
    n_parts: int
    wants_hidden: int


class Part(NamedTuple):
    """A message. end: of rows a position; of LOGITS nanoseconds that the chunk took."""

    kind: int
    end: int
    content: np.ndarray


def send(world: World, rank: int, kind: int, content: np.ndarray, end: int = 0) -> None:
    """Send a part. Raises RankError."""
    content = np.ascontiguousarray(content)
    head = np.array([kind, content.nbytes, end], np.int64)
    with world.reaching(rank):
        requests = [world.links.start_send(head, rank, _HEAD_TAG)]
        requests += [world.links.start_send(content, rank, _CONTENT_TAG)] if content.nbytes else []
        for request in requests:
            world.links.finish(request, _END_S if kind == END else None, _MOVING_S)


def receive(world: World, rank: int, limit_s: float = math.inf) -> Part:
    """The next part, which may take so long to come; its content is uint8. Raises RankError."""
    head, links = np.zeros(3, np.int64), world.links
    with world.reaching(rank):
        links.finish(links.start_receive(head, rank, _HEAD_TAG), limit_s, READER_PAUSE_S)
        kind, n_bytes, end = head.tolist()
        content = np.empty(n_bytes, np.uint8)
        if n_bytes:
            links.finish(links.start_receive(content, rank, _CONTENT_TAG), None, _MOVING_S)
    return Part(kind, end, content)


@dataclass
class _Answer:
    """What came of a chunk: parts of rows, logits (1, vocab), hidden (T, D) or None; how long its computing took."""

    rows: list[Part] = field(default_factory=list)
    logits: np.ndarray | None = None
    hidden: np.ndarray | None = None
    busy_s: float = 0.0


@dataclass(eq=False)
class _Reader:
    """A rank that reads.

    Attributes:
        cache: the one that it follows.
        position: tokens that its own then holds; -1 where nobody knows.
        ids, job: the chunk that it is at; no job if it is free.
        is_dropped: nobody wants what comes of it.
    """

    rank: int
    cache: Callable[[], Cache | None] = lambda: None
    position: int = -1
    ids: list[int] = field(default_factory=list)
    job: Future[_Answer] | None = None
    is_dropped: bool = False

    @property
    def is_free(self) -> bool:
        return self.job is None or (self.is_dropped and self.job.done())


class Readers:
    """Ranks that read prompts for this process. One thread at a time uses it, but for figures().

    Args:
        world: theirs and this process's.
        least: tokens of a chunk that goes to them; fewer are evaluated here.
        wants_hidden: whether `hidden` is needed of each token, with every chunk.
    """

    def __init__(self, world: World, least: int, wants_hidden: Callable[[], bool]):
        """Waits until all are ready. Raises RankError."""
        self.world, self._least, self._wants_hidden = world, least, wants_hidden
        self._readers = [_Reader(rank) for rank in range(1, world.size)]
        self._threads = ThreadPoolExecutor(len(self._readers), "localrun-readers")
        self._lock, self._figures = threading.Lock(), np.zeros(len(_FIGURES))
        for reader in self._readers:
            if world.receive(reader.rank) != READY:
                raise RankError(reader.rank, f"{world.names[reader.rank]}: does not say that it is ready")

    def __len__(self) -> int:
        return len(self._readers)

    def takes(self, n_tokens: int) -> bool:
        """Whether a chunk of so many tokens goes to them."""
        return n_tokens >= self._least

    def has_read(self, ids: Sequence[int], cache: Cache, wait_s: float) -> bool:
        """Whether forward() of these would not have to wait; has it begun if a reader is free, and waits so long."""
        reader = self._at(ids, cache) or self._begin(ids, cache)
        wait([reader.job] if reader else self._jobs, wait_s, FIRST_COMPLETED)
        return reader is not None and reader.job.done()

    def drop(self, cache: Cache) -> None:
        """What was begun for a cache is not needed any more."""
        for reader in self._readers:
            reader.is_dropped |= reader.cache() is cache

    def forward(self, ids: Sequence[int], cache: Cache) -> tuple[np.ndarray, np.ndarray | None]:
        """Have ids evaluated after the cache's tokens; the cache, which has room for them, then holds them too.

        Returns: float32 (1, vocab), the logits after the last; float32 (T, D) of each token, if that is wanted.
        Raises RankError.
        """
        try:
            while not (reader := self._at(ids, cache) or self._begin(ids, cache)):
                wait(self._jobs, return_when=FIRST_COMPLETED)
            answer = reader.job.result()
        except RankError as error:
            raise self.world.note(error) from None
        except BaseException:
            self.drop(cache)
            raise
        for part in answer.rows:
            cache.write(part.kind, part.end, part.content)
        cache.advance(len(ids))
        cache.n_followed = reader.position = cache.length
        reader.job = None
        return answer.logits, answer.hidden

    @property
    def _jobs(self) -> list[Future[_Answer]]:
        return [reader.job for reader in self._readers if reader.job and not reader.is_free]

    def _at(self, ids: Sequence[int], cache: Cache) -> _Reader | None:
        """The one that has begun with these."""
        for reader in self._readers:
            if reader.job and not reader.is_dropped and reader.cache() is cache and reader.ids == list(ids):
                return reader
        return None

    def _begin(self, ids: Sequence[int], cache: Cache) -> _Reader | None:
        """One that begins with these, if any is free: that which follows the cache, else one that follows no other."""
        self.world.check()
        self.drop(cache)
        free = [reader for reader in self._readers if reader.is_free]
        if not free:
            return None
        reader = min(free, key=lambda reader: 0 if reader.cache() is cache else 1 + (reader.cache() is not None))
        first = cache.n_followed if reader.cache() is cache else 0
        rows = list(cache.since(first)) if first < cache.length or reader.position != cache.length else []
        asked = Asked(cache.capacity, cache.bits, cache.length, len(rows), self._wants_hidden())
        reader.cache, reader.position, reader.ids, reader.is_dropped = weakref.ref(cache), -1, list(ids), False
        reader.job = self._threads.submit(self._read, reader.rank, asked, reader.ids, rows)
        return reader

    def _read(self, rank: int, asked: Asked, ids: list[int], rows: list[tuple[int, int, np.ndarray]]) -> _Answer:
        """In a thread of the reader's."""
        began, answer = time.perf_counter(), _Answer()
        send(self.world, rank, ASK, np.array([*asked, *ids], np.int64))
        for block, end, content in rows:
            send(self.world, rank, block, content, end)
        while answer.logits is None:
            part = receive(self.world, rank, START_S)
            if part.kind >= 0:
                answer.rows.append(part)
                continue
            values = part.content.view(np.float32)
            if part.kind == HIDDEN:
                answer.hidden = values.reshape(len(ids), -1)
            else:
                answer.logits, answer.busy_s = values[None], part.end / 1e9
        seconds = time.perf_counter() - began
        out, back = sum(each[2].nbytes for each in rows), sum(part.content.nbytes for part in answer.rows)
        with self._lock:
            self._figures += 1, len(ids), out, back, answer.busy_s, seconds - answer.busy_s
        return answer

    def figures(self) -> dict[str, float]:
        """Of all chunks: tokens, bytes of rows sent and received, seconds of computing there, and what came on top."""
        return dict(zip(_FIGURES, self._figures.tolist(), strict=True))

    def close(self) -> None:
        """Tell the readers that there is nothing more to do."""
        broken = self.world.links.broken
        before, broken[0] = int(broken[0]), 1  # ends the wait for a chunk that nobody wants
        self._threads.shutdown()
        broken[0] = before
        for reader in self._readers:
            with suppress(RankError):  # one that is gone need not be told
                send(self.world, reader.rank, END, np.zeros(0, np.uint8))


_FIGURES = ("chunks", "tokens", "bytes_out", "bytes_back", "computing_s", "on_top_s")
