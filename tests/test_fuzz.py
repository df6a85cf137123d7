"""Broken and odd files of every kind, by seed: each is read, or refused in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import SCRIPTS

SEED = 17


def fuzz(folder: Path, *options: str) -> tuple[int, dict]:
    """Exit code and document of the script, in a process of its own: it is forked, which a loaded model forbids."""
    command = [sys.executable, str(SCRIPTS / "fuzz.py"), str(folder), "--seed", str(SEED), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.first
@pytest.mark.parametrize("cases", [400, pytest.param(6_000, marks=pytest.mark.slow)])
def test_odd_files_are_read_or_refused(cases: int, tmp_path: Path) -> None:
    code, document = fuzz(tmp_path, "--cases", str(cases))
    assert document["faults"] == [] and code == 0
    for kind, counts in document["counts"].items():
        assert set(counts) <= {"read", "refused"}, kind
    assert sum(counts.get("read", 0) for counts in document["counts"].values()) > 0.05 * cases


PROGRAM = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import fuzz
from localrun.errors import LocalrunError
kept = []
def refuse():
    raise LocalrunError("x" * 10**6 + chr(27))
def check(probe, path):
    what = path.read_bytes()
    if what == b"3":
        raise KeyError("x")
    if what == b"5":
        os.kill(os.getpid(), 11)
    if what == b"7":
        time.sleep(60)
    if what == b"9":
        kept.extend(open(os.devnull) for _ in range(20))
    if what == b"11":
        probe(refuse)
fuzz.HANG_S = 2
fuzz.fuzz_kinds.kinds = lambda: [
    fuzz.Kind("k", 1.0, lambda seed, number: ("told", str(number).encode()), check)
]
sys.argv = ["fuzz", {folder!r}, "--cases", "16"]
fuzz.main()
"""


def test_faults_are_counted_and_the_run_goes_on(tmp_path: Path) -> None:
    """One of each kind among sixteen cases; a refusal is made one short line. Called again, nothing is left to do."""
    program = PROGRAM.format(scripts=str(SCRIPTS), folder=str(tmp_path))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        document = json.loads(done.stdout.splitlines()[-1])
        assert done.returncode == 1 and document["cases"] == 16
        assert document["counts"]["k"] == {"read": 11, "refused": 1, "fault": 2, "signal": 1, "hang": 1}
        found = {fault["number"]: fault["fault"] for fault in document["faults"]}
        assert found[3].startswith("KeyError at <string>") and found[5] == "ends its process with -11"
        assert found[7] == "hangs for 2 s" and "20 descriptors stay open" in found[15] and len(found) == 4
    assert [path.read_bytes() for path in tmp_path.glob("k-KeyError*/3/input")] == [b"3"]
