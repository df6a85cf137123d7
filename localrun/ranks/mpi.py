"""MPI in this process, as ranks use it: mpi4py's, for several threads, not finalised by itself."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError

# Of MPICH's UCX: no lines on stderr about peers that are gone; inside one machine no network, so that nothing listens.
# Long messages by shared memory, not by reading the sender's (CMA): UCX aborts where the sender is gone, or where a
# container forbids it, and its copies take half the time (2 MB 57 us, by CMA 153).
_QUIET, _INSIDE, _BETWEEN = {"UCX_LOG_LEVEL": "fatal"}, {"UCX_TLS": "self,posix,sysv"}, {"UCX_TLS": "^cma"}
# Of MPICH: messages lie in RAM, and where a host node of a card sends them, nobody may ask CUDA for that.
_IN_RAM = {"MPIR_CVAR_ENABLE_GPU": "0"}
_MISSING = "several ranks need MPI: pip install 'localrun[cluster]'"


def set_up_mpi(is_inside: bool) -> None:
    """How MPI is to start in this process and those that it starts. is_inside: all ranks are on one machine.

    Raises LocalrunError if it is not installed.
    """
    try:
        import mpi4py
    except ImportError:
        raise LocalrunError(_MISSING) from None
    mpi4py.rc.thread_level, mpi4py.rc.finalize = "multiple", False
    for name, value in (_QUIET | _IN_RAM | (_INSIDE if is_inside else _BETWEEN)).items():
        os.environ.setdefault(name, value)


@cache
def mpi() -> Any:
    """mpi4py's module, MPI started, which all processes of an mpiexec do together. Raises LocalrunError."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LocalrunError(f"MPI can't be started: {' '.join(str(error).split())}") from None
    MPI.COMM_WORLD.Barrier()
    for shared in _shared_files():
        shared.unlink(missing_ok=True)
    return MPI


def join(MPI: Any, port: str | None, is_first: bool) -> Any:
    """The communicator of the first rank and all others, which returns errors; port: where the first one is found.

    Without a port all are of one world.
    """
    if port is None:
        comm = MPI.COMM_WORLD.Dup()
    elif is_first:
        comm = MPI.COMM_SELF.Accept(port).Merge(high=False)
        MPI.Close_port(port)
    else:
        comm = MPI.COMM_WORLD.Connect(port).Merge(high=True)
    comm.Set_errhandler(MPI.ERRORS_RETURN)
    return comm


def place_in_mpiexec() -> tuple[int, int]:
    """Rank and number of processes of the mpiexec that started this one; 0 of 1 if none did."""
    for rank, size in (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        found = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(number.isdigit() for number in found):
            return int(found[0]), int(found[1])
    return 0, 1


def _shared_files() -> Iterator[Path]:
    """MPICH's in /dev/shm, which all ranks of a host have mapped by now, and which only MPI_Finalize would remove."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            if (name := line.split(maxsplit=5)[-1]).startswith("/dev/shm/mpich_shm_"):
                yield Path(name)


def mpiexec() -> str:
    """The one beside this Python, which is of the same MPI, else the system's. Raises LocalrunError."""
    beside = Path(sys.executable).parent
    if found := shutil.which("mpiexec", path=str(beside)) or shutil.which("mpiexec"):
        return found
    raise LocalrunError(_MISSING)
