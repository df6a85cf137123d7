"""How torch shares the cores with the workers of quant: threads that wait quietly, and memory that stays."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from localrun.models.config import Config
from quant.threads.pool import Pool

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


class TorchThreads:
    """How torch works while any native network is open: a setting of the whole process, so counted here.

    The workers of quant do the heavy part, on the same cores. torch's threads (OpenMP's) spin for milliseconds after
    each operation, unless told otherwise before they exist; where torch was imported before, one thread is faster
    (docs/lab-notes.md).
    """

    _SPINS = "1500"  # pauses: some 0.1 ms, longer than between operations and short beside a job of the workers
    _holders = 0
    _before = 1
    _yields = False  # whether the threads stop spinning soon
    # One of so many has 0.3 ms of work for a thread, 0.1 ms more than two take if both cores are free at once. Beside
    # other programs they are not: each operation waits until its last thread has run, and a chunk of 32 tokens of the
    # 16B shape took 4.2 s with two threads, 1.8 s with one.
    _ALONE = 1 << 18

    @classmethod
    def hold(cls, n_threads: int) -> None:
        """Let torch use n_threads if they yield to the workers, else one."""
        if "torch" not in sys.modules:
            os.environ.setdefault("GOMP_SPINCOUNT", cls._SPINS)
            cls._yields = True
        import torch

        if cls._holders == 0:
            cls._before = torch.get_num_threads()
            torch.set_num_threads(n_threads if cls._yields else 1)
            _keep_freed_memory()
        cls._holders += 1

    @classmethod
    def release(cls) -> None:
        """The last one brings back what was before."""
        import torch

        cls._holders -= 1
        if cls._holders == 0:
            torch.set_num_threads(cls._before)
            _give_freed_memory_back()

    @classmethod
    @contextmanager
    def for_tensors(cls, n_elements: int) -> Iterator[None]:
        """Within, torch uses one thread if what it works on has few elements."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(1 if n_elements <= cls._ALONE else before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def torch_at_work(pool: Pool, config: Config, n_tokens: int) -> Iterator[None]:
    """Within, torch has the cores for so many tokens of a model: the workers do not spin while they wait.

    Small tensors take one of its threads: (n_tokens, hidden_size) counts, as few operations are on a token's streams.
    """
    with pool.passive_wait(), TorchThreads.for_tensors(n_tokens * config.hidden_size):
        yield


def _keep_freed_memory() -> None:
    """Have glibc keep freed tensors' memory for the next ones: new pages cost more than most operations on them.

    Of any size, so none has pages of its own, which go when it is freed; up to what a chunk of a prompt takes.
    """
    libc = _libc()
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        libc.mallopt(_M_MMAP_MAX, 0)


def _give_freed_memory_back() -> None:
    """What was kept so."""
    libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
