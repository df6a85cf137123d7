"""Whose turn it is to use a model: one thread's at a time, and nobody's once the model is closed."""

from __future__ import annotations

import os
import threading

from localrun.errors import ClosedError, LocalrunError


class Turn:
    """A context manager around every use of a model's memory. Others wait; the same thread may nest its turns.

    Raises ClosedError if the model has been closed, or if this process was forked after it was loaded: threads don't
    come along, and locks may be held by threads that no longer are. Such a process can't have a turn of its own either:
    in it, the libraries that compute (OpenMP's threads among them) would wait for ever.
    """

    _first_process: int | None = None  # the one that loaded a model first

    def __init__(self) -> None:
        Turn._first_process = Turn._first_process or os.getpid()
        if os.getpid() != Turn._first_process:
            raise ClosedError(
                "this process was forked after a model was loaded; start it anew (multiprocessing: spawn)"
            )
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._depth = 0
        self._is_closed = False

    def check(self) -> None:
        """Raises ClosedError if there are no turns any more."""
        if self._is_closed:
            raise ClosedError("the model is closed; load it again")
        if os.getpid() != self._process:
            raise ClosedError(
                "this process was forked after the model was loaded; start it anew (multiprocessing: spawn)"
            )

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()
        try:
            self.check()  # it may have been closed meanwhile
            self._depth += 1
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        self._lock.release()

    def end(self) -> bool:
        """No more turns, once the one that is taken is over. Whether there is something to free now.

        Raises LocalrunError if this thread has the turn: what it does would go on in freed memory.
        """
        if os.getpid() != self._process:
            self._is_closed = True  # what there is belongs to the process that loaded it
        if self._is_closed:
            return False
        with self._lock:
            if self._depth:
                raise LocalrunError("the model is at work in this thread; close it afterwards")
            before, self._is_closed = self._is_closed, True
            return not before
