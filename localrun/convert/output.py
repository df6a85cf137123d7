"""Writes the parts of a converted model beside their final names, and renames them when all is on the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from localrun.convert.journal import Journal
from localrun.convert.layout import Layout
from localrun.errors import LocalrunError

SYNC_BYTES = 256 << 20  # written between two syncs: what a crash costs, and seldom enough not to be felt


class Output:
    """The parts of one conversion, open for writing.

    Attributes:
        done: units that an earlier run has written.
    """

    def __init__(self, layout: Layout, destination: Path, fingerprint: str, sync_bytes: int = SYNC_BYTES) -> None:
        """Begin, or go on where the journal says. Raises LocalrunError, OSError."""
        self._layout, self._sync_bytes = layout, sync_bytes
        self._journal = Journal(journal_path(destination), fingerprint)
        self._fds: list[int] = []
        try:
            self.done = self._journal.done if self._journal.complete or self._all_there() else 0
            if not self._journal.complete:
                check_space(layout, destination)
                self._open()
        except BaseException:
            self.close()
            raise
        self._units_written, self._unsynced = self.done, 0

    def _all_there(self) -> bool:
        """Whether the partial files are as the journal left them; else its units are void."""
        return all(
            partial_path(part.path).exists() and partial_path(part.path).stat().st_size == part.size
            for part in self._layout.parts
        )

    def _open(self) -> None:
        for part in self._layout.parts:
            fd = os.open(partial_path(part.path), os.O_RDWR | os.O_CREAT, 0o644)
            self._fds.append(fd)
            os.ftruncate(fd, part.size)
            self._write(fd, part.header, 0)

    def write(self, part: int, offset: int, data: np.ndarray) -> None:
        """The bytes of the next unit, in order of units; synced and journalled now and then. Raises OSError."""
        self._write(self._fds[part], data, offset)
        self._units_written += 1
        self._unsynced += data.nbytes
        if self._unsynced >= self._sync_bytes:
            self.sync()

    @staticmethod
    def _write(fd: int, data: bytes | np.ndarray, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            n_written = os.pwrite(fd, view, offset)
            view, offset = view[n_written:], offset + n_written

    def sync(self) -> None:
        """Bring all that is written to the disk, and note it. Raises OSError."""
        if not self._journal.complete:
            for fd in self._fds:
                os.fsync(fd)
            self._journal.record(self._units_written)
            self._unsynced = 0

    def finish(self) -> None:
        """Give the parts their names, the first one last: who finds it finds a whole model. Raises OSError."""
        if not self._journal.complete:
            for fd in self._fds:
                os.fsync(fd)
            self._journal.record(self._units_written, complete=True)
        for part in reversed(self._layout.parts):
            if partial_path(part.path).exists():  # else an earlier run got as far
                os.replace(partial_path(part.path), part.path)
        _sync_folder(self._layout.parts[0].path.parent)
        self._journal.remove()

    def discard(self) -> None:
        """Remove what was written: it can be of no use."""
        self.close()
        remove_partial(self._layout, self._journal.path)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._journal.close()


def partial_path(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(path.name + ".partial")


def journal_path(destination: Path) -> Path:
    return destination.with_name(destination.name + ".journal")


def remove_partial(layout: Layout, journal: Path) -> None:
    """What an unfinished conversion to these files has left."""
    for part in layout.parts:
        partial_path(part.path).unlink(missing_ok=True)
    journal.unlink(missing_ok=True)


def check_space(layout: Layout, destination: Path) -> None:
    """Raises LocalrunError if the disk has no room for what is not yet written."""
    there = [partial_path(part.path) for part in layout.parts if partial_path(part.path).exists()]
    needed = layout.size - sum(allocated(path) for path in there)
    free = shutil.disk_usage(destination.absolute().parent).free
    if free < needed:
        raise LocalrunError(f"{destination}: needs {needed:,} bytes of disk space, {free:,} are free")


def allocated(path: Path) -> int:
    """Bytes that a file takes on the disk; less than its size where it has holes."""
    status = path.stat()
    return getattr(status, "st_blocks", status.st_size // 512) * 512


def _sync_folder(folder: Path) -> None:
    """Make the renaming last, where folders can be synced."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
