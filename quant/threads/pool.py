"""Worker threads that run one kernel together, without the GIL.

A job is the address of a C function void(int64 arguments, int64 worker), compiled by jit.kernel, that takes units of
work from a shared counter until there are none. The calling thread is worker 0; the others spin for about a millisecond
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
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from quant.errors import QuantError
from quant.simd.memory import load_i64, store_i64
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

# The control block: words on cache lines of their own.
_LINE = 64
GENERATION, JOB, ARGUMENTS, TICKETS, DONE, STOP, SLEEPERS, SPINS = (i * _LINE for i in range(8))
_CONTROL_BYTES = 8 * _LINE
_CLOSED = 1 << 32  # added to TICKETS when no worker may join the job any more
_PAGE = 4096
_SPINS = 20_000  # pauses of 40-140 cycles: about 1 ms


@kernel("void(int64, int64)")
def _work(control, worker):
    """A worker's life: wait for the next generation, join its job if that is still open, until stopped."""
    generation = np.int64(0)
    while True:
        spins = 0
        while atomic_load(control + GENERATION) == generation:
            pause()
            spins += 1
            if spins > atomic_load(control + SPINS):
                atomic_add(control + SLEEPERS, 1)
                while atomic_load(control + GENERATION) == generation:
                    sleep_while_equal(control + GENERATION, generation)
                atomic_add(control + SLEEPERS, -1)
        generation = atomic_load(control + GENERATION)
        if atomic_load(control + STOP) != 0:
            return
        # The ticket may be one of the next job: then JOB and ARGUMENTS, set before TICKETS is opened, are that job's.
        if atomic_add(control + TICKETS, 1) < _CLOSED:
            call_2(load_i64(control + JOB), load_i64(control + ARGUMENTS), worker)
            atomic_add(control + DONE, 1)


@inline
def dispatch(control, job, arguments):
    """Hand out a job, do worker 0's share of it, wait for those who joined. For one caller at a time."""
    store_i64(control + JOB, job)
    store_i64(control + ARGUMENTS, arguments)
    atomic_store(control + DONE, 0)
    atomic_store(control + TICKETS, 0)
    atomic_add(control + GENERATION, 1)
    if atomic_load(control + SLEEPERS) > 0:
        wake_all(control + GENERATION)
    call_2(job, arguments, 0)
    joined = atomic_add(control + TICKETS, _CLOSED)
    wait_for(control + DONE, joined)


@kernel("void(int64, int64, int64)")
def _dispatch(control, job, arguments):
    dispatch(control, job, arguments)


@kernel("void(int64, int64)")
def _set_spins(control, spins):
    atomic_store(control + SPINS, spins)


@kernel("void(int64)")
def _stop(control):
    atomic_store(control + STOP, 1)
    atomic_add(control + GENERATION, 1)
    wake_all(control + GENERATION)


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


def _live(block: np.ndarray, worker: int) -> None:
    """A worker's thread. It holds the control block, which must not be freed while anybody looks at it."""
    _work.ctypes(block.ctypes.data, worker)


def _end(block: np.ndarray, threads: list[threading.Thread]) -> None:
    """Tell the workers to stop, and wait until they have."""
    _stop.ctypes(block.ctypes.data)
    for thread in threads:
        thread.join()


class Pool:
    """`n_workers` threads, the caller included. One job at a time; close(), or losing the pool, ends the threads."""

    def __init__(self, n_workers: int):
        """Start the workers. Raises QuantError if n_workers < 1."""
        if n_workers < 1:
            raise QuantError(f"{n_workers} threads asked for; at least 1 is needed")
        self.n_workers = n_workers
        self._block = aligned_bytes(_CONTROL_BYTES)
        self.control = self._block.ctypes.data
        _set_spins.ctypes(self.control, _SPINS)
        self._lock = threading.Lock()
        self._buffers: dict[str, tuple[int, int, np.ndarray]] = {}  # address, size, owner
        self._threads = [
            threading.Thread(target=_live, args=(self._block, worker), daemon=True, name=f"localrun-{worker}")
            for worker in range(1, n_workers)
        ]
        for thread in self._threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _end, self._block, self._threads)

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
    def drowsy(self) -> Iterator[None]:
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
