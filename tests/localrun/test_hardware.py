"""What the machine has: from made-up /proc and /sys files, and once from the real ones against psutil."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from localrun import hardware
from localrun.hardware import HugePages, NumaNode

GIB = 1 << 30
MEMINFO = "MemTotal:       33554432 kB\nMemFree: 1024 kB\nMemAvailable:   25165824 kB\nHugePages_Total:      12\n"


def tree(root: Path, files: dict[str, str | int]) -> Path:
    """A machine of 32 GiB, 24 of them free, with these files too."""
    for name, text in ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def test_without_limits(tmp_path: Path) -> None:
    root = tree(tmp_path, {"sys/fs/cgroup/memory.stat": "inactive_file 5"})
    assert (hardware.total_ram(root), hardware.free_ram(root)) == (32 * GIB, 24 * GIB)
    assert hardware.cpu_quota(root) is None


def v2(folder: str, limit: str | int, used: int, files: int = 0) -> dict[str, str | int]:
    """Files of a memory group; half of the file pages are active, and 7 GiB in memory cannot be dropped."""
    stat = f"anon 1\nfile {files + 7 * GIB}\ninactive_file {files // 2}\nactive_file {files // 2}\nshmem {7 * GIB}"
    base = f"sys/fs/cgroup/{folder}memory"
    return {f"{base}.max": limit, f"{base}.current": used, f"{base}.stat": stat}


def v1(folder: str, limit: int, used: int, files: int = 0) -> dict[str, str | int]:
    stat = f"cache 9\ninactive_file 1\nactive_file 1\ntotal_inactive_file {files}\ntotal_active_file 0"
    base = f"sys/fs/cgroup/memory/{folder}memory"
    return {f"{base}.limit_in_bytes": limit, f"{base}.usage_in_bytes": used, f"{base}.stat": stat}


CGROUPS = {
    "v2, in a container": ("0::/\n", v2("", 8 * GIB, 3 * GIB), 8, 5),
    "v2, file pages can be dropped": ("0::/\n", v2("", 8 * GIB, 7 * GIB, 4 * GIB), 8, 5),
    "v2, no limit": ("0::/a\n", v2("a/", "max", 3 * GIB), 32, 24),
    "v2, more than there is": ("0::/a\n", v2("a/", 100 * GIB, 3 * GIB), 32, 24),
    "v2, the parent's limit": ("0::/a/b\n", v2("a/b/", "max", 0) | v2("a/", 6 * GIB, 2 * GIB), 6, 4),
    "v2, both limits": ("0::/a/b\n", v2("a/b/", 6 * GIB, 0) | v2("a/", 8 * GIB, 5 * GIB), 6, 3),
    "v2, the host's path": ("0::/docker/f00\n", v2("", 8 * GIB, 3 * GIB), 8, 5),
    "v2, outside the namespace": ("0::/../../x\n", v2("", 8 * GIB, 3 * GIB), 8, 5),
    "v2, used up": ("0::/\n", v2("", 8 * GIB, 9 * GIB), 8, 0),
    "v1": ("5:cpu:/\n4:memory:/a\n", v1("a/", 8 * GIB, 3 * GIB, GIB), 8, 6),
    "v1, the host's path": ("4:memory:/docker/f00\n", v1("", 8 * GIB, 3 * GIB), 8, 5),
    "v1, no limit": ("4:memory:/\n", v1("", 9223372036854771712, 3 * GIB), 32, 24),
    "both, limit in v1": ("4:memory:/\n0::/\n", v1("", 8 * GIB, 3 * GIB), 8, 5),
    "both, limit in v2": ("4:cpu:/\n0::/\n", v2("unified/", 8 * GIB, 3 * GIB), 8, 5),
    "no control groups": ("", {}, 32, 24),
}


@pytest.mark.parametrize("name", CGROUPS)
def test_control_groups_limit_ram(name: str, tmp_path: Path) -> None:
    cgroup, files, total, free = CGROUPS[name]
    root = tree(tmp_path, {"proc/self/cgroup": cgroup} | files)
    assert (hardware.total_ram(root) / GIB, hardware.free_ram(root) / GIB) == (total, free)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "250000 100000"}, 3),
        ({"sys/fs/cgroup/cpu.max": "1000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 1", "sys/fs/cgroup/cpu.max": "4 1"}, 4),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_control_groups_limit_cores(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    assert hardware.cpu_quota(tree(tmp_path, files)) == cores


def test_usable_cores_keeps_to_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert hardware.usable_cores(tree(tmp_path, {})) == 12
    assert hardware.usable_cores(tree(tmp_path, {"sys/fs/cgroup/cpu.max": "300000 100000"})) == 3
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)  # as on some ARM boards
    assert hardware.usable_cores(tmp_path) >= 1


def topology(name: str, siblings: dict[int, str]) -> dict[str, str | int]:
    return {f"sys/devices/system/cpu/cpu{cpu}/topology/{name}": text for cpu, text in siblings.items()}


TWO_A_CORE = {cpu: f"{cpu % 32},{cpu % 32 + 32}" for cpu in range(64)}
MASKS = {
    "both threads of four cores": (TWO_A_CORE, {0, 1, 2, 3, 32, 33, 34, 35}, 4),
    "one thread of eight cores": (TWO_A_CORE, set(range(8)), 8),
    "one core": (TWO_A_CORE, {5, 37}, 1),
    "one thread": (TWO_A_CORE, {63}, 1),
    "all": (TWO_A_CORE, set(range(64)), 32),
    "cores of two kinds": ({0: "0-1", 1: "0-1", 2: "2", 3: "3"}, {0, 1, 2, 3}, 3),
    "four threads a core": ({cpu: f"{cpu // 4 * 4}-{cpu // 4 * 4 + 3}" for cpu in range(16)}, set(range(6)), 2),
    "not told for one of them": ({0: "0-1"}, {0, 1}, 2),
}


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize("case", MASKS)
def test_cores_of_a_mask(case: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker a physical core of those that this process is given, as under taskset or a container's cpuset."""
    siblings, mask, cores = MASKS[case]
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 64 if logical else 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: mask)
    root = tree(tmp_path, topology(name, siblings))
    assert hardware.usable_cores(root) == cores
    quota = tree(root, {"sys/fs/cgroup/cpu.max": "300000 100000"})
    assert hardware.usable_cores(quota) == min(3, cores)


