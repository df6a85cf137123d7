"""Reads broken and odd files by the million: each is read, or refused in one line; anything else is a fault.

    python scripts/fuzz.py FOLDER [--cases 1000000] [--seed 0] [--only KIND,KIND] [--limit-gb 8]

Every case follows from the seed, its kind and its number. Cases run in forked children, some thousands each, so that
a crash costs one case; the parent counts it and goes on. FOLDER keeps what was counted (called again with the same seed
and number of cases, the run goes on from there) and, for each fault, the input with what came of it. A fault is an
exception that is no error of ours, a message that is no short line, descriptors that stay open, a case that takes more
than ten seconds twice, or the end of the process. The last line of stdout is one JSON document: counts by kind, and the
faults, those from the same line of code together. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import fuzz_kinds
from fuzz_kinds import Files, Kind, Probe, in_child

from cli.explain import explain
from cli.output import note
from localrun.errors import LocalrunError
from quant.errors import QuantError

HANG_S = 10.0
LONGEST = 850  # characters of a line
FEW_DESCRIPTORS = 8  # that libraries may open when they are first used
MOST_KEPT = 5  # inputs of one fault
OUTCOMES = ("read", "refused", "fault", "signal", "hang")
READ, REFUSED, FAULT, SIGNAL, HANG = range(5)


class Shared:
    """What a child tells its parent without a word: the case it is at, since when, and the outcomes so far."""

    def __init__(self, n_cases: int) -> None:
        self._memory = mmap.mmap(-1, 16 + n_cases)

    def begin(self, index: int) -> None:
        self._memory[:16] = struct.pack("<qd", index, time.monotonic())  # at once: pack_into clears the place first

    def now(self) -> tuple[int, float]:
        """Index of the case, and the seconds since it began."""
        index, began = struct.unpack_from("<qd", self._memory)
        return index, time.monotonic() - began

    def __setitem__(self, index: int, outcome: int) -> None:
        self._memory[16 + index] = outcome

    def outcomes(self, count: int) -> list[int]:
        return list(self._memory[16 : 16 + count])


@dataclass
class Run:
    """One kind's cases, from some number on; faults go to a folder."""

    kind: Kind
    seed: int
    folder: Path
    limit_bytes: int
    slow: set[int] = field(default_factory=set)  # cases that took too long once: a busy machine is no hang

    def batch(self, first: int, count: int) -> Counter[str]:
        """Cases first to first + count - 1, in as many children as it takes."""
        shared, at = Shared(count), 0
        while at < count:
            at = self._child(shared, first, at, count)
        return Counter(OUTCOMES[outcome] for outcome in shared.outcomes(count))

    def _child(self, shared: Shared, first: int, start: int, count: int) -> int:
        """One child, from a case on; the index of the first that it did not come to."""
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_fast_folder(), ignore_cleanup_errors=True) as scratch:
            shared.begin(start)
            pid = os.fork()
            if pid == 0:
                try:
                    self._live(Path(scratch), shared, first, start, count)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc(file=sys.__stderr__)
                    os._exit(1)
            status, hangs = self._wait(pid, shared)
        if status == 0:
            return count
        index = shared.now()[0]
        if hangs and first + index not in self.slow:
            self.slow.add(first + index)
            return index  # once more
        shared[index] = HANG if hangs else SIGNAL
        what = f"hangs for {HANG_S:g} s" if hangs else f"ends its process with {os.waitstatus_to_exitcode(status)}"
        in_child(self.keep, first + index, what)
        return index + 1

    def _wait(self, pid: int, shared: Shared) -> tuple[int, bool]:
        """How the child ended, and whether that was because a case took too long."""
        status, hangs = None, False
        while status is None:
            time.sleep(0.001)
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
            if status is None and shared.now()[1] > HANG_S * (1 if self.kind.in_process else 12):
                hangs = True
                os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
        return status, hangs

    def _live(self, scratch: Path, shared: Shared, first: int, start: int, count: int) -> None:
        """A child's life."""
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(quiet, descriptor)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + self.limit_bytes,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("error", RuntimeWarning)  # NumPy's, which a user would see between our lines
        open_before = None
        for index in range(start, count):
            shared.begin(index)
            shared[index] = self.one(scratch, first + index)
            if index == start:
                open_before = _descriptors()
        if (left := _descriptors() - open_before) > FEW_DESCRIPTORS:
            shared[count - 1] = FAULT
            self.keep(first + count - 1, f"{left} descriptors stay open of cases {first + start} and following")

    def one(self, scratch: Path, number: int) -> int:
        """The outcome of one case."""
        _told, files = self.kind.case(self.seed, number)
        probe = Probe((LocalrunError, QuantError, OSError))
        path = write(scratch, files)
        try:
            self.kind.check(probe, path)
        except Exception as error:
            self.keep(number, f"{type(error).__name__} at {origin(error)}", "".join(traceback.format_exception(error)))
            return FAULT
        for error in probe.errors:
            line = said(error)
            if len(line) > LONGEST or not line[:-1].isprintable() or line[-1:] != "\n":
                self.keep(number, f"a message that is no short line, at {origin(error)}", line)
                return FAULT
        return REFUSED if probe.errors else READ

    def keep(self, number: int, what: str, details: str = "") -> None:
        """Notes a fault, and the input of the first few of its kind."""
        told, files = self.kind.case(self.seed, number)
        line = {"kind": self.kind.name, "number": number, "fault": what, "case": told[:300]}
        with (self.folder / "faults.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        group = self.folder / f"{self.kind.name}-{what}"[:120].replace("/", "_").replace("\0", "_")
        group.mkdir(exist_ok=True)
        if len(list(group.iterdir())) < MOST_KEPT:
            place = group / str(number)
            place.mkdir(exist_ok=True)
            write(place, files)
            (place / "fault.txt").write_text(f"{json.dumps(line, indent=1)}\n{details}", encoding="utf-8")


def said(error: BaseException) -> str:
    """What a command prints of an error."""
    with redirect_stderr(io.StringIO()) as printed:
        note(explain(error))
    return printed.getvalue()


def origin(error: BaseException) -> str:
    """Where it was raised, the last line of our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    packages = [Path(__file__).resolve().parents[1] / name for name in ("localrun", "quant", "cli")]
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(package) for package in packages)]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def write(folder: Path, files: Files) -> Path:
    """The files, in a folder that holds nothing else; the first of them, or the folder where there are several."""
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if isinstance(files, bytes):
        path = folder / "input"
        path.write_bytes(files)
        return path
    for name, content in files.items():
        (folder / name).mkdir() if content is None else (folder / name).write_bytes(content)
    return folder


def _fast_folder() -> str | None:
    """Memory, where there is such a folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


class Progress:
    """What was counted, kept in a file so that a run goes on where it ended."""

    def __init__(self, folder: Path, seed: int, cases: int) -> None:
        self._path, self._key = folder / "progress.json", f"seed {seed}, {cases} cases"
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        if found and found["run"] != self._key:
            raise SystemExit(f"{folder} holds another run ({found['run']}); choose another folder, or empty it")
        self.counts: dict[str, Counter[str]] = {kind: Counter(c) for kind, c in found.get("counts", {}).items()}

    def done(self, kind: Kind) -> int:
        return self.counts.get(kind.name, Counter()).total()

    def add(self, kind: Kind, counts: Counter[str]) -> None:
        self.counts[kind.name] = self.counts.get(kind.name, Counter()) + counts
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps({"run": self._key, "counts": self.counts}))
        beside.replace(self._path)


