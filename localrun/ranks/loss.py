"""A rank that is lost while the first one opens the model, which, long in compilers and copies, would find out late."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import psutil

from localrun.ranks.world import RankError, World

_NOTICE_S = 1.0  # for the block to find out by itself, and to end in order


@contextmanager
def ending_at_loss(worlds: Sequence[World], say: Callable[[str], None]) -> Iterator[None]:
    """A block that leaves nothing to be put in order: if a rank is lost, and the block goes on, this process ends.

    What it has started is ended before, `say` gets the line, the exit code is 1. No exception is raised in the block:
    compilers and modules that are being imported lose those (cli.interrupt).
    """
    over, turn = threading.Event(), threading.Lock()

    def end(error: RankError) -> None:
        if over.wait(_NOTICE_S):
            return
        with turn:
            if over.is_set():
                return
            with ExitStack() as last:  # whatever comes before
                last.callback(os._exit, 1)
                last.callback(say, str(error))
                for world in worlds:
                    world.end()
                for process in psutil.Process().children(recursive=True):  # that compile
                    with suppress(psutil.Error):
                        process.kill()

    def begin(error: RankError) -> None:  # in another thread: the one that calls this is waited for by world.end()
        threading.Thread(target=end, args=(error,), daemon=True, name="localrun-loss").start()

    try:
        for world in worlds:
            world.at_failure = begin
            world.check()
        yield
    finally:
        with turn:  # or there would be two lines
            over.set()
