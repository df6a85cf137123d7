"""Faults of memory, and of a driver that is not what is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gpu_faults.fault import MIB, Fault

if TYPE_CHECKING:
    import pytest


def _memory(used: int = 0, left: int = 0, each: int = 0, cached: int = 0):
    """A device that says that much is in use while a model is loaded, at last, and after each one more.

    cached: while one is that has a cache of experts.
    """

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu import hybrid
        from localrun.gpu.device import StandIn

        class Leaking(StandIn):
            taken = 0

            def free_bytes(self) -> int:
                return (1 << 40) - self.taken

        leaking = Leaking()
        load, close = hybrid.HybridModel._load, hybrid.HybridModel.close

        def loads(self: Any) -> None:
            load(self)
            leaking.taken += cached if self.routed.cache else used

        def closes(self: Any) -> None:
            close(self)
            leaking.taken = max(leaking.taken - (cached if self.routed.cache else used), left) + each

        patch.setattr(hybrid.HybridModel, "_load", loads)
        patch.setattr(hybrid.HybridModel, "close", closes)

        def make(card: int) -> Any:
            leaking.taken = 0  # each part has a process of its own
            return leaking

        return make

    return install


def _no_room(error: Callable[[], BaseException]):
    """Memory is full when the cache that was asked for is made."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from localrun.gpu import hybrid

        new_cache = hybrid.new_cache

        def full(config: Any, capacity: int, *more: Any) -> Any:
            if capacity == 48:
                raise error()
            return new_cache(config, capacity, *more)

        patch.setattr(hybrid, "new_cache", full)

    return install


def _out_of_vram() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has 1 GiB")


def _driver(library: Any):
    """The card's own device, over a driver made up."""

    def install(patch: pytest.MonkeyPatch) -> Callable[[int], Any]:
        from localrun.gpu import device as gpu

        def load(name: str) -> Any:
            if isinstance(library, Exception):
                raise library
            return library

        patch.setattr(ctypes, "CDLL", load)
        return gpu.Cuda

    return install


class _NoHostNodes:
    """A driver without the one function that is needed of it."""


FAULTS = (
    Fault("no driver", "kernels", r"no CUDA driver: libcuda.so.1 can't be loaded \(no such file\)",
          _driver(OSError("no such file"))),
    Fault("a driver without host nodes", "kernels", "the NVIDIA driver lacks cuLaunchHostFunc; install a newer one",
          _driver(_NoHostNodes())),
    Fault("slots that nobody counted", "memory",
          r"1024 MiB of VRAM in use with 2 cached experts a layer, \d+ MiB counted", _memory(cached=1024 * MIB)),
    Fault("more memory than was counted", "memory", r"1024 MiB of VRAM in use, \d+ MiB counted", _memory(1024 * MIB)),
    Fault("memory that close() does not free", "memory", "400 MiB of VRAM are not free after the model was closed",
          _memory(400 * MIB, 400 * MIB)),
    Fault("a leak", "memory", "each load leaves 64 MiB of VRAM behind", _memory(64 * MIB, each=64 * MIB)),
    Fault("no VRAM for the whole context", "memory", "out of memory: CUDA out of memory. Tried to allocate 6.00 GiB.*",
          _no_room(_out_of_vram)),
    Fault("no RAM", "memory", "out of memory: no room", _no_room(lambda: MemoryError("no room"))),
)  # fmt: skip
