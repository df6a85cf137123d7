"""Texts that end a reply, also where control tokens spell them."""

from collections.abc import Sequence


def with_marks(stops: Sequence[str], controls: dict[str, int]) -> tuple[list[str], dict[int, str]]:
    """The stop strings, also with a mark in place of each control token that they spell; and the marks by token id.

    A mark is half of a character, which decoded text never holds.
    """
    marked, marks = list(stops), {}
    for text in sorted(controls, key=len, reverse=True):
        if any(text in stop for stop in marked):
            mark = marks[controls[text]] = chr(0xD800 + len(marks))
            marked = [stop.replace(text, mark) for stop in marked]
    return [*stops, *marked], marks


class StopStrings:
    """Passes text on until one of the stop strings comes, holding back what could be the beginning of one.

    Attributes:
        which: the number of the one that has come, empty ones not counted; None as long as none has.
    """

    which: int | None = None

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string."""
        self._held += text
        # The one that ends first wins, so that it does not matter in what pieces the text comes.
        found = [
            (self._held.find(stop) + len(stop), self._held.find(stop), which)
            for which, stop in enumerate(self._stops)
            if stop in self._held
        ]
        if found:
            self.found = True
            _, start, self.which = min(found)
            return self._held[:start]
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        passed = self._held[: len(self._held) - keep]
        self._held = self._held[len(passed) :]
        return passed

    def flush(self) -> str:
        """What is held back: no stop string came of it."""
        held, self._held = self._held, ""
        return "" if self.found else held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that begins `stop`, and is not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
