"""The engine's one thread, and whose turn it is, in rounds: a step of all running replies, then a chunk of a prompt.

Replies share the step where the model can: each weight is read once for all of them. Only a reply that runs alone has
drafts verified. Where replies can't share, each takes a step of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localrun.engine import Engine
from localrun.errors import ClosedError, LocalrunError
from localrun.generate.session import Session
from localrun.generate.together import step_together
from localrun.serve.chunks import ChunkSize
from localrun.serve.job import Job
from localrun.serve.prefixes import Prefixes
from localrun.serve.store import Store

MOST_WAITING = 64  # replies
MOST_PAUSE_S = 1.0  # of a running reply, while others' prompts are read
_LOOK_S = 0.02  # that a prompt waits for another host to read it before the next one has its turn


class QueueFullError(LocalrunError):
    """Too many replies wait already.

    Attributes:
        retry_after_s: when there may be room.
    """

    def __init__(self, waiting: int, retry_after_s: int):
        super().__init__(f"{waiting} replies are waiting already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass
class Totals:
    """Since the start: replies that have ended, and the tokens and seconds of computing that they took."""

    replies: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    decode_s: float = 0.0
    reply_s: float = 0.0  # from a job's first turn to its end


@dataclass(eq=False)
class _Running:
    """A job at work. Its memory is its session's."""

    job: Job
    session: Session
    units: Iterator[None]
    started: float


class Scheduler:
    """Runs jobs on an engine, `slots` at once; the others wait in the order in which they came.

    Attributes:
        totals: for whoever watches; whole numbers and sums that only the engine thread changes.

    Args:
        most_pause_s: the seconds between two tokens of a running reply that reading prompts should keep to.
        store: where conversations go that there is no room for.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int,
        cache_bytes: int,
        most_waiting: int = MOST_WAITING,
        most_pause_s: float = MOST_PAUSE_S,
        store: Store | None = None,
    ):
        self.totals = Totals()
        self._engine, self._slots, self._most_waiting = engine, slots, most_waiting
        self._most_pause_s, self._chunk_size = most_pause_s, ChunkSize(engine.model.least_chunk)
        self._left_s: float | None = None  # for the chunk at hand; None where no reply waits for it
        self._prefixes = Prefixes(engine, cache_bytes, slots, store)
        self._waiting: list[Job] = []
        self._running: list[_Running] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Replies at work."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Replies that have not begun."""
        return len(self._waiting)

    @property
    def cached_bytes(self) -> int:
        """Of finished conversations that are kept."""
        return self._prefixes.n_bytes

    def submit(self, jobs: Sequence[Job]) -> None:
        """Have jobs done, all or none. Raises QueueFullError, or ClosedError after close()."""
        with self._changed:
            if self._is_closed:
                raise ClosedError("the server is shutting down")
            if len(self._waiting) + len(jobs) > self._most_waiting + self._slots - len(self._running):
                self.totals.refused += len(jobs)
                raise QueueFullError(len(self._waiting), self._wait_s())
            self._waiting += jobs
            self._changed.notify()

    def close(self, keep: bool = True) -> None:
        """Cancel what is left, and end the thread after the chunk or step that it is at.

        keep: have the store hold what is kept, which takes as long as writing it.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        if keep:
            self._prefixes.close()

    def _wait_s(self) -> int:
        """About how long until one of those that wait begins."""
        mean = self.totals.reply_s / self.totals.replies if self.totals.replies else 1.0
        return max(1, min(math.ceil(mean * len(self._waiting) / self._slots), 600))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._running or self._is_closed)
                if self._is_closed:
                    for job in [*self._waiting, *(running.job for running in self._running)]:
                        job.cancelled = True
                starting = self._next_jobs()
            for job in starting:
                self._start(job)
            self._round()
            if self._is_closed and not self._waiting and not self._running:
                return

    def _next_jobs(self) -> list[Job]:
        """Jobs that leave the queue: the cancelled ones, and for each free slot one that can start."""
        free = self._slots - len(self._running)
        leaving = [job for job in self._waiting if job.cancelled]
        leaving += [job for job in self._waiting if job.can_start and not job.cancelled][:free]
        self._waiting = [job for job in self._waiting if job not in leaving]
        return leaving

    def _start(self, job: Job) -> None:
        if job.cancelled:
            self._end(job)
            return
        try:
            session = self._prefixes.take(job.ids, [running.session for running in self._running])
        except Exception as error:  # no memory for a cache, say: the other replies go on
            job.error = error
            self._end(job)
            return
        units = job.units(self._engine, session, self._piece, self._patience_s)
        self._running.append(_Running(job, session, units, time.perf_counter()))

    def _round(self) -> None:
        """A step of all replies, then a chunk of the prompt that has waited longest."""
        started = time.perf_counter()
        for running in [running for running in self._running if running.job.cancelled]:
            self._turn(running)
        replying = [running for running in self._running if running.job.has_read]
        self._share_step(replying)
        for running in replying:
            self._turn(running)
        reading = next((running for running in self._running if not running.job.has_read), None)
        if reading:
            taken_s = time.perf_counter() - started
            self._left_s = max(0.0, self._most_pause_s - taken_s) if replying else None
            self._running.remove(reading)
            self._running.append(reading)
            self._read(reading)

    def _share_step(self, replying: Sequence[_Running]) -> None:
        """Have those evaluated together that need a step; each takes what comes of it at its turn."""
        ready = [each for each in replying if not each.job.cancelled and each.session.next_id is not None]
        if len(ready) < 2 or self._engine.model.most_together < 2:
            return
        try:
            step_together([running.session for running in ready])
        except Exception as error:  # of the file or the machine: a row that is no number is its own reply's
            for running in ready:
                running.job.error = error

    def _read(self, reading: _Running) -> None:
        """A chunk of its prompt."""
        started, before, was_elsewhere = time.perf_counter(), len(reading.session.ids), reading.job.is_elsewhere
        self._turn(reading)
        if self._left_s is not None and not was_elsewhere:
            self._chunk_size.record(len(reading.session.ids) - before, time.perf_counter() - started)

    def _piece(self, n_left: int) -> int:
        """How many tokens of a prompt to read now, of those that are left of what is read at once in an idle hour."""
        return n_left if self._left_s is None else self._chunk_size.next(self._left_s, n_left)

    def _patience_s(self) -> float:
        """How long a prompt may wait for another host: not at all where replies are running."""
        return _LOOK_S if self._left_s is None else 0.0

    def _turn(self, running: _Running) -> None:
        """One unit of its work, or its end."""
        job = running.job
        try:
            if not job.cancelled and job.error is None:
                next(running.units)
                return
        except StopIteration:
            pass
        except Exception as error:  # whatever it is, it is this reply's: the client is told, the others go on
            job.error = error
        running.units.close()  # type: ignore[attr-defined]
        self._running.remove(running)
        self.totals.reply_s += time.perf_counter() - running.started
        if job.error is None:
            self._prefixes.keep(running.session)
        self._end(job)

    def _end(self, job: Job) -> None:
        totals, usage = self.totals, job.usage
        totals.replies += 1
        totals.cancelled += job.finish_reason is None and job.error is None
        totals.failed += job.error is not None
        totals.prompt_tokens += usage.prompt_tokens
        totals.cached_tokens += usage.cached_tokens
        totals.prompt_s += usage.prompt_s
        totals.generated_tokens += usage.stats.generated_tokens
        totals.decode_s += usage.stats.decode_s
        job.ended = True
        job.deliver(None)
