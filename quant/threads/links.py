"""Messages between processes from inside kernels, by three C functions of MPI: MPI_Isend, MPI_Irecv and MPI_Test.

The functions come by their addresses, handles as integers, so that nothing here loads MPI, and a test can put others in
their place. All waits have a limit: a peer that died is an error, not a hang. Who waits spins for some milliseconds,
then sleeps between looks.
Source of signatures: MPI 4.1, sections 3.7.2 and 3.7.3. Handles are int or pointers; either goes in a register.
"""

import ctypes
import select
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from llvmlite import ir
from numba import types

from quant.errors import QuantError
from quant.simd.core import I32, I64, define, pointer
from quant.simd.memory import load_i32, load_i64, stack
from quant.simd.struct import address, i64, struct
from quant.target.jit import inline
from quant.threads.atomics import give_way, pause

# In place of MPI's error codes, which are above 0: nothing came within the limit; somebody said that a rank is gone.
LATE, BROKEN = -1, -2
_PATIENCE, _CLOCK_TURNS = 200, 64  # looks before a core is offered to others; looks between two looks at the clock
SPIN_NS, _SLEEP_US, _IDLE_US = 20_000_000, 200, 1000
_REQUEST_WORDS = 34  # of a Request
_POLLFD = np.dtype([("fd", np.int32), ("events", np.int16), ("revents", np.int16)])
_MONOTONIC = 6 if sys.platform == "darwin" else 1

LINKS = struct(
    "Links",
    isend=address,
    irecv=address,
    test=address,
    byte=i64,
    comm=i64,
    limit_ns=i64,
    broken=address,
    peers=address,  # struct pollfd (n_peers): sockets that close with the other processes
    n_peers=i64,
)


def _call_address(n_arguments: int):
    """An intrinsic that calls a C function int(int64 * n_arguments) by its address."""

    def emit(builder, function, *values):
        function_type = ir.FunctionType(I32, [I64] * n_arguments)
        return builder.sext(builder.call(pointer(builder, function, function_type), values), I64)

    return define(types.int64, (types.int64,) * (n_arguments + 1), emit)


_call_3, _call_7 = _call_address(3), _call_address(7)
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.int64, types.int32))
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))
_time, _flag, _status = stack(16), stack(8), stack(256)  # an MPI_Status has some 20 to 40 bytes


@inline
def clock_ns():
    """Nanoseconds of a clock that only goes on."""
    at = _time()
    _clock_gettime(numba.int32(_MONOTONIC), at)
    return 1_000_000_000 * load_i64(at) + load_i64(at + 8)


@inline
def is_broken(links):
    """Whether no message is worth sending: MPICH's MPI_Isend writes to a null pointer where it finds the other gone."""
    if load_i64(links.broken) != 0:
        return True
    return links.n_peers > 0 and _poll(links.peers, links.n_peers, numba.int32(0)) > 0


@inline
def start_send(links, at, n_bytes, rank, tag, request):
    """Begin to send; the bytes must stay. request: address of 8 bytes. Returns MPI's error code."""
    return _call_7(links.isend, at, n_bytes, links.byte, rank, tag, links.comm, request)


@inline
def start_receive(links, at, n_bytes, rank, tag, request):
    """Begin to receive up to n_bytes. Returns MPI's error code."""
    return _call_7(links.irecv, at, n_bytes, links.byte, rank, tag, links.comm, request)


@inline
def finish(links, request, limit_ns, spin_ns):
    """Wait for what was begun: 0, LATE, BROKEN, or MPI's error code.

    spin_ns: before it sleeps between looks; 0 to sleep longer each time, where nothing is expected.
    """
    flag, status, began, looks, result = _flag(), _status(), 0, 0, 0
    while True:
        result = _call_3(links.test, request, flag, status)
        if result != 0 or load_i32(flag) != 0:
            break
        looks += 1
        if looks < _PATIENCE:
            pause()
        else:
            give_way()
        if looks % _CLOCK_TURNS == 0:
            now = clock_ns()
            if began == 0:
                began = now
            if load_i64(links.broken) != 0 or now - began > limit_ns:
                result = BROKEN if load_i64(links.broken) != 0 else LATE
                break
            if now - began > spin_ns:
                looks -= 1  # the clock every time from now on
                _usleep(numba.uint32(_SLEEP_US if spin_ns > 0 else _IDLE_US))
    return result