def batches(total: int, done: int, size: int) -> Iterator[tuple[int, int]]:
    """First number and count of what is left."""
    for first in range(done, total, size):
        yield first, min(size, total - first)


def faults(folder: Path) -> list[dict]:
    """Each fault with how often it came, and the number of its first case."""
    path = folder / "faults.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    first = {}
    for line in lines:
        first.setdefault((line["kind"], line["fault"]), line)
    times = Counter((line["kind"], line["fault"]) for line in lines)
    return [line | {"times": times[key]} for key, line in first.items()]


def main() -> None:
    """Run what is left, print the table and the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="names of kinds, with commas")
    parser.add_argument("--limit-gb", type=float, default=8.0, help="memory of a child beyond what it begins with")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    progress, started, seconds = Progress(arguments.folder, arguments.seed, arguments.cases), time.monotonic(), {}
    kinds = fuzz_kinds.kinds()
    if arguments.only:
        kinds = [kind for kind in kinds if kind.name in arguments.only.split(",")]
    for kind in kinds:
        total = max(1, round(arguments.cases * kind.share))
        run = Run(kind, arguments.seed, arguments.folder, int(arguments.limit_gb * 2**30))
        began = time.monotonic()
        for first, count in batches(total, progress.done(kind), kind.batch):
            progress.add(kind, run.batch(first, count))
        seconds[kind.name] = time.monotonic() - began
        counts = "".join(f"{progress.counts[kind.name][outcome]:>9}" for outcome in OUTCOMES)
        print(f"{kind.name:<20}{total:>9}{counts}{seconds[kind.name]:>8.0f} s", file=sys.stderr, flush=True)
    found = faults(arguments.folder)
    for fault in found:
        print(f"FAULT {fault['kind']} {fault['number']} ({fault['times']} times): {fault['fault']}", file=sys.stderr)
    document = {
        "seed": arguments.seed,
        "cases": sum(counts.total() for counts in progress.counts.values()),
        "seconds": round(time.monotonic() - started),
        "counts": progress.counts,
        "faults": found,
    }
    print(json.dumps(document))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
