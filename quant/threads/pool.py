"""Worker threads that run one kernel together, without the GIL.

A job is the address of a C function void(int64 arguments, int64 worker), compiled by jit.kernel. It takes work items
from a shared counter until there are none. The calling thread is worker 0. The others spin for about a millisecond
between jobs (a decode step hands out hundreds), then sleep. A worker that comes too late is not waited for: on a busy
machine a job then takes as long as on one core, instead of until the system finds time for the second
(docs/lab-notes.md).

Worker 0 need not be a Python thread: dispatch() is C code, which a GPU's driver may call from a thread of its own, once
a layer (host_node.py). While layers follow each other within a millisecond the other workers are awake when it does;
after longer waits it wakes them, a system call. That thread works on a core like any other worker, so whoever waits for
the GPU meanwhile should sleep, not spin: there are n_workers threads that compute, and no core is left for one more.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from quant.errors import QuantError
from quant.simd.struct import address, atomic, struct
from quant.target.jit import inline, kernel
from quant.threads.atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_2,
    pause,
    sleep_while_equal,
    wait_for,
    wake_all,
)
from quant.threads.numa import Spread

CONTROL = struct(
    "PoolControl",
    generation=atomic,  # of jobs
    tickets=atomic,  # workers who asked to join the job; _CLOSED is added when none may any more
    done=atomic,  # workers who have finished it
    stop=atomic,
    sleepers=atomic,
    spins=atomic,  # pauses before a worker sleeps
    job=address,
    arguments=address,
)
_CLOSED = 1 << 32
_PAGE = 4096
_SPINS = 20_000  # pauses of 40-140 cycles: about 1 ms


@kernel("void(int64, int64)")
def _work(control, worker):
    """A worker's life: wait for the next generation, join its job if that is still open, until stopped."""
    c, generation = CONTROL(control), np.int64(0)
    while True:
        spins = 0
        while atomic_load(c.generation) == generation:
            pause()
            spins += 1
            if spins > atomic_load(c.spins):
                atomic_add(c.sleepers, 1)
                while atomic_load(c.generation) == generation:
                    sleep_while_equal(c.generation, generation)
                atomic_add(c.sleepers, -1)
        generation = atomic_load(c.generation)
        if atomic_load(c.stop) != 0:
            return
        # The ticket may be one of the next job: then job and arguments, set before tickets are open, are that job's.
        if atomic_add(c.tickets, 1) < _CLOSED:
            call_2(c.job, c.arguments, worker)
            atomic_add(c.done, 1)


@inline
def dispatch(control, job, arguments):
    """Hand out a job, do worker 0's share of it, wait for those who joined. For one caller at a time."""
    c = CONTROL(control)
    c.job = job
    c.arguments = arguments
    atomic_store(c.done, 0)
    atomic_store(c.tickets, 0)
    atomic_add(c.generation, 1)
    if atomic_load(c.sleepers) > 0:
        wake_all(c.generation)
    call_2(job, arguments, 0)
    joined = atomic_add(c.tickets, _CLOSED)
    wait_for(c.done, joined)


@kernel("void(int64, int64, int64)")
def _dispatch(control, job, arguments):
    dispatch(control, job, arguments)


@kernel("void(int64, int64)")
def _set_spins(control, spins):
    atomic_store(CONTROL(control).spins, spins)


@kernel("void(int64)")
def _stop(control):
    c = CONTROL(control)
    atomic_store(c.stop, 1)
    atomic_add(c.generation, 1)
    wake_all(c.generation)


def aligned_bytes(n_bytes: int) -> np.ndarray:
    """uint8 (n_bytes,) of zeros, page aligned."""
    raw = np.zeros(n_bytes + _PAGE, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start : start + n_bytes]


def worker_bytes(n_bytes: int) -> int:
    """Bytes from the work memory of one worker, who needs n_bytes, to the next one's: whole pages and one between.

    A core that reads to the end of its memory fetches what follows, within a page. Lines that another core writes again
    and again would travel to and fro (docs/lab-notes.md).
    """
    return (-(-n_bytes // _PAGE) + 1) * _PAGE


def _live(block: np.ndarray, worker: int, spread: Spread) -> None:
    """A worker's thread. It holds the control block, which must not be freed while anybody looks at it."""
    spread.settle(worker)
    _work.ctypes(block.ctypes.data, worker)


def _end(block: np.ndarray, threads: list[threading.Thread]) -> None:
    """Tell the workers to stop, and wait until they have."""
    _stop.ctypes(block.ctypes.data)
    for thread in threads:
        thread.join()


class Pool:
    """`n_workers` threads, the caller included. One job at a time; close(), or losing the pool, ends the threads.

    Attributes:
        spread: the workers over NUMA nodes. The caller counts as one of the first node's, and stays where it is.
    """

    def __init__(self, n_workers: int, cores: Sequence[Sequence[int]] = ()):
        """Start the workers.

        Args:
            cores: of each NUMA node, to keep workers there; empty to let the system choose.

        Raises QuantError if n_workers < 1, or if so many can't be started: then none is left.
        """
        if n_workers < 1:
            raise QuantError(f"{n_workers} threads asked for; at least 1 is needed")
        self.n_workers, self.spread = n_workers, Spread(n_workers, cores)
        self._block = CONTROL.zeros()
        self.control = self._block.ctypes.data
        _set_spins.ctypes(self.control, _SPINS)
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[int, int, np.ndarray]] = {}  # address, size, owner
        self._threads: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _end, self._block, self._threads)
        for worker in range(1, n_workers):
            arguments = self._block, worker, self.spread
            thread = threading.Thread(target=_live, args=arguments, daemon=True, name=f"localrun-{worker}")
            try:
                thread.start()
            except RuntimeError:
                self._finalizer()
                raise QuantError(f"{n_workers} threads can't be started here") from None
            self._threads.append(thread)

    def run(self, job: int, arguments: np.ndarray) -> None:
        """Run the kernel at address `job` on the workers; returns when it is done. `arguments`: int64, C order."""
        with self._lock:
            _dispatch.ctypes(self.control, job, arguments.ctypes.data)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Within, nobody's run() hands out jobs, the caller's own neither: others that hold `control` do it."""
        with self._lock:
            yield

    @contextmanager
    def passive_wait(self) -> Iterator[None]:
        """Within, workers sleep as soon as a job ends: what the caller does between jobs has use for all cores."""
        _set_spins.ctypes(self.control, 0)
        try:
            yield
        finally:
            _set_spins.ctypes(self.control, _SPINS)

    def buffer(self, name: str, n_bytes: int) -> int:
        """Address of a work buffer of at least n_bytes, page aligned; kept for the next job that asks by `name`."""
        address, size, _ = self._buffers.get(name, (0, -1, None))
        if size < n_bytes:
            array = aligned_bytes(n_bytes)
            address = array.ctypes.data
            self._buffers[name] = (address, n_bytes, array)
        return address

    def close(self) -> None:
        """End the worker threads; the pool can't run jobs afterwards."""
        with self._lock:
            self._finalizer()
