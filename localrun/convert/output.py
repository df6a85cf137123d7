"""Writes the parts of a converted model beside their final names, and renames them when all is on the disk."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

import numpy as np

from localrun.convert.journal import Journal, is_journal
from localrun.convert.layout import Layout, Part
from localrun.errors import LocalrunError
from localrun.files import NO_FOLLOW

SYNC_BYTES = 256 << 20  # written between two syncs: what a crash costs, and seldom enough not to be felt


class Output:
    """The parts of one conversion, open for writing.

    Attributes:
        done: units that an earlier run has written.
    """

    def __init__(
        self, layout: Layout, destination: Path, fingerprint: str, n_units: int, sync_bytes: int = SYNC_BYTES
    ) -> None:
        """Begin, or go on where the journal says, as far as the files bear it out. Raises LocalrunError, OSError.

        What could not be begun leaves nothing behind.
        """
        self._layout, self._sync_bytes = layout, sync_bytes
        self._journal = Journal(journal_path(destination), fingerprint)
        self._fds: list[int] = []
        self._made: list[Path] = []
        try:
            self._complete = self._journal.complete and self._journal.done == n_units and self._all_written()
            all_there = all(map(_is_laid_out, map(_partial, layout.parts), layout.parts))
            self.done = self._journal.done if self._complete or (all_there and self._journal.done <= n_units) else 0
            if not self._complete:
                check_space(layout, destination)
                self._open()
        except BaseException:
            self._undo()
            raise
        self._units_written, self._unsynced = self.done, 0

    def _all_written(self) -> bool:
        """Whether each part is there, under either of its names."""
        return all(_is_laid_out(_partial(part), part) or _is_laid_out(part.path, part) for part in self._layout.parts)

    def _open(self) -> None:
        for part in self._layout.parts:
            self._fds.append(self._open_part(_partial(part)))
            os.ftruncate(self._fds[-1], part.size)
            self._write(self._fds[-1], part.header, 0)

    def _open_part(self, path: Path) -> int:
        """A descriptor of a new file, or of one that the journal vouches for; never of a link's target."""
        with suppress(FileExistsError):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o644)
            self._made.append(path)
            return fd
        if self._journal.is_new or not _is_plain(path):
            raise LocalrunError(f"{path}: is there, and no part of an unfinished conversion; remove or rename it")
        return os.open(path, os.O_RDWR | NO_FOLLOW)

    def _undo(self) -> None:
        """Remove what this attempt has made."""
        self.close()
        for path in [*self._made, *([self._journal.path] if self._journal.is_new else [])]:
            path.unlink(missing_ok=True)

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
        if not self._complete:
            for fd in self._fds:
                os.fsync(fd)
            self._journal.record(self._units_written)
            self._unsynced = 0

    def finish(self) -> None:
        """Give the parts their names, the first one last: who finds it finds a whole model. Raises OSError."""
        if not self._complete:
            for fd in self._fds:
                os.fsync(fd)
            self._journal.record(self._units_written, complete=True)
        for part in reversed(self._layout.parts):
            if _partial(part).exists():  # else an earlier run got as far
                os.replace(_partial(part), part.path)
        _sync_folder(self._layout.parts[0].path.parent)
        self._journal.remove()

    def discard(self) -> None:
        """Remove what was written: it can be of no use."""
        self.close()
        remove_partial(self._layout, self._journal.path)

    def close(self) -> None:
        """Close all files, and the journal; none is renamed."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._journal.close()


def partial_path(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(path.name + ".partial")


def journal_path(destination: Path) -> Path:
    """Where the journal of a conversion to that file lies."""
    return destination.with_name(destination.name + ".journal")


def _partial(part: Part) -> Path:
    return partial_path(part.path)


def _is_plain(path: Path) -> bool:
    """Whether that is a file itself, and known by no other name."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


def _is_laid_out(path: Path, part: Part) -> bool:
    """Whether a file has a part's size and header: a conversion makes it so before it writes any unit."""
    if not _is_plain(path) or path.stat().st_size != part.size:
        return False
    with path.open("rb") as file:
        return file.read(len(part.header)) == part.header


def remove_partial(layout: Layout, journal: Path) -> None:
    """What an unfinished conversion to these files has left; without its journal it is somebody else's, and stays."""
    if is_journal(journal):
        for part in layout.parts:
            _partial(part).unlink(missing_ok=True)
        journal.unlink()


def check_space(layout: Layout, destination: Path) -> None:
    """Raises LocalrunError if the disk has no room for what is not yet written."""
    there = [_partial(part) for part in layout.parts if _partial(part).exists()]
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
