"""Files that the user names: which one is meant, how much of it is read, and how another takes its place.

What is written appears under its name when all of it is there, or not at all. Until then it lies beside it under a name
that nobody had, so that no link is followed and nobody else's file is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from localrun.errors import LocalrunError

NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
TEMPORARY = ".localrun-*.tmp"  # names of files that are being written
_PIECE = 1 << 20  # bytes read at a time


def user_path(name: str) -> Path:
    """The path that a user means: ~ at its beginning is a home folder if there is such a home, else part of the name.

    Raises LocalrunError if no file can be called that.
    """
    if not name or "\0" in name:
        raise LocalrunError(f"{name!r} is no file name")
    try:
        return Path(name).expanduser()
    except RuntimeError:  # nobody of that name, or nobody at home
        return Path(name)


def read_bytes(path: Path, shown: str, most: int) -> bytes:
    """The content of a file or pipe. Raises LocalrunError that calls it `shown` if it can't be read or has more."""
    try:
        with path.open("rb") as file:
            return read_stream(file, shown, most)
    except OSError as error:
        raise LocalrunError(f"{shown}: cannot be read: {error.strerror}") from None


def read_stream(file: BinaryIO, shown: str, most: int) -> bytes:
    """All that is left of an open file. Raises LocalrunError if that is more than `most` bytes, and OSError."""
    pieces, left = [], most + 1
    while left and (piece := file.read(min(left, _PIECE))):
        pieces.append(piece)
        left -= len(piece)
    if not left:
        raise LocalrunError(f"{shown}: is larger than {most:,} bytes")
    return b"".join(pieces)


def check_place(path: Path) -> None:
    """Raises LocalrunError where no file of that name can be written, for want of rights, too."""
    with _explained(path):
        _check_name(path)
        _create(_beside(path), 0o600).unlink()


@contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[Path]:
    """A new file to write, which takes the place of `path` when the block ends, or goes if it is left by an error.

    Args:
        private: for its owner alone.

    Raises LocalrunError that speaks of `path`, also for the block's OSErrors: those of writing.
    """
    with _explained(path):
        _check_name(path)
        temporary = _create(_beside(path), 0o600 if private else 0o666)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A file with the document. Raises LocalrunError if it can't be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


class Lines:
    """A file of lines that grows: each one is there wholly, or is taken away when the file is opened again."""

    def __init__(self, path: Path, goes_on: bool) -> None:
        """
        Args:
            goes_on: with the lines that are there; else there must be none.

        Raises LocalrunError if the file can't be written, is written by another process, or has lines and is not to go
        on with them.
        """
        self._path = path
        with _explained(path):
            _check_name(path)
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            hold(self._file.fileno(), f"{path}: is being written by another process")
            if not goes_on and os.fstat(self._file.fileno()).st_size:
                raise LocalrunError(f"{path}: is there already; --resume goes on with it, or name another file")

    def read(self) -> list[bytes]:
        """The whole lines. What a kill has left of another one goes. Raises LocalrunError if they can't be read."""
        with _explained(self._path):
            self._file.seek(0)
            data = self._file.read()
            end = data.rfind(b"\n") + 1
            self._file.truncate(end)
            self._file.seek(end)
        return data[:end].split(b"\n")[:-1]

    def append(self, line: bytes) -> None:
        """Write one, onto the disk. Raises LocalrunError if it can't be."""
        with _explained(self._path):
            left = memoryview(line + b"\n")
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())


def hold(fd: int, refusal: str) -> None:
    """Keep other processes off an open file until it is closed, where the system has such locks.

    Raises LocalrunError, with that line, if another one holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LocalrunError(refusal) from None


def nameless_file() -> BinaryIO:
    """An empty file to write and read that goes when closed: in memory where the system has such, so on no disk.

    Raises LocalrunError if there is no place for it.
    """
    if hasattr(os, "memfd_create"):
        with suppress(OSError):  # a sandbox may forbid it
            return os.fdopen(os.memfd_create("localrun"), "w+b")
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        raise LocalrunError(
            f"temporary files: {error.strerror}; set TMPDIR to a folder that can be written to"
        ) from None


def _beside(path: Path) -> Path:
    return path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))


def _create(path: Path, mode: int) -> Path:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, mode))
    return path


def _check_name(path: Path) -> None:
    """Raises LocalrunError if what has that name is no file, or no file can have it; OSError for names too long."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise LocalrunError(f"{path}: folder {folder} does not exist")
    if path.is_dir():
        raise LocalrunError(f"{path}: is a folder; expected the name of the file to write")
    with suppress(FileNotFoundError):
        path.lstat()
        if not path.is_file():
            raise LocalrunError(f"{path}: is a device, a pipe or a broken link; expected the name of the file to write")


def _sync(path: Path) -> None:
    """On the disk before it replaces anything: else a crash may leave neither the old file nor the new one."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LocalrunError(f"{path}: cannot be written: {error.strerror or error}") from None