def test_numa_nodes(tmp_path: Path) -> None:
    node = "sys/devices/system/node/node"
    files = {
        f"{node}10/meminfo": "Node 10 MemTotal:       1048576 kB\nNode 10 MemFree: 5 kB",
        f"{node}10/cpulist": "8-15",
        f"{node}0/meminfo": "Node 0 MemTotal:       2097152 kB",
        f"{node}0/cpulist": "0-7",
        f"{node}2/meminfo": "Node 2 MemTotal:       0 kB",  # cores without memory
        f"{node}2/cpulist": "16",
    }
    assert hardware.numa_nodes(tree(tmp_path, files)) == [NumaNode(0, "0-7", 2 * GIB), NumaNode(10, "8-15", GIB)]
    assert hardware.numa_nodes(tmp_path / "nowhere") == []


def test_pages_caches_and_names(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO + "Hugepagesize:       2048 kB\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "sys/devices/system/cpu/cpu0/cache/index0/size": "48K",
        "sys/devices/system/cpu/cpu0/cache/index3/size": "266240K",
        "proc/cpuinfo": "processor\t: 0\nmodel name\t: Acme 9000 @ 2 GHz\n",
    }
    root = tree(tmp_path, files)
    assert hardware.huge_pages(root) == HugePages("madvise", 12, 2 << 20)
    assert hardware.last_level_cache(root) == 260 << 20
    assert hardware.cpu_model(root) == "Acme 9000 @ 2 GHz"


def test_where_there_is_nothing_to_read(tmp_path: Path) -> None:
    """Another system: psutil's answers, and no error."""
    assert hardware.total_ram(tmp_path) == psutil.virtual_memory().total
    assert 0 < hardware.free_ram(tmp_path) <= hardware.total_ram(tmp_path)
    assert hardware.huge_pages(tmp_path) == HugePages("", 0, 0)
    assert hardware.last_level_cache(tmp_path) == 0
    assert hardware.cpu_model(tmp_path)
    assert hardware.cpu_quota(tmp_path) is None


def test_this_machine() -> None:
    """At most what psutil says, which knows no limits; a tenth for what other programs do in the meantime."""
    assert 0 < hardware.total_ram() <= psutil.virtual_memory().total
    before, free, behind = psutil.virtual_memory(), hardware.free_ram(), psutil.virtual_memory()
    assert free <= 1.1 * max(before.available, behind.available)
    assert 1 <= hardware.usable_cores() <= hardware.logical_cores()


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v limits addresses on Linux only")
def test_ulimit_is_a_limit() -> None:
    code = "from localrun import hardware; print(hardware.free_ram())"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 2000000; exec '{sys.executable}' -c '{code}'"], capture_output=True, text=True
    )
    free = int(done.stdout)
    assert 2_000_000 * 1024 - 1.5 * GIB < free < 2_000_000 * 1024  # less what Python and NumPy have mapped


def two_nodes(root: Path, **files: str) -> Path:
    """Two nodes with memory and cores, one of memory alone, one of cores alone; the process may have memory of all."""
    base, sizes = "sys/devices/system/node/node", {"0": "0-1,8", "1": "2-3,9", "2": "", "3": "4"}
    nodes = {}
    for name, cores in sizes.items():
        nodes |= {
            f"{base}{name}/cpulist": cores,
            f"{base}{name}/meminfo": f"Node {name} MemTotal: {int(name != '3')} kB",
        }
    return tree(root, nodes | files)


@pytest.mark.parametrize(
    ("mine", "status", "expected"),
    [
        (range(16), "", {0: (0, 1, 8), 1: (2, 3, 9)}),
        ({1, 3, 9}, "Mems_allowed_list:\t0-3", {0: (1,), 1: (3, 9)}),
        ({0, 1, 8}, "", {}),  # taskset, a cpuset, or a rank of --ranks numa: one node is left
        (range(16), "Name:\tx\nMems_allowed_list:\t1", {}),  # numactl --membind=1
    ],
)
def test_nodes_that_may_be_used(
    mine: set[int], status: str, expected: dict[int, tuple[int, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(mine))
    assert hardware.usable_nodes(two_nodes(tmp_path, **{"proc/self/status": status})) == expected


def test_one_node_is_none() -> None:
    """Here, where the tests run, unless it is a machine of several."""
    assert len(hardware.usable_nodes()) != 1
