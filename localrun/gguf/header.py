"""The header of one GGUF file: its keys, typed values and tensor records, every field checked before it is used.

Knows nothing of split files or of what keys mean. All counts and sizes are Python integers, so no sum or product can
wrap, and a count is held against the bytes that are left before anything is read or allocated for it.

Layout: ggml/include/gguf.h of https://github.com/ggml-org/llama.cpp @3f545becc; the checks are those of
ggml/src/gguf.cpp there, plus: key count, tensor count, UTF-8 in names and scalar strings, zero dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from mmap import mmap
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValueType

from localrun.errors import GGUFError
from localrun.gguf import lfs
from localrun.gguf import types as tensor_types
from localrun.gguf.types import InterleavedType, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_KEY = 2**16 - 1  # bytes; the format's own limit
MAX_NAME = 63  # bytes of a tensor name; GGML_MAX_NAME less its NUL
MAX_STRING = MAX_ITEMS = 2**30  # bytes, items: llama.cpp's limits
# Real models stay under 200 keys and 3,000 tensors. Each costs some hundred bytes here and as few as 14 in the file,
# so without a limit a hostile file would take many times its size.
MAX_KEYS = MAX_TENSORS = 2**16
INT64_MAX = 2**63 - 1  # ggml counts elements and bytes in int64

_KEY_BYTES = 8 + 1 + 4 + 1  # the least a key can take: length, one character, type, value
_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, dimension count, type, offset
_U32, _U64 = Struct("<I"), Struct("<Q")
_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class Scalar:
    """A number, a truth value or a string."""

    type: GGUFValueType
    value: int | float | bool | str

    @property
    def type_name(self) -> str:
        """As errors and `inspect` have it."""
        return self.type.name.lower()


@dataclass(frozen=True)
class Array:
    """An array whose extent has been checked and whose items are decoded when first asked for."""

    type: GGUFValueType  # of the items
    count: int
    start: int  # offset of the first item in data, bytes
    data: mmap

    @property
    def type_name(self) -> str:
        """As errors and `inspect` have it."""
        return f"array of {self.type.name.lower()}"

    @cached_property
    def value(self) -> list[str] | np.ndarray:
        """Strings as a list, all else as a read-only 1-D NumPy array.

        llama.cpp takes any bytes as a string item (byte-level vocabularies hold pieces of characters), and so does
        this: bytes that are not UTF-8 come as lone surrogates, and item.encode("utf-8", "surrogateescape") is exact.
        """
        if self.type == GGUFValueType.STRING:
            return self._strings()
        items = np.frombuffer(self.data, _NUMBERS[self.type], self.count, self.start).copy()
        items = items.astype(bool) if self.type == GGUFValueType.BOOL else items
        items.flags.writeable = False
        return items

    def _strings(self) -> list[str]:
        items, position, data, read_length = [], self.start, self.data, _U64.unpack_from
        for _ in range(self.count):
            (length,) = read_length(data, position)
            end = position + 8 + length
            items.append(data[position + 8 : end].decode("utf-8", "surrogateescape"))
            position = end
        return items


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor says it is; shape in NumPy order, offset in bytes from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type: TensorType
    n_bytes: int
    offset: int


@dataclass(frozen=True)
class Header:
    version: int
    alignment: int
    values: dict[str, Scalar | Array]
    tensors: list[TensorRecord]
    keys_end: int  # offset of what follows the keys in the file, bytes
    data_start: int  # and of the data section


class _Cursor:
    """A read position that never passes the end of the data. where names what is being read, for the error."""

    def __init__(self, data: mmap, path: Path) -> None:
        self.data, self.path, self.size = data, path, len(data)
        self.position = 0
        self.where = "the header"

    def error(self, problem: str) -> GGUFError:
        return GGUFError(f"{self.path}: {self.where} {problem}")

    def skip(self, n_bytes: int) -> int:
        """The offset of the next n_bytes, after stepping over them."""
        start, left = self.position, self.size - self.position
        if n_bytes > left:
            raise self.error(f"is cut off: expected {n_bytes} bytes at offset {start}, found {left}")
        self.position += n_bytes
        return start

    def u32(self) -> int:
        return _U32.unpack_from(self.data, self.skip(4))[0]

    def u64(self) -> int:
        return _U64.unpack_from(self.data, self.skip(8))[0]

    def text(self, what: str, limit: int) -> str:
        length = self.u64()
        if length > limit:
            raise self.error(f"has a {what} of {length} bytes, expected at most {limit}")
        start = self.skip(length)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"has a {what} that is not UTF-8 (byte {error.start})") from None

    def count(self, what: str, limit: int, item_bytes: int) -> int:
        """A u64 count of items that can still fit in the file."""
        n_items, left = self.u64(), self.size - self.position
        if n_items > limit:
            raise self.error(f"declares {n_items} {what}, expected at most {limit}")
        if n_items > left // item_bytes:
            raise self.error(f"declares {n_items} {what}, but the {left} bytes left can hold {left // item_bytes}")
        return n_items


def read_header(data: mmap, path: Path) -> Header:
    """The checked header of the GGUF file whose bytes are data.

    Tensor data itself is not read, but each tensor is known to lie within the file. Raises GGUFError naming path.
    """
    cursor = _Cursor(data, path)
    version = _read_version(cursor)
    n_tensors = cursor.count("tensors", MAX_TENSORS, _TENSOR_BYTES)
    n_keys = cursor.count("keys", MAX_KEYS, _KEY_BYTES)
    values = _read_values(cursor, n_keys)
    keys_end = cursor.position
    alignment = _alignment(cursor, values)
    tensors = _read_tensors(cursor, n_tensors, alignment)
    data_start = _padded(cursor.position, alignment)
    for tensor in tensors:
        _check_extent(cursor, tensor, data_start)
    return Header(version, alignment, values, tensors, keys_end, data_start)


def _read_version(cursor: _Cursor) -> int:
    if lfs.is_pointer(cursor.data[: lfs.LONGEST]):
        raise GGUFError(f"{cursor.path}: {lfs.ADVICE}")
    cursor.skip(len(MAGIC))
    magic = cursor.data[: len(MAGIC)]
    if magic != MAGIC:
        raise cursor.error(f"has magic {magic!r}, expected {MAGIC!r}: not a GGUF file")
    version = cursor.u32()
    if version and not version & 0xFFFF:
        raise cursor.error(f"has version {version:#010x}: a big-endian file, expected little-endian")
    if version not in VERSIONS:
        raise cursor.error(f"has version {version}, expected 2 or 3")
    return version


def _read_values(cursor: _Cursor, n_keys: int) -> dict[str, Scalar | Array]:
    values: dict[str, Scalar | Array] = {}
    for index in range(n_keys):
        cursor.where = f"key {index + 1} of {n_keys}"
        key = cursor.text("name", MAX_KEY)
        if not key:
            raise cursor.error("has an empty name")
        cursor.where = f"key {key[:100]!r}"
        if key in values:
            raise cursor.error("appears twice")
        values[key] = _read_value(cursor)
    return values


def _read_value(cursor: _Cursor) -> Scalar | Array:
    type_ = _value_type(cursor, "value")
    if type_ == GGUFValueType.ARRAY:
        return _read_array(cursor)
    if type_ == GGUFValueType.STRING:
        return Scalar(type_, cursor.text("string", MAX_STRING))
    dtype = np.dtype(_NUMBERS[type_])
    value = np.frombuffer(cursor.data, dtype, 1, cursor.skip(dtype.itemsize))[0].item()
    if type_ == GGUFValueType.BOOL:
        if value > 1:
            raise cursor.error(f"has the bool byte {value}, expected 0 or 1")
        value = bool(value)
    return Scalar(type_, value)


def _read_array(cursor: _Cursor) -> Array:
    type_ = _value_type(cursor, "item")
    if type_ == GGUFValueType.ARRAY:
        raise cursor.error("is an array of arrays, which is not supported")
    if type_ == GGUFValueType.STRING:
        array = Array(type_, cursor.count("strings", MAX_ITEMS, 8), cursor.position, cursor.data)
        _skip_strings(cursor, array.count)
        return array
    itemsize = np.dtype(_NUMBERS[type_]).itemsize
    array = Array(type_, cursor.count("items", MAX_ITEMS, itemsize), cursor.position, cursor.data)
    cursor.skip(array.count * itemsize)
    if type_ == GGUFValueType.BOOL and array.count:
        highest = int(np.frombuffer(cursor.data, np.uint8, array.count, array.start).max())
        if highest > 1:
            raise cursor.error(f"has the bool byte {highest}, expected 0 or 1")
    return array


def _value_type(cursor: _Cursor, what: str) -> GGUFValueType:
    number = cursor.u32()
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.error(f"has {what} type {number}, expected 0 to {max(GGUFValueType)}") from None


def _skip_strings(cursor: _Cursor, count: int) -> None:
    """Step over count strings. Written for speed: a vocabulary and its merges are 250,000 of them."""
    data, position, size, read_length = cursor.data, cursor.position, cursor.size, _U64.unpack_from
    last_length = size - 8
    for index in range(count):
        if position > last_length:
            raise cursor.error(f"is cut off at item {index} of {count}: found no length at offset {position}")
        (length,) = read_length(data, position)
        position += 8 + length
        if position > size or length > MAX_STRING:
            room = min(MAX_STRING, size - position + length)
            raise cursor.error(f"has {length} bytes in item {index} of {count}, expected at most {room}")
    cursor.position = position


def _alignment(cursor: _Cursor, values: Mapping[str, Scalar | Array]) -> int:
    entry: Any = values.get("general.alignment", Scalar(GGUFValueType.UINT32, GGUF_DEFAULT_ALIGNMENT))
    cursor.where = "key 'general.alignment'"
    if not isinstance(entry, Scalar) or entry.type != GGUFValueType.UINT32:
        raise cursor.error(f"has type {entry.type_name}, expected uint32")
    if entry.value.bit_count() != 1:
        raise cursor.error(f"is {entry.value}, expected a power of two")
    return entry.value


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> list[TensorRecord]:
    tensors: list[TensorRecord] = []
    names: set[str] = set()
    offset = 0  # where the next tensor must start: the padded sum of those before it
    for index in range(n_tensors):
        cursor.where = f"tensor {index + 1} of {n_tensors}"
        tensor = _read_tensor(cursor)
        if tensor.name in names:
            raise cursor.error("appears twice")
        if tensor.offset != offset:
            raise cursor.error(f"has offset {tensor.offset}, expected {offset}, the end of the tensors before it")
        offset = _padded(offset + tensor.n_bytes, alignment)
        names.add(tensor.name)
        tensors.append(tensor)
    return tensors


def _read_tensor(cursor: _Cursor) -> TensorRecord:
    name = cursor.text("name", MAX_NAME)
    cursor.where = f"tensor {name!r}"
    n_dims = cursor.u32()
    if n_dims > MAX_DIMS:
        raise cursor.error(f"has {n_dims} dimensions, expected at most {MAX_DIMS}")
    shape = tuple(cursor.u64() for _ in range(n_dims))[::-1]
    _check_shape(cursor, shape)
    type_ = _tensor_type(cursor)
    n_bytes = _tensor_bytes(cursor, shape, type_)
    return TensorRecord(name, shape, type_, n_bytes, cursor.u64())


def _check_shape(cursor: _Cursor, shape: tuple[int, ...]) -> None:
    if not all(0 < size <= INT64_MAX for size in shape):
        raise cursor.error(f"has shape {shape}, expected sizes from 1 to 2^63 - 1")
    if prod(shape) > INT64_MAX:
        raise cursor.error(f"has shape {shape}, {prod(shape)} elements; expected fewer than 2^63")


def _tensor_type(cursor: _Cursor) -> TensorType:
    number = cursor.u32()
    try:
        return tensor_types.from_number(number)
    except ValueError:
        raise cursor.error(f"has type {number}, which is not a known ggml type (or one that was removed)") from None


def _tensor_bytes(cursor: _Cursor, shape: tuple[int, ...], type_: TensorType) -> int:
    block, block_bytes = tensor_types.block_size(type_)
    row = shape[-1] if shape else 1
    if row % block:
        raise cursor.error(f"has rows of {row} elements, expected a multiple of {block} for {type_.name}")
    if isinstance(type_, InterleavedType) and (len(shape) < 2 or shape[-2] % tensor_types.ROWS):
        raise cursor.error(f"has shape {shape}, expected a multiple of {tensor_types.ROWS} rows for {type_.name}")
    n_bytes = prod(shape) // block * block_bytes
    if n_bytes > INT64_MAX:
        raise cursor.error(f"takes {n_bytes} bytes, expected fewer than 2^63")
    return n_bytes


def _check_extent(cursor: _Cursor, tensor: TensorRecord, data_start: int) -> None:
    end = data_start + tensor.offset + tensor.n_bytes
    if end > cursor.size:
        cursor.where = f"tensor {tensor.name!r}"
        raise cursor.error(
            f"is not within the file: its {tensor.n_bytes} bytes end at offset {end}, the file at {cursor.size}; "
            "the file is corrupted or incomplete"
        )


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment
