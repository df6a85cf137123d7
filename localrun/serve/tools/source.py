"""A reply's text as it comes, for readers that are generators: where they need more text, they yield None.

Text that is read but not settled is kept: a reader that finds no call goes back, and the text is content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import NamedTuple, TypeVar

from localrun.generate.stop_strings import overlap

LONGEST_HEADER = 256  # characters that are held back where a name, a key or an end is looked for


class CallStart(NamedTuple):
    """A call begins: its number in the reply, its id, the function's name."""

    index: int
    id: str
    name: str


class Arguments(NamedTuple):
    """The next characters of a call's arguments, which are JSON."""

    index: int
    text: str


Part = tuple[str, str] | CallStart | Arguments  # (REASONING or CONTENT, text)
Result = TypeVar("Result")
Reading = Generator[Part | None, None, Result]
Emit = Callable[[str], Part | None]


class Source:
    """Attributes:
    text: what has come and may still be needed.
    at: where the reader is.
    kept: up to where the text is settled; the reader may go back to here.
    ended: no more will come.
    """

    def __init__(self) -> None:
        self.text, self.at, self.kept, self.ended = "", 0, 0, False

    def push(self, text: str) -> None:
        """More text. Positions change."""
        self.text = self.text[self.kept :] + text
        self.at, self.kept = self.at - self.kept, 0

    def match(self, *patterns: re.Pattern[str]) -> Reading[re.Match[str] | None]:
        """The match of one of the patterns here, which is read; None if there is none within LONGEST_HEADER."""
        while True:
            for pattern in patterns:
                if found := pattern.match(self.text, self.at):
                    self.at = found.end()
                    return found
            if self.ended or len(self.text) - self.at > LONGEST_HEADER:
                return None
            yield None

    def next_letter(self) -> Reading[str]:
        """The next character that is no space, unread; "" at the end."""
        while not (rest := self.text[self.at :].lstrip()) and not self.ended:
            yield None
        return rest[:1]

    def until(self, marks: Iterable[str], emit: Emit, *, holds_space: bool = False) -> Reading[str | None]:
        """The first of the marks, which is read; None at the end of the text. What comes before goes to emit.

        Args:
            holds_space: space before a mark is left out; it stays kept.
        """
        while True:
            found = [(at, -len(mark), mark) for mark in marks if (at := self.text.find(mark, self.at)) >= 0]
            mark = min(found)[2] if found else None
            rest = self.text[self.at : min(found)[0] if found else None]
            if mark is None and not self.ended:
                rest = rest[: len(rest) - max((overlap(rest, each) for each in marks), default=0)]
            piece = rest.rstrip() if holds_space and (mark or not self.ended) else rest
            if piece and (part := emit(piece)):
                yield part
            self.kept = self.at = self.at + len(piece)
            if mark is not None:
                self.at = self.text.index(mark, self.at) + len(mark)
                return mark
            if self.ended:
                return None
            yield None

    def json_object(self, emit: Emit) -> Reading[bool]:
        """Whether a JSON object is read to its closing brace; its text goes to emit as it comes."""
        depth, in_string, is_escaped = 0, False, False
        while True:
            start = self.at
            for at, letter in enumerate(self.text[start:], start):
                self.at = at + 1
                if in_string:
                    in_string = is_escaped or letter != '"'
                    is_escaped = letter == "\\" and not is_escaped
                elif letter == '"':
                    in_string = True
                elif letter in "{[":
                    depth += 1
                elif letter in "}]":
                    depth -= 1
                    if not depth:
                        break
            piece, self.kept = self.text[start : self.at], self.at
            if piece:
                yield emit(piece)
            if piece and not depth:
                return True
            if self.ended:
                return False
            yield None
