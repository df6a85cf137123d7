"""GGUF keys with their exact types, in order, to be written by gguf.GGUFWriter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, GGUFWriter

from localrun.errors import LocalrunError


@dataclass(frozen=True)
class Entry:
    """A value; item_type is that of an array's items."""

    type: GGUFValueType
    value: Any
    item_type: GGUFValueType | None = None


class Metadata:
    """The keys of a file. The setters take a full key, or one that starts with a dot: that of the architecture."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.entries: dict[str, Entry] = {}
        self.string("general.architecture", architecture)

    def set(self, key: str, entry: Entry) -> None:
        """An entry by its key; one that begins with a point goes behind the architecture's name."""
        self.entries[self.architecture + key if key.startswith(".") else key] = entry

    def u32(self, key: str, value: int) -> None:
        """An entry of uint32."""
        self.set(key, Entry(GGUFValueType.UINT32, int(value)))

    def i32(self, key: str, value: int) -> None:
        """An entry of int32."""
        self.set(key, Entry(GGUFValueType.INT32, int(value)))

    def f32(self, key: str, value: float) -> None:
        """An entry of float32."""
        self.set(key, Entry(GGUFValueType.FLOAT32, float(value)))

    def bool(self, key: str, value: bool) -> None:
        """An entry of a boolean."""
        self.set(key, Entry(GGUFValueType.BOOL, bool(value)))

    def bools(self, key: str, values: Sequence[bool]) -> None:
        """An entry of an array of booleans."""
        self.array(key, GGUFValueType.BOOL, list(values))

    def i32s(self, key: str, values: Sequence[int]) -> None:
        """An entry of an array of int32."""
        self.array(key, GGUFValueType.INT32, list(map(int, values)))

    def f32s(self, key: str, values: Sequence[float]) -> None:
        """An entry of an array of float32."""
        self.array(key, GGUFValueType.FLOAT32, list(map(float, values)))

    def string(self, key: str, value: str) -> None:
        """Raises LocalrunError if the text is not Unicode: JSON can spell halves of characters."""
        _check_text(key, [value])
        self.set(key, Entry(GGUFValueType.STRING, value))

    def array(self, key: str, item_type: GGUFValueType, items: Sequence[Any]) -> None:
        """An array; one without items is left out, since the format's writers know none."""
        if item_type == GGUFValueType.STRING:
            _check_text(key, items)
        if len(items):
            self.set(key, Entry(GGUFValueType.ARRAY, items, item_type))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, full or starting with a dot."""
        entry = self.entries.get(self.architecture + key if key.startswith(".") else key)
        return default if entry is None else entry.value

    def write(self, writer: GGUFWriter) -> None:
        """Add all keys to a writer that was made with the architecture."""
        for key, entry in self.entries.items():
            if key != "general.architecture":  # GGUFWriter adds it itself
                writer.add_key_value(key, entry.value, entry.type, entry.item_type)


class PlannedHeader:
    """The header of a file that is not there, with what models.reader and models.names ask of GGUFFile."""

    def __init__(self, path: Path, metadata: Metadata, tensors: Iterable[Any]) -> None:
        """tensors: anything with a name and a shape in NumPy order."""
        self.path = path
        self.metadata = {key: entry.value for key, entry in metadata.entries.items()}
        self.tensors = {tensor.name: tensor for tensor in tensors}

    def has(self, key: str) -> bool:
        """Whether the header will have the key."""
        return key in self.metadata

    def _get(self, key: str, default: Any = ...) -> Any:
        return self.metadata[key] if default is ... else self.metadata.get(key, default)

    u32 = f32 = bool = string = _get

    def array(self, key: str, item_type: GGUFValueType, default: Any = ...) -> Any:
        """The values of an array, as GGUFFile.array gives those of a file; their type is not looked at."""
        return self._get(key, default)


def _check_text(key: str, items: Sequence[str | bytes]) -> None:
    for item in items:
        try:
            item if isinstance(item, bytes) else item.encode()
        except UnicodeEncodeError:
            raise LocalrunError(f"key '{key}': {item[:50]!r} is not Unicode text") from None
