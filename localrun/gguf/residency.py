"""Bringing a mapped file into memory while the program already works: without it every expert's first use pays page
faults, 0.2 ms a megabyte even when the file is cached (docs/lab-notes.md). And letting go of what is elsewhere now."""

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from localrun import hardware
from localrun.gguf.file import GGUFFile
from localrun.gguf.numa_pages import move_to_node

_DONTNEED, _POPULATE_READ = 4, 22  # of linux/mman.h, MADV_POPULATE_READ since Linux 5.14
_STEP_BYTES = 1 << 28

Span = tuple[int, int]  # address and bytes


@dataclass(frozen=True)
class Near:
    """What the workers of a NUMA node read first.

    Attributes:
        node: its number.
        cores: those of the node's that this process may run on.
    """

    node: int
    cores: Sequence[int]
    spans: Sequence[Span]


class Resident:
    """A thread that brings a file into memory, if it fits in what is free; close() before the file is.

    Before that a thread on each NUMA node brings in what is to lie there: a page comes to the node that asks for it
    first. What another program's reading has brought elsewhere is moved.
    """

    def __init__(self, file: GGUFFile, spans: Sequence[Span] | None = None, near: Sequence[Near] = ()):
        """spans: the parts of the file's maps to bring in; None for all."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._populate, daemon=True, name="localrun-resident")
        self._spans = file.spans if spans is None else [_pages(span) for span in spans]
        self._near = near
        if sum(n_bytes for _, n_bytes in self._spans) < hardware.free_ram():
            self._thread.start()

    def _populate(self) -> None:
        threads = [threading.Thread(target=self._bring_near, args=(near,), daemon=True) for near in self._near]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for span in self._spans:
            if not self._bring(span):
                return

    def _bring_near(self, near: Near) -> None:
        with suppress(OSError):
            os.sched_setaffinity(0, near.cores)
        for span in map(_pages, near.spans):
            if not self._bring(span):
                return
            move_to_node(*span, near.node)

    def _bring(self, span: Span) -> bool:
        """Whether it could be done, and is to go on."""
        libc, (start, n_bytes) = ctypes.CDLL(None), span
        for at in range(start, start + n_bytes, _STEP_BYTES):
            count = min(_STEP_BYTES, start + n_bytes - at)
            arguments = ctypes.c_void_p(at), ctypes.c_size_t(count), ctypes.c_int(_POPULATE_READ)
            if self._stop.is_set() or libc.madvise(*arguments) != 0:
                return False  # an older kernel: pages come as they are used
        return True

    def wait(self) -> None:
        """Until all is in memory, or never will be."""
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self.wait()


def let_go(spans: Sequence[Span]) -> None:
    """Unmap pages that lie within, until they are used again: they stay cached only as long as nothing else needs room.

    For maps that nobody writes to; a page that was written to would be read from the file again.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, n_bytes in spans:
        first, end = -(-start // mmap.PAGESIZE), (start + n_bytes) // mmap.PAGESIZE
        if first < end:
            at, count = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t((end - first) * mmap.PAGESIZE)
            libc.madvise(at, count, ctypes.c_int(_DONTNEED))


def own_memory(n_bytes: int) -> np.ndarray:
    """uint8 (n_bytes,) of zeros that go back to the system with their last view; malloc keeps memory for the next.

    Raises MemoryError.
    """
    try:
        memory = mmap.mmap(-1, n_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from None
    with suppress(OSError, AttributeError):  # a system without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def within(spans: Sequence[Span], maps: Sequence[Span]) -> list[Span]:
    """Those of the spans that lie in one of the maps."""
    return [
        (start, n_bytes)
        for start, n_bytes in spans
        if any(first <= start and start + n_bytes <= first + length for first, length in maps)
    ]


def _pages(span: Span) -> Span:
    """The whole pages that a span touches."""
    first, end = span[0] // mmap.PAGESIZE, -(-(span[0] + span[1]) // mmap.PAGESIZE)
    return first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE
