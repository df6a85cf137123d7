"""A file mapped into memory, and ways to the same bytes for libraries that take nothing but a path.

The descriptor stays open, so that whoever reads the file later reads the one that was checked, whatever its name leads
to by then.
"""

from __future__ import annotations

import mmap
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import finalize

from localrun.errors import GGUFError
from localrun.files import nameless_file

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # linux/mman.h; named by newer Pythons only
_DESCRIPTORS = Path("/proc/self/fd")  # Linux: opening an entry opens the file itself, for a child process as well


class MappedFile:
    """An open file.

    Attributes:
        map: all of it, private and copy-on-write.
        descriptor: of the file.

    Raises GGUFError if it cannot be opened, is empty, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mode = path.stat().st_mode  # before open, which would wait for ever on a pipe
            if not stat.S_ISREG(mode):
                kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
                raise GGUFError(f"{path}: is {kind}, expected a GGUF file")
            with path.open("rb") as file:
                self.descriptor = os.dup(file.fileno())
            self._close = finalize(self, os.close, self.descriptor)
            self._opened = os.fstat(self.descriptor)
            if not self._opened.st_size:
                raise GGUFError(f"{path}: is empty (0 bytes), expected a GGUF file")
            self.map = _map_private(self.descriptor, self._opened.st_size)
        except FileNotFoundError:
            raise GGUFError(f"{path}: no such file") from None
        except OSError as error:
            raise GGUFError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:  # a NUL in the path, or a file that became shorter just now
            raise GGUFError(f"{path}: cannot be read: {error}") from None

    @property
    def same_path(self) -> str:
        """A path to this very file; where the system has no such path, the name that it was opened by."""
        return str(_DESCRIPTORS / str(self.descriptor)) if _DESCRIPTORS.exists() else str(self.path)

    def check_same(self) -> None:
        """For whoever has read same_path: raises GGUFError unless that was this file, as it was when it was opened."""
        self.check_unchanged()
        if self.same_path == str(self.path) and self.was_replaced():
            raise GGUFError(f"{self.path}: was replaced just now; open it again")

    def check_unchanged(self) -> None:
        """Raises GGUFError if the file, unless closed, was written to, or cut short, since it was opened."""
        if not self._close.alive:
            return
        now, then = os.fstat(self.descriptor), self._opened
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
            raise GGUFError(f"{self.path}: was written to while it was in use; open it again")

    def was_replaced(self) -> bool:
        """Whether another file has its name now; the one that was opened stays as it is."""
        try:
            return not os.path.samestat(os.stat(self.path), self._opened)
        except OSError:  # removed, or out of reach: nobody can take something else for it
            return False

    @property
    def identity(self) -> tuple[int, ...]:
        """The same for the same content, as far as the system can tell."""
        return self._opened.st_dev, self._opened.st_ino, self._opened.st_size, self._opened.st_mtime_ns

    def close(self) -> None:
        """Let go of the file. Views of the map that others still hold stay valid."""
        with suppress(BufferError):  # raised while a view of the map is alive
            self.map.close()
        self._close()


def _map_private(fd: int, size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
    # ACCESS_COPY plus NORESERVE: without it Linux refuses to map a file larger than RAM and swap, as if all of it might
    # be written to, and such a model could not even be inspected.
    return mmap.mmap(fd, size, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)


@contextmanager
def path_of(content: bytes) -> Iterator[str]:
    """A path at which content can be read as long as the context lasts; on Linux it takes no room on any disk.

    Raises LocalrunError or OSError where a temporary file is needed and none can be written.
    """
    if _DESCRIPTORS.exists():
        with nameless_file() as file:
            file.write(content)
            file.flush()
            yield str(_DESCRIPTORS / str(file.fileno()))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "content")
        path.write_bytes(content)
        yield str(path)
