"""What this machine has, and what of it this process may use.

In a container /proc tells of the whole machine, so the limits of control groups (version 2 and 1) and of ulimit -v are
applied to it. Sources: proc(5), Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst and mm/transhuge.rst of
the Linux kernel. Where there is no /proc, psutil answers. `root` is where /proc and /sys are looked for: tests have
their own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil

ROOT = Path("/")
_UNLIMITED = 1 << 60  # version 1 says "no limit" with a number near 2**63


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name."""
    for line in _lines(root / "proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def logical_cores() -> int:
    """Hardware threads that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def physical_cores() -> int:
    """Cores of the machine, however many hardware threads each has."""
    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may keep busy, at least 1."""
    cores = _cores_of_mask(root) or min(logical_cores(), physical_cores())
    return max(1, min(cores, cpu_quota(root) or cores))


def _cores_of_mask(root: Path) -> int:
    """Physical cores among the hardware threads that this process may run on; 0 if the system does not tell.

    A mask may hold some threads of a core, or all: each core's threads name the same siblings.
    """
    if not hasattr(os, "sched_getaffinity"):
        return 0
    topologies = [root / f"sys/devices/system/cpu/cpu{thread}/topology" for thread in os.sched_getaffinity(0)]
    siblings = [_text(path / "core_cpus_list") or _text(path / "thread_siblings_list") for path in topologies]
    return len(set(siblings)) if all(siblings) else 0


def cpu_quota(root: Path = ROOT) -> int | None:
    """Cores' worth of time that control groups allow, rounded up; None if they set no limit."""
    quotas = []
    for group in _groups("cpu", root):
        words = _text(group / "cpu.max").split()  # "200000 100000" or "max 100000"
        if not words:
            words = [_text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")]  # -1 for no limit
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            quotas.append(ceil(int(words[0]) / int(words[1])))
    return min(quotas, default=None)


def busy_cores() -> float:
    """Threads that ran or waited for a core, on average over the last minute: the load average; 0 where unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def total_ram(root: Path = ROOT) -> int:
    """Bytes of RAM that this process and its like may use together: the machine's, or a control group's limit."""
    info = _meminfo(root)
    return min([info["MemTotal"], *(group.limit for group in _memory_groups(root))])


def free_ram(root: Path = ROOT) -> int:
    """Bytes of RAM that new allocations can have without swapping, within all limits; file caches count as free."""
    info = _meminfo(root)
    return max(0, min([info["MemAvailable"], free_addresses(), *(group.free for group in _memory_groups(root))]))


@dataclass(frozen=True)
class NumaNode:
    """A part of the memory and the cores near it ("0-15,32-47")."""

    index: int
    cores: str
    ram_bytes: int


def numa_nodes(root: Path = ROOT) -> list[NumaNode]:
    """The nodes that have memory; empty if the system does not tell."""
    nodes = []
    for folder in root.glob("sys/devices/system/node/node[0-9]*"):
        # "Node 0 MemTotal:       24602808 kB"
        totals = [line.split() for line in _lines(folder / "meminfo") if " MemTotal:" in line]
        if totals and totals[0][3] != "0":
            nodes.append(NumaNode(int(folder.name[4:]), _text(folder / "cpulist"), 1024 * int(totals[0][3])))
    return sorted(nodes, key=lambda node: node.index)


def core_list(text: str) -> Iterator[int]:
    """The numbers in Linux's way to write them: "0-3,8" -> 0, 1, 2, 3, 8."""
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def usable_nodes(root: Path = ROOT) -> dict[int, tuple[int, ...]]:
    """Hardware threads that this process may run on, by NUMA node that it may have memory of.

    Empty unless there are several such nodes: numactl, taskset or a control group's cpuset may leave one.
    """
    if not hasattr(os, "sched_getaffinity"):
        return {}
    mine, memory = os.sched_getaffinity(0), ""
    for line in _lines(root / "proc/self/status"):
        if line.startswith("Mems_allowed_list:"):
            memory = line.partition(":")[2].strip()
    nodes = {}
    for node in numa_nodes(root):
        cores = tuple(core for core in core_list(node.cores) if core in mine)
        if cores and (not memory or node.index in core_list(memory)):
            nodes[node.index] = cores
    return nodes if len(nodes) > 1 else {}


@dataclass(frozen=True)
class HugePages:
    """Transparent huge pages ("always", "madvise", "never", "" if the system has none), and reserved ones."""

    transparent: str
    reserved: int
    page_bytes: int


def huge_pages(root: Path = ROOT) -> HugePages:
    """How the system deals out large pages."""
    modes = _text(root / "sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
    info = _meminfo(root)
    mode = modes.partition("[")[2].partition("]")[0]
    return HugePages(mode, info.get("HugePages_Total", 0), info.get("Hugepagesize", 0))


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache that the first core uses; 0 if the system does not tell."""
    sizes = [_text(index / "size") for index in root.glob("sys/devices/system/cpu/cpu0/cache/index*")]
    return max((1024 * int(size[:-1]) for size in sizes if size.endswith("K")), default=0)


def _text(path: Path) -> str:
    """The content of a small file; nothing where there is none, or it may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; counts of pages as they are."""
    info = {}
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        number, *unit = value.split() or ["0"]
        info[name] = int(number) * (1024 if unit == ["kB"] else 1)
    if "MemTotal" in info and "MemAvailable" in info:
        return info
    memory = psutil.virtual_memory()
    return {"MemTotal": memory.total, "MemAvailable": memory.available}


def free_addresses() -> int:
    """Bytes of address space that ulimit -v leaves this process."""
    try:
        import resource
    except ImportError:  # Windows
        return _UNLIMITED
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit - psutil.Process().memory_info().vms


@dataclass(frozen=True)
class _MemoryGroup:
    """Limit and what is left of it, in bytes."""

    limit: int
    free: int


def _memory_groups(root: Path) -> Iterator[_MemoryGroup]:
    """The control groups that limit this process's memory."""
    for group in _groups("memory", root):
        limit = _text(group / "memory.max") or _text(group / "memory.limit_in_bytes")
        used = _text(group / "memory.current") or _text(group / "memory.usage_in_bytes")
        if limit.isdigit() and int(limit) < _UNLIMITED:
            stat = dict(line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2)
            # File pages can be dropped; version 1 counts those of the group's children under total_*.
            prefix = "total_" if "total_inactive_file" in stat else ""
            files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
            yield _MemoryGroup(int(limit), int(limit) - int(used or 0) + files)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all above it, as far as they can be seen from here.

    Inside a container the path may be that of the host, of which only the top is mounted; folders that are not there
    are passed over.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            tops = [root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup" / controller]
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in dict.fromkeys(tops):
            for depth in range(len(parts), -1, -1):
                yield top.joinpath(*parts[:depth])
