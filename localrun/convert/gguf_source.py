"""A GGUF as the source of a conversion: its keys as they are, its rows as float32 or as their blocks."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path

import numpy as np

from localrun.convert.architecture import Model
from localrun.convert.metadata import Entry, Metadata
from localrun.convert.mixes import PLAIN, is_table
from localrun.convert.sources.checkpoint import TABLE, SourceTensor
from localrun.convert.sources.reading import Reader
from localrun.convert.targets import Piece, Target
from localrun.errors import GGUFError, LocalrunError, UnsupportedModelError
from localrun.gguf import types as tensor_types
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gguf.header import Array, Header, read_header
from localrun.models.names import check_tensors, check_types
from localrun.models.reader import architecture_of, read_config
from localrun.models.registry import ARCHITECTURES
from quant.formats import registry
from quant.formats.interleave import deinterleave

FREE_SOURCES = ("F32", "F16", "BF16", "Q8_0")  # near enough to the original to be packed anew without a word


class GGUFSource:
    """A GGUF model, all its parts.

    Attributes:
        tensors: name -> SourceTensor; dtype is ggml's name of the type, or of what an interleaved one is made of.
        files: the parts.
        keys: all keys of the first part, with their types.
        block_types: the types whose blocks it gives.
    """

    block_types = (*registry.NAMES, TABLE)

    def __init__(self, path: Path) -> None:
        """Read and check all headers. Raises GGUFError."""
        with open_gguf(path) as file:  # checks the parts against each other, too
            self.path, self.files = path, file.paths
            self.architecture = architecture_of(file)
            _check(file)
        self.tensors: dict[str, SourceTensor] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._interleaved: dict[str, str] = {}  # name -> type
        headers = [_read_header(part) for part in self.files]
        self.keys = headers[0].values
        for part, header in zip(self.files, headers, strict=True):
            for record in header.tensors:
                plain = tensor_types.plain(record.type)
                self.tensors[record.name] = SourceTensor(record.name, record.shape, plain.name, record.n_bytes)
                if plain != record.type:
                    self._interleaved[record.name] = record.type.name
                self._places[record.name] = part, header.data_start + record.offset
        self._reader = Reader()

    @property
    def is_interleaved(self) -> bool:
        """Whether some tensors have interleaved rows."""
        return bool(self._interleaved)

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """out = rows start..stop of a tensor, float32 (stop - start, n_cols), C order. Raises CheckpointError."""
        path, offset, n_bytes = self._extent(name, start, stop)
        blocks = self._reader.fetch(path, offset, n_bytes, name)
        self._reader.widen(self._in_order(name, stop - start, blocks), self.tensors[name].dtype, out)

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes): the blocks of the rows in order, a new array. Raises CheckpointError."""
        path, offset, n_bytes = self._extent(name, start, stop)
        out = np.empty(n_bytes, np.uint8)
        self._reader.read(path, offset, out, name)
        return self._in_order(name, stop - start, out).reshape(stop - start, -1)

    def _in_order(self, name: str, n_rows: int, blocks: np.ndarray) -> np.ndarray:
        """The rows one after the other; n_rows is a multiple of tensor_types.ROWS where they were interleaved."""
        type_ = self._interleaved.get(name)
        if type_ is None:
            return blocks
        return deinterleave(registry.get(type_), blocks, n_rows, blocks.size // n_rows).reshape(-1)

    def _extent(self, name: str, start: int, stop: int) -> tuple[Path, int, int]:
        """Where rows are: file, offset, bytes."""
        path, offset = self._places[name]
        row_bytes = self.tensors[name].n_bytes // self.tensors[name].n_rows
        return path, offset + start * row_bytes, (stop - start) * row_bytes

    def close(self) -> None:
        """Close the file that was read last."""
        self._reader.close()


def _check(file: GGUFFile) -> None:
    """Raises GGUFError for a model that nobody could run. What llama.cpp alone may run can be packed all the same."""
    if not file.tensors or architecture_of(file) not in ARCHITECTURES:
        return  # said later, in words of their own
    with suppress(UnsupportedModelError):
        check_tensors(file, read_config(file))
        check_types(file)
    for tensor in file.tensors.values():
        if not tensor.shape:
            raise GGUFError(f"{file.path}: tensor '{tensor.name}' has no dimensions, expected rows")


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        map_ = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # arrays are decoded from it later
    return read_header(map_, path)


def read_model(source: GGUFSource, *, keep_mtp: bool = True) -> Model:
    """Keys and tensors of a GGUF, to be written again. Raises UnsupportedModelError."""
    if not keep_mtp:
        raise LocalrunError(f"{source.path}: --no-mtp needs a checkpoint folder, not a GGUF")
    metadata = _copy_metadata(source)
    if metadata.architecture not in ARCHITECTURES:
        *others, last = ARCHITECTURES
        known = f"{', '.join(others)} and {last}"
        raise UnsupportedModelError(f"{source.path}: types are known for {known}, not for '{metadata.architecture}'")
    targets = []
    for tensor in source.tensors.values():
        if tensor.dtype not in registry.NAMES and not (is_table(tensor) and tensor.dtype == TABLE):
            raise UnsupportedModelError(
                f"{source.path}: tensor '{tensor.name}' has type {tensor.dtype}, not convertible"
            )
        pieces = (Piece(tensor.name, 0, tensor.n_rows, tensor.n_rows),)
        targets.append(Target(tensor.name, tensor.shape, tensor.dtype, pieces))
    return Model(metadata, targets)


def _copy_metadata(source: GGUFSource) -> Metadata:
    """All keys with their types, but for those of a split and of the alignment, which are the writer's own affair."""
    metadata = Metadata(source.architecture)
    for key, entry in source.keys.items():
        if key.startswith("split.") or key == "general.alignment":
            continue
        if isinstance(entry, Array):
            metadata.array(key, entry.type, _items(entry))
        else:
            metadata.set(key, Entry(entry.type, entry.value))
    return metadata


def _items(entry: Array) -> list:
    """The array's items; strings that are not UTF-8 as bytes."""
    items = entry.value
    if isinstance(items, np.ndarray):
        return items.tolist()
    return [item.encode("utf-8", "surrogateescape") for item in items]


def check_requantize(source: GGUFSource, targets: list[Target], types: list[str], allowed: bool) -> None:
    """Raises LocalrunError if a tensor would be packed anew from a type that has already lost much.

    Unpacking to floats loses nothing more.
    """
    for target, type_ in zip(targets, types, strict=True):
        if not allowed and type_ not in PLAIN and target.from_type not in (*FREE_SOURCES, type_):
            raise LocalrunError(
                f"{source.path}: tensor '{target.name}' is {target.from_type}; packing it again as {type_} loses twice "
                "(--allow-requantize does it)"
            )
