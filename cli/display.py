"""A reply as it comes, with what the model thought before it."""

from typing import Protocol

from cli.output import tell, write
from localrun.generate.reasoning import REASONING

FOLD, SHOW, HIDE = "fold", "show", "hide"
"""What is seen of thoughts: all while they come and a line afterwards; all; a line."""
_BEFORE, _BEHIND = "<think>\n", "\n</think>\n\n"


class Display(Protocol):
    """Where a reply is shown.

    Attributes:
        thoughts: FOLD, SHOW or HIDE.
    """

    thoughts: str

    def push(self, kind: str, text: str) -> None:
        """A piece of it: REASONING or CONTENT."""

    def end(self) -> None:
        """There is no more of it."""


class PlainDisplay:
    """The reply's own characters and nothing else; thoughts between tags, where they are to be seen at all."""

    def __init__(self, thoughts: str = FOLD) -> None:
        self.thoughts = thoughts
        self._kind, self._last = "", ""

    def push(self, kind: str, text: str) -> None:
        if kind == REASONING and self.thoughts != SHOW:
            if not self._kind:
                tell("thinking ...")
            self._kind = kind
            return
        if kind != self._kind:
            self._write(_BEFORE if kind == REASONING else _BEHIND if self._is_open else "")
            self._kind = kind
        self._write(text)

    @property
    def _is_open(self) -> bool:
        return self._kind == REASONING and self.thoughts == SHOW

    def end(self) -> None:
        if self._last and self._last != "\n":
            write("\n")
        self._kind = self._last = ""

    def _write(self, text: str) -> None:
        if text:
            write(text)
            self._last = text[-1]
