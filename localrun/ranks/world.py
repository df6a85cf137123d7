"""The ranks that run one model, as each of them sees the others: names, and ways to send.

Whoever starts them makes the World, of MPI's communicator (mpi_world) or of anything else that has the same three
functions. Rank 0 is where the user is.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from localrun.errors import LocalrunError
from quant.decode.messages import CONTROL
from quant.threads.links import BROKEN, LATE, LinkError, Links, Request

if TYPE_CHECKING:
    from mpi4py import MPI

LOOK_S = 0.1  # before it sleeps between looks at a message

LIMIT_S = 10.0
START_S = 900.0  # until a rank looks at messages: it may have to read a disk or compile kernels first
_WORD_S = 2.0  # until who watches says why a connection has closed


class RankError(LocalrunError):
    """A rank can't be reached any more. rank: its number."""

    def __init__(self, rank: int, message: str):
        self.rank = rank
        super().__init__(message)


class World:
    """The ranks of one run.

    Attributes:
        rank, size: this one, and how many there are.
        names: of all, for messages: "host b (rank 1)".
        links: what messages go through.
        failure: what made it useless, if something did.
        at_failure: called with that, by the thread that has found out that a rank is gone.
        end: has the other ranks' processes end, whatever state they are in.
    """

    def __init__(self, rank: int, names: Sequence[str], links: Links):
        self.rank, self.size, self.names, self.links = rank, len(names), tuple(names), links
        self.failure: RankError | None = None
        self.at_failure: Callable[[RankError], None] = lambda error: None
        self.end: Callable[[], None] = lambda: None

    @property
    def limit_s(self) -> float:
        """The longest wait for a rank, in steps as well; to be set before a model is opened."""
        return self.links.limit_s

    @limit_s.setter
    def limit_s(self, seconds: float) -> None:
        self.links.limit_s = seconds

    def fail(self, rank: int, text: str) -> None:
        """From any thread: the rank is gone. All waits for any rank end with this text, soon."""
        error = self.note(RankError(rank, text))
        self.links.broken[0] = 1
        self.at_failure(error)

    def check(self) -> None:
        """Raises what made it useless."""
        if self.failure:
            raise self.failure

    def note(self, error: RankError) -> RankError:
        """Remember an error as what made the world useless, unless there was one before: that is given."""
        self.failure = self.failure or error
        return self.failure

    def error(self, rank: int, code: int, limit_s: float | None = None) -> RankError:
        """What to raise of links' error with a rank. limit_s: how long it was waited for, if not the usual limit."""
        until = time.monotonic() + _WORD_S
        while code == BROKEN and not (self.failure or self.links.broken[0]) and time.monotonic() < until:
            time.sleep(0.01)
        if code == BROKEN and self.failure:
            return self.failure
        if code == LATE:
            return RankError(rank, f"{self.names[rank]}: no answer in {limit_s or self.limit_s:g} s")
        return RankError(rank, f"{self.names[rank]}: the connection is lost (MPI's error {code})")

    @contextmanager
    def reaching(self, rank: int, limit_s: float | None = None) -> Iterator[None]:
        """Within, a message that does not get through is a RankError. limit_s: as error() has it."""
        try:
            yield
        except LinkError as error:
            raise self.error(rank, error.code, limit_s) from None

    def watch(self, request: Request) -> None:
        """Until a message has moved: looking is what moves it, and there is nothing else to do. Raises LinkError."""
        until = time.monotonic() + LOOK_S
        while time.monotonic() < until:
            if self.links.is_done(request):
                return
            time.sleep(0)
        self.links.finish(request)

    def send(self, rank: int, data: bytes) -> None:
        """Send some bytes, in order. Raises RankError, within START_S."""
        size, content = np.array([len(data)], np.int64), np.frombuffer(data, np.uint8).copy()
        with self.reaching(rank, START_S):
            requests = [self.links.start_send(array, rank, CONTROL) for array in (size, content) if array.size]
            for request in requests:
                self.links.finish(request, START_S)

    def receive(self, rank: int) -> bytes:
        """What the rank has sent. Raises RankError, within START_S."""
        size = np.zeros(1, np.int64)
        with self.reaching(rank, START_S):
            self.links.finish(self.links.start_receive(size, rank, CONTROL), START_S)
            content = np.zeros(int(size[0]), np.uint8)
            if content.size:
                self.links.finish(self.links.start_receive(content, rank, CONTROL), START_S)
        return content.tobytes()


def mpi_world(comm: MPI.Intracomm, names: Sequence[str]) -> World:
    """The ranks of a communicator, which must stay and return errors (as mpi4py's do).

    mpi4py has MPI's functions loaded: they are found through its module, whichever MPI that is for.
    """
    from mpi4py import MPI

    library = ctypes.CDLL(MPI.__file__)
    functions = (ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _FUNCTIONS)
    handles = (ctypes.c_int64(MPI._handleof(handle)).value for handle in (MPI.BYTE, comm))
    links = Links(*functions, *handles, LIMIT_S, (library, comm))
    return World(comm.rank, names, links)


_FUNCTIONS = ("MPI_Isend", "MPI_Irecv", "MPI_Test")
