"""Ranks as threads of this process: MPI's three functions over a dictionary, called by their addresses as MPI's are."""

from __future__ import annotations

import ctypes
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from localrun.cpu.reader import serve_reading
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.models.reader import read_config
from localrun.ranks.sharing import Ranks, Sharing
from localrun.ranks.worker import serve_share
from localrun.ranks.world import RankError, World
from quant.threads.links import Links

_START, _TEST = (ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * n) for n in (7, 3))
_SHORT = 1000  # bytes
Key = tuple[int, int, int]  # from, to, tag


class Post:
    """Delivers bytes between ranks, in order by sender, receiver and tag; a communicator is the rank's own number.

    As with MPI, a short message is copied when it is sent, a longer one is taken from where it is when it is received.

    Attributes:
        dead: ranks whose messages don't arrive, nor those to them.
        error: what isend returns to rank 0 from now on, without sending.
        n_sent, n_messages: bytes and messages by sender and receiver.
    """

    def __init__(self) -> None:
        self.dead: set[int] = set()
        self.error = 0
        self.n_sent: Counter[tuple[int, int]] = Counter()
        self.n_messages: Counter[tuple[int, int]] = Counter()
        self._lock = threading.Lock()
        self._sent: Counter[Key] = Counter()
        self._asked: Counter[Key] = Counter()
        self._content: dict[tuple[Key, int], bytes | tuple[int, int]] = {}  # of long ones address and size
        self._requests: list[tuple[Key, int, int, int]] = []  # address 0: to send
        self.functions = _START(self._isend), _START(self._irecv), _TEST(self._test)

    def links(self, rank: int) -> Links:
        return Links(*(ctypes.cast(f, ctypes.c_void_p).value for f in self.functions), 0, rank, owner=self)

    def _isend(self, at: int, n_bytes: int, byte: int, to: int, tag: int, rank: int, request: int) -> int:
        if self.error and rank == 0:
            return self.error
        with self._lock:
            key, is_long = (rank, to, tag), n_bytes > _SHORT
            if not {rank, to} & self.dead:
                self._content[key, self._sent[key]] = (at, n_bytes) if is_long else ctypes.string_at(at, n_bytes)
                self.n_sent[rank, to] += n_bytes
                self.n_messages[rank, to] += 1
            self._begin(request, key, self._sent, 0, 0)
            if not is_long:
                ctypes.c_int64.from_address(request).value = 0
            return 0

    def _irecv(self, at: int, n_bytes: int, byte: int, source: int, tag: int, rank: int, request: int) -> int:
        with self._lock:
            self._begin(request, (source, rank, tag), self._asked, at, n_bytes)
            return 0

    def _begin(self, request: int, key: Key, counts: Counter[Key], at: int, n_bytes: int) -> None:
        self._requests.append((key, counts[key], at, n_bytes))
        counts[key] += 1
        ctypes.c_int64.from_address(request).value = len(self._requests)

    def _test(self, request: int, flag: int, status: int) -> int:
        with self._lock:
            number = ctypes.c_int64.from_address(request)
            if number.value and self._is_done(*self._requests[number.value - 1]):
                number.value = 0
            ctypes.c_int32.from_address(flag).value = number.value == 0
            return 0

    def _is_done(self, key: Key, count: int, at: int, n_bytes: int) -> bool:
        content = self._content.get((key, count))
        if at == 0:
            return content is None
        if content is None:
            return False
        source, size = (content, len(content)) if isinstance(content, bytes) else content
        assert size <= n_bytes, "a message is longer than its buffer"
        ctypes.memmove(at, source, size)
        del self._content[key, count]
        return True


@contextmanager
def in_process(
    path: Path, n_ranks: int, sharing: Sharing, post: Post | None = None, threads: int = 1
) -> Iterator[Ranks]:
    """Ranks 1.. serve shares of a model within; given is what rank 0 loads it with, and must close."""
    with _living(path, n_ranks, post, lambda file, world: serve_share(file, world, sharing, threads)) as world:
        yield Ranks(world, sharing)


@contextmanager
def reading_in_process(path: Path, n_readers: int = 1, post: Post | None = None) -> Iterator[World]:
    """The same of readers: they read prompts within."""
    with _living(
        path, 1 + n_readers, post, lambda file, world: serve_reading(file, read_config(file), world, 2)
    ) as world:
        yield world


@contextmanager
def _living(path: Path, n_ranks: int, post: Post | None, serve: Callable[[GGUFFile, World], None]) -> Iterator[World]:
    """Ranks 1.. serve within; given is rank 0's world."""
    post = post or Post()
    names = [f"rank {rank}" for rank in range(n_ranks)]
    worlds = [World(rank, names, post.links(rank)) for rank in range(n_ranks)]
    raised: list[BaseException] = []

    def live(world: World) -> None:
        try:
            with open_gguf(path) as file:
                serve(file, world)
        except BaseException as error:
            raised.append(error)
            worlds[0].fail(world.rank, str(error))

    lives = [threading.Thread(target=live, args=(world,), daemon=True) for world in worlds[1:]]
    for thread in lives:
        thread.start()
    try:
        yield worlds[0]
    finally:
        for world in worlds[1:]:
            if post.dead or post.error or worlds[0].failure:  # as where connections close
                world.fail(0, "over")
        for thread in lives:
            thread.join(10)
            assert not thread.is_alive()
    with suppress(RankError):
        for error in raised:
            raise error
