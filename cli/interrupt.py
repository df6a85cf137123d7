"""Ctrl-C: it ends the program at once, or raises KeyboardInterrupt where something is to be put in order, or ends a
reply and not the program.

An exception is lost where C code calls Python: callbacks of ctypes and of weak references, modules that are being
imported. Python prints it, goes on, and the user's Ctrl-C had no effect. So no exception is raised while a program
starts and loads, when there is nothing to put in order.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

INTERRUPTED = 130  # the exit code, as of a shell's command
_AGAIN_S = 0.02  # until the callback that lost a Ctrl-C has likely returned


def end_at_once() -> None:
    """From now on Ctrl-C ends the process, wherever it is, if it would raise KeyboardInterrupt now.

    It does not in a background job, which ignores it.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def show_cursor() -> None:
    """Leave the line of a progress bar, which hides the cursor."""
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, b"\x1b[?25h\n")


def _end(_signal: int, _frame: FrameType | None) -> None:
    show_cursor()
    os._exit(INTERRUPTED)


@contextmanager
def raising() -> Iterator[None]:
    """A block in which Ctrl-C raises KeyboardInterrupt, and again if that was lost in a callback."""
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    if handler is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def again(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            main = threading.main_thread().ident
            threading.Timer(_AGAIN_S, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            hook(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, handler)


class Interruptible:
    """A context in which Ctrl-C sets pressed; the second one raises KeyboardInterrupt at once.

    An exception in the middle of a model step could leave the cache and its token list apart, so the flag is looked at
    between steps.
    """

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
