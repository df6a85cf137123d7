"""Bringing a mapped file into memory while the program already works: without it every expert's first use pays page
faults, 0.2 ms a megabyte even when the file is cached (docs/lab-notes.md)."""

import ctypes
import threading

from localrun import hardware
from localrun.gguf import GGUFFile

_POPULATE_READ = 22  # MADV_POPULATE_READ, linux/mman.h; since Linux 5.14
_STEP_BYTES = 1 << 28


class Resident:
    """A thread that brings a file into memory, if it fits in what is free; close() before the file is."""

    def __init__(self, file: GGUFFile):
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._populate, daemon=True, name="localrun-resident")
        self._spans = file.spans
        if file.file_size < hardware.free_ram():
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
