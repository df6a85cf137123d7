"""Where everything goes in the file or files: headers as bytes, and each tensor's part and offset.

The headers are gguf.GGUFWriter's, which also deals the tensors out to parts: a new part begins where the next tensor
would take the last one past the limit.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.gguf_writer import WriterState

from localrun.convert.metadata import Metadata
from localrun.convert.targets import Target
from localrun.errors import LocalrunError
from localrun.gguf import types as tensor_types

MAX_PARTS = 2**16 - 1  # split.count has 16 bits


@dataclass(frozen=True)
class Part:
    """One file: what it starts with, where its data begins, and its whole size, in bytes."""

    path: Path
    header: bytes
    data_start: int
    size: int


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: index of the part, offset in that file, and size, in bytes."""

    part: int
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Layout:
    """All parts, and the place of each target, in the same order."""

    parts: list[Part]
    places: list[Place]

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)


def tensor_bytes(target: Target, type_: str) -> int:
    """Bytes of a target in a type that its rows fit."""
    block, block_bytes = tensor_types.block_size(tensor_types.from_name(type_))
    return target.n_weights // block * block_bytes


def make_layout(
    path: Path, metadata: Metadata, targets: list[Target], types: list[str], split_max_bytes: int = 0
) -> Layout:
    """The files to write for path: path itself, or with a limit name-00001-of-00003.gguf and so on.

    Raises LocalrunError if there would be too many.
    """
    writer = GGUFWriter(None, metadata.architecture, split_max_size=split_max_bytes)
    metadata.write(writer)
    for target, type_ in zip(targets, types, strict=True):
        kind = tensor_types.from_name(type_)
        writer.add_tensor_info(
            target.name, target.shape, np.dtype(np.float32), tensor_bytes(target, type_), raw_dtype=kind
        )
    if len(writer.tensors) > MAX_PARTS:
        raise LocalrunError(f"{path}: would be {len(writer.tensors)} parts, more than {MAX_PARTS}; allow larger ones")
    writer.split_max_size = 0  # has done its work; if there is one part only, the writer would warn
    paths, members = writer.format_shard_names(path), [list(tensors) for tensors in writer.tensors]
    headers = _headers(writer)
    return _place(
        paths, headers, members, {t.name: tensor_bytes(t, type_) for t, type_ in zip(targets, types, strict=True)}
    )


def _headers(writer: GGUFWriter) -> list[bytes]:
    buffers = [io.BytesIO() for _ in writer.tensors]
    writer.fout, writer.state = buffers, WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for buffer in buffers:
        writer.write_padding(buffer, buffer.tell())
    return [buffer.getvalue() for buffer in buffers]


def _place(paths: list[Path], headers: list[bytes], members: list[list[str]], sizes: dict[str, int]) -> Layout:
    parts, places = [], []
    for index, (path, header, names) in enumerate(zip(paths, headers, members, strict=True)):
        at = len(header)
        for name in names:
            places.append(Place(index, at, sizes[name]))
            at += GGUFWriter.ggml_pad(sizes[name], 32)
        parts.append(Part(path, header, len(header), at))
    return Layout(parts, places)
