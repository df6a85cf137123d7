"""The hand-over by stream memory operations: the words, the thread that polls, and workers that wedge."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import gpu_device  # noqa: F401  before triton
import gpu_proofs
import numpy as np
import pytest
import torch

from localrun.errors import LocalrunError
from localrun.gpu import device as gpu
from localrun.gpu.device import Cuda, StandIn, sleep_node
from localrun.gpu.handover import MAILBOX_WORDS, Coordinator, HostWords, StreamWords, Watch
from localrun.gpu.proof import child, prove
from localrun.gpu.proof.parts import PARTS
from localrun.gpu.proof.steps import replaced
from localrun.gpu.ways import HOST_NODES, STREAM_MEMORY
from quant.decode.coordinator import END, count


def coordinator(limit_s: float = 10.0) -> Coordinator:
    return Coordinator(torch.zeros(MAILBOX_WORDS, dtype=torch.int64), HostWords(limit_s), limit_s)


class Mute(HostWords):
    """A card that has not come to what finish() queues.

    Attributes:
        written: when it has come to what was queued first.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self.written = threading.Event()

    def write(self, stream: Any, address: int, value: int) -> None:
        if value != END:
            super().write(stream, address, value)
            self.written.set()


def test_nodes_are_called_one_after_the_other_and_the_card_waits() -> None:
    calls = np.zeros(2, np.int64)
    with closing(coordinator()) as found:
        for turn in range(1, 4):
            found.begin()
            for i in (0, 1, 0):
                before = int(calls[i])
                found.hand_over(None, count.address, calls[i:].ctypes.data)
                assert calls[i] == before + 1  # it has come back
            found.finish(None)
            assert calls.tolist() == [2 * turn, turn]


def test_workers_that_wedge_are_an_error_and_the_card_goes_on() -> None:
    """The card is a thread here; it would wait for four seconds, and is let go after a tenth of one."""
    found, went_on = coordinator(0.1), []

    def card() -> None:
        found.hand_over(None, sleep_node(), 4_000_000)
        went_on.append(time.monotonic())
        found._set("request", END)

    found._words = words = Mute(30.0)
    found.begin()
    thread = threading.Thread(target=card)
    thread.start()
    assert words.written.wait(10)
    start = time.monotonic()
    with pytest.raises(LocalrunError, match=r"have not answered each other for 0\.1 s; --device cpu does without"):
        found.finish(None)
    thread.join(5)
    assert went_on and went_on[0] - start < 3
    with pytest.raises(LocalrunError, match="have not answered before"):
        found.begin()


def test_host_nodes_that_wedge_are_an_error() -> None:
    """As long as anything gets on there is none; what waits for the card raises as itself."""
    watch, never, steps = Watch(0.2), threading.Event(), iter(range(9))
    with pytest.raises(LocalrunError, match="the GPU failed"):
        watch.wait(lambda: raise_(LocalrunError("the GPU failed")), lambda: 0)
    start = time.monotonic()
    with pytest.raises(LocalrunError, match=r"have not answered each other for 0\.2 s; --device cpu does without"):
        watch.wait(never.wait, lambda: next(steps, 9))
    assert 0.6 < time.monotonic() - start < 5 and watch.has_failed
    with pytest.raises(LocalrunError, match="have not answered before"):
        watch.wait(lambda: None, lambda: 0)
    never.set()


def raise_(error: Exception) -> None:
    raise error


def test_a_step_by_host_nodes_is_watched(fake: SimpleNamespace) -> None:
    """One that is captured and replayed by stream memory operations is not: its thread is."""
    device, waits = Cuda(), []
    device._watch.wait = lambda wait, progress: waits.append(progress())
    device.synchronize(lambda: 7)
    device.synchronize()
    assert waits == [7] and fake.log == ["sleep"] and not device.is_stuck


def test_a_captured_step_is_the_same_either_way() -> None:
    """Launch by launch nodes are called at once; what was captured is called by the thread."""
    device, calls, seen = StandIn(), np.zeros(1, np.int64), []
    device.use(STREAM_MEMORY)

    def step() -> None:
        device.call(count.address, calls.ctypes.data)
        seen.append(int(calls[0]))

    step()
    replay = device.capture(step)
    for _ in range(3):
        replay()
        device.synchronize()
    device.use(HOST_NODES)
    device.capture(step)()
    device.synchronize()
    assert seen == [1, 2, 3, 4, 5]


