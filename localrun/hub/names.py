"""What REPO:QUANT names: the GGUF files of a repository, those of a split model together, told apart by their type.

A name is all that there is to go by before a download; nothing here decides what a file holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from localrun.errors import LocalrunError

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REFERENCE = re.compile(rf"({_PART}/{_PART})(?::([^:\s]{{1,200}}))?")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})$")
_TYPE = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_[A-Z0-9]+)*|NVFP4|BF16|F16|F32))(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_NO_MODELS = re.compile(r"mmproj|imatrix", re.IGNORECASE)  # projectors of images, importances


@dataclass(frozen=True)
class Reference:
    """REPO[:QUANT], as users write it."""

    repo: str
    quant: str | None = None

    def __str__(self) -> str:
        return self.repo if self.quant is None else f"{self.repo}:{self.quant}"


@dataclass(frozen=True)
class File:
    """A file of a repository: its path there, its bytes, and what its content must hash to.

    Attributes:
        sha256: of the content; None where only git's own hash is known.
        blob: git's hash, SHA-1 of a header and the content.
    """

    path: str
    n_bytes: int
    sha256: str | None = None
    blob: str | None = None


@dataclass(frozen=True)
class Model:
    """What one name stands for: a file, or all parts of a split one in order.

    Attributes:
        quant: the type that its name says, or all of its name.
        n_parts: as many as there must be.
    """

    quant: str
    files: tuple[File, ...]
    n_parts: int = 1

    @property
    def n_bytes(self) -> int:
        """Of all its files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def is_whole(self) -> bool:
        """Whether all parts are there."""
        return len(self.files) == self.n_parts


def parse(text: str) -> Reference | None:
    """The reference that a text is; None if it is none."""
    match = _REFERENCE.fullmatch(text)
    return Reference(match[1], match[2]) if match else None


def reference(text: str) -> Reference:
    """The same. Raises LocalrunError if it is none."""
    found = parse(text)
    if found is None:
        raise LocalrunError(f"{text!r}: expected OWNER/NAME or OWNER/NAME:QUANT, as on Hugging Face")
    return found


def models_of(files: Iterable[File]) -> list[Model]:
    """The models that files are, the smallest first."""
    parts: dict[str, list[tuple[int, int, File]]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if path.suffix == ".gguf" and not _NO_MODELS.search(path.name):
            split = _SPLIT.search(path.stem)
            index, count = (int(split[1]), int(split[2])) if split else (1, 1)
            stem = path.stem[: split.start()] if split else path.stem
            parts.setdefault(str(path.with_name(stem)), []).append((index, count, file))
    quants = {stem: _quant(stem) for stem in parts}
    models = []
    for stem, found in parts.items():
        found.sort(key=lambda part: part[0])
        is_alone = list(quants.values()).count(quants[stem]) == 1
        quant = quants[stem] if is_alone else PurePosixPath(stem).name
        models.append(Model(quant, tuple(file for _, _, file in found), found[0][1]))
    return sorted(models, key=lambda model: (model.n_bytes, model.quant))


def choose(models: Sequence[Model], wanted: Reference, where: str) -> Model:
    """The model that a reference names; the only one if it names none. Raises LocalrunError, with what there is."""
    found = [model for model in models if wanted.quant is None or model.quant.lower() == wanted.quant.lower()]
    if len(found) == 1:
        return found[0]
    if not models:
        raise LocalrunError(f"{wanted.repo}: no GGUF file is {where}")
    there = ", ".join(model.quant for model in models)
    if wanted.quant is None:
        raise LocalrunError(f"{wanted.repo}: name one, as in {wanted.repo}:QUANT, of what is {where}: {there}")
    raise LocalrunError(f"{wanted}: not {where}; there is {there}")


def _quant(stem: str) -> str:
    found = _TYPE.findall(PurePosixPath(stem).name)
    return found[-1].upper() if found else PurePosixPath(stem).name
