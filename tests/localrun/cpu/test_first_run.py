"""The first run on a machine compiles kernels and says so; later ones find them."""

import os
import subprocess
import sys
from pathlib import Path

import tiny_models

LOAD = """
import sys, localrun
show = (lambda done, total, what: print(done, total, what)) if sys.argv[2] == "progress" else None
localrun.load(sys.argv[1], threads=1, ctx=8, progress=show, notice=lambda line: print("notice:", line)).close()
"""


def load(cache: Path, how: str) -> list[str]:
    arguments = [sys.executable, "-c", LOAD, str(tiny_models.shared("llama-mha")), how]
    environment = os.environ | {"LOCALRUN_CACHE": str(cache)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_only_the_first_run_compiles_and_says_so(tmp_path: Path) -> None:
    assert load(tmp_path, "quiet") == ["notice: first run on this machine: compiling the kernels, which takes a while"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(kept) > 20
    steps = [line.split(" ", 2) for line in load(tmp_path, "progress")]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == kept
    done, totals, names = zip(*steps, strict=True)
    assert [int(n) for n in done] == list(range(len(steps))) and set(totals) == {str(len(steps) - 1)}
    assert "Kernels: decoding: attention" in names and "Kernels: F32" in names
