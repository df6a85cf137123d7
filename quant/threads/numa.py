"""Workers by NUMA node: which node a worker is on, and which part of a row of work items is a node's own.

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

from quant.simd.struct import i64, pointer, struct
from quant.target.jit import inline

LINE = 64  # bytes from one node's counter to the next

# What a job knows of it.
NUMA = struct("Numa", n_nodes=i64, node_of=pointer(i64), before=pointer(i64))


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
