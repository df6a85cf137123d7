"""Odd JSON: a sound document changed in a few places, as a structure and, now and then, as bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

_DEEP: Any = [0]
for _ in range(40):
    _DEEP = [_DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), 2**31,
    2**32 - 1, 2**63, 2**64, -(2**63), 10**400, "", "x", "0", "1e5", "\0", "\x1b[31m", "\ud800", "\u00e4" * 300,
    "y" * 5000, [], [0], [None], [[]], {}, {"": 0}, {"value": 1}, _DEEP,
)  # fmt: skip


def change(rng: random.Random, document: Any) -> tuple[Any, str]:
    """A copy with one change, and what it is."""
    document = copy.deepcopy(document)
    places = list(_places(document))
    if not places:
        return rng.choice(VALUES), "another document"
    holder, key = rng.choice(places)
    how = rng.randrange(8)
    if how <= 2:
        holder[key] = rng.choice(VALUES)
    elif how == 3:
        del holder[key]
    elif how == 4 and isinstance(holder, dict):
        holder[_misspelt(rng, str(key))] = holder.pop(key)
    elif how == 5:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
    elif how == 6:
        holder[key] = rng.choice(([holder[key]], {"value": holder[key]}, str(holder[key])))
    else:
        holder[key] = _near(rng, holder[key])
    return document, f"{key!r:.40} changed, way {how}"


def write(rng: random.Random, document: Any) -> bytes:
    """The document as text; in one of ten, with bytes that no writer would write."""
    text = json.dumps(document).encode()
    if rng.random() < 0.9 or not text:
        return text
    raw, at = bytearray(text), rng.randrange(len(text))
    for _ in range(rng.choice((1, 1, 2, 5))):
        raw[rng.randrange(len(raw))] = rng.choice(b'\0\xff"{}[],:0e-\\\n')
    return bytes(rng.choice((raw, raw[:at], b"\xef\xbb\xbf" + raw, raw + raw, b"[" * 100_000, b"\xff\xfe" + raw)))


def _places(value: Any) -> Any:
    """Every place of the document: what holds it, and its key there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield value, key
        yield from _places(item)


def _misspelt(rng: random.Random, name: str) -> str:
    at = rng.randrange(len(name) + 1)
    return name[:at] + rng.choice(("x", "_", " ", "\n", "\x1b[2J", "\u00e4")) + name[at + rng.randrange(2) :]


def _near(rng: random.Random, value: Any) -> Any:
    """A number a little off, a text cut short or made long."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return [value]
    if isinstance(value, str):
        return rng.choice((value[: len(value) // 2], value * 3, value.upper(), value + "\n"))
    return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, value * 10**9, str(value)))
