"""On which NUMA node pages lie, and moving them to another: move_pages(2) by its number, as the C library has no such
function. Source of numbers and constants: the Linux kernel's syscall tables and include/uapi/linux/mempolicy.h.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys

import numpy as np

_CALL = {"x86_64": 279, "aarch64": 239}.get(platform.machine()) if sys.platform == "linux" else None
_MOVE = 2  # MPOL_MF_MOVE: pages that no other process has mapped
_TOGETHER = 1 << 16  # pages of a call


def nodes_of_pages(address: int, n_bytes: int) -> np.ndarray:
    """int32, by page from `address` on, which begins one: its node, or below 0 where none is in memory.

    Empty where the system does not tell.
    """
    return _move_pages(np.arange(address, address + n_bytes, mmap.PAGESIZE, np.uint64), None)


def move_to_node(address: int, n_bytes: int, node: int) -> None:
    """Move the pages of a range, which begins a page, to a node, as far as the system does it."""
    step = _TOGETHER * mmap.PAGESIZE
    for at in range(address, address + n_bytes, step):
        found = nodes_of_pages(at, min(step, address + n_bytes - at))
        elsewhere = np.flatnonzero((found >= 0) & (found != node))
        if elsewhere.size:
            pages = (at + mmap.PAGESIZE * elsewhere).astype(np.uint64)
            _move_pages(pages, np.full(pages.size, node, np.int32))


def _move_pages(pages: np.ndarray, nodes: np.ndarray | None) -> np.ndarray:
    """int32 (n,): where each page is, or why it is not there, below 0; empty if nothing could be done."""
    status = np.full(pages.size, -1, np.int32)
    if _CALL is None:
        return status[:0]
    place = None if nodes is None else ctypes.c_void_p(nodes.ctypes.data)
    arrays = ctypes.c_void_p(pages.ctypes.data), place, ctypes.c_void_p(status.ctypes.data)
    done = _syscall(ctypes.c_long(_CALL), ctypes.c_int(0), ctypes.c_ulong(pages.size), *arrays, ctypes.c_int(_MOVE))
    return status[:0] if done < 0 else status  # above 0: so many pages did not move


def _syscall(*arguments: object) -> int:
    return ctypes.CDLL(None).syscall(*arguments)
