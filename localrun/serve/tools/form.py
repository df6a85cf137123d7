"""What all forms of calls share: marks around them, and how they are told from content."""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from localrun.generate.reasoning import CONTENT
from localrun.serve.tools.grammar import Grammar
from localrun.serve.tools.source import CallStart, Part, Reading, Source

Schemas = Mapping[str, Any]  # of functions' parameters, by name


@dataclass(frozen=True)
class Form:
    """How a family of models writes calls.

    Attributes:
        begin, end: the marks of a call.
        sections: marks around one call or several; either may be missing. The first are the usual ones.
        opening: a call up to its arguments, with {name} and, where calls are numbered, {index}.
        closing: what ends it after the arguments.
    """

    begin: str
    end: str
    opening: str
    closing: str
    sections: tuple[tuple[str, str], ...] = ()

    def spelled(self, controls: Mapping[str, int]) -> dict[int, str]:
        """Control tokens in what is written around names, keys and values: they are part of a reply's text."""
        around = "".join(mark for section in self.sections for mark in section)
        marks = f"{around} {self.begin} {self.end} {self.opening} {self.closing}"
        return {id: text for text, id in controls.items() if text and text in marks}

    def example(self, name: str) -> str:
        """A whole call."""
        before, after = self.sections[0] if self.sections else ("", "")
        return f"{before}{self.opening.format(name=name, index=0)}ARGUMENTS{self.closing}{after}"

    def arguments(self, parameters: Mapping[str, Any] | None, grammar: Grammar) -> str:
        """A rule's body for the arguments of a call. parameters: a schema; None where anything goes.

        Raises LocalrunError where this form cannot be held to the schema.
        """
        raise NotImplementedError

    def call(self, source: Source, calls: Calls) -> Reading[bool]:
        """Read a call whose beginning is read already. False if it is none; nothing has been yielded then."""
        raise NotImplementedError

    def bare_call(self, source: Source, calls: Calls) -> Reading[bool]:
        """The same at the beginning of a reply, where some models write a call without marks."""
        return False
        yield


class Calls:
    """Calls of one reply: their numbers, and the functions that there are."""

    def __init__(self, schemas: Schemas):
        self.schemas, self.count = schemas, 0

    def start(self, name: str, id: str | None = None) -> CallStart:
        """The next call. id: None for one of ours."""
        self.count += 1
        return CallStart(self.count - 1, id or f"call_{uuid.uuid4().hex[:24]}", name)


class CallParser:
    """Text in, in any pieces; parts out: content, and calls with their arguments.

    What is no call is content, to the letter. Space between content and a call is neither.
    """

    def __init__(self, form: Form, schemas: Schemas):
        self._form, self._source, self._calls = form, Source(), Calls(schemas)
        self._reading: Generator[Part | None, None, None] = self._read()

    @property
    def count(self) -> int:
        """Calls so far."""
        return self._calls.count

    def push(self, text: str) -> Iterator[Part]:
        """What is certain by now."""
        self._source.push(text)
        yield from self._parts()

    def flush(self) -> Iterator[Part]:
        """What is held back, at the end of the reply."""
        self._source.ended = True
        yield from self._parts()

    def _parts(self) -> Iterator[Part]:
        for part in self._reading:
            if part is None:
                return
            yield part

    def _read(self) -> Generator[Part | None, None, None]:
        form, source = self._form, self._source
        if not (yield from form.bare_call(source, self._calls)):
            source.at = source.kept
        begins = [form.begin, *(begin for begin, _ in form.sections)]
        ends = [end for _, end in form.sections]
        while True:
            if self.count:  # space after a call, and what closes a section of calls
                source.at = source.kept = len(source.text) - len(source.text[source.at :].lstrip())
                if not source.text[source.at :] and not source.ended:
                    yield None
                    continue
            mark = yield from source.until(begins + (ends if self.count else []), _content, holds_space=True)
            if mark is None:
                return
            if mark in ends and mark not in begins:
                source.kept = source.at
            elif not (yield from self._call(mark)):
                stop = source.text.index(mark, source.kept) + len(mark)
                yield _content(source.text[source.kept : stop])
                source.at = source.kept = stop

    def _call(self, mark: str) -> Reading[bool]:
        form, source = self._form, self._source
        if mark != form.begin and not (yield from source.match(re.compile(rf"\s*{re.escape(form.begin)}"))):
            return False
        if not (yield from form.call(source, self._calls)):
            return False
        rest = source.text[source.at :].strip()
        after = form.closing + (form.sections[0][1] if form.sections else "")
        if source.ended and after.strip().startswith(rest):  # cut off, or ended by a stop string
            source.at = len(source.text)
        source.kept = source.at
        return True


def _content(text: str) -> Part:
    return CONTENT, text
