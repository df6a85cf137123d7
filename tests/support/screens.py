"""A terminal of pyte's behind stdout: what is on the screen and what has scrolled off it."""

from __future__ import annotations

import sys

import pyte
import pytest


class Screen:
    """Takes what cli.output writes; columns and rows may change between two writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, columns: int = 80, rows: int = 24) -> None:
        self.columns, self.rows, self.written = columns, rows, [""]
        self._screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self._screen.set_mode(pyte.modes.LNM)  # as the terminal's driver makes \r\n of \n
        self._stream = pyte.Stream(self._screen)
        monkeypatch.setattr("cli.terminal.display.terminal_size", lambda: (self.columns, self.rows))
        monkeypatch.setattr("cli.terminal.display.draw", self.feed)
        monkeypatch.setattr(sys, "stdout", sys.stderr)

    def feed(self, text: str) -> None:
        self.written.append(text)
        self._stream.feed(text)

    def resize(self, columns: int) -> None:
        self.columns = columns
        self._screen.resize(self.rows, columns)

    def lines(self) -> list[str]:
        """All lines, from the first one that was written."""
        history = ["".join(line[x].data for x in range(self.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*history, *self._screen.display]).rstrip("\n").split("\n")

    def is_dim_or_colored(self, row: int) -> bool:
        return any(self._screen.buffer[row][x].fg != "default" for x in range(self.columns))
