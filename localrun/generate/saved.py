"""A session on the disk: its ids and cache, in a file of tensors that says what model it is good for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from localrun.errors import LocalrunError
from localrun.files import replacing
from localrun.runtime import Runner

_IDS, _MODEL = "localrun.ids", "localrun.model"  # what a saved session says of itself


def write(path: Path, engine: Runner, ids: list[int], tensors: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all, for the user alone. Raises LocalrunError if it can't be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    metadata = {_IDS: json.dumps(ids), _MODEL: fingerprint(engine)}
    with replacing(path, private=True) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata)
        except SafetensorError as error:  # a full disk
            raise LocalrunError(f"{path}: cannot save the session: {error}") from None


def read(path: Path, engine: Runner) -> tuple[list[int], dict[str, np.ndarray]]:
    """Ids and tensors. Raises LocalrunError if it is no session of this model."""
    with _open_saved(path) as file:
        metadata = file.metadata() or {}
        if metadata.get(_MODEL) != fingerprint(engine):
            raise LocalrunError(f"{path}: the session belongs to another model")
        ids = _read_ids(metadata.get(_IDS, ""))
        if ids is None:
            raise LocalrunError(f"{path}: not a saved session: its token ids are damaged")
        return ids, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def is_saved_session(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a session that some model has saved."""
    try:
        with _open_saved(path) as file:
            return _IDS in (file.metadata() or {})
    except LocalrunError:
        return False


@contextmanager
def _open_saved(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A file of tensors, open. Raises LocalrunError, also where the block finds it broken."""
    from safetensors import SafetensorError, safe_open

    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise LocalrunError(f"{path}: no such file")
        with safe_open(os.fspath(path), "np") as file:
            yield file
    except (OSError, SafetensorError, TypeError, AttributeError) as error:  # the last two: types that NumPy lacks
        raise LocalrunError(f"{path}: not a saved session: {error}") from None


def _read_ids(text: str) -> list[int] | None:
    """The list of whole numbers that `text` holds in JSON; None if it holds anything else."""
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return ids if isinstance(ids, list) and all(type(token) is int for token in ids) else None


def fingerprint(engine: Runner) -> str:
    """A name for the model and backend that a saved cache is good for: a hash over all tensors' first bytes."""
    return engine.file.fingerprint(engine.backend.encode())
