"""Importance matrices: the mean square of what each column of a matrix is multiplied with, per expert for stacked ones.

Two formats, both llama.cpp's (tools/imatrix/imatrix.cpp of https://github.com/ggml-org/llama.cpp @3f545becc). GGUF:
general.type "imatrix"; for each matrix <name>.in_sum2 (slices, columns), sums of squares, <name>.counts (slices, 1).
The older one: int32 entries; for each int32 length, name, int32 calls, int32 values, float32 values: means times calls.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from localrun.convert.sources.json_file import shown
from localrun.convert.targets import Target
from localrun.errors import GGUFError
from localrun.gguf.file import open_gguf
from localrun.gguf.header import read_header

_SUMS, _COUNTS = ".in_sum2", ".counts"
# Means below it count as 0: their products with small weights are no normal float32 numbers any more, which packing
# divides by. Means are 1e-6 and more.
_LEAST = 1e-20
_LONGEST_NAME = 1024  # bytes; tensors' names have 64 at most


@dataclass(frozen=True)
class _Stored:
    """Where the float32 sums of a matrix are, how many, and what to divide them by: counts in the file, or n_calls."""

    sums_at: int
    n_sums: int
    counts_at: int = 0
    n_counts: int = 1
    n_calls: int = 0


class Importances(Mapping[str, np.ndarray]):
    """Target -> float32 (slices, n_cols), for those that have importances; NaN rows for slices never reached.

    Read from the file whenever asked for: those of a large model all together would take gigabytes.

    Attributes:
        path: the file.
        unreached: target -> numbers of the slices that the text never reached.
        missing: matrices of layers that the file has nothing for, such as those for multi-token prediction.
    """

    def __init__(self, path: Path, targets: list[Target]) -> None:
        """Find and check all. Raises GGUFError if the file is no imatrix, or a matrix does not fit its target."""
        self.path = path
        stored = _find(path)
        self._targets = {target.name: target for target in targets if target.name in stored}
        if not self._targets:
            raise GGUFError(f"{path}: has no importances for any tensor of this model")
        self._stored = stored
        missed = {name: np.flatnonzero(np.isnan(self[name][:, 0])).tolist() for name in self}
        self.unreached = {name: slices for name, slices in missed.items() if slices}
        matrices = [target.name for target in targets if len(target.shape) > 1 and target.name.startswith("blk.")]
        self.missing = [name for name in matrices if name not in self]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)

    def __getitem__(self, name: str) -> np.ndarray:
        target, stored = self._targets[name], self._stored[name]
        n_slices = target.n_rows // target.shape[-2] if len(target.shape) > 1 else 1
        if stored.n_sums != n_slices * target.n_cols or stored.n_counts not in (1, n_slices):
            expected = f"{n_slices * target.n_cols} and {n_slices}"
            found = f"{stored.n_sums} sums and {stored.n_counts} counts"
            raise GGUFError(f"{self.path}: {shown(name)} has {found}, expected {expected}")
        sums = self._floats(name, stored.sums_at, stored.n_sums).reshape(n_slices, -1)
        if stored.counts_at:
            counts = self._floats(name, stored.counts_at, stored.n_counts)
        else:
            counts = np.array([stored.n_calls], np.float32)
        if not (np.isfinite(sums).all() and np.isfinite(counts).all() and (sums >= 0).all()):
            raise GGUFError(f"{self.path}: {shown(name)} has importances that are not finite or below 0")
        counts = np.broadcast_to(counts, n_slices)[:, None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            means = np.where(counts > 0, sums / counts, np.nan).astype(np.float32)
        if np.isinf(means).any():
            raise GGUFError(f"{self.path}: {shown(name)} has importances that no float32 number holds")
        means[means < _LEAST] = 0
        return means

    def _floats(self, name: str, at: int, count: int) -> np.ndarray:
        values = np.fromfile(self.path, np.float32, count, offset=at)
        if values.size != count:
            raise GGUFError(f"{self.path}: is cut off in {shown(name)}")
        return values


def _find(path: Path) -> dict[str, _Stored]:
    """Name -> where its importances are, in either format. Raises GGUFError."""
    try:
        with path.open("rb") if path.is_file() else nullcontext() as file:  # a pipe would be waited for
            is_gguf = file is None or file.read(4) == b"GGUF"
    except OSError:
        is_gguf = True  # whose reader says what is wrong
    return dict(_find_gguf(path) if is_gguf else _find_legacy(path))


def _find_gguf(path: Path) -> Iterator[tuple[str, _Stored]]:
    with open_gguf(path) as file:
        if file.string("general.type", "") != "imatrix":
            found = file.string("general.type", None)
            raise GGUFError(f"{path}: key 'general.type' is {found!r}, expected 'imatrix'")
    with path.open("rb") as file:
        header = read_header(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), path)
    records = {record.name: record for record in header.tensors}
    for record in header.tensors:
        name = record.name.removesuffix(_SUMS)
        if name == record.name:
            continue
        counts = records.get(name + _COUNTS)
        for part, tensor in ((_SUMS, record), (_COUNTS, counts)):
            if tensor is None or tensor.type.name != "F32":
                found = "missing" if tensor is None else tensor.type.name
                raise GGUFError(f"{path}: tensor {shown(name + part)} is {found}, expected F32")
        sums_at, counts_at = (header.data_start + tensor.offset for tensor in (record, counts))
        yield name, _Stored(sums_at, prod(record.shape), counts_at, prod(counts.shape))


def _find_legacy(path: Path) -> Iterator[tuple[str, _Stored]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        for _ in range(_int32(file, path)):
            name = file.read(_int32(file, path, _LONGEST_NAME)).decode("utf-8", "replace")
            n_calls, n_sums = _int32(file, path), _int32(file, path)
            yield name, _Stored(file.tell(), n_sums, n_calls=max(1, n_calls))
            if file.seek(4 * n_sums, os.SEEK_CUR) > size:
                raise GGUFError(f"{path}: is cut off in {shown(name)}")


def _int32(file: BinaryIO, path: Path, most: int = 2**31 - 1) -> int:
    """The next number, none of which is below 0 in this format. Raises GGUFError."""
    data = file.read(4)
    if len(data) < 4 or int.from_bytes(data, "little") > most:
        raise GGUFError(f"{path}: is no importance matrix: neither a GGUF file nor of llama.cpp's older format")
    return int.from_bytes(data, "little")
