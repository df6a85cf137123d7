"""Rules of a grammar, in llguidance's variant of Lark, for calls: marks, JSON, and texts between marks.

Source: https://github.com/guidance-ai/llguidance, docs/syntax.md. A control token of the vocabulary is none that text
can spell there, so marks are written as the tokens that the model has for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from localrun.arguments import shown
from localrun.errors import LocalrunError
from localrun.generate.constraint import JSON_OPTIONS

INDEX = "\0"  # in a mark: where a call's number stands
_TERMINALS = r"""
ANY: /(?s:.*)/
SPACE: /[ \n]{1,2}/
KEY: /[\w.-]+/
NUMBER: /[0-9]{1,2}/
"""
_OPTIONAL_BREAK = re.compile(r"\s*\n\s*(?=[<{`])")  # models of one family differ in these
_OF_TEXTS = {"type", "enum", "const", "minLength", "maxLength", "pattern", "anyOf", "oneOf"}
_REMARKS = {"title", "description", "default", "examples", "format", "deprecated", "$comment"}
_OF_OTHERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "items", "prefixItems"}
_OF_OTHERS |= {"minItems", "maxItems", "uniqueItems", "properties", "required", "additionalProperties"}


class Grammar:
    """Rules by number, as they are made.

    Args:
        controls: ids of the vocabulary's control tokens by text.
    """

    def __init__(self, controls: Mapping[str, int]):
        texts = sorted((text for text in controls if text), key=len, reverse=True)
        self._controls, self._rules = controls, list[str]()
        self._split = re.compile("|".join([re.escape(INDEX), *map(re.escape, texts)]))

    def rule(self, body: str, options: str = "") -> str:
        """The name of a new rule."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """The name of a new terminal, of what is no rule but one text."""
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def text(self, start: str) -> str:
        """The grammar in Lark."""
        return "\n".join([f"start: {start}", *self._rules]) + _TERMINALS

    def mark(self, text: str) -> str:
        """Text around names and values; line breaks before marks are optional."""
        pieces = _OPTIONAL_BREAK.split(text.rstrip(" "))
        return " SPACE? ".join(self.exactly(piece) if piece else "" for piece in pieces).strip()

    def exactly(self, text: str) -> str:
        """A text that is not empty, its control tokens as such."""
        return " ".join(self._pieces(text))

    def before_control(self, text: str) -> tuple[str, str]:
        """What comes before a text's first control token as a literal, "" if nothing does; and the rest."""
        pieces = list(self._pieces(text))
        first = next((index for index, piece in enumerate(pieces) if piece.startswith("<")), len(pieces))
        return " ".join(pieces[:first]), " ".join(pieces[first:])

    def _pieces(self, text: str) -> Iterator[str]:
        at = 0
        for found in self._split.finditer(text):
            if found.start() > at:
                yield quoted(text[at : found.start()])
            yield "NUMBER" if found[0] == INDEX else f"<[{self._controls[found[0]]}]>"
            at = found.end()
        if text[at:]:
            yield quoted(text[at:])

    def json(self, schema: Mapping[str, Any]) -> str:
        """A JSON document of a schema."""
        try:
            return f"%json {json.dumps({**schema, 'x-guidance': JSON_OPTIONS})}"
        except RecursionError:
            raise LocalrunError("the schema is nested too deeply") from None

    def text_until(self, terminal: str, ends: Sequence[str]) -> str:
        """A text of a terminal's that has none of the ends in it, and the first one after it."""
        without = f"({terminal} & ~(ANY {quoted(ends[-1])} ANY) & ANY)"
        literal, rest = self.before_control(ends[0])
        return f"{self.terminal(f'{without} {literal}')} {rest}".strip()


def quoted(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)


def kinds_of(schema: Any) -> frozenset[str]:
    """The types that a schema says it allows; none where it says nothing of them."""
    if not isinstance(schema, Mapping):
        return frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, list):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    choices = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(choices, list):
        return frozenset().union(*map(kinds_of, choices))
    if kinds is None and isinstance(values := schema.get("enum"), list) and all(isinstance(v, str) for v in values):
        return frozenset({"string"})
    return frozenset({kinds}) if isinstance(kinds, str) else frozenset()


def string_terminals(schema: Mapping[str, Any], end: str) -> list[str]:
    """Terminals for the strings that a schema allows, written without quotes, up to an end that they may not have.

    Raises LocalrunError for a keyword that it cannot do, or where there are none.
    """
    if unknown := schema.keys() - _OF_TEXTS - _OF_OTHERS - _REMARKS:
        raise LocalrunError(f"a string with {min(unknown)} can't be held to that in this model's form")
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        if of_both := schema.keys() & (_OF_TEXTS - {"type", "anyOf", "oneOf"}):
            raise LocalrunError(f"a string with anyOf and {min(of_both)} can't be held to both in this model's form")
        found = [each for branch in branches if "string" in kinds_of(branch) for each in string_terminals(branch, end)]
        if not found:
            raise LocalrunError("of a string's anyOf or oneOf none says that it is for strings")
        return found
    if "enum" in schema or "const" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        values = values if isinstance(values, list) else []
        if not (texts := [quoted(value) for value in values if isinstance(value, str) and end not in value]):
            raise LocalrunError("a string's enum is no list, or has no string that this model's form can write")
        return [f"({' | '.join(texts)})"]
    parts = [f"/{_with_pattern(schema['pattern'])}/"] if "pattern" in schema else []
    fewest, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if fewest or most != "":
        if not all(each == "" or (type(each) is int and each >= 0) for each in (fewest, most)):
            raise LocalrunError("minLength or maxLength is not a whole number from 0 up")
        parts.append(f"/(?s:.{{{fewest},{most}}})/")
    return [" & ".join(parts) or "ANY"]


def _with_pattern(pattern: Any) -> str:
    """A regular expression of all of a text of which a pattern of JSON Schema matches a part."""
    from llguidance import regex_to_lark

    if not isinstance(pattern, str):
        raise LocalrunError(f"the pattern is {shown(pattern)}; expected a text")
    before = "" if pattern.startswith("^") else "(?s:.*)"
    after = "" if pattern.endswith("$") and not pattern.endswith("\\$") else "(?s:.*)"
    inner = pattern.removeprefix("^") if not before else pattern
    try:
        return f"{before}(?:{regex_to_lark(inner if after else inner[:-1], 'dw')}){after}"
    except ValueError as error:
        raise LocalrunError(f"the pattern {shown(pattern)} is not usable: {error}") from None
