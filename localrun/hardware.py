"""What this machine has."""

import os

import psutil


def usable_cores() -> int:
    """Physical cores that this process may run on, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def free_ram() -> int:
    """Bytes of RAM that new allocations can have without swapping."""
    return psutil.virtual_memory().available


def total_ram() -> int:
    """Bytes of RAM."""
    return psutil.virtual_memory().total
