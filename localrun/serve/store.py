"""Conversations in a folder: those that memory has no room for, and those that the next start is to find.

A file holds one: MAGIC, the SHA-256 of all that follows, the length of the header in 8 bytes, the header (JSON: what
model and settings it is good for, the tokens, the arrays' types and shapes), then the arrays of the cache one after the
other. Its name begins with what it is good for, so that several models may share a folder. What is damaged is dropped
with a line and never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Full, Queue
from typing import Any, BinaryIO

import numpy as np

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.files import TEMPORARY, check_place, replacing
from localrun.generate.saved import fingerprint
from localrun.generate.session import Session

MAGIC = b"localrun conversation 1\n"
LEAST_TOKENS, LEAST_SHARE = 16, 64  # that reading an entry must save at least, and one in so many of its own
_SUFFIX = ".conversation"
_MOST_QUEUED = 4  # conversations that wait to be written; what comes beyond them is lost
_MOST_HEADER = 1 << 26  # bytes
_PIECE = 1 << 20  # bytes read at a time
_ABANDONED_S = 3600.0  # age of a file that its writer has left half-written


@dataclass(frozen=True)
class Entry:
    """A conversation in the folder.

    Attributes:
        ids: int32, its tokens.
        least: the fewest of them that can be gone on from: a layer with a window does not keep the first ones.
    """

    path: Path
    ids: np.ndarray
    least: int


class Store:
    """The conversations of one engine, up to `most_bytes` of those of all models in the folder.

    One thread asks; another one, of the store's own, writes.

    Args:
        notice: called with a line where something is dropped or can't be written.

    Raises LocalrunError if the folder can't be used.
    """

    def __init__(self, engine: Engine, folder: Path, most_bytes: int, notice: Callable[[str], None]):
        self._folder, self._most_bytes, self._notice = folder, most_bytes, notice
        self._key, self._ctx = good_for(engine), engine.ctx
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise LocalrunError(f"{folder}: {error.strerror}") from None
        check_place(folder / f"x{_SUFFIX}")
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._find()
        self._queue: Queue[_Content | None] = Queue(_MOST_QUEUED)
        self._thread = threading.Thread(target=self._write_all, name="conversations", daemon=True)
        self._thread.start()

    def longest(self, ids: Sequence[int]) -> tuple[Entry | None, int]:
        """The entry that shares most first tokens with a prompt, and how many; None where none helps."""
        prompt = np.array(ids[:-1], np.int32)
        best, most = None, 0
        with self._lock:
            entries = [entry for entry in self._entries.values() if len(entry.ids) <= self._ctx]
        for entry in entries:
            n_shared = _shared(entry.ids, prompt)
            if n_shared > most and n_shared >= entry.least:
                best, most = entry, n_shared
        return best, most

    def read(self, entry: Entry, session: Session) -> bool:
        """Have a session hold an entry; False, and the entry is dropped, if it is not what it was."""
        try:
            ids, tensors = self._content(entry.path)
            session.restore(ids, tensors)
            os.utime(entry.path)
        except (OSError, LocalrunError, ValueError, TypeError) as error:
            self._drop(entry.path, error)
            return False
        return True

    def put(self, session: Session) -> None:
        """Have a session written that nobody uses any more, unless too many wait for that already."""
        if content := self._worth_writing(session):
            with suppress(Full):
                self._queue.put_nowait(content)

    def close(self, sessions: Iterable[Session]) -> None:
        """Write these as well, the one used last in the end, and end the thread."""
        for session in sessions:
            if content := self._worth_writing(session):
                self._queue.put(content)
        self._queue.put(None)
        self._thread.join()

    def _worth_writing(self, session: Session) -> _Content | None:
        """What is to be written of a session; None where that would be of no use."""
        length = len(session.ids)
        session.forget(length)
        if length < LEAST_TOKENS or len(session.ids) < length:
            return None
        content = _Content(session, self._key)
        return content if content.n_bytes <= self._most_bytes else None

    def _write_all(self) -> None:
        while content := self._queue.get():
            try:
                self._write(content)
            except Exception as error:  # whatever it is, the server goes on without it
                self._notice(f"a conversation was not kept: {error}")

    def _write(self, content: _Content) -> None:
        """Unless an entry holds it already. Entries that it holds go, and the oldest of all while there is no room."""
        new = content.entry(self._folder)
        with self._lock:
            others = list(self._entries.values())
        for other in others:
            if _shared(other.ids, new.ids) == len(new.ids) and other.least <= len(new.ids):
                with suppress(OSError):
                    os.utime(other.path)
                return
        with replacing(new.path, private=True) as temporary, temporary.open("r+b") as file:
            content.write(file)
        with self._lock:
            self._entries[new.path.name] = new
        for other in others:
            if _shared(other.ids, new.ids) == len(other.ids) and new.least <= len(other.ids):
                self._remove(other.path)
        self._make_room()

    def _make_room(self) -> None:
        files = []
        for path in self._folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        n_bytes = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if n_bytes <= self._most_bytes:
                return
            self._remove(path)
            n_bytes -= size

    def _find(self) -> None:
        """The entries of this model; those that were left half-written go."""
        for path in self._folder.glob(TEMPORARY):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    path.unlink()
        for path in sorted(self._folder.glob(f"{self._key[:16]}-*{_SUFFIX}")):
            try:
                with path.open("rb") as file:
                    header = self._header(file)
                    self._entries[path.name] = Entry(path, np.array(header["ids"], np.int32), header["least"])
            except (OSError, LocalrunError) as error:
                self._drop(path, error)

    def _content(self, path: Path) -> tuple[list[int], dict[str, np.ndarray]]:
        """An entry's tokens and arrays, which are read as they are looked at. Raises LocalrunError or OSError."""
        with path.open("rb") as file:
            header = self._header(file)
            start = file.tell()
            file.seek(len(MAGIC))
            expected, digest = file.read(32), hashlib.sha256()
            while piece := file.read(_PIECE):
                digest.update(piece)
            if digest.digest() != expected:
                raise LocalrunError("its checksum is wrong")
            tensors = {}
            for name, (dtype, shape) in header["arrays"].items():
                tensors[name] = np.memmap(file, dtype, "r", start, tuple(shape))
                start += tensors[name].nbytes
        return header["ids"], tensors

    def _header(self, file: BinaryIO) -> dict[str, Any]:
        """Raises LocalrunError if there is none, or it is another model's. Whether it is sound the checksum tells."""
        try:
            magic, _, length = file.read(len(MAGIC)), file.read(32), int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MOST_HEADER)))
            if magic != MAGIC or not all(type(header[name]) is kind for name, kind in _HEADER.items()):
                raise ValueError
            np.array(header["ids"], np.int32)
            if any(np.dtype(dtype).kind not in "fu" for dtype, _ in header["arrays"].values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise LocalrunError("its header is damaged") from None
        if header["good_for"] != self._key:
            raise LocalrunError("it belongs to another model, or to other settings")
        return header

    def _drop(self, path: Path, error: Exception) -> None:
        self._notice(f"{path}: dropped: {getattr(error, 'strerror', None) or error}")
        self._remove(path)

    def _remove(self, path: Path) -> None:
        with self._lock:
            self._entries.pop(path.name, None)
        with suppress(OSError):
            path.unlink()


_HEADER = {"good_for": str, "ids": list, "least": int, "arrays": dict}  # its fields


class _Content:
    """What an entry is made of. The arrays are views of the cache, which nobody writes to any more."""

    def __init__(self, session: Session, key: str):
        cache, self._key, self._ids = session.cache, key, session.ids
        self._tensors = cache.save()
        lengths = range(1, len(self._ids) + 1)
        self._least = 1 + bisect_left(lengths, True, key=lambda length: cache.kept(length) > 0)

    @property
    def n_bytes(self) -> int:
        """Of the arrays."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def entry(self, folder: Path) -> Entry:
        """Where it is to be."""
        ids = np.array(self._ids, np.int32)
        name = f"{self._key[:16]}-{hashlib.sha256(ids.tobytes()).hexdigest()[:16]}{_SUFFIX}"
        return Entry(folder / name, ids, self._least)

    def write(self, file: BinaryIO) -> None:
        """The whole file."""
        arrays = {name: (tensor.dtype.str, tensor.shape) for name, tensor in self._tensors.items()}
        fields = {"good_for": self._key, "ids": self._ids, "least": self._least, "arrays": arrays}
        header, digest = json.dumps(fields).encode(), hashlib.sha256()
        file.write(MAGIC + bytes(32))
        for part in (len(header).to_bytes(8, "little"), header, *map(np.ascontiguousarray, self._tensors.values())):
            data = memoryview(part).cast("B") if len(part) else b""
            digest.update(data)
            file.write(data)
        file.seek(len(MAGIC))
        file.write(digest.digest())


def good_for(engine: Engine) -> str:
    """What a cache depends on: the model's file, and how it is run."""
    facts = engine.describe()
    bits = engine.placement.cache_bits if engine.placement else None
    settings = engine.config, facts["device"], facts.get("isa"), bits, localrun.__version__
    return hashlib.sha256(f"{fingerprint(engine)} {settings!r}".encode()).hexdigest()


def _shared(ids: np.ndarray, others: np.ndarray) -> int:
    """How many first tokens are the same."""
    length = min(len(ids), len(others))
    different = ids[:length] != others[:length]
    return int(different.argmax()) if different.any() else length
