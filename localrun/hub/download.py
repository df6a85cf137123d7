"""A model from the hub to its place: interrupted at any time, it goes on where it was; what stands there is whole.

All files of a model are fetched to .unfinished and checked, size and hash; then all are moved.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.files import hold
from localrun.hub import store
from localrun.hub.names import File, Model
from localrun.hub.remote import PIECE, ConnectionBroken, Repository

Progress = Callable[[int, int, str], None]

N_TRIES = 5  # in a row that bring nothing
PAUSE_S = 1.0
_BLOCK = 4 << 20


def download(repository: Repository, model: Model, folder: Path, progress: Progress | None = None) -> Path:
    """The path of a model's file, or of its first part, once all is there.

    Raises LocalrunError on whatever goes wrong; what has come is kept for the next time, unless its hash is wrong.
    """
    if not model.is_whole:
        raise LocalrunError(f"{repository.name}: {model.quant} has {len(model.files)} of {model.n_parts} parts there")
    paths = [store.place(folder, repository.name, file.path) for file in model.files]
    missing = [(file, path) for file, path in zip(model.files, paths, strict=True) if _size(path) != file.n_bytes]
    for file, _ in missing:
        if not file.n_bytes:
            raise LocalrunError(f"{repository.name}: {file.path!r} is empty, or the hub does not say its size")
    waiting = [store.unfinished(folder, repository.name, file.path) for file, _ in missing]
    try:
        come = [min(_size(path), file.n_bytes) for path, (file, _) in zip(waiting, missing, strict=True)]
        store.check_room(folder, sum(file.n_bytes for file, _ in missing) - sum(come))
        done = model.n_bytes - sum(file.n_bytes for file, _ in missing)
        for path, (file, _) in zip(waiting, missing, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            _fetch(repository, file, path, _part_of(progress, done, model.n_bytes, "Downloading"))
            done += file.n_bytes
        done = 0
        for path, (file, _) in zip(waiting, missing, strict=True):
            _check(repository, file, path, _part_of(progress, done, model.n_bytes, "Checking"))
            done += file.n_bytes
        for path, (_, final) in zip(waiting, missing, strict=True):
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)
    except OSError as error:
        raise LocalrunError(f"{error.filename or folder}: cannot be written: {error.strerror}") from None
    store.forget_empty(folder, repository.name)
    return paths[0]


def _fetch(repository: Repository, file: File, path: Path, progress: Callable[[int], None]) -> None:
    """Appends what is missing of a file. Raises ConnectionBroken when several tries in a row bring nothing."""
    n_tries = 0
    with path.open("ab") as out:
        hold(out.fileno(), f"{path}: is being pulled by another process")
        if out.tell() > file.n_bytes:
            out.truncate(0)
        out.seek(0, os.SEEK_END)
        while out.tell() < file.n_bytes:
            start = out.tell()
            try:
                for chunk in repository.read(file, start, min(file.n_bytes, start + PIECE)):
                    out.write(chunk)
                    progress(out.tell())
            except ConnectionBroken:
                n_tries = 1 if out.tell() > start else n_tries + 1
                if n_tries == N_TRIES:
                    raise
                time.sleep(PAUSE_S)
        out.flush()
        os.fsync(out.fileno())


def _check(repository: Repository, file: File, path: Path, progress: Callable[[int], None]) -> None:
    """Raises LocalrunError, and deletes the file, unless its hash is the one that the hub lists."""
    expected = file.sha256 or file.blob
    digest: Any = hashlib.sha256() if file.sha256 else hashlib.sha1(f"blob {file.n_bytes}\0".encode())
    with path.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
            progress(content.tell())
    if digest.hexdigest() != expected:
        path.unlink()
        raise LocalrunError(
            f"{repository.name}: what came as {file.path!r} has the hash {digest.hexdigest()[:16]}..., expected "
            f"{str(expected)[:16]}...; it was deleted, pull again"
        )


def _part_of(progress: Progress | None, before: int, total: int, what: str) -> Callable[[int], None]:
    return lambda done: progress(before + done, total, what) if progress else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
