"""MPI as ranks have it, between two programs of their own."""

import subprocess
import sys

import pytest

from localrun.ranks.mpi import mpiexec

pytest.importorskip("mpi4py")

# Long enough not to be sent at once where a receiver may read the sender's memory.
_PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from localrun.ranks.mpi import join, mpi, set_up_mpi
set_up_mpi(is_inside=True)
MPI, path, is_first = mpi(), Path(sys.argv[1]), sys.argv[2] == "first"
if is_first:
    port = MPI.Open_port()
    path.with_suffix(".new").write_text(port)
    path.with_suffix(".new").rename(path)
while not path.exists():
    time.sleep(0.01)
comm, message = join(MPI, path.read_text(), is_first), bytearray(100_000)
sender = comm.bcast(os.getpid(), 1)
request = comm.Irecv(message, 1) if is_first else comm.Isend(b"x" * 100_000, 0)
if not is_first:
    until = time.process_time() + 0.2
    while time.process_time() < until:
        request.Test()
    os.kill(os.getpid(), signal.SIGKILL)
while Path(f"/proc/{sender}/exe").exists():
    time.sleep(0.01)
until = time.monotonic() + 5
while not request.Test() and time.monotonic() < until:
    time.sleep(0.01)
print("came" if message[-1] else "lost", flush=True)
os._exit(0)
"""


def test_a_long_message_of_a_rank_that_is_gone(tmp_path):
    """It needs no memory of the sender's: reading that of a process that has ended aborts the reader."""
    command = [mpiexec(), "-n", "1", sys.executable, "-c", _PROGRAM, str(tmp_path / "port")]
    other = subprocess.Popen([*command, "other"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        first = subprocess.run([*command, "first"], capture_output=True, text=True, timeout=60)
    finally:
        other.kill()
        other.wait()
    assert (first.returncode, first.stdout) == (0, "came\n"), first.stderr
