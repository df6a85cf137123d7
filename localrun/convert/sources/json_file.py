"""JSON files of a checkpoint and the values in them, read here alone: each is of the type that is asked for, or named.

Anyone may have made these files: any value can be of any type and size.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.gguf import lfs

_FLOAT32_MAX = 3.4e38
_MAX_BYTES = 1 << 30  # the largest published, tokenizer.json, has some 30 MB
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "an object",
}
_MAX_SHOWN = 100  # characters of a value in a message
_SPELL = reprlib.Repr()
_SPELL.maxstring = _SPELL.maxother = 80


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError naming the file."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is no file")
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: is larger than 1 GiB")
        text = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    if lfs.is_pointer(text):
        raise CheckpointError(f"{path}: {lfs.ADVICE}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value is of this kind: an int of 0 to 2^32 - 1; a float that fits 32 bits, also written as an int."""
    if kind is int:
        return type(value) is int and 0 <= value < 2**32
    if kind is float:
        return type(value) in (int, float) and abs(value) <= _FLOAT32_MAX
    return isinstance(value, kind)


def typed(values: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """values[key] of this kind. Raises CheckpointError naming `where` and the key."""
    if key not in values:
        raise CheckpointError(f"{where}: {key} is missing; expected {_NAMES[kind]}")
    value = values[key]
    if not is_kind(value, kind):
        raise CheckpointError(f"{where}: {key} is {shown(value)}; expected {_NAMES[kind]}")
    return kind(value)


def shown(value: Any) -> str:
    """A value for a message: as Python spells it (null is None), short, in one line."""
    text = _SPELL.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
