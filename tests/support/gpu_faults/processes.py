"""Faults that end a process, or never end: what makes the device of a child."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

from gpu_faults.fault import Fault


def _when_loading(action: Callable[[], None]) -> Any:
    """A stand-in whose memory is asked for: then the action."""
    from localrun.gpu.device import StandIn

    class Ending(StandIn):
        def free_bytes(self) -> int:
            action()
            return super().free_bytes()

    return Ending()


def hangs(card: int) -> Any:
    return _when_loading(lambda: time.sleep(3600))


def crashes(card: int) -> Any:
    return _when_loading(lambda: os.kill(os.getpid(), signal.SIGSEGV))


def is_killed(card: int) -> Any:
    return _when_loading(lambda: os.kill(os.getpid(), signal.SIGKILL))


def gives_up(card: int) -> Any:
    """As a driver's library that calls exit()."""
    return _when_loading(lambda: os._exit(0))


def aborts(card: int) -> Any:
    """As CUDA's own assertions do, with a line on stderr."""

    def abort() -> None:
        os.write(2, b"driver: fatal: Xid 79, GPU has fallen off the bus\n")
        os.abort()

    return _when_loading(abort)


FAULTS = (
    Fault("a driver that hangs", "kernels", r"hangs: no answer for 3 s \(loading\)", child="hangs"),
    Fault("a driver that crashes", "kernels", r"crashed with SIGSEGV \(loading\)", child="crashes"),
    Fault("a card that falls off the bus", "kernels",
          r"crashed with SIGABRT \(loading\): driver: fatal: Xid 79, GPU has fallen off the bus", child="aborts"),
    Fault("a process killed for memory", "kernels", r"was killed, as by a system without memory \(loading\)",
          child="is_killed"),
    Fault("a driver that ends the process", "kernels", r"ended with exit code 0 \(loading\)", child="gives_up"),
)  # fmt: skip
