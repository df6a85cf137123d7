"""The keys of one architecture in a GGUF, with checks."""

import math

import numpy as np
from gguf import GGUFValueType

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import GGUFFile


class Keys:
    """Remembers which keys were read, so that an unknown one is not silently ignored.

    Names are without the architecture's prefix. Getters raise GGUFError where a key is missing without a default, or is
    of another type.
    """

    def __init__(self, file: GGUFFile, architecture: str):
        self.file = file
        self.prefix = architecture + "."
        self._read: set[str] = set()

    def _get(self, getter, name: str, default):
        self._read.add(name)
        return getter(self.prefix + name, *default)

    def u32(self, name: str, *default, by_layer: bool = False):
        """A count; 0 only where there is a default.

        by_layer: an array of one count a layer will do as well, if all are the same; else UnsupportedModelError.
        """
        items = self.file.metadata.get(self.prefix + name) if by_layer else None
        if isinstance(items, np.ndarray) and items.dtype in (np.uint32, np.int32):
            self._read.add(name)
            value = self._same_in_all(name, items)
        else:
            value = self._get(self.file.u32, name, default)
        if isinstance(value, int) and value == 0 and not default:
            self.fail(name, 0, "a positive number")
        return value

    def _same_in_all(self, name: str, items: np.ndarray) -> int:
        n_layers = self.u32("block_count")
        if len(items) != n_layers:
            self.fail(name, f"{len(items)} numbers", f"one, or {n_layers}: one a layer")
        if items.min() < 0:
            self.fail(name, items.min(), "a positive number")
        if items.min() != items.max():
            self.refuse(f"key '{self.prefix}{name}' is another number from layer to layer, which is not native")
        return int(items[0])

    def f32(self, name: str, *default):
        """A finite number."""
        value = self._get(self.file.f32, name, default)
        if value is not None and not math.isfinite(value):
            self.fail(name, value, "a finite number")
        return value

    def bool(self, name: str, *default):
        """True or False."""
        return self._get(self.file.bool, name, default)

    def bools(self, name: str, *default) -> tuple[bool, ...] | None:
        """An array of True and False."""
        self._read.add(name)
        found = self.file.array(self.prefix + name, GGUFValueType.BOOL, *default)
        return None if found is None else tuple(map(bool, found))

    def i32s(self, name: str, *default) -> tuple[int, ...] | None:
        """An array of whole numbers of 32 bits, with or without a sign."""
        return self._numbers(name, (np.int32, np.uint32), default)

    def f32s(self, name: str, *default) -> tuple[float, ...] | None:
        """An array of numbers; a single one will do as well."""
        if isinstance(self.file.metadata.get(self.prefix + name), float):
            return (self.f32(name),)
        return self._numbers(name, (np.float32,), default)

    def _numbers(self, name: str, types: tuple[type, ...], default: tuple) -> tuple | None:
        self._read.add(name)
        found = self.file.metadata.get(self.prefix + name)
        if found is None and default:
            return default[0]
        if isinstance(found, np.ndarray) and found.dtype in types:
            found = found.tolist()
        if not isinstance(found, list) or not all(type(item) in (int, float) for item in found):
            self.fail(name, "missing" if found is None else "something else", f"an array of {types[0].__name__}")
        return tuple(found)

    def string(self, name: str, *default):
        """Text."""
        return self._get(self.file.string, name, default)

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        self._read.add(name)
        return self.file.has(self.prefix + name)

    def rows(self, tensor: str) -> int:
        """Rows of a matrix. Raises GGUFError if it is missing, or none."""
        if tensor not in self.file.tensors:
            raise GGUFError(f"{self.file.path}: tensor '{tensor}' not found")
        shape = self.file.tensors[tensor].shape
        if len(shape) != 2:
            raise GGUFError(f"{self.file.path}: tensor '{tensor}' has shape {shape}; expected rows and columns")
        return shape[0]

    def fail(self, name: str, found, expected) -> None:
        """Raises GGUFError."""
        raise GGUFError(f"{self.file.path}: key '{self.prefix}{name}' is {found}; expected {expected}")

    def refuse(self, what: str) -> None:
        """Raises UnsupportedModelError."""
        raise UnsupportedModelError(f"{self.file.path}: {what}")

    def refuse_unread(self) -> None:
        """Raises UnsupportedModelError if the architecture has a key that nothing here understands."""
        for key in self.file.metadata:
            if key.startswith(self.prefix) and key.removeprefix(self.prefix) not in self._read:
                self.refuse(f"key {key[:100]!r} is not known to the native backend")
