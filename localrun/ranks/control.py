"""What ranks say to each other besides MPI: who they are, that they are alive, and why they end.

MPI waits for ever for a peer that has died. So each rank has a TCP connection to the first one as well, and whoever
finds it closed knows that the other is gone. A connection begins with a proof, both ways, that the other has this run's
secret (multiprocessing.connection: HMAC of a random challenge); the first rank listens until all have come, not longer.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from typing import Any

from localrun.errors import LocalrunError

HEARTBEAT_S = 1.0
SILENCE_S = 4.0  # without a heartbeat: 10 s until the user knows, with what comes after
_ANYWHERE = "192.0.2.1"  # RFC 5737: nobody's, so that the way there is that to strangers
ALIVE, READY = b"alive", b"ready"  # what is no JSON of a rank
_IDLE_S, _EVERY_S, _TIMES = 5, 2, 2  # a host without power is found by TCP's own probes


def send(connection: Connection, document: dict[str, Any]) -> None:
    """Raises OSError if the other is gone."""
    connection.send_bytes(json.dumps(document).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """The next message. Raises EOFError or OSError if the other is gone."""
    return json.loads(connection.recv_bytes())


def watch_tcp(connection: Connection) -> None:
    """Have the system find out when the other's host is gone, which sends nothing then, not even the end."""
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        copy.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _EVERY_S), ("TCP_KEEPCNT", _TIMES)):
            if hasattr(socket, option):
                copy.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def own_address(host: str) -> str:
    """This machine's address towards a host, or the one towards others if its name is ssh's affair alone.

    Raises LocalrunError if there is none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
        for name in (host, _ANYWHERE):
            with suppress(OSError):
                probe.connect((name, 9))
                return probe.getsockname()[0]
    raise LocalrunError(f"host {host}: this machine has no network that leads there")


class Callers:
    """Takes connections of ranks that know the secret, in a thread: a stranger who says nothing can only delay it.

    Attributes:
        come: connections so far, in any order.
    """

    def __init__(self, address: str, secret: bytes):
        """Raises OSError if there is no such address here."""
        self._listener = Listener((address, 0), authkey=secret)
        self.address = self._listener.address  # where to connect to
        self.come: list[Connection] = []
        self._is_closed = False
        threading.Thread(target=self._run, daemon=True, name="localrun-callers").start()

    def _run(self) -> None:
        while not self._is_closed:
            with suppress(OSError, EOFError, AuthenticationError):  # of a stranger
                self.come.append(self._listener.accept())
        self._listener.close()

    def close(self) -> None:
        """Take no more."""
        self._is_closed = True
        with suppress(OSError):
            socket.create_connection(self.address, timeout=1).close()  # wakes the thread up


class Watch:
    """A thread that hears ranks' heartbeats and says which of them is gone, and why.

    Attributes:
        ready: ranks that have said so.
    """

    def __init__(self, connections: Sequence[Connection], names: Sequence[str], gone: Callable[[int, str], None]):
        """connections: of ranks from 1 on. gone: called in the thread, once a rank, with its number and a line."""
        self._ranks = {connection: rank for rank, connection in enumerate(connections, 1)}
        self.ready: set[int] = set()
        self._names, self._gone, self._is_closed = names, gone, False
        self._thread = threading.Thread(target=self._run, daemon=True, name="localrun-watch")
        self._thread.start()

    def _run(self) -> None:
        heard = dict.fromkeys(self._ranks, time.monotonic())
        while self._ranks and not self._is_closed:
            for connection in wait(list(self._ranks), HEARTBEAT_S):
                heard[connection] = time.monotonic()
                self._hear(connection)
            for connection in list(self._ranks):
                if time.monotonic() - heard[connection] > SILENCE_S:
                    self._lose(connection, f"no sign of life for {SILENCE_S:g} s")

    def _hear(self, connection: Connection) -> None:
        try:
            data = connection.recv_bytes()
        except (EOFError, OSError):
            self._lose(connection, "is gone: it was killed, or the connection is lost")
            return
        if data == READY:
            self.ready.add(self._ranks[connection])
        elif data != ALIVE:
            self._lose(connection, json.loads(data)["error"])

    def _lose(self, connection: Connection, why: str) -> None:
        rank = self._ranks.pop(connection)
        self._gone(rank, f"{self._names[rank]}: {why}")

    def close(self) -> None:
        """Watch no more."""
        self._is_closed = True
        self._thread.join(2 * HEARTBEAT_S)
