"""Starting ranks, and what is said when that fails, with a stub for mpiexec; under the real one in test_runs.py."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest
from ranks_in_process import Post

import localrun
from localrun.cpu.warmup import Kernels, warm_up
from localrun.errors import LocalrunError
from localrun.ranks import control, loss, start
from localrun.ranks.control import ALIVE, READY, Callers, Watch
from localrun.ranks.places import host_places, local_places
from localrun.ranks.world import RankError, World

NAMES = ["rank 0", "host b (rank 1)", "host c (rank 2)"]


def until(is_so: Callable[[], Any]) -> Any:
    for _ in range(2000):
        if found := is_so():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


# --- who is let in


def test_only_those_who_know_the_secret_are_let_in() -> None:
    callers = Callers("127.0.0.1", b"right")
    outcome: list[str] = []

    def come() -> None:  # in a thread: who is let in without a word waits for ever
        try:
            Client(callers.address, authkey=b"wrong")
        except (AuthenticationError, EOFError, OSError):
            outcome.append("refused")

    threading.Thread(target=come, daemon=True).start()
    until(lambda: outcome)
    assert not callers.come
    with Client(callers.address, authkey=b"right") as connection:
        until(lambda: callers.come)
        connection.send_bytes(b"hello")
        assert callers.come[0].recv_bytes() == b"hello"
    callers.close()
    until(lambda: not _takes_connections(callers.address))


def _takes_connections(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


# --- who is watched


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A watch over two ranks: what it has said so far, the watch, and the ranks' ends."""
    monkeypatch.setattr(control, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(control, "SILENCE_S", 1.5)  # on a busy machine a rank that lives may be late
    pairs, said = [Pipe(), Pipe()], list[tuple[int, str]]()
    watch = Watch([here for here, _ in pairs], NAMES, lambda rank, line: said.append((rank, line)))
    yield said, watch, [there for _, there in pairs]
    watch.close()


def test_a_rank_that_ends(watched: Any) -> None:
    said, watch, (first, second) = watched
    second.send_bytes(READY)
    first.close()
    until(lambda: said and watch.ready)
    assert said == [(1, "host b (rank 1): is gone: it was killed, or the connection is lost")] and watch.ready == {2}


def test_a_rank_that_says_why(watched: Any) -> None:
    said, _, (_, second) = watched
    control.send(second, {"error": "has not enough memory"})
    until(lambda: said)
    assert said == [(2, "host c (rank 2): has not enough memory")]


def test_a_rank_that_hangs(watched: Any) -> None:
    """The other one beats on."""
    said, _, (first, _) = watched
    until(lambda: first.send_bytes(ALIVE) or said)
    assert said == [(2, "host c (rank 2): no sign of life for 1.5 s")]


def test_nothing_is_said_after_the_end(watched: Any) -> None:
    said, watch, (first, second) = watched
    watch.close()
    first.close()
    second.close()
    time.sleep(0.1)
    assert not said


# --- who is lost while the model is opened


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A world, and what is done and said when one of its ranks is lost."""
    done, world = list[Any](), World(0, NAMES, Post().links(0))
    world.end = lambda: done.append("ended")
    monkeypatch.setattr(loss, "_NOTICE_S", 0.1)
    monkeypatch.setattr(loss.os, "_exit", done.append)
    return world, done


def test_a_rank_lost_in_a_block_that_goes_on(opened: Any) -> None:
    """As if it compiled: the process ends, once."""
    world, done = opened
    with loss.ending_at_loss([world], done.append):
        world.fail(1, "host b (rank 1): is gone")
        world.fail(2, "host c (rank 2): is gone")
        until(lambda: 1 in done)
    time.sleep(0.2)
    assert done[:3] == ["ended", "host b (rank 1): is gone", 1]


def test_a_rank_lost_in_a_block_that_finds_out(opened: Any) -> None:
    """The block's own error tells the user."""
    world, done = opened
    with pytest.raises(RankError, match="is gone"), loss.ending_at_loss([world], done.append):
        world.fail(1, "host b (rank 1): is gone")
        world.check()
    time.sleep(0.2)
    assert not done
    with pytest.raises(RankError, match="is gone"), loss.ending_at_loss([world], done.append):
        raise AssertionError("it was lost before")


def test_kernels_are_compiled_for_nobody(opened: Any) -> None:
    """Where an engine is there already, what is lost is found between two kernels."""
    world, _ = opened
    world.fail(1, "host b (rank 1): is gone")
    with pytest.raises(RankError, match="is gone"):
        warm_up(Kernels({"quant.threads.pool": "pool"}, [], []), None, lambda line: None, world.check)


# --- a stub for mpiexec


def stub(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str, come_s: float = 5.0) -> None:
    """mpiexec is a shell script."""
    path = folder / "mpiexec"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(start, "mpiexec", lambda: str(path))
    monkeypatch.setattr(start, "set_up_mpi", lambda is_inside: None)
    monkeypatch.setattr(start, "COME_S", come_s)


def refused(text: str) -> str:
    """What is said when ranks at these hosts are to be started."""
    with pytest.raises(LocalrunError) as error, start.echoing_ranks(host_places(text), print):
        pass
    return str(error.value)


def test_a_host_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """mpiexec's own lines tell nothing to a user."""
    said = "ssh: connect to host 127.0.0.3 port 22: Connection refused"
    stub(monkeypatch, tmp_path, f"echo {said} >&2; echo '[mpiexec@a] launch failed' >&2; exit 255")
    assert refused("127.0.0.2,127.0.0.3") == f"host 127.0.0.3 (rank 2): can't be started: {said}"


def test_a_start_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, tmp_path, "exit 1")
    assert refused("127.0.0.2,127.0.0.3").startswith("host 127.0.0.2 (rank 1), host 127.0.0.3 (rank 2): ")


def test_a_host_without_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reason = "execvp error on file /no/python (No such file or directory)"
    stub(monkeypatch, tmp_path, f"echo '[proxy:0@b] HYDU_create_process (launch.c:73): {reason}'; exit 255")
    assert refused("127.0.0.2") == f"host 127.0.0.2 (rank 1): can't be started: {reason}"


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was started is ended, what it has started as well."""
    stub(monkeypatch, tmp_path, f"sleep 60 & echo $! > {tmp_path}/pid; wait", come_s=0.3)
    assert refused("127.0.0.2") == (
        "host 127.0.0.2 (rank 1): not there within 0.3 s; can ssh reach it, and it this machine?"
    )
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def test_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, tmp_path, f"cat > {tmp_path}/invitation; sleep 60")

    def come() -> None:
        text = until(lambda: (tmp_path / "invitation").exists() and (tmp_path / "invitation").read_text())
        invitation = json.loads(text)
        connection = Client(tuple(invitation["address"]), authkey=bytes.fromhex(invitation["secret"]))
        control.send(connection, {"rank": 1, "version": "0.0.1"})

    threading.Thread(target=come, daemon=True).start()
    with pytest.raises(LocalrunError) as error, start.echoing_ranks(local_places("2"), print):
        pass
    assert str(error.value) == f"rank 1: has localrun 0.0.1; here it is {localrun.__version__}"


def test_without_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)  # as if it were not installed
    with (
        pytest.raises(LocalrunError, match=r"pip install 'localrun\[cluster\]'"),
        start.echoing_ranks(local_places("2"), print),
    ):
        pass
