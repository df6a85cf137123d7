"""The worker pool: every unit of a job is done once, by whoever has time; threads end."""

import gc
import threading
import time

import numpy as np
import pytest

from quant.errors import QuantError
from quant.simd.memory import load_i64
from quant.target.jit import kernel
from quant.threads.atomics import atomic_add
from quant.threads.pool import Pool, worker_bytes


@kernel("void(int64, int64)")
def _take(arguments, worker):
    """Count each unit by its number and by who took it: [counter, n_units, by unit.., by worker..]."""
    n_units = load_i64(arguments + 8)
    while True:
        unit = atomic_add(arguments, 1)
        if unit >= n_units:
            break
        atomic_add(arguments + 16 + 8 * unit, 1)
        atomic_add(arguments + 16 + 8 * (n_units + worker), 1)


def take(pool: Pool, n_units: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each unit was done, and how many units each worker did."""
    arguments = np.zeros(2 + n_units + pool.n_workers, np.int64)
    arguments[1] = n_units
    pool.run(_take.address, arguments)
    return arguments[2 : 2 + n_units], arguments[2 + n_units :]


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_every_unit_is_done_once_when_run_returns(n_workers):
    pool = Pool(n_workers)
    for n_units in [1, 2, 1000] * 100:
        by_unit, by_worker = take(pool, n_units)
        assert by_unit.tolist() == [1] * n_units
        assert by_worker.sum() == n_units
    time.sleep(0.05)  # long enough for the workers to fall asleep
    assert take(pool, 1000)[0].tolist() == [1] * 1000
    pool.close()


@pytest.mark.serial
def test_the_other_workers_take_part():
    pool = Pool(3)
    others = sum(take(pool, 200_000)[1][1:].sum() for _ in range(20))
    pool.close()
    assert others > 0


@pytest.mark.serial
def test_idle_workers_sleep_and_close_ends_them():
    pool = Pool(2)
    take(pool, 100)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1  # a spinning worker would use all of the 0.3 s
    workers = pool._threads
    assert workers and all(thread.is_alive() for thread in workers)
    pool.close()
    assert not any(thread.is_alive() for thread in workers)


def busy_seconds(pool: Pool) -> float:
    """Processor time of 100 short jobs with 2 ms between them."""
    before = time.process_time()
    for _ in range(100):
        take(pool, 1)
        time.sleep(0.002)
    return time.process_time() - before


@pytest.mark.serial
def test_passive_waiters_do_not_spin() -> None:
    pool = Pool(2)
    lively = busy_seconds(pool)
    with pool.passive_wait():
        passive = busy_seconds(pool)
    again = busy_seconds(pool)
    pool.close()
    assert passive < 0.5 * min(lively, again)  # a lively worker spins for about 1 ms of each 2


def test_buffers_grow_and_are_kept():
    pool = Pool(1)
    small = pool.buffer("a", 100)
    assert small % 64 == 0
    assert pool.buffer("a", 50) == small
    assert pool.buffer("a", 1 << 20) % 64 == 0
    pool.close()


@pytest.mark.parametrize("n_bytes", [1, 4095, 4096, 4097, 20_672])
def test_memory_of_workers_is_a_page_apart(n_bytes):
    """Whatever a worker uses, a whole page lies between its last line's page and the next worker's first."""
    last_page, next_page = (n_bytes - 1) // 4096, worker_bytes(n_bytes) // 4096
    assert worker_bytes(n_bytes) % 4096 == 0 and next_page - last_page == 2
    assert Pool(1).buffer("a", 2 * worker_bytes(n_bytes)) % 4096 == 0


def test_no_workers():
    with pytest.raises(QuantError, match="0 threads"):
        Pool(0)


def test_where_not_all_can_start_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started, start = [], threading.Thread.start

    def two_start(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", two_start)
    with pytest.raises(QuantError, match="5 threads can't be started here"):
        Pool(5)
    assert not any(thread.is_alive() for thread in started)


def test_a_lost_pool_ends_its_threads() -> None:
    """They would look at freed memory otherwise, and count in it."""
    pool = Pool(3)
    threads = list(pool._threads)
    assert all(thread.is_alive() for thread in threads)
    del pool
    gc.collect()
    assert not any(thread.is_alive() for thread in threads)
