"""Lines at the bottom of a terminal that are written again in place, as more of them is known.

Only what differs is written, in one go, and over what was there: nothing flickers. What does not fit on the screen
scrolls away and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

Size = tuple[int, int]  # columns and rows


class Region:
    """Lines below everything else that was written. The cursor stays at the end of the last one."""

    def __init__(self, draw: Callable[[str], None], size: Callable[[], Size], width_of: Callable[[str], int]) -> None:
        """width_of: columns that a line takes, without its escape sequences."""
        self._draw, self._size, self._width_of = draw, size, width_of
        self._shown: list[str] = []
        self._n_gone = 0  # lines before those, which have scrolled away
        self._columns = 0

    def show(self, lines: list[str]) -> None:
        """Lines of which those shown last were an earlier state."""
        columns, rows = self._size()
        if self._is_lost(columns):
            self.end()
        self._columns = columns
        new = lines[self._n_gone :] or [""]
        pairs = enumerate(zip(self._shown, new, strict=False))
        same = next((index for index, (x, y) in pairs if x != y), min(len(self._shown), len(new)))
        if same < max(len(self._shown), len(new)):
            same = min(same, len(new) - 1)  # the cursor is to stand behind the last one
            self._draw(self._change(self._shown[same:], new[same:], same > 0))
        self._shown = new
        while len(self._shown) > 1 and sum(map(self._rows, self._shown)) >= max(rows, 2):
            del self._shown[0]  # the cursor no longer reaches it
            self._n_gone += 1

    def keep(self, n_lines: int) -> None:
        """Have so many of the first lines stay, fewer than there are; what is shown next lacks them."""
        del self._shown[: max(0, n_lines - self._n_gone)]
        self._n_gone = max(0, self._n_gone - n_lines)

    def end(self) -> None:
        """What is shown stays; the next lines come below."""
        if self._shown:
            self._draw("\n")
        self._shown, self._n_gone = [], 0

    def _is_lost(self, columns: int) -> bool:
        """Whether the terminal has another width now, and nobody knows where the lines are, or which have gone."""
        if columns == self._columns or not self._shown:
            return False
        return self._n_gone > 0 or any(self._width_of(line) > columns for line in self._shown)

    def _change(self, old: list[str], new: list[str], follows: bool) -> str:
        """What to write to have `new`, a line at least, in place of `old`, perhaps behind a line that stays."""
        if not old:
            return "\n" * follows + "\n".join(new)
        if len(old) == 1 and new[0].startswith(old[0]):
            return "\n".join([new[0][len(old[0]) :], *new[1:]])
        up = sum(map(self._rows, old)) - 1
        lines = [self._over(line, "\x1b[K" if index < len(new) - 1 else "\x1b[J") for index, line in enumerate(new)]
        return "\r" + (f"\x1b[{up}A" if up else "") + "\n".join(lines)

    def _over(self, line: str, clear: str) -> str:
        """A line, and what clears the rest; before it where it ends at the edge, whose letter would be cleared too."""
        is_full = line and self._width_of(line) % self._columns == 0
        return clear + line if is_full else line + clear

    def _rows(self, line: str) -> int:
        return max(1, -(-self._width_of(line) // self._columns))
