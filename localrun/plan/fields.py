"""The fields of a JSON description, checked as they are read: of machines, of links.

A number may stand alone or as {"value": ..., "source": ...}.
"""

from __future__ import annotations

from typing import Any

from localrun.errors import LocalrunError

_LEAST, _MOST = 1e-18, 1e24  # of any number: beyond all machines, and products of some are still finite


class Fields:
    """A JSON object with checks: every key known, every number positive and finite."""

    def __init__(self, value: Any, where: str, prefix: str = "", sources: dict[str, str] | None = None) -> None:
        self.where, self.prefix = where, prefix
        self.sources: dict[str, str] = {} if sources is None else sources
        self._read: set[str] = set()
        if not isinstance(value, dict):
            raise LocalrunError(f"{where}: {prefix.rstrip('.') or 'the document'} is no object; see docs/plan.md")
        self._values = value

    def fail(self, key: str, found: Any, expected: str) -> None:
        """Raises LocalrunError: what was found in place of what is expected."""
        raise LocalrunError(f"{self.where}: {self.prefix}{key} is {found!r}; expected {expected}")

    def has(self, key: str) -> bool:
        """Whether the key has a value; it counts as read."""
        self._read.add(key)
        return self._values.get(key) is not None

    def get(self, key: str, *default: Any) -> Any:
        """A value, or the default. Raises LocalrunError if both are missing."""
        if not self.has(key):
            if not default:
                raise LocalrunError(f"{self.where}: {self.prefix}{key} is missing")
            return default[0]
        return self._values[key]

    def number(self, key: str, *default: float, at_least: float | None = None) -> float:
        """A number, bare or as {value, source}: positive, or at least at_least, 0 where there is a default.

        Raises LocalrunError if it is missing, or none of these.
        """
        value = self.get(key, *default)
        if isinstance(value, dict):
            self.sources[self.prefix + key] = str(value.get("source", ""))
            value = value.get("value")
        least = 0.0 if default else at_least
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not ((least is not None and value == least) or _LEAST <= value <= _MOST):
            expected = "a positive number" if least is None else f"a number of at least {least:g}"
            self.fail(key, value, f"{expected}, {_LEAST:g} to {_MOST:g}")
        return float(value)

    def fraction(self, key: str) -> float:
        """A number above 0, at most 1."""
        value = self.number(key)
        if value > 1:
            self.fail(key, value, "a number between 0 and 1")
        return value

    def count(self, key: str, *default: int) -> int:
        """A whole number, at most a million."""
        value = self.number(key, *default)
        if value != int(value) or value > 1e6:
            self.fail(key, value, "a whole number")
        return int(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value

    def text(self, key: str, *default: str) -> str:
        """A text, which may be empty."""
        value = self.get(key, *default)
        if not isinstance(value, str):
            self.fail(key, value, "text")
        return value

    def part(self, key: str) -> Fields:
        """The fields of an object within."""
        return Fields(self.get(key), self.where, f"{self.prefix}{key}.", self.sources)

    def refuse_unread(self) -> None:
        """Raises LocalrunError on a key that nothing has read."""
        for key in self._values:
            if key not in self._read:
                raise LocalrunError(f"{self.where}: {self.prefix}{key} is not known; see docs/plan.md")
