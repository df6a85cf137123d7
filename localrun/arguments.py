"""Arguments of the Python interface, checked where they come in.

Each check returns the value as plain Python. What it raises is a LocalrunError that names the argument, what was given
and what was expected, in one short line.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Set
from numbers import Real
from typing import Any, NoReturn

from localrun.errors import LocalrunError

_MOST_SHOWN = 40  # characters of a value in a message
_MOST_BITS = 128  # of a number that is written out


def shown(value: Any) -> str:
    """A value as messages name it: short, on one line."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:  # Python refuses to write out very long ones
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        return f"{value!r}" if len(value) <= _MOST_SHOWN else f"{value[:_MOST_SHOWN]!r}..."
    return str(value) if value is None or isinstance(value, Real) else f"of type {type(value).__name__}"


def refuse(name: str, value: Any, expected: str) -> NoReturn:
    """Raises the error that all of these checks raise."""
    raise LocalrunError(f"{name} is {shown(value)}; expected {expected}")


def whole(name: str, value: Any, expected: str, low: int | None = None, high: int | None = None) -> int:
    """A whole number from low to high, Python's or NumPy's; no bool, no text, no fraction."""
    try:
        number = operator.index(value)
    except TypeError:
        refuse(name, value, expected)
    if isinstance(value, bool) or (low is not None and number < low) or (high is not None and number > high):
        refuse(name, value, expected)
    return number


def number(name: str, value: Any, expected: str) -> float:
    """A finite number, Python's or NumPy's; no bool, no text."""
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(name, value, expected)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        refuse(name, value, expected)
    return result


def token_ids(ids: Any) -> list[int]:
    """A list of whole numbers, from a sequence of Python's or NumPy's."""
    expected = "a sequence of token ids, as tokenizer.encode gives them"
    if isinstance(ids, str | bytes | bytearray | Mapping | Set) or not isinstance(ids, Iterable):
        refuse("ids", ids, expected)
    try:
        items = list(ids)
    except TypeError:  # an array without dimensions
        refuse("ids", ids, expected)
    return [whole(f"ids[{index}]", item, "a token id, a whole number") for index, item in enumerate(items)]


def texts(name: str, value: Any) -> list[str]:
    """A list of texts; a single text is a list of one."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        refuse(name, value, "a text, or a list of texts")
    return list(value)


def messages(value: Any) -> list[dict[str, str]]:
    """A conversation: objects that have at least a role and a content, both texts."""
    expected = 'a list of messages such as {"role": "user", "content": "Hi"}'
    if not isinstance(value, list | tuple):
        refuse("messages", value, expected)
    for index, message in enumerate(value):
        if not isinstance(message, Mapping):
            refuse(f"messages[{index}]", message, expected)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                refuse(f"messages[{index}][{key!r}]", message.get(key), "a text")
    return list(value)


def flag(name: str, value: Any) -> bool:
    """True or False."""
    return value if isinstance(value, bool) else refuse(name, value, "True or False")


def function(name: str, value: Any) -> Any:
    """Something to call, or None."""
    return value if value is None or callable(value) else refuse(name, value, "a function, or None")


def path_text(name: str, value: Any) -> str:
    """A path as text, from a text, bytes or a path."""
    if not isinstance(value, str | bytes | os.PathLike):
        refuse(name, value, "a path")
    return os.fsdecode(value)
