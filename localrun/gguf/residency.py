"""Bringing a mapped file into memory while the program already works: without it every expert's first use pays page
faults, 0.2 ms a megabyte even when the file is cached (docs/lab-notes.md). And letting go of what is elsewhere now."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence

from localrun import hardware
from localrun.gguf.file import GGUFFile

_DONTNEED, _POPULATE_READ = 4, 22  # of linux/mman.h, MADV_POPULATE_READ since Linux 5.14
_STEP_BYTES = 1 << 28

Span = tuple[int, int]  # address and bytes


class Resident:
    """A thread that brings a file into memory, if it fits in what is free; close() before the file is."""

    def __init__(self, file: GGUFFile, spans: Sequence[Span] | None = None):
        """spans: the parts of the file's maps to bring in; None for all."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._populate, daemon=True, name="localrun-resident")
        self._spans = file.spans if spans is None else [_pages(span) for span in spans]
        if sum(n_bytes for _, n_bytes in self._spans) < hardware.free_ram():
            self._thread.start()

    def _populate(self) -> None:
        libc = ctypes.CDLL(None)
        for start, n_bytes in self._spans:
            for at in range(start, start + n_bytes, _STEP_BYTES):
                count = min(_STEP_BYTES, start + n_bytes - at)
                arguments = ctypes.c_void_p(at), ctypes.c_size_t(count), ctypes.c_int(_POPULATE_READ)
                if self._stop.is_set() or libc.madvise(*arguments) != 0:
                    return  # an older kernel: pages come as they are used

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


def _pages(span: Span) -> Span:
    """The whole pages that a span touches."""
    first, end = span[0] // mmap.PAGESIZE, -(-(span[0] + span[1]) // mmap.PAGESIZE)
    return first * mmap.PAGESIZE, (end - first) * mmap.PAGESIZE
