"""A model served on a socket until a signal ends it."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from localrun import hardware
from localrun.arguments import whole
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.ranks.world import RankError
from localrun.serve.app import application
from localrun.serve.scheduler import MOST_PAUSE_S, Scheduler
from localrun.serve.service import Service
from localrun.serve.store import Store

MOST_SLOTS = 256
_USUAL_SLOTS = 4
_KEEP_ALIVE_S = 75
_SIGNAL_S = 0.05  # until a second signal is noticed
_UNREAD_MS = 120_000  # that a client may take nothing of what waits for it, or it would hold up the end of the server


def listen_on(host: str, port: int) -> socket.socket:
    """A socket on an address, which nobody can connect to yet; port 0 is any that is free.

    Raises LocalrunError if the address can't be had.
    """
    port = whole("port", port, "0 to 65535", low=0, high=65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise LocalrunError(f"{host}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # of Linux; accepted connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNREAD_MS)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise LocalrunError(f"{host} port {port}: {error.strerror}") from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    """Whether this machine alone can connect."""
    address = listener.getsockname()[0]
    return address.startswith("127.") or address == "::1"


def url(listener: socket.socket) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def slots_for(engine: Engine, wanted: int | None) -> int:
    """How many replies may run at once: as many as wanted, or what fits of the usual number.

    Raises LocalrunError if the contexts of those that are wanted do not fit into the RAM that is free.
    """
    if engine.config is None or engine.device != "cpu":  # the first one's memory is all that was reckoned with
        return whole("slots", 1 if wanted is None else wanted, f"1 to {MOST_SLOTS}", low=1, high=MOST_SLOTS)
    fits = max(1, hardware.free_ram() // (engine.ctx * engine.config.kv_token_bytes(engine.placement.cache_bits)))
    slots = whole(
        "slots", min(_USUAL_SLOTS, fits) if wanted is None else wanted, f"1 to {MOST_SLOTS}", low=1, high=MOST_SLOTS
    )
    if slots > fits:
        raise LocalrunError(
            f"{slots} slots of {engine.ctx} tokens do not fit into the RAM that is free; {fits} would, or a smaller -c"
        )
    return slots


def serve(
    engine: Engine,
    listener: socket.socket,
    *,
    name: str,
    api_key: str | None,
    slots: int,
    cache_bytes: int,
    most_pause_s: float = MOST_PAUSE_S,
    store: Store | None = None,
    origins: Sequence[str] = (),
    variables: Mapping[str, Any] | None = None,
    ready: Callable[[], None],
) -> None:
    """Answer requests until SIGTERM or SIGINT; what has begun is finished then, unless there comes another signal.

    Args:
        name: of the model, for clients.
        api_key: what they have to send; None for nothing.
        slots: replies that run at once.
        cache_bytes: of finished conversations that are kept.
        store: where they go that there is no room for, and all in the end.
        most_pause_s: the seconds between two tokens of a running reply that reading prompts should keep to.
        origins: whose pages may use the server, in a browser, besides its own.
        variables: of the chat template, where a request sets none.
        ready: called once connections are taken.

    Raises RankError: a rank or a reader is gone; running replies that need it have ended with that error.
    """
    engine.prepare()
    scheduler = Scheduler(engine, slots, cache_bytes, most_pause_s=most_pause_s, store=store)
    is_hurried = True
    try:
        service = Service(engine, scheduler, name, variables)
        app = application(service, api_key, origins=origins, is_local=is_loopback(listener))
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=_KEEP_ALIVE_S, ws="none"
        )
        server = _Server(config, ready, lambda: _failure(engine) is not None)
        server.run(sockets=[listener])
        is_hurried = server.force_exit
    finally:
        scheduler.close(keep=not is_hurried)
    if failure := _failure(engine):
        raise failure


def _failure(engine: Engine) -> RankError | None:
    """Of the ranks that share its experts, or of those that read its prompts."""
    worlds = [others.world for others in (engine.ranks, engine.readers) if others]
    return next((world.failure for world in worlds if world.failure), None)


class _Server(uvicorn.Server):
    """uvicorn's, which a failure ends, or a second signal of any kind; it returns then instead of raising that."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], has_failed: Callable[[], bool]):
        super().__init__(config)
        self._ready, self._has_failed = ready, has_failed

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's, ten times a second; whether to end."""
        return self._has_failed() or await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which from Python 3.12 on waits for connections, whatever signals come."""
        watch = asyncio.ensure_future(self._abort_when_forced())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()

    async def _abort_when_forced(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(_SIGNAL_S)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM)
        before: dict[int, Any] = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
