"""Calls whose arguments are written one by one between tags, values as they are; what comes out is JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrun.arguments import shown
from localrun.errors import LocalrunError
from localrun.serve.tools.alternatives import alternatives
from localrun.serve.tools.form import Calls, Form
from localrun.serve.tools.grammar import INDEX, Grammar, kinds_of, string_terminals
from localrun.serve.tools.source import Arguments, Reading, Source

_OF_OBJECTS = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}
_OF_OBJECTS |= {"title", "description", "default", "examples", "$comment"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class XMLForm(Form):
    """Attributes:
    header: after the beginning of a call; has a group `name`.
    key: what begins a value; has a group `key`, and `string` where the model says whether the value is a string.
    parameter: how a value is begun, with {key}, and {string} where the model says whether it is a string.
    value_ends: marks, each of which ends a value: the usual one first, one that is part of all others last.
    tail: what closes a call.
    """

    header: re.Pattern[str]
    key: re.Pattern[str]
    parameter: str
    value_ends: tuple[str, ...]
    tail: re.Pattern[str]

    def call(self, source: Source, calls: Calls) -> Reading[bool]:
        """Read a call where one begins, a tag a parameter: its parts are yielded as JSON. Whether one did."""
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

    def arguments(self, parameters: Mapping[str, Any] | None, grammar: Grammar) -> str:
        """One after the other, in the schema's order."""
        if parameters is None:
            key = " KEY ".join(map(grammar.mark, self.parameter.format(key=INDEX, string="true").split(INDEX)))
            return f"(SPACE? {key} {grammar.text_until('ANY', self.value_ends)})*"
        if (of := parameters.get("type", "object")) != "object":
            raise LocalrunError(f"the schema is of type {of!r}, not of an object")
        schemas = alternatives(parameters)
        if INDEX not in self.parameter.format(key="", string=INDEX):
            _check_texts(schemas)
        each = [self._written(schema, grammar) for schema in schemas]
        return each[0] if len(each) == 1 else f"({' | '.join(map(grammar.rule, each))})"

    def _written(self, parameters: Mapping[str, Any], grammar: Grammar) -> str:
        """The arguments of a schema without alternatives."""
        if unknown := parameters.keys() - _OF_OBJECTS:
            raise LocalrunError(f"the schema has {min(unknown)}, which calls in this model's form can't be held to")
        properties, required = parameters.get("properties", {}), parameters.get("required", [])
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise LocalrunError("the schema's properties are no object, or required is no list")
        shared = {key: parameters[key] for key in ("$defs", "definitions") if key in parameters}
        rules = []
        for name in dict.fromkeys([*properties, *map(str, required)]):
            rule = grammar.rule(self._parameter(name, properties.get(name, {}), shared, grammar))
            rules.append(f"(SPACE? {rule})" if name in required else f"(SPACE? {rule})?")
        return " ".join(rules)

    def _parameter(self, name: str, schema: Any, shared: Mapping[str, Any], grammar: Grammar) -> str:
        found = self.key.fullmatch(self.parameter.format(key=name, string="true"))
        if not found or found["key"] != name or name.strip() != name:
            raise LocalrunError(f"the property {shown(name)} can't be written in this model's form")
        schema = {} if schema is True else schema
        if not isinstance(schema, Mapping):
            raise LocalrunError(f"the schema of the property {shown(name)} is no object")
        as_text, as_json = (self.parameter.format(key=name, string=kind) for kind in ("true", "false"))
        end, kinds = grammar.mark(self.value_ends[0]), kinds_of(schema)
        if "string" not in kinds:
            return f"{grammar.mark(as_json)} SPACE? {grammar.json({**shared, **schema})} SPACE? {end}"
        texts = [grammar.text_until(each, self.value_ends) for each in string_terminals(schema, self.value_ends[-1])]
        choices = [f"{grammar.mark(as_text)} {each}" for each in texts]
        if "null" in kinds:
            choices.append(f'{grammar.mark(as_json)} "null" {end}')
        return " | ".join(choices)

    def _value(self, source: Source, index: int, kinds: frozenset[str]) -> Reading[bool]:
        """Whether the value is complete. A string comes as the model writes it, anything else at once."""
        if kinds == {"string"}:
            yield Arguments(index, '"')
            if (yield from source.until(self.value_ends, lambda text: Arguments(index, _json(text)[1:-1]))) is None:
                return False
            yield Arguments(index, '"')
        else:
            pieces: list[str] = []
            mark = yield from source.until(self.value_ends, pieces.append)
            while mark and "string" not in kinds and _is_in_string("".join(pieces)):
                pieces.append(mark)
                mark = yield from source.until(self.value_ends, pieces.append)
            if mark is None:
                return False
            yield Arguments(index, _json(_value("".join(pieces), kinds)))
        source.kept = source.at
        return True


def _check_texts(schemas: Sequence[Mapping[str, Any]]) -> None:
    """Raises LocalrunError for a property that is text by one of the schemas and not by another: "30" would be both."""
    are_texts: dict[str, bool] = {}
    for schema in schemas:
        properties = schema.get("properties", {})
        for name, of in properties.items() if isinstance(properties, Mapping) else ():
            kinds = kinds_of(of)
            if kinds != {"null"} and are_texts.setdefault(name, "string" in kinds) != ("string" in kinds):
                raise LocalrunError(
                    f"the property {shown(name)} is text by one schema of anyOf and not by another, which calls in "
                    "this model's form don't tell apart"
                )


def _types(schema: Any) -> dict[str, frozenset[str]]:
    """The types that a schema allows its properties; none for those of which it says nothing."""
    if not isinstance(schema, Mapping):
        return {}
    try:
        each = alternatives(schema)
    except LocalrunError:
        each = [schema]
    types: dict[str, frozenset[str]] = {}
    for properties in (one.get("properties") for one in each):
        if isinstance(properties, Mapping):
            for name, of in properties.items():
                kinds = kinds_of(of)
                known = types.get(name, kinds)
                types[name] = known | kinds if known and kinds else frozenset()
    return types


def _value(text: str, kinds: frozenset[str]) -> Any:
    """What a value's text says: a string where the schema allows one or it is no JSON, else JSON."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    return text if "string" in kinds and not (value is None and "null" in kinds) else value


def _is_in_string(text: str) -> bool:
    """Whether what looks like JSON breaks off within a string: a mark that comes next is part of it."""
    return text.lstrip()[:1] in ("[", "{", '"') and '"' in _STRING.sub("", text)


def _refuse(name: str) -> Any:
    raise ValueError(name)  # NaN and Infinity are no JSON


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
