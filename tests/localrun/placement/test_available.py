"""Which GPU can be used: each way in which none can, on drivers and torches made up; nothing heavy without a card."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localrun.placement import available
from localrun.placement.available import Gpu, NoGpu

GIB = 1 << 30
missing_to_build = available._missing_to_build


class Driver:
    """A driver's library with two cards."""

    def __init__(self) -> None:
        self.start, self.name, self.capability, self.version = 0, b"Acme 5000", (8, 9), 12040

    def cuInit(self, flags: int) -> int:
        return self.start

    def cuDeviceGetName(self, name: Any, size: int, device: int) -> int:
        assert size == 256
        name.value = self.name if device == 0 else b"Acme 6000"
        return 0

    def cuDeviceGetCount(self, value: Any) -> int:
        value._obj.value = 2
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """A machine with a card, its driver, Triton, and a torch that can use it."""
    found = Driver()
    monkeypatch.setattr(available, "_driver_library", lambda: found)
    monkeypatch.setattr(available, "_on_the_bus", lambda: True)
    monkeypatch.setattr(available, "driver_version", lambda: "550.54")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    spec = importlib.machinery.ModuleSpec("triton", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(available, "_missing_to_build", lambda: "")
    cuda = SimpleNamespace(init=lambda: None, mem_get_info=lambda index: (20 * GIB, 24 * GIB))
    torch = SimpleNamespace(__version__="2.9.0", version=SimpleNamespace(cuda="12.8"), cuda=cuda)
    monkeypatch.setitem(sys.modules, "torch", torch)
    return found


def refused(reason: str, has_card: bool = True) -> None:
    found = available.find()
    assert isinstance(found, NoGpu) and "\n" not in found.reason
    assert (found.reason, found.has_card) == (reason, has_card)


def test_a_gpu(driver: Driver) -> None:
    assert available.find() == Gpu("Acme 5000", (8, 9), 24 * GIB, 20 * GIB, "550.54", "12.8")
    assert available.card() == "Acme 5000"


def test_a_second_gpu(driver: Driver) -> None:
    assert available.count() == 2 and available.card(1) == "Acme 6000" and available.card(2) == ""
    assert available.find(1) == Gpu("Acme 6000", (8, 9), 24 * GIB, 20 * GIB, "550.54", "12.8", index=1)
    assert available.find(2) == NoGpu("there is no card 2: CUDA sees 2, counted from 0", True)


@pytest.mark.parametrize(
    ("has_card", "reason"),
    [(False, "there is no NVIDIA card"), (True, "there is an NVIDIA card, but no driver for it")],
)
def test_no_driver(driver: Driver, has_card: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "_driver_library", lambda: None)
    monkeypatch.setattr(available, "_on_the_bus", lambda: has_card)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    refused(reason, has_card)
    assert available.card() == ""


def test_a_driver_without_a_card(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.start = 100
    refused("CUDA sees no card")
    assert available.card() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused("CUDA sees no card (CUDA_VISIBLE_DEVICES is set)")


def test_a_driver_that_does_not_start(driver: Driver) -> None:
    driver.start = 999
    refused("the NVIDIA driver does not start: CUDA error 999")


@pytest.mark.parametrize("capability", [(6, 1), (7, 0)])
def test_an_old_card(driver: Driver, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    driver.capability = capability
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(f"Acme 5000 has compute capability {capability[0]}.{capability[1]}; 7.5 is needed")


def test_no_triton(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused("Triton is not installed: pip install 'localrun[gpu]'")


def test_nothing_to_compile_with(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton compiles a C module before it launches the first kernel."""
    monkeypatch.setattr(available, "_missing_to_build", missing_to_build)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(available.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for found in ([], ["gcc"], ["clang"]):
        monkeypatch.setattr(available.shutil, "which", lambda name, found=found: name if name in found else None)
        header = f"Python's C headers ({tmp_path / 'Python.h'}; python3-dev or python3-devel)"
        refused(f"Triton needs {header if found else 'a C compiler (gcc or clang)'}, which is not there")
    (tmp_path / "Python.h").touch()
    assert isinstance(available.find(), Gpu)
    monkeypatch.setattr(available.shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert isinstance(available.find(), Gpu)


def test_no_torch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = available.find()
    assert isinstance(found, NoGpu) and found.reason.startswith("torch cannot be imported: ")


def test_torch_without_cuda(driver: Driver) -> None:
    sys.modules["torch"].version.cuda = None
    refused("torch 2.9.0 is built without CUDA: install one with it (pytorch.org)")


def test_an_old_driver(driver: Driver) -> None:
    driver.version = 11080
    refused("the NVIDIA driver is too old: it has CUDA 11.8, torch needs 12.8")
    driver.version = 12020  # of the same major version older ones do, by NVIDIA's promise
    assert isinstance(available.find(), Gpu)


@pytest.mark.parametrize("name", ["init", "mem_get_info"])
def test_cuda_that_does_not_start(driver: Driver, name: str) -> None:
    def fail(*_: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    setattr(sys.modules["torch"].cuda, name, fail)
    refused("CUDA does not start: CUDA error: out of memory")


def test_too_little_vram(driver: Driver) -> None:
    sys.modules["torch"].cuda.mem_get_info = lambda index: (GIB - 1, 8 * GIB)
    refused("Acme 5000 has 1.0 of 8.0 GiB of VRAM free, too little")


def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.10  Wed Jan 15\nGCC version: 12.3\n"
    monkeypatch.setattr(Path, "read_text", lambda self: line)
    assert available.driver_version() == "570.86.10"


def test_a_missing_library_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert available._driver_library() is None


def test_looking_for_a_gpu_is_cheap() -> None:
    """Without a driver neither torch nor Triton is imported, nor anything that takes time."""
    code = (
        "import sys\nfrom localrun.placement import available\n"
        "available._driver_library = lambda: None\nprint(available.find())\n"
        "print([n for n in ('torch', 'triton', 'numba', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("NoGpu(") and done.stdout.endswith("\n[]\n")
