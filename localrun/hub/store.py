"""The folder of models that were pulled: FOLDER/OWNER/NAME/ and the path that a file has in its repository.

A file stands there only when all of its model has come and its hash is right; until then it lies in .unfinished.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localrun.errors import LocalrunError
from localrun.files import user_path
from localrun.hub.names import File, Model, Reference, choose, models_of

_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class Stored:
    """A model that is there.

    Attributes:
        path: its file, or the first part.
    """

    reference: Reference
    model: Model
    path: Path


def models_folder() -> Path:
    """LOCALRUN_MODELS, or a folder of the user's data. Raises LocalrunError if the user has none."""
    given = os.environ.get("LOCALRUN_MODELS")
    folder = user_path(given) if given else user_path(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
    if not folder.is_absolute() and not given:
        raise LocalrunError("there is no home to keep models in: set LOCALRUN_MODELS, or name a folder with --folder")
    return folder if given else folder / "localrun" / "models"


def place(folder: Path, repo: str, path: str) -> Path:
    """Where a file of a repository belongs. Raises LocalrunError on a path that leads elsewhere."""
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") or "\\" in part or part.startswith(".") for part in parts):
        raise LocalrunError(f"{repo}: has a file {path!r}, which is no name that can be used here")
    return folder.joinpath(*repo.split("/"), *parts)


def unfinished(folder: Path, repo: str, path: str) -> Path:
    """Where it lies until all of it is there."""
    place(folder, repo, path)
    return folder.joinpath(*repo.split("/"), _UNFINISHED, *path.split("/"))


def stored(folder: Path) -> list[Stored]:
    """All models that are there and whole, by name."""
    repos = [path for path in _folders(folder) for path in _folders(path)]
    return [
        Stored(Reference(repo, model.quant), model, place(folder, repo, model.files[0].path))
        for repo in sorted("/".join(path.parts[-2:]) for path in repos)
        for model in _models(folder, repo)
        if model.is_whole
    ]


def find(wanted: Reference, folder: Path) -> Path:
    """The file of a model that is there, or its first part. Raises LocalrunError if it is not."""
    models = [model for model in _models(folder, wanted.repo) if model.is_whole]
    if not models:
        raise LocalrunError(f"{wanted}: not in {folder}; localrun pull {wanted}")
    return place(folder, wanted.repo, choose(models, wanted, "here").files[0].path)


def remove(wanted: Reference, folder: Path) -> int:
    """Deletes a model, unfinished or not; how many bytes there were. Raises LocalrunError if there is none."""
    models = {
        model.quant: model for model in [*_models(folder, wanted.repo, _UNFINISHED), *_models(folder, wanted.repo)]
    }
    if not models:
        raise LocalrunError(f"{wanted}: not in {folder}")
    model = choose(list(models.values()), wanted, "here")
    n_bytes = 0
    for root in ("", _UNFINISHED):
        for other in _models(folder, wanted.repo, root):
            for file in other.files if other.quant == model.quant else ():
                folder.joinpath(wanted.repo, root, file.path).unlink()
                n_bytes += file.n_bytes
    forget_empty(folder, wanted.repo)
    return n_bytes


def forget_empty(folder: Path, repo: str) -> None:
    """Deletes the folders of a repository in which nothing is left."""
    top = folder.joinpath(*repo.split("/"))
    for path in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            path.rmdir()
    for path in (top, top.parent):
        with suppress(OSError):
            path.rmdir()


def check_room(folder: Path, n_bytes: int) -> None:
    """Raises LocalrunError if the disk has not so much room."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(there).free
    if free < n_bytes:
        raise LocalrunError(f"{folder}: {n_bytes:,} bytes are still to come, {free:,} are free on that disk")


def _models(folder: Path, repo: str, root: str = "") -> list[Model]:
    top = folder.joinpath(*repo.split("/"), root)
    return models_of(File(path.relative_to(top).as_posix(), path.stat().st_size) for path in _files(top))


def _files(top: Path) -> Iterator[Path]:
    for path in sorted(top.rglob("*.gguf")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(top).parts):
            yield path


def _folders(path: Path) -> list[Path]:
    try:
        return [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
    except FileNotFoundError:
        return []
