"""Commands with ranks under the real mpiexec: what they say is what one process says, and they end as they should."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny_models
from paths import ROOT

from localrun.plan.link import load_link

pytestmark = pytest.mark.slow  # several processes each, which import everything
pytest.importorskip("mpi4py")

SSH = """#!/bin/sh
# What mpiexec calls to reach a host: here every host is this machine.
shift 2
exec sh -c "$*"
"""


def command(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-m", "cli.main", *args]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, cwd=ROOT, **options)  # type: ignore[call-overload]


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names of hosts lead to this machine."""
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("HYDRA_LAUNCHER", "ssh")
    monkeypatch.setenv("HYDRA_LAUNCHER_EXEC", str(tmp_path / "ssh"))


def test_messages_are_timed(tmp_path: Path) -> None:
    done = command("doctor", "--ranks", "2", "--link", str(tmp_path / "link.json"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (rank,) = json.loads(done.stdout)["ranks"]
    assert rank["rank"] == "rank 1" and 0 < rank["round_trip_s"] <= rank["round_trip_p90_s"] < 1
    link = load_link(str(tmp_path / "link.json"))
    assert link.round_trip_s == rank["round_trip_s"] and link.bytes_per_s > 1e7


def test_another_file_on_another_host(hosts: None, tmp_path: Path) -> None:
    here, there = tiny_models.shared("v3"), tiny_models.shared("v2-lite")
    done = command("bench", str(here), "--hosts", f"127.0.0.2={there}", "-p", "8", "-n", "4")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"localrun: host 127.0.0.2 (rank 1): {there}: is another model than the first rank's\n"


def test_bench_over_hosts(hosts: None) -> None:
    """The messages of two other ranks are counted; none of the processes is left."""
    arguments = ["bench", str(tiny_models.shared("v3")), "--hosts", "127.0.0.2,127.0.0.3", "-t", "1"]
    done = command(*arguments, "-p", "8", "-n", "4", "-r", "1", "--json", env=os.environ | {"LOCALRUN_MARK": "bench"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["messages"]["exchanges"] > 0
    marked = psutil.process_iter(["environ"])
    left = [p for p in marked if (p.info["environ"] or {}).get("LOCALRUN_MARK") == "bench"]
    assert not psutil.wait_procs(left, timeout=20)[1]


def test_prompts_read_on_another_host(hosts: None) -> None:
    """With the experts shared as well: two MPI worlds of one process."""
    arguments = ["bench", str(tiny_models.shared("v3")), "-t", "1", "-p", "700", "-n", "4", "-r", "1", "--json"]
    for others in ([], ["--ranks", "2"], ["--hosts", "127.0.0.3"]):
        done = command(*arguments, "--prefill-hosts", "127.0.0.2", *others)
        assert (done.returncode, done.stderr) == (0, "")
        document = json.loads(done.stdout)
        assert document["reading"]["tokens"] == 1400 and document["reading"]["bytes_back"] > 0  # one warms up
        assert ("messages" in document) == bool(others)


def test_a_reply_to_a_prompt_that_is_read_elsewhere() -> None:
    """It is the one to a prompt that is read here."""
    prompt = "Once upon a time, there was a little girl named Lily. " * 20
    arguments = ["generate", "miniature", "--raw", "-p", prompt, "-n", "30", "--temp", "0", "-t", "1"]
    here, there = command(*arguments), command(*arguments, "--prefill-hosts", "localhost", "-v")
    assert here.returncode == there.returncode == 0, there.stderr
    assert there.stdout == here.stdout
    assert "read on other hosts: " in there.stderr and "read on other hosts: 0 tokens" not in there.stderr


@pytest.mark.parametrize("option", [["--ranks", "1"], ["--hosts", "localhost"]])
def test_one_rank_is_a_plain_run(option: list[str]) -> None:
    arguments = ["generate", "miniature", "--raw", "-p", "Once upon a time", "-n", "30", "--temp", "0", "-t", "1"]
    alone, found = command(*arguments), command(*arguments, *option)
    assert (found.returncode, found.stdout, found.stderr) == (0, alone.stdout, alone.stderr)


def test_one_rank_has_nobody_to_time_messages_with() -> None:
    done = command("doctor", "--ranks", "1")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1


def test_a_reader_with_another_file(hosts: None) -> None:
    here, there = tiny_models.shared("v3"), tiny_models.shared("v2-lite")
    done = command("bench", str(here), "--prefill-hosts", f"127.0.0.2={there}", "-p", "8", "-n", "4")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"localrun: host 127.0.0.2 (reader 1): {there}: is another model than the first rank's\n"


def in_mpiexec(*args: str) -> subprocess.CompletedProcess[str]:
    """A command of two processes that the user's mpiexec starts."""
    mpiexec = [str(shutil.which("mpiexec", path=str(Path(sys.executable).parent))), "-n", "2", sys.executable]
    return subprocess.run([*mpiexec, "-m", "cli.main", *args], capture_output=True, text=True, timeout=60, cwd=ROOT)


def test_an_mpiexec_of_the_users() -> None:
    """Its first process is the program, the others serve it."""
    done = in_mpiexec("bench", str(tiny_models.shared("v3")), "-t", "1", "-p", "8", "-n", "4", "-r", "1", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["messages"]["exchanges"] > 0, done.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["bench", "nowhere.gguf"], "localrun: nowhere.gguf: no such file"),  # before the others are told anything
        (
            ["bench", "miniature", "-t", "1", "--rank-share", "slices"],
            "localrun: experts of 256 inner columns",
        ),  # while they get ready to serve
    ],
)
def test_the_users_mpiexec_ends_with_an_error(args: list[str], line: str) -> None:
    done = in_mpiexec(*args)
    assert (done.returncode, done.stdout) == (1, "")
    said = done.stderr.replace("localrun: rank 1: ", "localrun: ")  # whichever rank finds it first
    assert said.startswith(line) and said.count("\n") == 1


def test_an_mpiexec_without_need() -> None:
    """Of a command that shares nothing there is one output, not two."""
    done = in_mpiexec("inspect", str(tiny_models.shared("v3")), "--json")
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)


@pytest.mark.parametrize(
    ("option", "program", "name"),
    [
        (["--ranks", "2"], "localrun.ranks.rank_child", "rank 1"),
        (["--prefill-hosts", "localhost"], "localrun.cpu.reader_child", "host localhost (reader 1)"),
    ],
)
def test_a_rank_is_killed(option: list[str], program: str, name: str) -> None:
    """One line within 10 s, and nothing left; scripts/kill_ranks.py does so at all moments."""
    arguments = [sys.executable, "-m", "cli.main", "bench", str(tiny_models.shared("v3")), *option, "-t", "1"]
    run = subprocess.Popen([*arguments, "-n", "100", "-r", "1000000"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    children: list[psutil.Process] = []
    while not children:
        assert run.poll() is None
        found = psutil.Process(run.pid).children(recursive=True)
        children = [p for p in found if "python" in p.name() and program in p.cmdline()]
        time.sleep(0.05)
    time.sleep(8)
    children[0].send_signal(signal.SIGKILL)
    began = time.monotonic()
    _, err = run.communicate(timeout=10)
    assert run.returncode == 1 and time.monotonic() - began < 10
    assert err.splitlines()[-1] == f"localrun: {name}: is gone: it was killed, or the connection is lost"
    assert not [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def compiling(folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process], psutil.Process]:
    """A first run with two ranks, once it has compiled something: with an empty cache that goes on for long after.

    Returns: the first rank, all that it has started, the other rank.
    """
    environment = os.environ | {"LOCALRUN_CACHE": str(folder)}
    arguments = [sys.executable, "-m", "cli.main", "bench", str(tiny_models.shared("v3")), "--ranks", "2", "-t", "1"]
    run = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    while not any(folder.rglob("*.kernel")):
        assert run.poll() is None
        time.sleep(0.05)
    found = psutil.Process(run.pid).children(recursive=True)
    return run, found, next(p for p in found if "localrun.ranks.rank_child" in p.cmdline() and "python" in p.name())


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_is_lost_while_kernels_are_compiled(kind: signal.Signals, tmp_path: Path) -> None:
    run, found, other = compiling(tmp_path)
    other.send_signal(kind)
    _, err = run.communicate(timeout=30)  # 10 s are promised, but of a machine that compiles nothing beside it
    assert run.returncode == 1 and err.splitlines()[-1].startswith("localrun: rank 1: ")
    assert not [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_user_ends_it_while_kernels_are_compiled(tmp_path: Path) -> None:
    """Both ranks are at it; what they have begun ends when they are gone."""
    run, found, _ = compiling(tmp_path)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=30)
    assert run.returncode == 130 and "Traceback" not in err
    assert not psutil.wait_procs(found, timeout=10)[1]
