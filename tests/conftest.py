"""For all tests: Ctrl-C as on a terminal, Triton's interpreter where there is no GPU, processes side by side, one pool.

A directory's tests run in several processes (pytest-xdist), a single file's in one. Those marked `serial` measure time
or processor time: while one of them runs, the other processes wait.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import os
import re
import signal
import tempfile
import zlib
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import gpu_device  # noqa: F401 (before any test imports what imports triton)
import hypothesis
import pytest

from localrun.hardware import usable_cores
from quant.threads.pool import Pool

# Modules and tests, a million objects, live as long as the process: each search for garbage would go through them.
gc.disable()

# A suite that is started in the background inherits SIGINT ignored, and so would the processes that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: a failure can be had again, and a change is not blamed for an old fault.
hypothesis.settings.register_profile("localrun", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("localrun")

_MOST_PROCESSES = 4  # each holds 1 to 2 GB
# Threads of torch's and NumPy's libraries spin while they wait for each other: two processes with two threads each take
# several times as long as with one each.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two workers."""
    with closing(Pool(2)) as two_workers:
        yield two_workers


# ---- processes side by side ------------------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process for single files, whose tests would be over before another has started."""
    if not all(Path(argument.split("::")[0]).is_dir() for argument in config.args):
        return 0
    return min(usable_cores(), _MOST_PROCESSES)


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "one of the cases that differ in sizes alone, of each format or of each factory of formats"
    parser.addoption("--sample", choices=("formats", "factories"), help=what)


def _is_size(value: object) -> bool:
    """A number, or several."""
    return all(map(_is_size, value)) if isinstance(value, tuple) else isinstance(value, int | float)


_FACTORY = {"Q5_": "Q4_", "IQ1_M": "IQ1_S", "IQ2_XS": "IQ2_S", "IQ2_XXS": "IQ2_S", "IQ3_XXS": "IQ3_S", "TQ1_0": "TQ2_0"}
_TWIN = re.compile("|".join(_FACTORY))


def _kind(item: pytest.Item, of: str) -> tuple[str, ...]:
    """The test function, and those of its parameters that are no sizes: names of formats, models, kinds of input.

    of: "factories" if formats whose kernels one factory makes are to count as one.
    """
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = [repr(value) for value in parameters if not _is_size(value)]
    if of == "factories":
        kinds = [_TWIN.sub(lambda twin: _FACTORY[twin[0]], kind) for kind in kinds]
    return item.nodeid.split("[")[0], *kinds


def _sample(items: list[pytest.Item], of: str) -> list[pytest.Item]:
    """One of each kind: whichever, but not the same size of all of them, and the same one in every run."""
    chosen = {_kind(item, of): item for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode()))}
    return [item for item in items if chosen[_kind(item, of)] is item]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those that take longest first, or a process would end with them alone; the serial ones last, when most processes
    have nothing left to wait with."""
    if of := config.getoption("--sample"):
        sample = _sample(items, of)
        config.hook.pytest_deselected(items=[item for item in items if item not in sample])
        items[:] = sample
    turns = {"first": 0, "serial": 2}
    items.sort(key=lambda item: next((turn for mark, turn in turns.items() if item.get_closest_marker(mark)), 1))


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Searches for garbage from now on, more rarely, and not among what is there.

    Also in the process that hands tests out to others, which collects none and hears of all.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)
    gc.enable()


def pytest_unconfigure() -> None:
    """Or libraries would report leaks when the process ends."""
    gc.unfreeze()


@functools.cache
def _shared_folder() -> tempfile.TemporaryDirectory:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="localrun-tests-")


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["folder"] = _shared_folder().name


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    """With an advisory lock on a file, shared or exclusive."""
    with path.open("w") as file:
        fcntl.flock(file, how)
        yield


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        os.environ |= _ONE_THREAD | {"TINY_MODELS": _shared_folder().name}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A serial test has the room to itself. It waits for that in the door, so that nobody overtakes it."""
    if not hasattr(item.config, "workerinput"):  # one process
        return (yield)
    folder = Path(item.config.workerinput["folder"])
    how = fcntl.LOCK_EX if item.get_closest_marker("serial") else fcntl.LOCK_SH
    with ExitStack() as room:
        with _locked(folder / "door", fcntl.LOCK_EX):
            room.enter_context(_locked(folder / "room", how))
        return (yield)
