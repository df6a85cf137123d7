"""Starting and ending the ranks of a run, from the first one, which is the user's own process.

The others are children of one mpiexec, in a session of its own, which reaches other hosts by ssh. This process stays
outside of it: it keeps its terminal, and mpiexec, which ends all its children when one dies, cannot end it. MPI joins
the two (MPI_Comm_accept). Ranks that have served never call MPI_Finalize: it would wait for those that are gone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

import localrun
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.ranks.control import Callers, Watch, own_address, receive, send, watch_tcp
from localrun.ranks.loss import ending_at_loss
from localrun.ranks.mpi import join, mpi, mpiexec, place_in_mpiexec, set_up_mpi
from localrun.ranks.places import Place, names_of, prepare
from localrun.ranks.sharing import Ranks, Sharing
from localrun.ranks.world import World, mpi_world

if TYPE_CHECKING:
    from mpi4py import MPI

COME_S, READY_S, JOIN_S = 8.0, 60.0, 8.0  # until a rank is there; has opened and compared its file; is joined
_END_S = 1.0  # for processes to end by themselves, then by a signal
_POLL_S = 0.01
_LOCAL = "127.0.0.1"
_NO_PROGRAM = re.compile(r"execvp error on file .*")
_NOISE = ("[", "=", "YOUR APPLICATION", "This typically", "Please see")  # mpiexec's own lines


@contextmanager
def sharing_ranks(path: Path, places: Sequence[Place], sharing: Sharing, threads: int | None) -> Iterator[Ranks]:
    """The ranks at these places, each with its file checked, to serve their shares; ended when the block is.

    Args:
        threads: of each rank; None for its part of the cores that it may use.

    Raises LocalrunError, one line that names the host or the rank, if one of them can't be started, or there are none.
    """
    if len(places) < 2:
        raise LocalrunError("one place has nobody to share experts with; give two or more")
    with closing(_run(places, _task(path, threads) | {"sharing": vars(sharing)})) as run:
        yield Ranks(run.start(), sharing)


@contextmanager
def reading_ranks(path: Path, places: Sequence[Place], threads: int | None, dense_attention: bool) -> Iterator[World]:
    """The ranks at these places, but the first, to read prompts for this one (localrun.ranks.readers).

    Raises LocalrunError as sharing_ranks.
    """
    task = _task(path, threads) | {"dense_attention": dense_attention}
    names = ["rank 0", *(f"host {place.host or 'localhost'} (reader {i})" for i, place in enumerate(places[1:], 1))]
    with closing(_Run(places, task, names, "localrun.cpu.reader_child")) as run:
        yield run.start()


def _task(path: Path, threads: int | None) -> dict[str, Any]:
    with open_gguf(path) as file:
        identity = file.fingerprint(file.without_tensors())
    return {"path": str(path.resolve()), "identity": identity, "threads": threads}


@contextmanager
def echoing_ranks(places: Sequence[Place], say: Callable[[str], None]) -> Iterator[MPI.Intracomm]:
    """The communicator of ranks that answer messages (localrun.ranks.echo). Raises LocalrunError as sharing_ranks.

    say: gets a line if one is lost, which ends this process: it would wait for ever.
    """
    with closing(_run(places, {})) as run, ending_at_loss([run.start()], say):
        yield run.comm


@cache
def places_in_mpiexec() -> list[Place]:
    """Those of the ranks that the user's mpiexec has started, this one among them. Raises LocalrunError."""
    set_up_mpi(is_inside=False)
    hosts = mpi().COMM_WORLD.gather(socket.gethostname(), 0)
    return [Place("" if host == hosts[0] else host, together=hosts.count(host)) for host in hosts]


def end_in_mpiexec(code: int) -> NoReturn:
    """End this process, the first of the user's mpiexec, and the others with it; mpiexec's exit code is this one.

    Those that were invited end when their connections close, or mpiexec ends them. The others wait to be told.
    """
    with suppress(LocalrunError):  # without MPI none waits
        if not _joined:
            places_in_mpiexec()
            mpi().COMM_WORLD.bcast(None, 0)
            mpi().Finalize()
    os._exit(code)  # at once: the end of the interpreter would close connections before it is over


