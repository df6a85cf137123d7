"""What the hybrid path asks of a device: a second stream, memory that both sides copy, host nodes, steps captured once.

The only module that knows CUDA's streams, events and graphs. `Cuda` is a GPU; `StandIn` does the same on the CPU at
once, so that everything else is testable without one.

A host node is a C function void(void*) that the driver calls from a thread of its own, when what was queued before is
done; what is queued behind waits until it returns. It must not call CUDA. It goes straight to the driver's
cuLaunchHostFunc (https://docs.nvidia.com/cuda/cuda-driver-api/, "Execution Control"): cuda-bindings hands over a
function of its own instead, depending on its version (12.8.0 in its runtime module; 12.9.10 and 13.0.0 in its driver
module, too), which takes the GIL and frees its argument at the first call, so that a graph can't be replayed
(github.com/NVIDIA/cuda-python, issue 790). A captured step may have stream memory operations instead (handover.py).
"""

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from weakref import WeakSet

import torch

from localrun.errors import LocalrunError
from localrun.gpu import tiles
from localrun.gpu.handover import MAILBOX_WORDS, Coordinator, HostWords, StreamWords, Watch
from localrun.gpu.ways import STREAM_MEMORY

_SMALL = (8, 0)  # compute capability: those below have less shared memory, and no tensor cores that Triton knows
_WARM_UPS = 2  # of a step before it is captured: kernels are compiled and libraries make their work memory
_CYCLES = 1.5e9  # a second, of a card's clock, about
_FAILURES = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]")  # how torch's and Triton's messages begin


class StandIn:
    """The CPU as if it were a device: everything is done when it is asked for.

    Of what was captured, host nodes are called by the coordinator's thread, if use() says so.
    """

    _coordinator: Coordinator | None = None
    _replays = _pending = False
    is_stuck, tiles = False, tiles.USUAL  # as Cuda has them

    def __init__(self, index: int = 0) -> None:
        """index: as Cuda has it; all are the CPU."""
        self.torch = torch.device("cpu")

    def cut(self, names: Mapping[str, str]) -> None:
        """As Cuda."""
        tiles.use(self.torch, tiles.named(names, self.tiles))

    def use(self, handover: str) -> None:
        """Hand captured work over to the CPU in one of the ways of ways.py."""
        self._coordinator = None
        if handover == STREAM_MEMORY:
            self._coordinator = Coordinator(self.pinned((MAILBOX_WORDS,), torch.int64), HostWords())

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the host that the device copies to and from."""
        return torch.empty(shape, dtype=dtype)

    @contextmanager
    def side(self) -> Iterator[None]:
        """A branch of what is queued here, from now on; join() it."""
        yield

    def join(self, branch: None) -> None:
        """Go on after a branch."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is queued within waits for nothing else, and nothing waits for it; one thread's."""
        yield

    def call(self, function: int, argument: int) -> None:
        """Call a C function void(void*) by its address."""
        if self._coordinator is not None and self._replays:
            self._coordinator.hand_over(None, function, argument)
        else:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """What does the same as step, later and more than once."""
        return step if self._coordinator is None else partial(self._replay, self._coordinator, step)

    def _replay(self, coordinator: Coordinator, step: Callable[[], None]) -> None:
        if not self._pending:
            self._pending = True
            coordinator.begin()
        self._replays = True
        try:
            step()
        finally:
            self._replays = False

    def mark(self) -> Callable[[], None]:
        """What waits until all that has been queued is done."""
        return self.synchronize

    def synchronize(self, progress: Callable[[], int] | None = None) -> None:
        """Wait for all that has been queued. Raises LocalrunError if the workers do not answer."""
        if self._coordinator is not None and self._pending:
            self._pending = False
            self._coordinator.finish(None)

    def free_bytes(self) -> int:
        """Of its memory, as the driver says: more than anybody needs."""
        return 1 << 40

    def release(self) -> None:
        """Give memory that no tensor uses back to the driver."""

    def spin(self, seconds: float) -> None:
        """Be busy for about so long."""
        time.sleep(seconds)

    def sleep(self, seconds: float) -> None:
        """Have the thread that calls host nodes sleep for so long."""
        time.sleep(seconds)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Within, the device's failures are errors of one line."""
        yield


