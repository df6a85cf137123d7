"""Workers by NUMA node: which node a worker is on, which part of a row of work items is a node's own, and who takes it.

Items that are the same rows of weights in every step belong to the same node in every step, so that their pages can lie
there. A worker takes its own node's items first, then helps the others: where a node has less to do, or its workers
come late, nobody waits.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quant.simd.struct import address, i64, pointer, struct
from quant.target.jit import inline
from quant.threads.atomics import atomic_add, atomic_load

LINE = 64  # bytes from one node's counter to the next

# What a job knows of it.
NUMA = struct("Numa", n_nodes=i64, node_of=pointer(i64), before=pointer(i64))
# Work items of a job, in rows of `period` that are shared out by node. taken: a counter a node, LINE bytes apart.
ITEMS = struct("Items", numa=NUMA, taken=address, n_items=i64, period=i64)


@dataclass(frozen=True)
class Spread:
    """Workers over the nodes.

    Attributes:
        n_workers: in all.
        cores: of each node, those that workers may run on; empty where memory is the same from everywhere.
    """

    n_workers: int
    cores: Sequence[Sequence[int]] = ()

    @cached_property
    def before(self) -> np.ndarray:
        """int64 (nodes + 1,): workers on the nodes before each; then all."""
        counts = np.cumsum([0, *map(len, self.cores)]) if len(self.cores) > 1 else np.array([0, 1])
        return np.round(self.n_workers * counts / counts[-1]).astype(np.int64)

    @property
    def n_nodes(self) -> int:
        return len(self.before) - 1

    @cached_property
    def node_of(self) -> np.ndarray:
        """int64 (n_workers,): each one's node."""
        return np.searchsorted(self.before, np.arange(self.n_workers), side="right") - 1

    @property
    def struct(self) -> np.ndarray:
        """As kernels see it."""
        return NUMA.pack(n_nodes=self.n_nodes, node_of=self.node_of.ctypes.data, before=self.before.ctypes.data)

    def settle(self, worker: int) -> None:
        """Keep this thread on the cores of a worker's node."""
        if self.n_nodes > 1:
            with suppress(OSError):  # cores that were taken away since: it runs where it may
                os.sched_setaffinity(0, self.cores[self.node_of[worker]])

    def own(self, period: int, node: int) -> tuple[int, int]:
        """The first item of a node's in a row of `period` items, and how many: what own_items() says."""
        first, end = (int(period * n // self.n_workers) for n in self.before[node : node + 2])
        return first, end - first


@inline
def own_items(numa, period, node):
    """Spread.own of a NUMA."""
    n_workers = numa.before[numa.n_nodes]
    first = period * numa.before[node] // n_workers
    return first, period * numa.before[node + 1] // n_workers - first


@inline
def item_at(i, first, n_own, period):
    """The i-th item of a node that owns n_own from `first` on in each row of `period`."""
    return i // n_own * period + first + i % n_own


class Items:
    """The work items of one job, none taken. Lives as long as the job.

    Attributes:
        struct: as kernels see them.
    """

    def __init__(self, spread: Spread, n_items: int, period: int):
        """period: items that come again and again, with other matrices of the same rows; divides n_items."""
        self._taken = np.zeros(spread.n_nodes * LINE // 8, np.int64)
        numa, taken = spread.struct, self._taken.ctypes.data
        self.struct = ITEMS.pack(numa=numa, taken=taken, n_items=n_items, period=max(1, period))


@inline
def take(items, worker):
    """The next item of ITEMS for this worker, one of its own node's while there are any; -1 if none is left."""
    numa, period = items.numa, items.period
    if numa.n_nodes == 1:
        taken = atomic_add(items.taken, 1)
        return taken if taken < items.n_items else -1
    for i in range(numa.n_nodes):
        node = (numa.node_of[worker] + i) % numa.n_nodes
        first, n_own = own_items(numa, period, node)
        counter, end = items.taken + LINE * node, n_own * (items.n_items // period)
        if atomic_load(counter) < end:
            taken = atomic_add(counter, 1)
            if taken < end:
                return item_at(taken, first, n_own, period)
    return -1
