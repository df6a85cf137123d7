"""How a recorded step hands work to the CPU and gets it back.

By host nodes of the driver, or by stream memory operations and a thread that polls (quant.decode.coordinator). Which
one is faster on a machine, the proof finds.

Stream memory operations: cuStreamWriteValue64 and cuStreamWaitValue64 on page-locked words, which card and CPU address
alike (CUDA Driver API, "Stream Memory Operations" and "Unified Addressing"). The thread sleeps between steps. Should
the workers never answer, the words are poisoned, so that the card goes on, and the step is an error.

Host nodes can't be called off: there the step is given up (Watch), and the card with it.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch

from localrun.errors import LocalrunError
from quant.decode.coordinator import END, MAILBOX, NODE, serve

LIMIT_S = 60.0  # for one layer's experts: a layer that comes from a disk takes seconds
MAILBOX_WORDS = MAILBOX.size // 8
_MOST_NODES = 1 << 14  # different ones: layers by numbers of tokens
_POISON = 1 << 62  # more than any node's number: what waits for one goes on
_POISON_S = 5.0  # for the card to end its step then
_AT_LEAST = 0  # CU_STREAM_WAIT_VALUE_GEQ


_WEDGED = "the GPU and the workers have not answered each other for {:g} s; --device cpu does without the GPU"
_BEFORE = "the workers have not answered before; start localrun anew"


def _finishes(finished: threading.Event, progress: Callable[[], int], limit_s: float) -> bool:
    """Wait until it is set; or give up, as soon as `progress` has been the same for limit_s. Ctrl-C waits, too."""
    interrupt: KeyboardInterrupt | None = None
    last, since, is_over = progress(), time.monotonic(), False
    while not is_over:
        try:
            is_over = finished.wait(min(1.0, limit_s / 4))
            now = progress()
            if now != last:
                last, since = now, time.monotonic()
            elif not is_over and time.monotonic() - since > limit_s:
                return False
        except KeyboardInterrupt as error:  # the nodes use the step's memory
            interrupt = error
    if interrupt is not None:
        raise interrupt
    return True


class Watch:
    """Has a thread wait for what may never come, so that the caller can give it up.

    Attributes:
        has_failed: whether it did: then the thread waits for ever.
    """

    def __init__(self, limit_s: float = LIMIT_S):
        self._limit_s, self.has_failed = limit_s, False
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], threading.Event, list[BaseException]]]
        self._jobs = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._live, daemon=True, name="localrun-watch")

    def wait(self, wait: Callable[[], None], progress: Callable[[], int]) -> None:
        """Until wait() returns, in the thread; raises what it raises.

        Raises LocalrunError if it does not, and `progress` stays the same for limit_s; and ever after.
        """
        if self.has_failed:
            raise LocalrunError(_BEFORE)
        if not self._thread.ident:
            self._thread.start()
        finished, errors = threading.Event(), []
        self._jobs.put((wait, finished, errors))
        if not _finishes(finished, progress, self._limit_s):
            self.has_failed = True
            raise LocalrunError(_WEDGED.format(self._limit_s))
        if errors:
            raise errors[0]

    def _live(self) -> None:
        """The thread's life."""
        while True:
            wait, finished, errors = self._jobs.get()
            try:
                wait()
            except BaseException as error:
                errors.append(error)
            finished.set()


class Words(Protocol):
    """What queues reads and writes of the words on the card."""

    def write(self, stream: Any, address: int, value: int) -> None:
        """Have the word be value, when all before is done."""

    def wait(self, stream: Any, address: int, value: int) -> None:
        """Go on when the word is value or more."""


class StreamWords:
    """The driver's operations. Raises LocalrunError if it has none."""

    def __init__(self, driver: Any):
        try:
            self._write, self._wait = driver.cuStreamWriteValue64_v2, driver.cuStreamWaitValue64_v2
        except AttributeError:
            raise LocalrunError("the NVIDIA driver has no stream memory operations of 64 bits") from None
        for function in (self._write, self._wait):
            function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint]
            function.restype = ctypes.c_int

    def write(self, stream: int, address: int, value: int) -> None:
        """As Words."""
        self._check("cuStreamWriteValue64", self._write(stream, address, value & (1 << 64) - 1, 0))

    def wait(self, stream: int, address: int, value: int) -> None:
        """As Words."""
        self._check("cuStreamWaitValue64", self._wait(stream, address, value, _AT_LEAST))

    def _check(self, name: str, result: int) -> None:
        if result != 0:
            raise LocalrunError(f"the GPU failed: {name} returned CUDA error {result}")


