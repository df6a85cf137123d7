"""The one place that prints: data to stdout, everything else to stderr; progress only where a person looks.

Names, texts and templates come from files that anyone may have made. Whatever could move a terminal's cursor, turn
letters around or not be seen at all is spelled out, in every line and in a reply on a terminal. A reply that goes into
a pipe or a file, and JSON, stay as they are.
"""

import base64
import io
import json
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]

_MOST = 200  # characters of a file's content that a line repeats
_LONGEST = 800  # of a whole message: those of ours are shorter
# What a message may hold of a file: a text in quotes, a list or an object, a name.
_FOREIGN = (r"""(?<!\w)(['"])(?:\\.|(?!\1).)*\1(?!\w)""", r"[\[({].*[\])}]", r"\S+")
# Invisible ones that texts need: soft hyphens, joiners, and marks of direction, none of which reaches beyond its word.
_NEEDED = frozenset("\t\n\u00ad\u061c\u200b\u200c\u200d\u200e\u200f\u2060")
_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats, lone surrogates, ends of lines and paragraphs


def show(line: str = "") -> None:
    """A line of data for people, on stdout."""
    print(_spelled(line), flush=True)


def tell(line: str, end: str = "\n") -> None:
    """A line on stderr, or a part of one."""
    print(_spelled(line), end=end, file=sys.stderr, flush=True)


def tell_text(text: str) -> None:
    """Lines of a conversation, on stderr."""
    print(visible(text), file=sys.stderr, flush=True)


def note(message: str) -> None:
    """One line for the user, on stderr, with this program's name."""
    tell(f"localrun: {brief(' '.join(message.split()))}")


def write(text: str) -> None:
    """A piece of a reply, at once."""
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def draw(text: str) -> None:
    """Escape sequences and lines of rendered(), on a terminal, as they are."""
    sys.stdout.write(text)
    sys.stdout.flush()


def rendered(renderable: Any, width: int) -> list[str]:
    """Lines of what rich can show, with escape sequences for colours, if the terminal has some; no space at their ends.

    Texts in it have to be visible() ones.
    """
    from rich.console import Console

    page = io.StringIO()
    console = Console(file=page, force_terminal=True, width=max(width, 1), height=100, legacy_windows=False)
    console.print(renderable, crop=False, highlight=False, markup=False, emoji=False)
    return [line.rstrip(" ") for line in page.getvalue().removesuffix("\n").split("\n")]


def width_of(line: str) -> int:
    """Columns that a line takes on a terminal, less its escape sequences."""
    from rich.cells import cell_len

    return cell_len(_COLOURS.sub("", line))


def terminal_size() -> tuple[int, int]:
    """Columns and rows of the terminal that stdout is."""
    try:
        columns, rows = os.get_terminal_size(sys.stdout.fileno())
    except (OSError, ValueError):
        columns, rows = 0, 0
    return columns or 80, rows or 24  # a terminal that does not say has 0


def is_screen() -> bool:
    """Whether stdout is a terminal whose cursor can be moved."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def copy(text: str) -> None:
    """text to the clipboard of the terminal, where it allows that: by xterm's sequence 52."""
    draw(f"\x1b]52;c;{base64.b64encode(text.encode('utf-8', 'replace')).decode()}\x07")


def show_again(line: str, width: int) -> None:
    """A line of progress on stderr, in place of the one before."""
    print(f"\r{_spelled(line):<{width}.{width}}", end="", file=sys.stderr, flush=True)


def end_line(width: int) -> None:
    """Clears what show_again has shown."""
    print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)


class Notes(logging.Handler):
    """What the packages log, as lines for the user."""

    def emit(self, record: logging.LogRecord) -> None:
        """A note on stderr of what a library logs."""
        note(record.getMessage())


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout, a line for each of its keys; characters that stdout cannot write are escaped.

    A path that is not UTF-8 is shown with U+FFFD in it.
    """
    rows = [
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in document.items()
    ]
    text = "{\n" + ",\n".join(rows) + "\n}"
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    print(text)


def printable(text: str) -> str:
    """A name or value of a file's, for a table: one line, shortened, with all that is not seen spelled out."""
    return _spelled(_cut(text, _MOST))


def visible(text: str) -> str:
    """A text of several lines with all that could deceive spelled out; each character by itself, so for pieces too."""
    return "".join(char if char in _NEEDED or _is_seen(char) else ascii(char)[1:-1] for char in text)


def brief(message: str) -> str:
    """A message in which nothing that can come from a file is longer than _MOST characters."""
    message = _cut(message, _LONGEST)
    for pattern in _FOREIGN:
        message = re.sub(pattern, lambda found: _cut(found[0], _MOST), message)
    return message


def _is_seen(char: str) -> bool:
    return " " <= char <= "~" or unicodedata.category(char) not in _UNSEEN


def _spelled(line: str) -> str:
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _cut(text: str, most: int) -> str:
    """text, or its beginning and its end."""
    if len(text) <= most:
        return text
    end = (most - 5) // 3
    return f"{text[: most - 5 - end]}[...]{text[-end:]}"


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """A function to report progress to, called as report(done, total, what); None where stderr is no terminal.

    The bar goes when the block ends.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Loading", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def rate(count: int, seconds: float) -> float:
    """Per second, with one digit behind the point; 0 where no time was measured."""
    return round(count / seconds, 1) if seconds > 0 else 0.0


def size(n_bytes: int) -> str:
    """12345678 -> "11.8 MiB"."""
    if n_bytes < 1024:
        return f"{n_bytes} B"
    exponent = min((n_bytes.bit_length() - 1) // 10, 3)
    return f"{n_bytes / 1024**exponent:.1f} {('KiB', 'MiB', 'GiB')[exponent - 1]}"
