"""Calls whose arguments are written as JSON: a header with the function's name, then an object."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from localrun.errors import LocalrunError
from localrun.serve.tools.form import Calls, Form
from localrun.serve.tools.grammar import Grammar
from localrun.serve.tools.source import Arguments, Reading, Source

_BRACE = re.compile(r"\s*\}")
_BARE_END = re.compile(r"\s*(?:\]|```)")


@dataclass(frozen=True, kw_only=True)
class JSONForm(Form):
    """Attributes:
    header: from the beginning of a call to the brace of its arguments; has a group `name`, and may have `id`.
    tail: what closes a call.
    bare: a header without a beginning, at the start of a reply; for known functions alone.
    """

    header: re.Pattern[str]
    tail: re.Pattern[str]
    bare: re.Pattern[str] | None = None

    def call(self, source: Source, calls: Calls) -> Reading[bool]:
        """Read a call where one begins: its parts are yielded as they come. Whether one did."""
        found = yield from source.match(self.header)
        if not found:
            return False
        yield from self._arguments(source, calls, found, self.tail)
        return True

    def bare_call(self, source: Source, calls: Calls) -> Reading[bool]:
        """The same of one without its marks, where a model leaves them out, if a function of the name was offered."""
        if self.bare is None or (yield from source.next_letter()) not in ("{", "[", "`"):
            return False
        found = yield from source.match(self.bare)
        if not found or found["name"] not in calls.schemas:
            return False
        yield from self._arguments(source, calls, found, _BRACE)
        if (yield from source.next_letter()) in ("]", "`"):
            yield from source.match(_BARE_END)
        source.kept = source.at
        return True

    def arguments(self, parameters: Mapping[str, Any] | None, grammar: Grammar) -> str:
        """The grammar of arguments of that schema. Raises LocalrunError if it is not one of objects."""
        schema = {"type": "object", **(parameters or {})}
        if schema["type"] != "object":
            raise LocalrunError("the schema is not of an object")
        return f"SPACE? {grammar.json(schema)}"

    def _arguments(self, source: Source, calls: Calls, header: re.Match[str], tail: re.Pattern[str]) -> Reading[None]:
        start = calls.start(header["name"], header.groupdict().get("id"))
        yield start
        if (yield from source.json_object(lambda text: Arguments(start.index, text))):
            yield from source.match(tail)
        source.kept = source.at
