"""Messages that nobody computes anything of: how long they take between the first rank and another.

Both sides use buffers of their own, blocking sends and receives, as few as a layer's messages are.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 7
_IDLE_S = 0.001


def answer(comm: MPI.Intracomm) -> None:
    """Answer rank 0 until it asks for no messages."""
    wanted = np.zeros(4, np.int64)
    while True:
        while not comm.Iprobe(0, _TAG):
            time.sleep(_IDLE_S)  # so that those which are measured have the cores
        comm.Recv(wanted, 0, _TAG)
        out_bytes, back_bytes, n_out, n_times = map(int, wanted)
        if not n_times:
            return
        out, back = np.zeros(out_bytes, np.uint8), np.zeros(back_bytes, np.uint8)
        for _ in range(n_times):
            for _ in range(n_out):
                comm.Recv(out, 0, _TAG)
            comm.Send(back, 0, _TAG)


def exchange_s(
    comm: MPI.Intracomm, rank: int, out_bytes: int, back_bytes: int, n_times: int, n_out: int = 1
) -> np.ndarray:
    """float64 (n_times,): seconds from the first of n_out messages to the one that comes back."""
    comm.Send(np.array([out_bytes, back_bytes, n_out, n_times], np.int64), rank, _TAG)
    out, back, seconds = np.zeros(out_bytes, np.uint8), np.zeros(back_bytes, np.uint8), np.zeros(n_times)
    for i in range(n_times):
        began = time.perf_counter()
        for _ in range(n_out):
            comm.Send(out, rank, _TAG)
        comm.Recv(back, rank, _TAG)
        seconds[i] = time.perf_counter() - began
    return seconds


def end(comm: MPI.Intracomm) -> None:
    """Have the others return from answer()."""
    for rank in range(1, comm.size):
        comm.Send(np.zeros(4, np.int64), rank, _TAG)
