"""A GGUF model as typed metadata and mapped tensors, one file or split over several.

Reads and checks everything at open; knows nothing of what keys or tensors mean. Splits follow
src/llama-model-loader.cpp of https://github.com/ggml-org/llama.cpp @3f545becc: the first part holds the metadata, parts
are named name-00001-of-00003.gguf, and each carries split.no (u16), split.count (u16), split.tensors.count (i32).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from struct import pack_into
from typing import Any

import numpy as np
from gguf import GGUFValueType

from localrun.errors import GGUFError
from localrun.gguf.header import Array, Header, Scalar, TensorRecord, read_header
from localrun.gguf.mapped import MappedFile
from localrun.gguf.types import InterleavedType, TensorType

REQUIRED: Any = object()  # default of the typed getters: a missing key is an error
_N_TENSORS = slice(8, 16)  # a u64 behind magic and version
_BEFORE_ITEMS = 12  # bytes from the type of an array's items to the items
_WHOLE = (GGUFValueType.INT32, GGUFValueType.UINT32)
_SPLIT_COUNT, _NO_KEY = (len(key).to_bytes(8, "little") + key for key in (b"split.count", b"split-count"))


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of the file; data is a view of the file's map, in the block layout of its type.

    shape is in NumPy order: outermost first, the contiguous dimension last. data is uint8, 1-D, n_bytes long; the map
    is private and copy-on-write, so data is writable (as torch wants) while the file never changes.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    n_bytes: int
    data: np.ndarray


class Metadata(Mapping[str, Any]):
    """The keys of the file; a scalar is a Python value, an array is decoded when it is first looked up."""

    def __init__(self, values: dict[str, Scalar | Array]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GGUFFile:
    """An open model; made by open_gguf. Close it, or use it as a context manager."""

    def __init__(self, parts: list[_Part]) -> None:
        header = parts[0].header
        self.paths = [part.path for part in parts]
        self.path = self.paths[0]
        self.version = header.version
        self.alignment = header.alignment
        self.metadata = Metadata(header.values)
        self.tensors = {record.name: part.tensor(record) for part in parts for record in part.header.tensors}
        self.files = [part.file for part in parts]
        self.file_size = sum(len(file.map) for file in self.files)
        self._values = header.values
        self._keys_end = header.keys_end
        self._replaced: dict[str, Tensor] = {}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Address and size of each part's map; of each tensor that is still there, if some have been replaced."""
        if self._replaced:
            kept = [tensor for name, tensor in self.tensors.items() if name not in self._replaced]
            return [(tensor.data.ctypes.data, tensor.n_bytes) for tensor in kept]
        return [(np.frombuffer(file.map, np.uint8).ctypes.data, len(file.map)) for file in self.files]

    @property
    def is_interleaved(self) -> bool:
        """Whether some tensors are of types that other tools don't know."""
        return any(isinstance(tensor.type, InterleavedType) for tensor in self.mapped.values())

    def without_tensors(self, as_floats: str = "") -> bytes:
        """A GGUF file of its keys alone, which other tools can read; not a part of a split, either.

        as_floats: a key whose array, if it is one that floats() reads, is written in float32.
        """
        content = bytearray(self.files[0].map[: self._keys_end])
        content[_N_TENSORS] = bytes(8)
        entry = self._values.get(as_floats)
        if isinstance(entry, Array) and entry.type in _WHOLE:
            pack_into("<I", content, entry.start - _BEFORE_ITEMS, GGUFValueType.FLOAT32)
            pack_into(f"<{entry.count}f", content, entry.start, *entry.value)
        content = content.replace(_SPLIT_COUNT, _NO_KEY, 1)
        return bytes(content).ljust(-(-self._keys_end // self.alignment) * self.alignment, b"\0")

    @property
    def mapped(self) -> dict[str, Tensor]:
        """The tensors as they are in the file."""
        return self.tensors | self._replaced

    def replace(self, name: str, type_: TensorType, data: np.ndarray) -> None:
        """Have another copy, in another type, stand for a tensor; the file itself stays as it is."""
        self._replaced[name] = self.tensors[name]
        self.tensors[name] = replace(self.tensors[name], type=type_, n_bytes=data.nbytes, data=data)

    def fingerprint(self, beside: bytes) -> str:
        """A name for what the tensors are: a hash over `beside`, and their names, shapes, types and first bytes."""
        digest = hashlib.sha256(beside)
        for tensor in self.mapped.values():
            digest.update(f"{tensor.name} {tensor.shape} {tensor.type.name}".encode())
            digest.update(tensor.data[:64].tobytes())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Raises GGUFError if one of its files was written to, or cut short, since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def replaced(self) -> Path | None:
        """The first of its names that leads to another file by now; what was opened is still as it was."""
        return next((file.path for file in self.files if file.was_replaced()), None)

    def close(self) -> None:
        """Let go of the files. Views that others still hold stay valid; a map ends with the last of its views."""
        self.tensors, self._replaced = {}, {}
        for file in self.files:
            file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, key: str) -> bool:
        """Whether the file has a value for the key."""
        return key in self._values

    def u32(self, key: str, default: Any = REQUIRED) -> int:
        """The value of a uint32 key, or default. Like all getters: raises GGUFError if absent or of another type."""
        return self._scalar(key, GGUFValueType.UINT32, default)

    def f32(self, key: str, default: Any = REQUIRED) -> float:
        """A float32. Raises LocalrunError if it is of another type, or missing without a default."""
        return self._scalar(key, GGUFValueType.FLOAT32, default)

    def bool(self, key: str, default: Any = REQUIRED) -> bool:
        """A boolean; errors as f32."""
        return self._scalar(key, GGUFValueType.BOOL, default)

    def string(self, key: str, default: Any = REQUIRED) -> str:
        """A text; errors as f32."""
        return self._scalar(key, GGUFValueType.STRING, default)

    def array(self, key: str, item_type: GGUFValueType, default: Any = REQUIRED) -> list[str] | np.ndarray:
        """The items of an array key: a list of strings, else a read-only 1-D NumPy array; or default."""
        return _typed(self.path, self._values, key, Array, item_type, default)

    def floats(self, key: str, default: Any = REQUIRED) -> np.ndarray:
        """The items of an array of float32, or of whole numbers of 32 bits, which some converters write instead."""
        entry = self._values.get(key)
        whole = isinstance(entry, Array) and entry.type in _WHOLE
        return self.array(key, entry.type if whole else GGUFValueType.FLOAT32, default)

    def _scalar(self, key: str, type_: GGUFValueType, default: Any) -> Any:
        return _typed(self.path, self._values, key, Scalar, type_, default)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """The model at path, all of it checked; the first part of a split model opens them all.

    Raises GGUFError, one line naming the file, the key or tensor, what was found and what was expected.
    """
    first = _open_part(Path(path))
    parts = [first, *_open_rest(first)]
    _check_unique(parts)
    return GGUFFile(parts)


@dataclass(frozen=True)
class _Part:
    """One mapped file with its header."""

    file: MappedFile
    header: Header

    @property
    def path(self) -> Path:
        return self.file.path

    def number(self, key: str, type_: GGUFValueType, default: Any = REQUIRED) -> int:
        return _typed(self.path, self.header.values, key, Scalar, type_, default)

    def tensor(self, record: TensorRecord) -> Tensor:
        start = self.header.data_start + record.offset
        data = np.frombuffer(self.file.map, np.uint8, record.n_bytes, start)
        return Tensor(record.name, record.shape, record.type, record.n_bytes, data)


def _open_part(path: Path) -> _Part:
    file = MappedFile(path)
    return _Part(file, read_header(file.map, path))


def _open_rest(first: _Part) -> list[_Part]:
    """The second and later parts of a split model; empty for a single file (split.count absent, 0 or 1)."""
    count = first.number("split.count", GGUFValueType.UINT16, 1)
    if count <= 1:
        return []
    paths = _part_paths(first, count)
    for missing in (path for path in paths if not path.exists()):
        raise GGUFError(f"{missing}: no such file; {first.path.name} is the first of {count} parts and all are needed")
    rest = [_open_part(path) for path in paths[1:]]
    for index, part in enumerate(rest, start=1):
        _expect(part, "split.no", GGUFValueType.UINT16, index)
        _expect(part, "split.count", GGUFValueType.UINT16, count)
    n_tensors = sum(len(part.header.tensors) for part in [first, *rest])
    for part in [first, *rest]:
        _expect(part, "split.tensors.count", GGUFValueType.INT32, n_tensors)
    return rest


def _part_paths(first: _Part, count: int) -> list[Path]:
    """The paths of all parts, from the name of the one opened, which must be the first."""
    number = first.number("split.no", GGUFValueType.UINT16) + 1
    ending = f"-{number:05d}-of-{count:05d}.gguf"
    if not first.path.name.endswith(ending):
        raise GGUFError(f"{first.path}: is part {number} of {count} by its keys, expected a name ending in {ending}")
    prefix = first.path.name.removesuffix(ending)
    paths = [first.path.with_name(f"{prefix}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if number != 1:
        raise GGUFError(f"{first.path}: is part {number} of {count} of a split model; open the first, {paths[0]}")
    return paths


def _expect(part: _Part, key: str, type_: GGUFValueType, expected: int) -> None:
    found = part.number(key, type_)
    if found != expected:
        raise GGUFError(f"{part.path}: key {key!r} is {found}, expected {expected} from the parts of this split model")


def _check_unique(parts: list[_Part]) -> None:
    owner: dict[str, Path] = {}
    for part in parts:
        for record in part.header.tensors:
            if record.name in owner:
                raise GGUFError(f"{part.path}: tensor {record.name!r} is also in {owner[record.name].name}")
            owner[record.name] = part.path


def _typed(
    path: Path, values: Mapping[str, Scalar | Array], key: str, kind: type, type_: GGUFValueType, default: Any
) -> Any:
    """The value of key, which must be of exactly this kind and type, as llama.cpp demands too; or default."""
    entry = values.get(key)
    wanted = f"array of {type_.name.lower()}" if kind is Array else type_.name.lower()
    if entry is None:
        if default is REQUIRED:
            raise GGUFError(f"{path}: key {key!r} ({wanted}) is missing")
        return default
    if not isinstance(entry, kind) or entry.type != type_:
        raise GGUFError(f"{path}: key {key!r} has type {entry.type_name}, expected {wanted}")
    return entry.value