class Cuda:
    """A GPU with its main stream, which is torch's current one, one more for branches, and one aside.

    A tensor may be used on the other stream than the one it was made on, as long as it is held until join().
    """

    def __init__(self, index: int = 0):
        """Raises LocalrunError if there is no driver, or the GPU can't be used."""
        self.torch = torch.device("cuda", index)
        self._driver = load_driver()
        with self.errors():
            self._side, self._capture, self._aside = (torch.cuda.Stream(self.torch) for _ in range(3))
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._coordinator: Coordinator | None = None
        self._hands_over = self._pending = False  # what is captured; what was replayed
        self._watch = Watch()
        is_small = torch.cuda.get_device_capability(self.torch) < _SMALL
        self.tiles = tiles.SMALL if is_small else tiles.USUAL
        self.cut({})

    def cut(self, names: Mapping[str, str]) -> None:
        """Have kernels use these tiles (tiles.CANDIDATES), else those for such a card.

        Raises LocalrunError if there are none of that name.
        """
        tiles.use(self.torch, tiles.named(names, self.tiles))

    def use(self, handover: str) -> None:
        """Hand captured work over to the CPU in one of the ways of ways.py; what was captured keeps its own.

        Raises LocalrunError if the driver does not have it.
        """
        self._coordinator = None
        if handover == STREAM_MEMORY:
            words = StreamWords(self._driver)
            self._coordinator = Coordinator(self.pinned((MAILBOX_WORDS,), torch.int64), words)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Page-locked memory of the host: only with it copies are asynchronous, and may be captured."""
        with self.errors():
            return torch.empty(shape, dtype=dtype, pin_memory=True)

    @contextmanager
    def side(self) -> Iterator[torch.cuda.Stream]:
        """What is queued within goes on another stream, which starts after what the current one has so far."""
        self._side.wait_stream(torch.cuda.current_stream(self.torch))
        with torch.cuda.stream(self._side):
            yield self._side

    def join(self, branch: torch.cuda.Stream) -> None:
        """The current stream goes on after the branch."""
        torch.cuda.current_stream(self.torch).wait_stream(branch)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is queued within goes on a stream that waits for no other, and no other for it; one thread's."""
        with torch.cuda.stream(self._aside):
            yield

    def call(self, function: int, argument: int) -> None:
        """A host node on the current stream: a C function void(void*) at an address, with its argument."""
        stream = torch.cuda.current_stream(self.torch).cuda_stream
        # Launch by launch, the stream's queue could be full before anybody polls.
        if self._coordinator is not None and torch.cuda.is_current_stream_capturing():
            self._coordinator.hand_over(stream, function, argument)
            self._hands_over = True
            return
        result = self._driver.cuLaunchHostFunc(stream, function, argument)
        if result != 0:
            raise LocalrunError(f"the GPU failed: cuLaunchHostFunc returned CUDA error {result}")

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """A CUDA graph of what step queues, as what launches it on the current stream.

        step runs a few times before; it must leave its branches joined and its buffers where they are, and neither wait
        for the device nor read from it. Work memory is shared with all other captured steps: they may run one after the
        other, in any order, and what is to be kept goes to buffers that were there before.
        """
        graph, stream, other = torch.cuda.CUDAGraph(), self._capture, next(iter(self._graphs), None)
        memory = None if other is None else other.pool()
        with self.errors():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            self._hands_over = False
            # Other threads may use CUDA meanwhile, as long as they keep off this stream.
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                step()
        self._graphs.add(graph)
        coordinator = self._coordinator if self._hands_over else None

        def replay() -> None:
            if coordinator is not None and not self._pending:
                self._pending = True
                coordinator.begin()
            with self.errors():
                graph.replay()

        return replay

    def mark(self) -> Callable[[], None]:
        """What waits until the current stream has done what it has so far; any thread may call it.

        It sleeps. torch.cuda.synchronize() would spin on a core that one of the workers needs.
        """
        with self.errors():
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self.torch))

        def wait() -> None:
            with self.errors():
                event.synchronize()

        return wait

    @property
    def is_stuck(self) -> bool:
        """Whether a step was given up: work that was handed over, and the workers, may never come back."""
        return self._watch.has_failed or (self._coordinator is not None and self._coordinator.has_failed)

    def synchronize(self, progress: Callable[[], int] | None = None) -> None:
        """Wait, asleep, for all that the current stream has; branches that were joined are part of it.

        Args:
            progress: a number that changes as long as host nodes get on.

        Raises LocalrunError if the device fails, or the workers do not answer.
        """
        if self._coordinator is not None and self._pending:
            self._pending = False
            with self.errors():
                self._coordinator.finish(torch.cuda.current_stream(self.torch).cuda_stream)
        elif progress is not None:
            self._watch.wait(self.mark(), progress)
            return
        self.mark()()

    def free_bytes(self) -> int:
        """Of its memory, as the driver says, whoever uses the rest."""
        with self.errors():
            return torch.cuda.mem_get_info(self.torch)[0]

    def release(self) -> None:
        """Give memory that no tensor uses back to the driver."""
        with self.errors():
            torch.cuda.empty_cache()

    def spin(self, seconds: float) -> None:
        """Queue a kernel that takes about so long, on the current stream."""
        torch.cuda._sleep(int(seconds * _CYCLES))

    def sleep(self, seconds: float) -> None:
        """Queue a host node that sleeps for so long, on the current stream."""
        Cuda.call(self, sleep_node(), int(seconds * 1e6))  # whatever stands in for its own call()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Within, the GPU is the current one, for Triton as well, and its failures are a LocalrunError of one line.

        Other exceptions stay what they are.
        """
        try:
            with torch.cuda.device(self.torch):
                yield
        except torch.cuda.OutOfMemoryError as error:
            raise LocalrunError(f"the GPU's memory is full: {_sentence(error)}; see --ctx and --vram") from error
        except RuntimeError as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # which broke off a recording: that fails of it
                raise error.__context__ from None
            if not str(error).startswith(_FAILURES):
                raise
            raise LocalrunError(f"the GPU failed: {_sentence(error)}; --device cpu does without it") from error
        except _kernel_errors() as error:
            raise LocalrunError(
                f"a GPU kernel can't be made: {_sentence(error)}; --device cpu does without it"
            ) from error


def _kernel_errors() -> tuple[type[Exception], ...]:
    """What Triton raises where a kernel does not compile or fit, and where the C compiler that it calls fails."""
    from triton.errors import TritonError

    return TritonError, subprocess.CalledProcessError


def load_driver() -> ctypes.CDLL:
    """The CUDA driver's library, with the one function that torch does not offer. Raises LocalrunError without it."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise LocalrunError(f"no CUDA driver: {name} can't be loaded ({error})") from None
    try:
        driver.cuLaunchHostFunc.argtypes = [ctypes.c_void_p] * 3  # stream, function, its argument
    except AttributeError:
        raise LocalrunError("the NVIDIA driver lacks cuLaunchHostFunc; install a newer one") from None
    driver.cuLaunchHostFunc.restype = ctypes.c_int
    return driver


def sleep_node() -> int:
    """Address of the C library's usleep, which takes its microseconds as a host node does its argument."""
    return ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p).value or 0


def _sentence(error: Exception) -> str:
    """The first sentence of a message; torch's go on with advice on how to debug."""
    return str(error).split("\n")[0].split(". ")[0].rstrip(".")
