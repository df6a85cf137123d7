"""A GGUF as the source of a conversion: its keys as they are, its rows as float32 or as their blocks."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from localrun.convert.architecture import Model
from localrun.convert.checkpoint import SourceTensor
from localrun.convert.metadata import Entry, Metadata
from localrun.convert.targets import Piece, Target
from localrun.errors import LocalrunError, UnsupportedModelError
from localrun.gguf import GGUFFile, open_gguf
from localrun.gguf_header import Array, read_header
from quant import formats
from quant.linear import expand_rows, weight
from quant.pool import Pool

FREE_SOURCES = ("F32", "F16", "BF16", "Q8_0")  # near enough to the original to be packed anew without a word


class GGUFSource:
    """An open GGUF file, all its parts.

    Attributes:
        tensors: name -> SourceTensor; dtype is ggml's name of the type.
        files: the parts.
    """

    def __init__(self, path: Path) -> None:
        """Raises GGUFError."""
        self.path = path
        self.file: GGUFFile = open_gguf(path)
        self.files = self.file.paths
        self.tensors = {
            tensor.name: SourceTensor(tensor.name, tensor.shape, tensor.type.name, tensor.n_bytes)
            for tensor in self.file.tensors.values()
        }
        self._pool = Pool(1)  # of the reading thread, beside the packers'

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """float32 (stop - start, n_cols)."""
        tensor = self.file.tensors[name]
        format_ = formats.get(tensor.type.name)
        n_cols = tensor.shape[-1]
        matrix = weight(tensor.data, format_, (self.tensors[name].n_rows, n_cols))
        out = np.empty((stop - start, n_cols), np.float32)
        expand_rows(self._pool, matrix, np.arange(start, stop, dtype=np.int64), out.ctypes.data)
        return out

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8: the rows as they are in the file."""
        tensor = self.file.tensors[name]
        row_bytes = tensor.n_bytes // self.tensors[name].n_rows
        return tensor.data[start * row_bytes : stop * row_bytes].copy()

    def close(self) -> None:
        self._pool.close()
        self.file.close()


def read_model(source: GGUFSource, *, keep_mtp: bool = True) -> Model:
    """Keys and tensors of a GGUF, to be written again. Raises UnsupportedModelError."""
    if not keep_mtp:
        raise LocalrunError(f"{source.path}: --no-mtp needs a checkpoint folder, not a GGUF")
    metadata = _copy_metadata(source)
    targets = []
    for tensor in source.tensors.values():
        if tensor.dtype not in formats.NAMES:
            raise UnsupportedModelError(
                f"{source.path}: tensor '{tensor.name}' has type {tensor.dtype}, not convertible"
            )
        pieces = (Piece(tensor.name, 0, tensor.n_rows, tensor.n_rows),)
        targets.append(Target(tensor.name, tensor.shape, tensor.dtype, pieces))
    return Model(metadata, targets)


def _copy_metadata(source: GGUFSource) -> Metadata:
    """All keys with their types, but for those of a split."""
    with source.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as map_:
        values = read_header(map_, source.path).values
        metadata = Metadata(source.file.string("general.architecture"))
        for key, entry in values.items():
            if key.startswith("split.") or key == "general.alignment":  # the writer's own affair
                continue
            if not isinstance(entry, Array):
                metadata.set(key, Entry(entry.type, entry.value))
            else:
                metadata.array(key, entry.type, _items(entry))
    return metadata


def _items(entry: Array) -> list:
    """The array's items; strings that are not UTF-8 as bytes."""
    items = entry.value
    if isinstance(items, np.ndarray):
        return items.tolist()
    return [item.encode("utf-8", "surrogateescape") for item in items]


def check_requantize(source: GGUFSource, targets: list[Target], types: list[str], allowed: bool) -> None:
    """Raises LocalrunError if a tensor would be packed anew from a type that has already lost much."""
    for target, type_ in zip(targets, types, strict=True):
        if not allowed and target.from_type not in (*FREE_SOURCES, type_):
            raise LocalrunError(
                f"{source.path}: tensor '{target.name}' is {target.from_type}; packing it again as {type_} loses twice "
                "(--allow-requantize does it)"
            )