def test_steps_by_stream_memory_pass_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu_proofs.kernels_in_torch(monkeypatch):
        task = gpu_proofs.task("F32").with_choices({"handover": STREAM_MEMORY})
        (part,) = (part for part in PARTS if part.name == "steps")
        assert prove.here(part, task, lambda what: None)["faults"] == []


# ---- what the driver is asked ----------------------------------------------------------------------------------------


class Driver:
    """Notes what it is asked."""

    def __init__(self, log: list[str]) -> None:
        def write(stream: int, address: int, value: int, flags: int) -> int:
            log.append(f"write {value if value < 1 << 63 else value - (1 << 64)} on {stream}")
            return 0

        def wait(stream: int, address: int, value: int, flags: int) -> int:
            log.append(f"wait {value} on {stream}")
            return 0

        self.cuStreamWriteValue64_v2, self.cuStreamWaitValue64_v2 = write, wait
        self.cuLaunchHostFunc = lambda stream, function, argument: log.append("host node") or 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """As much of torch.cuda as captures take."""
    log: list[str] = []

    @contextmanager
    def within(*_: Any, **__: Any) -> Iterator[None]:
        yield

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        found.capturing = True
        yield
        found.capturing = False

    def stream(*_: Any) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=7, wait_stream=lambda other: None)

    found = SimpleNamespace(
        get_device_capability=lambda device: (8, 9),
        capturing=False, Stream=stream, current_stream=stream, device=within, stream=within, graph=graph,
        is_current_stream_capturing=lambda: found.capturing, OutOfMemoryError=torch.cuda.OutOfMemoryError,
        CUDAGraph=type("Graph", (), {"replay": lambda self: log.append("replay"), "pool": lambda self: None}),
        Event=lambda blocking: SimpleNamespace(record=lambda s: None, synchronize=lambda: log.append("sleep")), log=log,
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", found)
    monkeypatch.setattr(gpu, "load_driver", lambda: Driver(log))
    monkeypatch.setattr(Cuda, "pinned", lambda self, shape, dtype: torch.zeros(shape, dtype=dtype))
    return found


def test_what_is_captured_is_two_words_and_what_is_launched_a_host_node(
    fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Cuda()
    device.use(STREAM_MEMORY)
    begun: list[str] = []
    monkeypatch.setattr(Coordinator, "begin", lambda self: begun.append("begin"))
    monkeypatch.setattr(Coordinator, "finish", lambda self, stream: begun.append(f"finish {stream}"))
    replay = device.capture(lambda: device.call(1, 2))
    assert fake.log == ["host node", "host node", "write 1 on 7", "wait 1 on 7", "write 0 on 7"]
    device.synchronize()
    assert begun == []
    replay()
    device.synchronize()
    device.synchronize()
    assert begun == ["begin", "finish 7"] and fake.log[-3:] == ["replay", "sleep", "sleep"]


def test_a_late_node_is_one_node(fake: SimpleNamespace) -> None:
    """As the proof makes the workers late, in place of the device's own call()."""
    device = Cuda()
    with replaced(device, call=lambda function, argument: device.sleep(1e-3)):
        device.call(1, 2)
    assert fake.log == ["host node"]


def test_a_driver_without_them_is_one_line() -> None:
    with pytest.raises(LocalrunError, match="no stream memory operations"):
        StreamWords(object())


@pytest.mark.parametrize("faults", [["hangs: no answer for 20 s (4 empty nodes in a row)"], ["no such operations"]])
def test_a_card_without_them_is_used_by_host_nodes(faults: list[str]) -> None:
    def run(part: Any, task: Any, doing: Any) -> child.Message:
        if part.name == "stream_memory":
            return {"faults": faults, "choices": {"handover": STREAM_MEMORY}}
        choices = {"handover": HOST_NODES, "handover_s": 1e-5} if part.name == "handover" else {}
        return {"faults": [], "choices": choices}

    found = prove.prove(gpu_proofs.identity_of("F32"), gpu_proofs.task("F32"), lambda line: None, run=run)
    assert not found.refusal and found.complete
    assert found.choices == {"handover": HOST_NODES, "handover_s": 1e-5}
    (part,) = (each for each in found.outcomes if each.name == "stream_memory")
    assert part.figures == {"not_used": faults[0]}
