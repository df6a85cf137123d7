"""Devices: the stand-in, CUDA's calls in their order on a fake torch.cuda, and streams, nodes and graphs on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import gpu_device
import numpy as np
import pytest
import torch
from triton.runtime.errors import OutOfResources

from localrun.errors import LocalrunError
from localrun.gpu import device as gpu
from localrun.gpu.device import Cuda, StandIn
from quant.simd.memory import load_i64, store_i64
from quant.target.jit import kernel


@kernel("void(int64)")
def _count(address):
    """A host node: words[1] += words[0]."""
    store_i64(address + 8, load_i64(address + 8) + load_i64(address))


def test_the_stand_in_does_things_at_once() -> None:
    device, words = StandIn(), np.array([5, 0], np.int64)
    with device.side() as branch:
        device.call(_count.address, words.ctypes.data)
        assert words[1] == 5
    device.join(branch)
    again = device.capture(lambda: device.call(_count.address, words.ctypes.data))
    assert words[1] == 5
    again()
    again()
    device.mark()()
    device.synchronize()
    assert words[1] == 15
    assert device.pinned((2, 3), torch.int64).shape == (2, 3)
    with pytest.raises(RuntimeError, match="CUDA error"), device.errors():
        raise RuntimeError("CUDA error: of somebody else")


# ---- what CUDA is asked, in order ------------------------------------------------------------------------------------


class Stream:
    def __init__(self, log: list[str], name: str, handle: int) -> None:
        self._log, self.name, self.cuda_stream = log, name, handle

    def wait_stream(self, other: Stream) -> None:
        self._log.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def pool(self) -> str:
        return f"memory of {self.name}"

    def replay(self) -> None:
        self._cuda.log.append(f"replay on {self._cuda.current.name}")


class FakeCuda:
    """torch.cuda as far as Cuda uses it; it notes what it is asked."""

    OutOfMemoryError = torch.cuda.OutOfMemoryError

    def __init__(self) -> None:
        self.log: list[str] = []
        self._names, self._graph_names = iter(["side", "capture", "aside"]), iter("ABC")
        self.current = Stream(self.log, "main", 0)
        self.sync_error: Exception | None = None
        self.index = 1  # the caller's

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 8, 9

    def Stream(self, device: torch.device) -> Stream:
        name = next(self._names)
        return Stream(self.log, name, {"side": 7, "capture": 9, "aside": 11}[name])

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return self.current

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.index = self.index, device.index
        yield
        self.index = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> Graph:
        return Graph(self, next(self._graph_names))

    @contextmanager
    def graph(self, graph: Graph, pool: str | None, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"begin {capture_error_mode}" + (f" in {pool}" if pool else ""))
        try:
            with self.stream(stream):
                yield
        except BaseException:  # as torch does, which ends the capture in any case
            raise RuntimeError("CUDA error: capturing stream has unjoined work")  # noqa: B904
        self.log.append("end")

    def Event(self, blocking: bool) -> SimpleNamespace:
        def synchronize() -> None:
            self.log.append(f"sleep {blocking}")
            if self.sync_error is not None:
                raise self.sync_error

        return SimpleNamespace(record=lambda stream: self.log.append(f"mark {stream.name}"), synchronize=synchronize)


class FakeDriver:
    def __init__(self, log: list[str]) -> None:
        self.log, self.result = log, 0

    def cuLaunchHostFunc(self, stream: int, function: int, argument: int) -> int:
        self.log.append(f"node on {stream}: {function}({argument})")
        return self.result


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    cuda.driver = FakeDriver(cuda.log)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(gpu, "load_driver", lambda: cuda.driver)
    return cuda


def test_what_is_aside_waits_for_no_stream_and_none_for_it(fake: FakeCuda) -> None:
    device = Cuda()
    with device.aside():
        device.mark()()
    device.synchronize()
    assert fake.log == ["mark aside", "sleep True", "mark main", "sleep True"]


def test_a_branch_starts_after_the_main_stream_and_the_main_stream_goes_on_after_it(fake: FakeCuda) -> None:
    device = Cuda()
    device.call(1, 2)
    with device.side() as branch:
        device.call(3, 4)
    device.call(5, 6)
    device.join(branch)
    expected = ["node on 0: 1(2)", "side waits for main", "node on 7: 3(4)", "node on 0: 5(6)", "main waits for side"]
    assert fake.log == expected


def test_kernels_are_launched_on_its_gpu_whichever_is_the_callers(fake: FakeCuda) -> None:
    device, found = Cuda(), []
    with device.errors():
        found.append(fake.index)
    device.capture(lambda: found.append(fake.index))
    assert found == [0] * 4 and fake.index == 1


def test_a_step_is_warmed_up_then_captured_with_its_branches(fake: FakeCuda) -> None:
    device = Cuda()

    def step() -> None:
        with device.side() as branch:
            device.call(1, 2)
        device.join(branch)

    replay = device.capture(step)
    one = ["side waits for capture", "node on 7: 1(2)", "capture waits for side"]
    warm = ["capture waits for main", *one, *one, "main waits for capture"]
    assert fake.log == [*warm, "begin thread_local", *one, "end"]
    fake.log.clear()
    replay()
    device.synchronize()
    assert fake.log == ["replay on main", "mark main", "sleep True"]


def test_an_interrupted_recording_is_an_interrupt(fake: FakeCuda) -> None:
    device = Cuda()

    def step() -> None:
        if fake.log[-1].startswith("begin"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.capture(step)
    assert fake.current.name == "main" and not device._graphs


def test_captured_steps_share_their_memory(fake: FakeCuda) -> None:
    device = Cuda()
    first = device.capture(lambda: None)
    second = device.capture(lambda: None)
    del first
    third = device.capture(lambda: None)
    begun = [entry for entry in fake.log if entry.startswith("begin")]
    assert begun == [f"begin thread_local{where}" for where in ("", " in memory of A", " in memory of B")]
    del second, third


def test_a_lost_device_is_one_line(fake: FakeCuda) -> None:
    fake.sync_error = RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be reported later")
    with pytest.raises(LocalrunError) as error:
        Cuda().synchronize()
    assert str(error.value) == "the GPU failed: CUDA error: unspecified launch failure; --device cpu does without it"


def test_a_full_memory_is_one_line(fake: FakeCuda) -> None:
    fake.sync_error = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB")
    with pytest.raises(LocalrunError, match=r"^the GPU's memory is full: CUDA out of memory; see --ctx and --vram$"):
        Cuda().synchronize()


@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(101_376, 101_120, "shared memory"),
        subprocess.CalledProcessError(1, ["gcc", "-O3", "cuda_utils.c"]),
    ],
    ids=type,
)
def test_a_kernel_that_cannot_be_made_is_one_line(fake: FakeCuda, error: Exception) -> None:
    message = r"^a GPU kernel can't be made: [^\n]*; --device cpu does without it$"
    with pytest.raises(LocalrunError, match=message), Cuda().errors():
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("CUDA error"), KeyboardInterrupt()])
def test_other_exceptions_stay_what_they_are(fake: FakeCuda, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, Cuda().errors():
        raise error
    assert raised.value is error


def test_a_node_that_cannot_be_queued_is_one_line(fake: FakeCuda) -> None:
    fake.driver.result = 400
    with pytest.raises(LocalrunError, match="cuLaunchHostFunc returned CUDA error 400"):
        Cuda().call(1, 2)


def test_a_missing_driver_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(LocalrunError, match=r"^no CUDA driver: [a-z0-9.]+ can't be loaded"):
        gpu.load_driver()


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@gpu_device.gpu
def test_host_nodes_run_in_order_and_are_captured() -> None:
    """x goes down, a node adds, the sum comes up; replayed with other inputs in the same places."""
    device = Cuda()
    words, up = device.pinned((2,), torch.int64), torch.zeros(2, dtype=torch.int64, device=device.torch)
    down = torch.zeros(2, dtype=torch.int64, device=device.torch)

    def step() -> None:
        with device.side() as branch:
            words.copy_(down, non_blocking=True)
            device.call(_count.address, words.data_ptr())
            up.copy_(words, non_blocking=True)
        device.join(branch)
        up.mul_(2)

    replay = device.capture(step)
    for value in (3, 11, -4):
        down.copy_(torch.tensor([value, 100]))
        replay()
        device.synchronize()
        assert up.tolist() == [2 * value, 2 * (100 + value)]


@gpu_device.gpu
def test_a_full_memory_of_a_gpu_is_one_line() -> None:
    device = Cuda()
    with pytest.raises(LocalrunError, match="the GPU's memory is full"), device.errors():
        torch.empty(1 << 46, dtype=torch.uint8, device=device.torch)
