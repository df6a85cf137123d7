"""A GGUF writer that writes what it is told, sound or broken, byte by byte, and computes nothing it was not asked for.

Layout: ggml/include/gguf.h of https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIifBQqd", strict=True))


def text(content: str | bytes, length: int | None = None) -> bytes:
    """A length-prefixed string; length may lie."""
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: str | bytes, type_: int, value: float | str | bytes) -> bytes:
    """One key with a scalar or string value."""
    if type_ == STRING:
        return raw_key(name, STRING, text(value))
    return raw_key(name, type_, struct.pack("<" + CODES[type_], value))


def raw_key(name: str | bytes, type_: int, payload: bytes) -> bytes:
    """One key whose value is payload, whatever its type says."""
    return text(name) + struct.pack("<I", type_) + payload


def array(name: str | bytes, item_type: int, items: Sequence, count: int | None = None) -> bytes:
    """One key with an array of items (numbers, or strings where item_type is STRING); count may lie."""
    if item_type == STRING:
        body = b"".join(text(item) for item in items)
    else:
        body = struct.pack(f"<{len(items)}{CODES[item_type]}", *items)
    return raw_key(name, ARRAY, struct.pack("<IQ", item_type, len(items) if count is None else count) + body)


def tensor(name: str | bytes, ne: Sequence[int], type_: int, offset: int, n_dims: int | None = None) -> bytes:
    """One tensor record; ne in ggml's order, contiguous dimension first; n_dims may lie."""
    dims = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
    return text(name) + dims + struct.pack("<IQ", type_, offset)


def pieces(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> list[bytes]:
    """The file cut at its structures: magic, version, tensor count, key count, each key, each record, padding, data."""
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = [magic, struct.pack("<I", version), *(struct.pack("<Q", count) for count in counts), *keys, *tensors]
    return [*head, bytes(-sum(map(len, head)) % alignment), data]


def build(*args: Sequence[bytes], **kwargs: int | bytes) -> bytes:
    """The whole file; arguments as for pieces."""
    return b"".join(pieces(*args, **kwargs))
