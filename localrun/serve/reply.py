"""What a reply's text is: what the model thought, what it says, and what it calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from localrun.generate.reasoning import CONTENT, REASONING, ReasoningSplitter
from localrun.serve.tools.form import CallParser
from localrun.serve.tools.source import Arguments, CallStart, Part


class ReplyParser:
    """Pieces of a reply in, parts out."""

    def __init__(self, opened: str | None = None, calls: CallParser | None = None):
        """
        Args:
            opened: the tag of reasoning that the prompt has opened.
            calls: reads calls; None where there are no tools.
        """
        self._splitter, self._calls = ReasoningSplitter(opened), calls

    @property
    def has_calls(self) -> bool:
        """So far."""
        return self._calls is not None and self._calls.count > 0

    def parts(self, piece: str | None) -> Iterator[Part]:
        """What is certain by now; with None, at the end of the reply, what was held back."""
        if piece is not None:
            yield from self._parsed(self._splitter.push(piece))
            return
        yield from self._parsed(self._splitter.flush())
        if self._calls:
            yield from self._calls.flush()

    def _parsed(self, parts: Iterable[tuple[str, str]]) -> Iterator[Part]:
        for kind, text in parts:
            if kind == CONTENT and self._calls:
                yield from self._calls.push(text)
            else:
                yield kind, text


@dataclass
class Call:
    """A call of a function; its arguments are JSON, unless the reply was cut off."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Reply:
    """A whole one. The reasoning is None where there was none."""

    content: str = ""
    reasoning: str | None = None
    calls: list[Call] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """The next part."""
        if isinstance(part, CallStart):
            self.calls.append(Call(part.id, part.name))
        elif isinstance(part, Arguments):
            self.calls[part.index].arguments += part.text
        elif part[0] == REASONING:
            self.reasoning = (self.reasoning or "") + part[1]
        else:
            self.content += part[1]
