"""What this machine has and measures, a finding at a time, each with what to do where something is amiss.

Needs no model and no rights. Measures for a few seconds: memory bandwidth, the copy rate to a GPU, a disk's read rate.
"""

from __future__ import annotations

import mmap
import os
import platform
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from localrun import hardware
from localrun.errors import LocalrunError
from localrun.placement import available
from quant.errors import QuantError

_NOT_LOADED = (OSError, ImportError)  # of shared libraries
READ_BYTES = 1 << 30  # of memory; four times the last level cache if that is more
_LITTLE_RAM = 4 << 30
_SLOW_DISK = 300e6  # bytes/s: a model of 10 GB takes half a minute to come in
_SLOW_LINK = 5e9  # bytes/s to a GPU: less than PCIe 3.0 x8
_DISK_SECONDS, _DISK_CHUNK, _DISK_THREADS = 2.0, 4 << 20, 4
_LINK_BYTES, _LINK_TRIES = 256 << 20, 5


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        text: for people.
        data: the same for programs, as JSON has it; sizes in bytes, rates in bytes/s.
        advice: what to do; empty if all is well.
    """

    name: str
    text: str
    data: Any
    advice: str = ""
    status: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", "warning" if self.advice else "ok")


def examine(path: Path | None) -> Iterator[Finding]:
    """All findings, each as soon as it is known.

    path: a file, or a folder with models, whose disk to measure; None to leave the disk out.
    """
    yield _python()
    yield _packages()
    yield _cpu()
    yield _tuning()
    yield _cores()
    yield _load()
    yield _numa()
    yield _ram()
    yield _pages()
    yield _kernels()
    yield _bandwidth()
    yield from map(_gpu, range(max(1, available.count())))
    yield _disk(path)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()}, {platform.platform()}", platform.python_version())


def _packages() -> Finding:
    """Those that this program asks for, by its own metadata."""
    found: dict[str, str | None] = {}
    for requirement in requires("localrun") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[^\w.-]", requirement)[0]
            found[name] = None
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    missing = [name for name, found_version in found.items() if found_version is None]
    advice = f"missing: {', '.join(missing)}; pip install {' '.join(missing)}" if missing else "; ".join(_broken())
    return Finding("packages", ", ".join(f"{name} {v}" for name, v in found.items() if v), found, advice)


def _broken() -> Iterator[str]:
    """What to do about packages whose shared libraries cannot be loaded."""
    for package, module in (("llvmlite", "llvmlite.binding"), ("llama-cpp-python", "llama_cpp")):
        try:
            loaded = import_module(module)
            if module == "llvmlite.binding":
                _ = loaded.llvm_version_info  # loads the library
        except (OSError, ImportError, RuntimeError) as error:
            yield f"{package} cannot be loaded ({error}); pip install --force-reinstall {package}"


def _cpu() -> Finding:
    model, forced = hardware.cpu_model(), os.environ.get("LOCALRUN_ISA", "").strip()
    try:
        from quant.target import isa
    except QuantError as error:  # LOCALRUN_ISA names no level, or one that this CPU lacks
        return Finding("cpu", model, {"model": model, "isa": None}, f"{error}; unset it")
    except _NOT_LOADED as error:
        return Finding("cpu", model, {"model": model, "isa": None}, str(error))
    usable = [level for level in isa.LEVELS if isa.FEATURES[level] <= isa.host_features()]
    best = usable[-2] if isa.REFUSED else usable[-1]
    data = {"model": model, "isa": isa.LEVEL, "best_isa": best, "LOCALRUN_ISA": forced or None}
    text = f"{model}, level {isa.LEVEL}" + (", forced by LOCALRUN_ISA" if forced else "")
    advice = ""
    if forced and best != isa.LEVEL:
        advice = f"unset LOCALRUN_ISA to use {best}"
    elif isa.REFUSED:
        advice = f"{isa.REFUSED}: prompts use {best} instead"
    elif best == "generic" and platform.machine() in ("x86_64", "AMD64"):
        advice = "this CPU (or virtual machine) has no AVX2: expect a fraction of the usual speed"
    return Finding("cpu", text, data, advice)


def _tuning() -> Finding:
    """What kernels were told of this CPU, and by whom."""
    try:
        from quant.target import tuning
    except (QuantError, *_NOT_LOADED):
        return Finding("tuning", "not looked at", None)  # the line before says why
    found = tuning.found()
    sources = {"tuned": "measured here", "table": "of the table", "default": "nothing is known of this CPU"}
    advice = "localrun tune MODEL measures what is best here, in a minute" if found.source == "default" else ""
    text = f"{tuning.cpu()}: {sources[found.source]}"
    text += "" if found.tuning.interleaving_pays else "; interleaved rows (--repack, --pack) do not pay"
    data = {"cpu": tuning.cpu(), "source": found.source, "tuning": tuning.as_json(found.tuning)}
    return Finding("tuning", text, data, advice)


def _cores() -> Finding:
    physical, logical, usable = hardware.physical_cores(), os.cpu_count() or 1, hardware.usable_cores()
    smt, quota = logical > physical, hardware.cpu_quota()
    data = {"physical": physical, "logical": logical, "usable": usable, "smt": smt, "quota": quota}
    text = f"{physical} cores, {logical} threads (SMT {'on' if smt else 'off'}); {usable} used by default"
    advice = ""
    if usable < physical:
        why = "a control group's quota" if quota == usable else "the CPU affinity"
        advice = f"{why} leaves {usable} of {physical} cores; lift it (taskset, docker --cpus) for more speed"
    return Finding("cores", text, data, advice)


def _load() -> Finding:
    busy, usable = hardware.busy_cores(), hardware.usable_cores()
    advice = ""
    if busy > max(0.5, usable / 4):
        advice = "other programs are running: rates below are lower than they could be; stop them and look again"
    return Finding("load", f"{busy:.1f} threads busy, over the last minute", round(busy, 2), advice)


def _numa() -> Finding:
    nodes = hardware.numa_nodes()
    data = [{"index": node.index, "cores": node.cores, "ram_bytes": node.ram_bytes} for node in nodes]
    text = "; ".join(f"node {node.index}: cores {node.cores}, {_gib(node.ram_bytes)}" for node in nodes) or "not known"
    usable = hardware.usable_nodes()
    if len(nodes) > 1:
        text += "; workers and weights stay on each" if usable else "; one of them may be used"
    return Finding("numa", text, data)


def _ram() -> Finding:
    total, free = hardware.total_ram(), hardware.free_ram()
    advice = ""
    if free < _LITTLE_RAM:
        advice = "little is free: models larger than that will run at the disk's speed; end other programs"
    return Finding("ram", f"{_gib(total)}, {_gib(free)} free", {"total": total, "free": free}, advice)


def _pages() -> Finding:
    pages = hardware.huge_pages()
    data = {"transparent": pages.transparent or None, "reserved": pages.reserved, "page_bytes": pages.page_bytes}
    text = f"transparent: {pages.transparent or 'none'}; reserved: {pages.reserved}"
    return Finding("huge pages", text, data)  # weights are a file's map, which has small pages and is as fast


def _kernels() -> Finding:
    """Where compiled kernels are kept: without a place to write to, every start takes half a minute."""
    try:
        from quant.target import kernel_cache
    except (QuantError, *_NOT_LOADED) as error:
        return Finding("kernel cache", "not looked at", None, str(error))
    folder = kernel_cache.folder()
    if folder.refusal:
        advice = f"{folder.refusal}, so every start compiles the kernels; set LOCALRUN_CACHE to a folder of your own"
        return Finding("kernel cache", f"{folder.path}, not used", str(folder.path), advice)
    kept, damaged = kernel_cache.kept(), kernel_cache.damaged()
    text = f"{folder.path}, {f'{kept} kernels' if kept else 'empty: the first run compiles'}"
    advice = f"{damaged} of them are damaged; the next run compiles them anew" if damaged else ""
    return Finding("kernel cache", text, str(folder.path), advice)


def _bandwidth() -> Finding:
    """Read by 1, half of and all cores; the best of short spans, since other programs only ever take from it."""
    try:
        from quant.threads import bandwidth
        from quant.threads.pool import Pool
    except (QuantError, *_NOT_LOADED) as error:
        return Finding("memory", "not measured", None, str(error))
    cache, usable = hardware.last_level_cache(), hardware.usable_cores()
    n_bytes = min(max(READ_BYTES, 4 * cache), hardware.free_ram() // 4)
    found: dict[int, bandwidth.Bandwidth] = {}
    try:
        pool = Pool(usable)
        array = bandwidth.buffer(pool, n_bytes)
        pool.close()
        for threads in sorted({1, (usable + 1) // 2, usable}):
            pool = Pool(threads)
            found[threads] = bandwidth.read_bandwidth(pool, array.ctypes.data, n_bytes)
            pool.close()
    except (MemoryError, RuntimeError, QuantError):  # no memory for the buffer, a thread's stack, or at all
        return Finding("memory", "not measured: no memory to read from", None, "end other programs, or raise ulimit -v")
    rates = ", ".join(f"{_rate(each.best)} by {threads}" for threads, each in found.items())
    data = {threads: {"best": round(each.best), "median": round(each.median)} for threads, each in found.items()}
    advice = ""
    if n_bytes < 2 * cache:
        advice = f"only {_gib(n_bytes)} could be read, less than twice the cache: memory itself may be slower"
    return Finding("memory", f"reads {rates} thread(s)", data, advice)


def _gpu(index: int) -> Finding:
    """A GPU that would be used, and how fast copies to it are; or why there is none."""
    found = available.find(index)
    if isinstance(found, available.NoGpu):
        if found.has_card:
            return Finding("gpu", "there is one that cannot be used", None, found.reason)
        return Finding("gpu", f"none: {found.reason}", None)
    try:
        rate = _copy_rate(index)
    except RuntimeError as error:  # torch's, for anything that CUDA refuses
        return Finding("gpu", f"{found.name}, not measured", None, f"CUDA: {str(error).splitlines()[0]}")
    capability = ".".join(map(str, found.capability))
    sizes = f"{_gib(found.total)}, {_gib(found.free)} free"
    text = f"{found.name} (compute capability {capability}), {sizes}, driver {found.driver or 'not known'}"
    advice = ""
    if rate < _SLOW_LINK:
        advice = "copies are slow: look whether the card sits in a slot with all its lanes (nvidia-smi -q -d PCIE)"
    data = {
        "name": found.name,
        "capability": list(found.capability),
        "vram_bytes": found.total,
        "free_bytes": found.free,
        "driver": found.driver or None,
        "cuda": found.cuda,
        "copy_bytes_per_s": round(rate),
    }
    return Finding("gpu", f"{text}, copies to it {_rate(rate)}", data, advice)


def _copy_rate(index: int) -> float:
    """Bytes/s from pinned memory to a GPU."""
    import torch

    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    device, best = torch.empty_like(host, device=f"cuda:{index}"), float("inf")
    for _ in range(_LINK_TRIES):
        torch.cuda.synchronize(index)
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize(index)
        best = min(best, time.perf_counter() - start)
    return _LINK_BYTES / best


def _disk(path: Path | None) -> Finding:
    """How fast the disk under path reads."""
    file = None if path is None else _largest_file(path)
    if file is None:
        where = "no model is installed" if path is None else f"{path} holds no file to read"
        return Finding("disk", f"not measured: {where}", None)
    try:
        rate, direct = read_rate(file)
    except OSError as error:
        return Finding("disk", f"not measured: {file}: {error.strerror}", None)
    how = "" if direct else ", perhaps from the file cache"
    data = {"path": str(file), "read_bytes_per_s": round(rate), "direct": direct}
    advice = ""
    if rate < _SLOW_DISK:
        advice = f"a model of 10 GB takes {10e9 / rate:.0f} s to come in; keep models on an SSD"
    return Finding("disk", f"{file.parent} reads {rate / 1e9:.2f} GB/s{how}", data, advice)


def _largest_file(path: Path) -> Path | None:
    """path itself, or the largest file in it, models first. Raises LocalrunError if there is no such path."""
    if path.is_file():
        return path
    try:
        files = [(entry.suffix == ".gguf", entry.stat().st_size, entry) for entry in path.iterdir() if entry.is_file()]
    except OSError as error:
        raise LocalrunError(f"{path}: {error.strerror}") from None
    largest = max(files, default=None)
    return largest[2] if largest and largest[1] >= _DISK_CHUNK else None


def read_rate(path: Path, seconds: float = _DISK_SECONDS) -> tuple[float, bool]:
    """(bytes/s of reading the file's chunks by some threads at once, whether the file cache was passed by).

    Reads for about so many seconds, or the whole file once. Raises OSError.
    """
    fd, direct = _open_uncached(path)
    try:
        starts = range(0, max(1, os.fstat(fd).st_size // _DISK_CHUNK) * _DISK_CHUNK, _DISK_CHUNK)
        begin = time.perf_counter()

        def read(lane: int) -> int:
            buffer, n_read = mmap.mmap(-1, _DISK_CHUNK), 0  # a map's address is whole pages, as direct reads ask
            for start in starts[lane::_DISK_THREADS]:
                n_read += os.preadv(fd, [buffer], start)
                if time.perf_counter() - begin > seconds:
                    break
            return n_read

        with ThreadPoolExecutor(_DISK_THREADS) as threads:
            total = sum(threads.map(read, range(_DISK_THREADS)))
        return total / (time.perf_counter() - begin), direct
    finally:
        os.close(fd)


def _open_uncached(path: Path) -> tuple[int, bool]:
    """A descriptor that reads from the disk itself, or where the file system knows no such thing, from its cache."""
    with suppress(OSError, AttributeError):  # AttributeError: a system without O_DIRECT
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(fd, [mmap.mmap(-1, 4096)], 0)
            return fd, True
        except OSError:
            os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # drops what nobody has mapped
    return fd, False
