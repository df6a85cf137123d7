"""One safetensors file: which tensors it holds and where, checked before anything is read.

Layout: u64 length of the header, the header as JSON, the data (https://github.com/huggingface/safetensors, README.md
"Format" @v0.6). The safetensors library would map the data; reading.py says why this does not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown, typed
from localrun.gguf import lfs

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
MAX_DIMS = 8  # no layer's weights have more than 4
# Bytes of an item, of the dtypes that something here reads.
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies; shape in NumPy order, offset in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    n_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. Raises CheckpointError, naming the file, if the file is not sound."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no file")
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(lfs.LONGEST)
            if lfs.is_pointer(start):
                raise CheckpointError(f"{path}: {lfs.ADVICE}")
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: is not a safetensors file, or cut off: a header of {length} bytes")
            header = _json_object(file.read(length), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
    _check_extent(path, list(tensors.values()), 8 + length, size)
    return tensors


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise CheckpointError(f"{path}: tensor {shown(name)} is there twice")
            found[name] = value
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the header is not JSON, expected a safetensors file") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is no JSON object, expected a safetensors file")
    return header


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> StoredTensor:
    """The tensor that a header entry tells of, dtype and extent checked."""
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} has a broken header entry, {shown(entry)}")
    dtype = typed(entry, "dtype", str, where)
    shape, offsets = (_numbers(entry, key, where) for key in ("shape", "data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets is {shown(offsets)}; expected where it starts and ends")
    if len(shape) > MAX_DIMS:
        raise CheckpointError(f"{where}: shape has {len(shape)} dimensions; expected at most {MAX_DIMS}")
    (start, end), shape = offsets, tuple(shape)
    if dtype in DTYPE_BYTES and end - start != prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointError(f"{where} has {end - start} bytes; expected {dtype} {list(shape)}")
    return StoredTensor(name, shape, dtype, path, data_start + start, end - start)


def _numbers(entry: dict[str, Any], key: str, where: str) -> list[int]:
    """A list of sizes of at most 64 bits."""
    numbers = typed(entry, key, list, where)
    if not all(type(number) is int and 0 <= number < 2**64 for number in numbers):
        raise CheckpointError(f"{where}: {key} is {shown(numbers)}; expected whole numbers: broken")
    return numbers


def _check_extent(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The tensors lie one behind another and end where the file does, as the format demands."""
    at = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != at:
            raise CheckpointError(f"{path}: tensor {shown(tensor.name)} starts at byte {tensor.offset}; expected {at}")
        at += tensor.n_bytes
        if at > size:
            raise CheckpointError(
                f"{path}: is cut off in tensor {shown(tensor.name)}: {size} bytes; expected {at} or more"
            )
    if at != size:
        raise CheckpointError(f"{path}: has {size} bytes; expected {at} from its header")
