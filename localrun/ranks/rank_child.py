"""The program of every rank but the first: it comes to the first one, opens its file, and serves its share.

It has no terminal, reads nothing but its invitation, and ends when the first rank's connection does. Readers come the
same way (localrun.cpu.reader_child).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import localrun
from localrun.errors import LocalrunError
from localrun.ranks.control import ALIVE, HEARTBEAT_S, READY, receive, send, watch_tcp
from localrun.ranks.mpi import join, mpi, set_up_mpi
from localrun.ranks.places import Place, prepare, threads_at

if TYPE_CHECKING:
    from localrun.gguf.file import GGUFFile
    from localrun.ranks.world import World

Serve = Callable[["GGUFFile", "World", dict[str, Any], int], None]  # with the task and threads, until the end


def main(serve: Serve | None = None) -> NoReturn:
    """The program, for an mpiexec that the first rank has started: its invitation is what comes on stdin.

    serve: what it does with its file; its share of experts' if not given.
    """
    set_up_mpi(is_inside=False)  # whether it is the first rank has said, in the environment
    MPI = mpi()
    invitation = json.loads(sys.stdin.readline()) if MPI.COMM_WORLD.rank == 0 else None
    _come(MPI, MPI.COMM_WORLD.bcast(invitation, 0), MPI.COMM_WORLD.rank + 1, serve or _serve_share)


def main_in_mpiexec() -> NoReturn:
    """The same for one that the user has started: the first rank is among its processes, and invites them, or not."""
    try:
        set_up_mpi(is_inside=False)
        MPI = mpi()
    except LocalrunError:  # the first rank says so
        sys.exit(1)
    MPI.COMM_WORLD.gather(socket.gethostname(), 0)
    invitation = MPI.COMM_WORLD.bcast(None, 0)
    if invitation is None:
        MPI.Finalize()
        sys.exit(0)
    _come(MPI, invitation, MPI.COMM_WORLD.rank, _serve_share, stays=True)


def _come(MPI: Any, invitation: dict[str, Any], rank: int, serve: Serve, stays: bool = False) -> NoReturn:
    """Do what the first rank asks for. stays: until that one is gone, since mpiexec would end it with this one."""
    connection = Client(tuple(invitation["address"]), authkey=bytes.fromhex(invitation["secret"]))
    watch_tcp(connection)
    send(connection, {"rank": rank, "version": localrun.__version__})
    try:
        _work(MPI, connection, receive(connection), serve)
    except Exception as error:
        with suppress(OSError):
            send(connection, {"error": _reason(error)})
    if stays:
        _live(connection)
    os._exit(0)


def _reason(error: Exception) -> str:
    if isinstance(error, LocalrunError):
        return str(error)
    if isinstance(error, MemoryError):
        return "has not enough memory"
    return f"{type(error).__name__}: {error}"


def _work(MPI: Any, connection: Connection, task: dict[str, Any], serve: Serve) -> None:
    """Join the others and do what is to be done. What takes time to import is imported once it is known to be here."""
    threading.Thread(target=_live, args=(connection,), daemon=True).start()
    place = Place(cores=tuple(task["cores"]), together=task["together"])
    prepare(place)
    file = _same_file(Path(task["path"]), task["identity"]) if task["path"] else None
    connection.send_bytes(READY)
    comm = join(MPI, task["port"], is_first=False)
    if file is None:
        from localrun.ranks.echo import answer

        answer(comm)
        return
    from localrun.ranks.world import mpi_world

    serve(file, mpi_world(comm, task["names"]), task, threads_at(place, task["threads"]))


def _serve_share(file: GGUFFile, world: World, task: dict[str, Any], n_threads: int) -> None:
    from localrun.ranks.sharing import Sharing
    from localrun.ranks.worker import serve_share

    serve_share(file, world, Sharing(**task["sharing"] | {"sizes": tuple(task["sharing"]["sizes"])}), n_threads)


def _same_file(path: Path, expected: str) -> GGUFFile:
    from localrun.gguf.file import open_gguf

    file = open_gguf(path)
    if file.fingerprint(file.without_tensors()) != expected:
        file.close()
        raise LocalrunError(f"{path}: is another model than the first rank's")
    return file


def _live(connection: Connection) -> None:
    """Say so every second, whatever else this process does; end it when the first rank is gone."""
    try:
        while True:
            connection.send_bytes(ALIVE)
            if connection.poll(HEARTBEAT_S):
                connection.recv_bytes()  # nothing comes any more but the end
    except (EOFError, OSError):
        os._exit(0)  # its exit code is the one that counts


if __name__ == "__main__":
    main()
