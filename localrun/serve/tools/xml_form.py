"""Calls whose arguments are written one by one between tags, values as they are; what comes out is JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localrun.serve.tools.form import Calls, Form
from localrun.serve.tools.source import Arguments, Reading, Source


@dataclass(frozen=True, kw_only=True)
class XMLForm(Form):
    """Attributes:
    header: after the beginning of a call; has a group `name`.
    key: what begins a value; has a group `key`, and `string` where the model says whether the value is a string.
    value_ends: marks, each of which ends a value.
    tail: what closes a call.
    """

    header: re.Pattern[str]
    key: re.Pattern[str]
    value_ends: tuple[str, ...]
    tail: re.Pattern[str]

    def call(self, source: Source, calls: Calls) -> Reading[bool]:
        header = yield from source.match(self.header)
        if not header:
            return False
        start = calls.start(header["name"])
        yield start
        source.kept = source.at
        types = _types(calls.schemas.get(header["name"]))
        opening = "{"
        while found := (yield from source.match(self.key, self.tail)):
            source.kept = source.at
            if found.re is self.tail:
                break
            key = found["key"].strip()
            yield Arguments(start.index, f"{opening}{_json(key)}: ")
            opening = ", "
            is_string = {"true": True, "false": False}.get(found.groupdict().get("string") or "")
            kinds = types.get(key, frozenset()) if is_string is None else frozenset({"string"} if is_string else ())
            if not (yield from self._value(source, start.index, kinds)):
                return True  # cut off
        yield Arguments(start.index, "{}" if opening == "{" else "}")
        return True

    def _value(self, source: Source, index: int, kinds: frozenset[str]) -> Reading[bool]:
        """Whether the value is complete. A string comes as the model writes it, anything else at once."""
        if kinds == {"string"}:
            yield Arguments(index, '"')
            if (yield from source.until(self.value_ends, lambda text: Arguments(index, _json(text)[1:-1]))) is None:
                return False
            yield Arguments(index, '"')
        else:
            pieces: list[str] = []
            if (yield from source.until(self.value_ends, pieces.append)) is None:
                return False
            yield Arguments(index, _json(_value("".join(pieces), kinds)))
        source.kept = source.at
        return True


def _types(schema: Any) -> dict[str, frozenset[str]]:
    """The types that a schema allows its properties; none for those of which it says nothing."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return {name: _kinds(each) for name, each in properties.items()} if isinstance(properties, Mapping) else {}


def _kinds(schema: Any) -> frozenset[str]:
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        return frozenset().union(*map(_kinds, choices))
    if kinds is None and isinstance(values := schema.get("enum"), list) and all(isinstance(v, str) for v in values):
        return frozenset({"string"})
    return frozenset({kinds}) if isinstance(kinds, str) else frozenset()


def _value(text: str, kinds: frozenset[str]) -> Any:
    """What a value's text says: a string where the schema allows one or it is no JSON, else JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and not (value is None and "null" in kinds) else value


def _refuse(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
