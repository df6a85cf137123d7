"""What of a conversion is safely on the disk: JSON lines beside the destination, for a later run to go on from.

The first line holds the fingerprint of plan and sources; each further one says how many units are done, and is written
after the data it speaks of has been synced. A line that a crash has cut short does not count.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from localrun.errors import LocalrunError


class Journal:
    """The journal of one destination, held open and locked.

    Attributes:
        done: units that are safely written.
        complete: whether all is written and synced, so that only the renaming may be missing.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or begin the journal. Raises LocalrunError if it is another conversion's, or in use."""
        self.path, self.done, self.complete = path, 0, False
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        _lock(self._fd, path)
        lines, n_bytes = _whole_lines(path)
        if lines and lines[0].get("fingerprint") != fingerprint:
            self.close()
            raise LocalrunError(
                f"{path}: belongs to a conversion of other files or with other options; --force begins anew"
            )
        os.ftruncate(self._fd, n_bytes)
        if not lines:
            self._append({"fingerprint": fingerprint})
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
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _lock(fd: int, path: Path) -> None:
    """Keeps a second process off the same destination, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise LocalrunError(f"{path}: another conversion to the same file is running") from None


def _whole_lines(path: Path) -> tuple[list[dict], int]:
    """The lines up to the first broken one, and the bytes they take."""
    lines, n_bytes = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
        n_bytes += len(line) + 1
    return lines, n_bytes
