"""Shares by time: ranks measure how fast they read memory, which a token's experts take time for, and messages."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from localrun.ranks.world import LOOK_S, World
from quant.decode.messages import CONTROL
from quant.threads.bandwidth import buffer, read_bandwidth
from quant.threads.pool import Pool

_BYTES = 1 << 28  # several times the caches
_N_EXCHANGES = 50


@dataclass(frozen=True)
class Rates:
    """What rank 0 knows of all.

    Attributes:
        speeds: bytes a second of each rank.
        exchange_s: of each other rank, a layer's messages there and back, which it does not compute meanwhile.
    """

    speeds: tuple[float, ...]
    exchange_s: tuple[float, ...]


def read_speed(n_threads: int) -> float:
    """Bytes a second."""
    with closing(Pool(n_threads)) as pool:
        memory = buffer(pool, _BYTES)
        return read_bandwidth(pool, memory.ctypes.data, _BYTES, passes=1).median


def measure(world: World, n_threads: int, n_bytes: int, n_bytes_back: int) -> Rates:
    """On rank 0, while the others are in be_measured(): all read at once, then all send. Raises RankError."""
    own, others = read_speed(n_threads), range(1, world.size)
    speeds = [own, *(float(np.frombuffer(world.receive(rank))[0]) for rank in others)]
    for rank in others:
        world.send(rank, b"")  # all have done with reading
    seconds = np.array([_exchange(world, n_bytes, n_bytes_back) for _ in range(_N_EXCHANGES)])
    # The shortest: here Python sends them, which takes longer than kernels do, by more than messages differ.
    return Rates(tuple(speeds), tuple(seconds.min(0).tolist()))


def be_measured(world: World, n_threads: int, n_bytes: int, n_bytes_back: int) -> None:
    """On another rank. Raises RankError."""
    world.send(0, np.array([read_speed(n_threads)]).tobytes())
    world.receive(0)
    there, back = np.zeros(n_bytes, np.uint8), np.zeros(n_bytes_back, np.uint8)
    for _ in range(_N_EXCHANGES):
        with world.reaching(0):
            world.watch(world.links.start_receive(there, 0, CONTROL))
            world.watch(world.links.start_send(back, 0, CONTROL))


def _exchange(world: World, n_bytes: int, n_bytes_back: int) -> list[float]:
    """Seconds until each of the others has answered."""
    others, links, began = range(1, world.size), world.links, time.perf_counter()
    sent, pending, found = np.zeros(n_bytes, np.uint8), {}, {}
    for rank in others:
        with world.reaching(rank):
            received = links.start_receive(np.zeros(n_bytes_back, np.uint8), rank, CONTROL)
            pending[rank] = (links.start_send(sent, rank, CONTROL), received)
    until = time.monotonic() + LOOK_S
    while len(found) < len(pending) and time.monotonic() < until:
        for rank in pending.keys() - found.keys():
            with world.reaching(rank):
                if links.is_done(pending[rank][1]):
                    found[rank] = time.perf_counter() - began
        time.sleep(0)
    for rank, pair in pending.items():
        with world.reaching(rank):
            for request in pair:
                world.watch(request)
        found.setdefault(rank, time.perf_counter() - began)
    return [found[rank] for rank in others]