class Coordinator:
    """The words, the table of nodes, and the thread that calls them while a step is under way.

    Attributes:
        has_failed: whether the workers have not answered.
    """

    def __init__(self, memory: torch.Tensor, words: Words, limit_s: float = LIMIT_S):
        """memory: int64 (MAILBOX_WORDS,), page-locked, whose address the card shares."""
        self._words, self.limit_s = words, limit_s
        self._memory, self._table = memory, np.zeros((_MOST_NODES, NODE.size // 8), np.int64)
        self._mailbox = memory.numpy()
        self._mailbox[:] = MAILBOX.pack(request=0, done=0, served=0, stop=0, nodes=self._table.ctypes.data)
        self._numbers: dict[tuple[int, int], int] = {}
        self._go, self._finished = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.has_failed = False

    def hand_over(self, stream: Any, function: int, argument: int) -> None:
        """Queue a node: what is queued behind it waits until it was called."""
        number = self._numbers.setdefault((function, argument), len(self._numbers) + 1)
        if number > _MOST_NODES:
            raise LocalrunError(f"more than {_MOST_NODES} different host nodes")
        self._table[number - 1] = NODE.pack(function=function, argument=argument)
        self._words.write(stream, self._address("request"), number)
        self._words.wait(stream, self._address("done"), number)
        self._words.write(stream, self._address("done"), 0)

    def begin(self) -> None:
        """Have the thread poll from now on, until finish(). Raises LocalrunError if it has failed before."""
        if self.has_failed:
            raise LocalrunError(_BEFORE)
        if self._thread is None:
            self._thread = threading.Thread(target=self._live, daemon=True, name="localrun-coordinator")
            self._thread.start()
        self._finished.clear()
        self._go.set()

    def finish(self, stream: Any) -> None:
        """Wait until all nodes that were queued on the stream were called; Ctrl-C waits for that, too.

        Raises LocalrunError if none is for limit_s: then the card was told to go on without them.
        """
        self._words.write(stream, self._address("request"), END)
        if not _finishes(self._finished, lambda: self._get("served"), self.limit_s):
            self._poison()
            raise LocalrunError(_WEDGED.format(self.limit_s))

    def _live(self) -> None:
        """The thread's life."""
        while True:
            self._go.wait()
            self._go.clear()
            serve.ctypes(self._mailbox.ctypes.data)
            if self.has_failed:
                return
            self._finished.set()

    def _poison(self) -> None:
        """Let the card go on, whatever it waits for, until it asks for the end."""
        self.has_failed = True
        self._set("stop", 1)
        until = time.monotonic() + _POISON_S
        while self._get("request") != END and time.monotonic() < until:
            self._set("done", _POISON)
            time.sleep(1e-3)

    def close(self) -> None:
        """End the thread, if it can be."""
        self.has_failed = True
        self._set("stop", 1)
        self._go.set()

    def _address(self, field: str) -> int:
        return self._mailbox.ctypes.data + MAILBOX.offset(field)

    def _get(self, field: str) -> int:
        return int(self._mailbox[MAILBOX.offset(field) // 8])

    def _set(self, field: str, value: int) -> None:
        self._mailbox[MAILBOX.offset(field) // 8] = value


class HostWords:
    """The operations of the stand-in for a card, which does at once what is queued."""

    def __init__(self, limit_s: float = 2 * LIMIT_S):
        self._limit_s = limit_s

    def write(self, stream: Any, address: int, value: int) -> None:
        """As Words."""
        ctypes.c_int64.from_address(address).value = value

    def wait(self, stream: Any, address: int, value: int) -> None:
        """As Words; a card would wait for ever."""
        word, until = ctypes.c_int64.from_address(address), time.monotonic() + self._limit_s
        while word.value < value:
            if time.monotonic() > until:
                raise LocalrunError(f"nobody has answered for {self._limit_s:g} s")
            time.sleep(0)
