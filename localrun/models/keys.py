"""The keys of one architecture in a GGUF, with checks."""

import math

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

    def u32(self, name: str, *default):
        """A count; 0 only where there is a default."""
        value = self._get(self.file.u32, name, default)
        if isinstance(value, int) and value == 0 and not default:
            self.fail(name, 0, "a positive number")
        return value

    def f32(self, name: str, *default):
        """A finite number."""
        value = self._get(self.file.f32, name, default)
        if value is not None and not math.isfinite(value):
            self.fail(name, value, "a finite number")
        return value

    def bool(self, name: str, *default):
        """True or False."""
        return self._get(self.file.bool, name, default)

    def string(self, name: str, *default):
        """Text."""
        return self._get(self.file.string, name, default)

    def has(self, name: str) -> bool:
        """Whether the file has the key."""
        self._read.add(name)
        return self.file.has(self.prefix + name)

    def rows(self, tensor: str) -> int:
        """Rows of a tensor. Raises GGUFError if it is missing."""
        if tensor not in self.file.tensors:
            raise GGUFError(f"{self.file.path}: tensor '{tensor}' not found")
        return self.file.tensors[tensor].shape[0]

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
                self.refuse(f"key '{key}' is not known to the native backend")
