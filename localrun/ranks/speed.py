"""Shares by speed: each rank measures how fast it reads memory, which is what a token's experts take time for."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import numpy as np

from localrun.ranks.sharing import Sharing
from localrun.ranks.world import World
from quant.threads.bandwidth import buffer, read_bandwidth
from quant.threads.pool import Pool

_BYTES = 1 << 28  # several times the caches
_LIMIT_S = 900.0  # a rank may have kernels to compile first


def read_speed(n_threads: int) -> float:
    """Bytes a second."""
    with closing(Pool(n_threads)) as pool:
        memory = buffer(pool, _BYTES)
        return read_bandwidth(pool, memory.ctypes.data, _BYTES, passes=1).median


def with_sizes(world: World, sharing: Sharing, n_threads: int) -> Sharing:
    """The sharing; where sizes are to be by speed, with those that all ranks have measured. All must call it.

    Raises RankError.
    """
    if not sharing.by_speed:
        return sharing
    own, others = np.array([read_speed(n_threads)]), range(1, world.size)
    if world.rank:
        world.send(0, own.tobytes())
        speeds = np.frombuffer(world.receive(0, _LIMIT_S))
    else:
        speeds = np.concatenate([own, *(np.frombuffer(world.receive(rank, _LIMIT_S)) for rank in others)])
        for rank in others:
            world.send(rank, speeds.tobytes())
    return replace(sharing, sizes=tuple(speeds.tolist()), by_speed=False)
