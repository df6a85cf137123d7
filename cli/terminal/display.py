"""A reply as it comes, with what the model thought before it."""

import time
from typing import Protocol

from cli.output import draw, tell, terminal_size, visible, width_of, write
from cli.terminal.region import Region
from localrun.generate.reasoning import REASONING

FOLD, SHOW, HIDE = "fold", "show", "hide"
"""What is seen of thoughts: all while they come and a line afterwards; all; a line."""
_MOST_LINES = 8  # of thoughts that are folded later
_MOST_TAIL = 4000  # characters of them, from which these lines are made
_PAUSE_S = 0.06  # between two states of the screen
_SHARE = 10  # of the time that goes by, one part at most is for drawing
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
        """Write a piece of text of a kind; of thoughts that are folded, a line on stderr once."""
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
        """End the reply's last line, and be ready for another."""
        if self._last and self._last != "\n":
            write("\n")
        self._kind = self._last = ""

    def _write(self, text: str) -> None:
        if text:
            write(text)
            self._last = text[-1]


class TerminalDisplay:
    """A reply as Markdown, on a screen, and dim thoughts before it, which fold to a line when they end.

    Blocks that are complete are written once; the one that is still growing is written again in place.
    """

    def __init__(self, thoughts: str = FOLD) -> None:
        self.thoughts = thoughts
        self._region = Region(draw, terminal_size, width_of)
        self._kind, self._text = "", ""
        self._has_block = False  # of this kind, complete
        self._started = self._draw_at = 0.0

    def push(self, kind: str, text: str) -> None:
        """Take a piece of text of a kind; what has come is drawn as often as drawing takes little of the time."""
        if kind != self._kind:
            self._close()
            self._kind, self._started = kind, time.monotonic()
        self._text += visible(text)
        now = time.monotonic()
        if now >= self._draw_at:
            self._show()
            took = time.monotonic() - now
            self._draw_at = now + max(_PAUSE_S, _SHARE * took)

    def end(self) -> None:
        """Draw what is left, and be ready for another reply."""
        self._close()
        self._draw_at = 0.0

    def _show(self) -> None:
        from cli.terminal.markdown import closed_blocks, markdown_lines

        if self._kind == REASONING:
            self._region.show(self._thoughts())
            return
        columns = terminal_size()[0]
        closed, rest = closed_blocks(self._text, columns)
        kept = [""] * self._has_block + markdown_lines(closed, columns) if closed.strip() else []
        if rest.strip():
            self._region.show([*kept, *[""] * (self._has_block or bool(kept)), *markdown_lines(rest, columns)])
        if kept:
            self._region.keep(len(kept))
            self._text, self._has_block = rest, True

    def _thoughts(self) -> list[str]:
        from cli.terminal.markdown import dim_lines

        columns, rows = terminal_size()
        if self.thoughts == HIDE:
            return dim_lines(f"thinking, {time.monotonic() - self._started:.0f} s", columns)
        if self.thoughts == SHOW:
            return dim_lines(self._text, columns)
        return dim_lines(self._text[-_MOST_TAIL:], columns)[-min(_MOST_LINES, max(1, rows - 2)) :]

    def _close(self) -> None:
        """What is shown is complete: all of it, or a line for thoughts that fold."""
        from cli.terminal.markdown import dim_lines

        if self._kind == REASONING and self.thoughts != SHOW:
            words, took = len(self._text.split()), time.monotonic() - self._started
            folded = f"[ thought for {took:.1f} s, {words} words; /think show shows them ]"
            self._region.show(dim_lines(folded, terminal_size()[0]))
        elif self._kind:
            self._show()
        self._region.end()
        if self._kind == REASONING:
            draw("\n")
        self._kind, self._text, self._has_block = "", "", False