def _run(places: Sequence[Place], task: dict[str, Any]) -> _Run:
    names = names_of(places)
    return _Joined(places, task, names) if place_in_mpiexec()[1] > 1 else _Run(places, task, names)


class _Run:
    """The other ranks: mpiexec, a connection to each, the thread that watches them."""

    def __init__(
        self,
        places: Sequence[Place],
        task: dict[str, Any],
        names: Sequence[str],
        program: str = "localrun.ranks.rank_child",
    ):
        """task: what each rank is told to do; one that has a file's path is told its own place's. program: theirs."""
        self._places, self._task, self._names, self._program = places, task, names, program
        self.world: World | None = None
        self._connections: list[Connection] = []
        self._mpiexec: subprocess.Popen | None = None
        self._watch: Watch | None = None
        self._failure = ""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in the end

    def start(self) -> World:
        """Raises LocalrunError."""
        prepare(self._places[0])
        hosts = [place.host for place in self._places if place.host]
        address, secret = own_address(hosts[0]) if hosts else _LOCAL, secrets.token_bytes(32)
        callers = Callers(address, secret)
        try:
            self._invite({"address": callers.address, "secret": secret.hex()}, bool(hosts))
            self._meet(callers)
        finally:
            callers.close()
        self.comm = self._settle()
        self.world = mpi_world(self.comm, self._names)
        self.world.end = self.close
        self.world.links.watch([connection.fileno() for connection in self._connections])
        self._wait(lambda: True, 0)  # a rank may have been lost before there was a world to tell
        return self.world

    def _lose(self, rank: int, line: str) -> None:
        """Called by the thread that watches."""
        self._failure = self._failure or line
        if self.world:
            self.world.fail(rank, line)

    def _invite(self, invitation: dict[str, Any], has_hosts: bool) -> None:
        """Start the others; what lets them in goes through mpiexec's stdin, which only they can read."""
        set_up_mpi(is_inside=not has_hosts)
        others = self._places[1:]
        command = [mpiexec(), "-disable-auto-cleanup", "-wdir", "/", "-n", str(len(others))]
        if has_hosts:
            hosts = [place.host or "localhost" for place in others]
            slots = [f"{host}:{hosts.count(host)}" for host in dict.fromkeys(hosts)]
            command += ["-localhost", invitation["address"][0], "-hosts", ",".join(slots)]
        command += [sys.executable, "-m", self._program]
        self._mpiexec = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, start_new_session=True
        )
        with suppress(BrokenPipeError), self._mpiexec.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(json.dumps(invitation).encode() + b"\n")

    def _meet(self, callers: Callers) -> None:
        """Wait for all of them to say who they are."""
        until = time.monotonic() + COME_S
        missing, heard = set(range(1, len(self._names))), 0
        connections: dict[int, Connection] = {}
        while missing:
            if (self._mpiexec and self._mpiexec.poll() is not None) or time.monotonic() > until:
                raise LocalrunError(self._why_nobody_came(sorted(missing)))
            if heard == len(callers.come):
                time.sleep(_POLL_S)
                continue
            connection, heard = callers.come[heard], heard + 1
            with suppress(OSError, EOFError):  # it has ended again: mpiexec will tell
                rank = self._take(connection, receive(connection))
                connections[rank] = connection
                missing.discard(rank)
        self._connections = [connections[rank] for rank in sorted(connections)]

    def _take(self, connection: Connection, hello: dict[str, Any]) -> int:
        """The rank that has come."""
        rank = hello["rank"]
        if hello["version"] != localrun.__version__:
            has, here = hello["version"], localrun.__version__
            raise LocalrunError(f"{self._names[rank]}: has localrun {has}; here it is {here}")
        watch_tcp(connection)
        return rank

    def _why_nobody_came(self, missing: list[int]) -> str:
        """mpiexec's reason, with the rank whose host it names; else all that are missing."""
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith(_NOISE)]
        said = said or [found[0] for line in lines if (found := _NO_PROGRAM.search(line))]
        named = [rank for rank in missing if said and self._places[rank].host and self._places[rank].host in said[-1]]
        names = ", ".join(self._names[rank] for rank in named[:1] or missing)
        if said:
            return f"{names}: can't be started: {said[-1][:200]}"
        return f"{names}: not there within {COME_S:g} s; can ssh reach it, and it this machine?"

    def _settle(self) -> MPI.Intracomm:
        """Tell each what it is to do, wait until all have found their file to be the same, and join them."""
        MPI = mpi()
        port = self._open_port(MPI)
        for connection, place in zip(self._connections, self._places[1:], strict=True):
            own = {"cores": place.cores, "together": place.together, "path": place.path or self._task.get("path")}
            with suppress(OSError):  # it is gone, as will be found
                send(connection, self._task | own | {"port": port, "names": self._names})
        self._watch = watch = Watch(self._connections, self._names, self._lose)
        if not self._wait(lambda: len(watch.ready) == len(self._connections), READY_S):
            late = next(rank for rank in range(1, len(self._names)) if rank not in watch.ready)
            raise LocalrunError(f"{self._names[late]}: has not opened its file within {READY_S:g} s")
        return self._join(MPI, port)

    def _open_port(self, MPI: Any) -> str | None:
        """Where the others are to connect to; None where they are of one world already."""
        return MPI.Open_port()

    def _wait(self, is_so: Callable[[], bool], limit_s: float) -> bool:
        """Until it is so, and whether it is. Raises LocalrunError if a rank is lost meanwhile."""
        until = time.monotonic() + limit_s
        while not (found := is_so()) and time.monotonic() < until and not self._failure:
            time.sleep(_POLL_S)
        if self._failure:
            raise LocalrunError(self._failure)
        return found

    def _join(self, MPI: Any, port: str | None) -> MPI.Intracomm:
        """The communicator of all. MPI can't be told to stop waiting: it waits in a thread that may be left behind."""
        joined: list[Any] = []
        thread = threading.Thread(
            target=lambda: joined.append(join(MPI, port, is_first=True)), daemon=True, name="localrun-join"
        )
        thread.start()
        if not self._wait(lambda: bool(joined), JOIN_S):
            raise LocalrunError(f"{self._names[1]}: MPI can't connect to it within {JOIN_S:g} s; is a port blocked?")
        return joined[0]

    def close(self) -> None:
        """End all. A rank ends when its connection closes; what has not by then is killed."""
        if self._watch:
            self._watch.close()
        for connection in self._connections:
            connection.close()
        if self._mpiexec is not None:
            self._end(self._mpiexec)
        self._log.close()

    def _end(self, mpiexec: subprocess.Popen) -> None:
        """Ranks that live have a second to end; mpiexec has another, to end what runs on other hosts."""
        started = _descendants(mpiexec.pid)
        if self._connections and not self._failure:
            with suppress(subprocess.TimeoutExpired):
                mpiexec.wait(_END_S)
        mpiexec.terminate()
        if any(place.host for place in self._places):
            with suppress(subprocess.TimeoutExpired):
                mpiexec.wait(_END_S)
        mpiexec.kill()
        mpiexec.wait()
        for process in started:
            with suppress(psutil.Error):
                process.kill()


class _Joined(_Run):
    """The same under an mpiexec that the user started: all are of one world, and end when this process does."""

    def _invite(self, invitation: dict[str, Any], has_hosts: bool) -> None:
        _joined.append(self)
        mpi().COMM_WORLD.bcast(invitation, 0)

    def _open_port(self, MPI: Any) -> str | None:
        return None

    def close(self) -> None:
        """Leave the others: that mpiexec ends all processes, this one too, once one of them has ended."""
        if self._watch:
            self._watch.close()
        self._log.close()


_joined: list[_Joined] = []  # with its connections, which stay open until this process ends


def _descendants(pid: int) -> list[psutil.Process]:
    """mpiexec's, which are in sessions of their own: proxies, ssh, and the ranks of this machine."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
