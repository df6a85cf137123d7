"""Schemas of objects with anyOf as several without: what one of them accepts the whole does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localrun.arguments import shown
from localrun.errors import LocalrunError

_MOST = 64  # alternatives, each of which a grammar has whole
_VALUES = {"enum", "const"}
_NESTED = {"properties", "additionalProperties", "items", "prefixItems", "anyOf", "oneOf"}  # whose meanings depend
_WITH_VALUES = _VALUES | {"type", "title", "description", "default", "examples"}

Schema = Mapping[str, Any]


def alternatives(schema: Schema) -> list[Schema]:
    """Schemas of objects without anyOf; as it is where it has none. Those that nothing satisfies are left out.

    Raises LocalrunError where two schemas of a property can't be made one, for too many, and where none is left.
    """
    found = list(_alternatives(schema))
    if not found:
        raise LocalrunError("no object satisfies the schema's anyOf")
    return found


def _alternatives(schema: Schema) -> list[Schema]:
    if "anyOf" not in schema:
        return [schema]
    branches, base = schema["anyOf"], {key: value for key, value in schema.items() if key != "anyOf"}
    if not isinstance(branches, list) or not all(isinstance(branch, Mapping) for branch in branches):
        raise LocalrunError("the schema's anyOf is not a list of objects")
    found: list[Schema] = []
    for branch in branches:
        for each in _alternatives(branch):
            if (both := _both(base, each)) is not None:
                found.append(both)
        if len(found) > _MOST:
            raise LocalrunError(f"the schema's anyOf has more than {_MOST} alternatives")
    return found


def _both(one: Schema, other: Schema) -> Schema | None:
    """What satisfies both; None if no object does."""
    if any(each.get("type", "object") != "object" for each in (one, other)):
        return None
    properties = _joined_properties(_mapping(one, "properties"), _mapping(other, "properties"))
    required = [*_list(one, "required"), *_list(other, "required")]
    for each in (one, other):
        more = each.get("additionalProperties", True)
        if not isinstance(more, bool):
            raise LocalrunError("the schema has anyOf and a schema of additionalProperties")
        if not more:
            properties = {name: value for name, value in properties.items() if name in _mapping(each, "properties")}
            if any(name not in properties for name in required):
                return None
    defs = {key: {**_mapping(one, key), **_mapping(other, key)} for key in ("$defs", "definitions")}
    for key, merged in defs.items():
        if any(merged[name] != value for name, value in _mapping(one, key).items()):
            raise LocalrunError(f"the schema's anyOf has a {key} of its own for what has one already")
    closed = (
        {"additionalProperties": False} if any(e.get("additionalProperties") is False for e in (one, other)) else {}
    )
    return {**one, **other, **defs, "properties": properties, "required": required, **closed}


def _joined_properties(one: Schema, other: Schema) -> dict[str, Any]:
    joined = {**one, **other}
    for name in one.keys() & other.keys():
        joined[name] = _joined(name, one[name], other[name])
    return joined


def _joined(name: str, one: Any, other: Any) -> Any:
    """Two schemas of a property as one, where that is no more than all their keywords."""
    if one == other or other in ({}, True):
        return one
    if one in ({}, True):
        return other
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        joined = {**one, **other}
        is_agreed = all(one[key] == other[key] for key in one.keys() & other.keys())
        n_values = len(_VALUES & joined.keys())
        has_one_meaning = not n_values or (n_values == 1 and joined.keys() <= _WITH_VALUES)
        if is_agreed and has_one_meaning and not joined.keys() & _NESTED:
            return joined
    raise LocalrunError(
        f"the schema's anyOf has another schema of the property {shown(name)}, and both can't be held to"
    )


def _list(schema: Schema, key: str) -> list[Any]:
    value = schema.get(key, [])
    return value if isinstance(value, list) else []


def _mapping(schema: Schema, key: str) -> Schema:
    value = schema.get(key, {})
    return value if isinstance(value, Mapping) else {}
