"""What of a conversion is safely on the disk: JSON lines beside the destination, for a later run to go on from.

The first line holds the fingerprint of plan and sources; each further one says how many units are done, and is written
after the data it speaks of has been synced. A line that a crash has cut short does not count, nor does what follows a
line that no conversion writes. A file that begins otherwise is somebody else's and stays as it is.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import NO_FOLLOW, hold

_BEGINNING = b'{"fingerprint": "'  # of every journal


class Journal:
    """The journal of one destination, held open and locked.

    Attributes:
        is_new: whether there was none before.
        done: units that are safely written.
        complete: whether all is written and synced, so that only the renaming may be missing.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or begin the journal. Raises LocalrunError if it is another conversion's, in use, or no journal."""
        self.path, self.done, self.complete = path, 0, False
        self._fd = _open(path)
        try:
            hold(self._fd, f"{path}: another conversion to the same file is running")
            data = path.read_bytes()
            if not _begins_like_a_journal(data):
                raise LocalrunError(f"{path}: is no journal of a conversion, and in the way; rename it")
            lines, n_bytes = _whole_lines(data)
            if lines and lines[0].get("fingerprint") != fingerprint:
                raise LocalrunError(
                    f"{path}: belongs to a conversion of other files or with other options; --force begins anew"
                )
            self.is_new = not lines
            os.ftruncate(self._fd, n_bytes)
            if not lines:
                self._append({"fingerprint": fingerprint})
        except BaseException:
            self.close()
            raise
        for line in lines[1:]:
            self.done, self.complete = line["done"], line.get("complete", False)

    def record(self, done: int, *, complete: bool = False) -> None:
        """Note, lastingly, that so many units are written. Their data must have been synced."""
        self._append({"done": done} | ({"complete": True} if complete else {}))
        self.done = done

    def _append(self, line: dict[str, object]) -> None:
        os.write(self._fd, (json.dumps(line) + "\n").encode())
        os.fsync(self._fd)

    def remove(self) -> None:
        """Close it and remove the file, if there is one."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; more than once is fine."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def is_journal(path: Path) -> bool:
    """Whether a conversion wrote the file of that name, which is no link."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return False
        with path.open("rb") as file:
            return _begins_like_a_journal(file.read(len(_BEGINNING)))
    except OSError:
        return False


def _begins_like_a_journal(data: bytes) -> bool:
    """A crash may have cut it short, even before the first byte."""
    return data.startswith(_BEGINNING) or _BEGINNING.startswith(data)


def _open(path: Path) -> int:
    """A descriptor of a file that is there, or new; never of a link's target. Raises LocalrunError, OSError."""
    flags = os.O_RDWR | os.O_APPEND | NO_FOLLOW
    with suppress(FileExistsError):
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
    if path.is_symlink() or not path.is_file():
        raise LocalrunError(f"{path}: is a link or no file, and in the way; remove it")
    return os.open(path, flags)


def _whole_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first broken one, and the bytes they take."""
    lines: list[dict[str, Any]] = []
    n_bytes, done = 0, 0
    for line in data.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not (_is_progress(entry, done) if lines else isinstance(entry, dict)):
            break
        done = entry.get("done", 0)
        lines.append(entry)
        n_bytes += len(line) + 1
    return lines, n_bytes


def _is_progress(entry: Any, done: int) -> bool:
    """Whether a line says how far a conversion is that had got as far as done."""
    if not isinstance(entry, dict) or not isinstance(entry.get("complete", False), bool):
        return False
    return type(entry.get("done")) is int and entry["done"] >= done