class LinkError(QuantError):
    """A message did not get through. code: LATE, BROKEN, or MPI's."""

    def __init__(self, code: int):
        self.code = code
        super().__init__({LATE: "no answer in time", BROKEN: "a rank is gone"}.get(code, f"MPI's error {code}"))


@dataclass(frozen=True, eq=False)
class Request:
    """A message on its way.

    Attributes:
        words: int64: MPI's request, a flag, a status.
        array: what is sent or received into, which must stay until the end.
    """

    words: np.ndarray
    array: np.ndarray


class Links:
    """The three functions, of one communicator. Memory of messages that never end is kept: MPI may still write there.

    Attributes:
        limit_s: the longest wait for a message that a step is to get.
        broken: int64 (1,): not 0 once no message is worth waiting for, which ends all waits.
    """

    def __init__(
        self, isend: int, irecv: int, test: int, byte: int, comm: int, limit_s: float = 10.0, owner: object = None
    ):
        """Addresses of the functions, handles of MPI_BYTE and of the communicator; owner: what keeps them alive."""
        self.limit_s, self._owner, self.broken = limit_s, owner, np.zeros(1, np.int64)
        self._fields = {"isend": isend, "irecv": irecv, "test": test, "byte": byte, "comm": comm}
        start, look = (ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * n) for n in (7, 3))
        self._isend, self._irecv, self._test = start(isend), start(irecv), look(test)
        self._peers, self._look = np.zeros(0, _POLLFD), ctypes.CDLL(None).poll
        self._kept: list[object] = []
        self._under_way: set[Request] = set()

    @property
    def struct(self) -> np.ndarray:
        """As kernels see them."""
        return LINKS.pack(
            **self._fields, limit_ns=int(1e9 * self.limit_s), broken=self.broken.ctypes.data,
            peers=self._peers.ctypes.data, n_peers=len(self._peers),
        )  # fmt: skip

    def watch(self, sockets: Sequence[int]) -> None:
        """Begin no message once one of these has been closed at its other end. Before a struct is made."""
        closed = getattr(select, "POLLRDHUP", 0)  # elsewhere than on Linux POLLHUP, which needs not be asked for
        self._peers = np.array([(socket, closed, 0) for socket in sockets], _POLLFD)

    @property
    def _is_broken(self) -> bool:
        """As is_broken()."""
        peers, n_peers = ctypes.c_void_p(self._peers.ctypes.data), ctypes.c_ulong(len(self._peers))
        return bool(self.broken[0]) or self._look(peers, n_peers, 0) > 0

    def keep(self, memory: object) -> None:
        """Hold what kernels send from and receive into."""
        self._kept.append(memory)

    def start_send(self, array: np.ndarray, rank: int, tag: int) -> Request:
        """Begin to send an array. Raises LinkError."""
        return self._start(self._isend, array, rank, tag)

    def start_receive(self, array: np.ndarray, rank: int, tag: int) -> Request:
        """Begin to receive up to an array's bytes into it. Raises LinkError."""
        return self._start(self._irecv, array, rank, tag)

    def _start(self, function: Callable[..., int], array: np.ndarray, rank: int, tag: int) -> Request:
        if self._is_broken:
            raise LinkError(BROKEN)
        request = Request(np.zeros(_REQUEST_WORDS, np.int64), array)
        byte, comm, at = self._fields["byte"], self._fields["comm"], request.words.ctypes.data
        if code := function(array.ctypes.data, array.nbytes, byte, rank, tag, comm, at):
            raise LinkError(code)
        self._under_way.add(request)
        return request

    def is_done(self, request: Request) -> bool:
        """Whether a request has ended. Raises LinkError."""
        at = request.words.ctypes.data
        if code := self._test(at, at + 8, at + 16):
            raise LinkError(code)
        if is_done := bool(request.words.view(np.int32)[2]):
            self._under_way.discard(request)
        return is_done

    def finish(self, request: Request, limit_s: float | None = None, most_pause_s: float = 2e-4) -> None:
        """Wait for a request to end, by sleeping, up to so long between looks. Raises LinkError."""
        end, pause_s = time.monotonic() + (self.limit_s if limit_s is None else limit_s), 1e-5
        while not self.is_done(request):
            if self.broken[0] or time.monotonic() > end:
                raise LinkError(BROKEN if self.broken[0] else LATE)
            time.sleep(pause_s)
            pause_s = min(most_pause_s, 2 * pause_s)
