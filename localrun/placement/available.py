"""Which GPU can be used, or in one line why none can. Asks the driver before it imports torch, which takes 1 to 2 s.

What is needed: an NVIDIA card of compute capability 7.5 or more, which tests compile kernels for, its driver, torch
with CUDA no newer (in its major version) than the driver's, and Triton, which compiles a small C module that loads and
launches kernels: for that it needs a C compiler and Python's headers (triton/runtime/build.py). Cards are numbered as
CUDA does it; CUDA_VISIBLE_DEVICES says which there are. Functions and numbers: CUDA Driver API, cuda.h of CUDA 12.4.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CAPABILITY = (7, 5)
LEAST_BYTES = 1 << 30  # of free VRAM: work memory takes most of it
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_INSTALL_TRITON = "pip install 'localrun[gpu]'"


@dataclass(frozen=True)
class Gpu:
    """A card: capability, bytes of VRAM in all and free, versions of driver ("" unknown) and CUDA, its number."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    driver: str
    cuda: str
    index: int = 0


@dataclass(frozen=True)
class NoGpu:
    """Why there is none, in one line; whether there is a card all the same, so that the user may wonder."""

    reason: str
    has_card: bool


def find(index: int = 0) -> Gpu | NoGpu:
    """The GPU, or why there is none. Imports torch only where a driver, the card and Triton are there."""
    driver = _driver_library()
    if driver is None:
        has_card = _on_the_bus()
        reason = "there is an NVIDIA card, but no driver for it" if has_card else "there is no NVIDIA card"
        return NoGpu(reason, has_card)
    code = driver.cuInit(0)
    if code == _NO_DEVICE:
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ
        return NoGpu("CUDA sees no card" + (" (CUDA_VISIBLE_DEVICES is set)" if hidden else ""), _on_the_bus())
    if code:
        return NoGpu(f"the NVIDIA driver does not start: CUDA error {code}", True)
    if index and index >= (n_cards := _count(driver)):
        return NoGpu(f"there is no card {index}: CUDA sees {n_cards}, counted from 0", True)
    name, capability = _card(driver, index)
    if capability < CAPABILITY:
        needed = ".".join(map(str, CAPABILITY))
        return NoGpu(f"{name} has compute capability {'.'.join(map(str, capability))}; {needed} is needed", True)
    if importlib.util.find_spec("triton") is None:
        return NoGpu(f"Triton is not installed: {_INSTALL_TRITON}", True)
    if missing := _missing_to_build():
        return NoGpu(f"Triton needs {missing}, which is not there", True)
    return _by_torch(name, capability, _cuda_version(driver), index)


def card(index: int = 0) -> str:
    """The name of a card that the driver has, "" if there is none. Does not import torch."""
    driver = _driver_library()
    if driver is None or driver.cuInit(0) or (index and index >= _count(driver)):
        return ""
    return _card(driver, index)[0]


def count() -> int:
    """How many cards the driver has. Does not import torch."""
    driver = _driver_library()
    return 0 if driver is None or driver.cuInit(0) else _count(driver)


def driver_version() -> str:
    """The NVIDIA driver's: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86  Wed ..."; "" where not known."""
    with suppress(OSError):
        for line in Path("/proc/driver/nvidia/version").read_text().splitlines():
            if line.startswith("NVRM"):
                return next((word for word in line.split() if word[0].isdigit() and "." in word), "")
    return ""


def _missing_to_build() -> str:
    """What Triton would not find to compile its C module with. Its builds for other systems than Linux bring it."""
    if sys.platform != "linux":
        return ""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.exists() else f"Python's C headers ({header}; python3-dev or python3-devel)"


def _by_torch(name: str, capability: tuple[int, int], driver_cuda: tuple[int, int], index: int) -> Gpu | NoGpu:
    """What torch can do with the card that the driver has."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return NoGpu(f"torch cannot be imported: {error}", True)
    if torch.version.cuda is None:
        return NoGpu(f"torch {torch.__version__} is built without CUDA: install one with it (pytorch.org)", True)
    if driver_cuda[0] < int(torch.version.cuda.split(".")[0]):
        found = ".".join(map(str, driver_cuda))
        return NoGpu(f"the NVIDIA driver is too old: it has CUDA {found}, torch needs {torch.version.cuda}", True)
    try:
        torch.cuda.init()
        free, total = torch.cuda.mem_get_info(index)  # makes a context, whose own memory is gone then
    except RuntimeError as error:  # torch's, for anything that CUDA refuses
        return NoGpu(f"CUDA does not start: {str(error).splitlines()[0]}", True)
    if free < LEAST_BYTES:
        return NoGpu(f"{name} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB of VRAM free, too little", True)
    return Gpu(name, capability, total, free, driver_version(), torch.version.cuda, index)


def _driver_library() -> ctypes.CDLL | None:
    """The driver's library, if it is installed."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _count(driver: ctypes.CDLL) -> int:
    """Cards; the driver has been started."""
    n_cards = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(n_cards))
    return n_cards.value


def _card(driver: ctypes.CDLL, index: int) -> tuple[str, tuple[int, int]]:
    """Name and compute capability; the driver has been started."""
    name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetName(name, len(name), index)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, index)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, index)
    return name.value.decode(errors="replace"), (major.value, minor.value)


def _cuda_version(driver: ctypes.CDLL) -> tuple[int, int]:
    """(12, 4) for 12040: the latest that the driver knows."""
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    return version.value // 1000, version.value % 1000 // 10


def _on_the_bus() -> bool:
    """Whether the PCI bus has a display or compute controller of NVIDIA's."""
    for folder in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            vendor, kind = (folder / "vendor").read_text().strip(), (folder / "class").read_text().strip()
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False
