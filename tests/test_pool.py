"""The worker pool: every worker runs every job once, barriers hold, threads end."""

import threading
import time

import numpy as np
import pytest

from quant.atomics import atomic_add
from quant.errors import QuantError
from quant.jit import kernel
from quant.pool import Pool, barrier
from quant.simd import load_i64, store_i64


@kernel("void(int64, int64)")
def _count(arguments, worker):
    atomic_add(arguments + 8 * worker, 1)


@kernel("void(int64, int64)")
def _meet(arguments, worker):
    """Each worker writes its number, and after the barrier reads the other's: [control, n, written.., read..]."""
    control, n_workers = load_i64(arguments), load_i64(arguments + 8)
    for step in range(100):
        store_i64(arguments + 16 + 8 * worker, step + 1)
        barrier(control, n_workers)
        if load_i64(arguments + 16 + 8 * ((worker + 1) % n_workers)) != step + 1:
            atomic_add(arguments + 16 + 8 * n_workers, 1)
        barrier(control, n_workers)


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_every_worker_runs_every_job(n_workers):
    pool = Pool(n_workers)
    counts = np.zeros(n_workers, np.int64)
    for _ in range(50):
        pool.run(_count.address, counts)
    time.sleep(0.05)  # long enough for the workers to fall asleep
    pool.run(_count.address, counts)
    pool.close()
    assert counts.tolist() == [51] * n_workers


def test_barriers_hold():
    pool = Pool(3)
    arguments = np.zeros(6, np.int64)
    arguments[:2] = pool.control, pool.n_workers
    pool.run(_meet.address, arguments)
    pool.close()
    assert arguments[2:].tolist() == [100, 100, 100, 0]


def test_idle_workers_sleep_and_close_ends_them():
    pool = Pool(2)
    pool.run(_count.address, np.zeros(2, np.int64))
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # a spinning worker would use all of the 0.3 s
    pool.close()
    assert not any(thread.name.startswith("localrun-") for thread in threading.enumerate())


def test_buffers_grow_and_are_kept():
    pool = Pool(1)
    small = pool.buffer("a", 100)
    assert small % 64 == 0
    assert pool.buffer("a", 50) == small
    assert pool.buffer("a", 1 << 20) % 64 == 0
    pool.close()


def test_no_workers():
    with pytest.raises(QuantError, match="0 threads"):
        Pool(0)
