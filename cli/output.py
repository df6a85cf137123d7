"""What goes to the terminal: data to stdout, everything else to stderr; progress bars only where a person looks."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]


def note(line: str) -> None:
    """One line for the user."""
    print(f"localrun: {line}", file=sys.stderr, flush=True)


class Notes(logging.Handler):
    """What the packages log, as lines for the user."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout, a line for each of its keys. A path that is not UTF-8 is shown with U+FFFD in it."""
    rows = [
        f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}"
        for key, value in document.items()
    ]
    text = "{\n" + ",\n".join(rows) + "\n}"
    print(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


def printable(text: str) -> str:
    """text with its control characters spelled out: names come from files that anyone may have made."""
    return text if text.isprintable() else ascii(text)[1:-1]


def write(text: str) -> None:
    """A piece of a reply, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


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
