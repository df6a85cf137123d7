"""Ctrl-C that ends a reply and not the program.

An exception in the middle of a model step could leave the cache and its token list apart, so Ctrl-C only sets a flag,
which is looked at between steps. A second Ctrl-C does not wait.
"""

import signal
from types import FrameType
from typing import Any


class Interruptible:
    """A context in which Ctrl-C sets pressed; the second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.pressed = False
        self._before: Any = None

    def __enter__(self) -> "Interruptible":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raises KeyboardInterrupt if Ctrl-C was pressed: for callbacks between two steps."""
        if self.pressed:
            raise KeyboardInterrupt

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
