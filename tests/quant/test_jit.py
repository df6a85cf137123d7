"""The name of the kernel cache covers all of quant: a stale kernel would give wrong numbers without a word."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


def fingerprint(folder: Path) -> str:
    code = "from quant.target import jit; print(jit._fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "quant", folder / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_same_sources_give_the_same_name(copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(ROOT)


@pytest.mark.parametrize("name", ["errors.py", "simd/core.py", "formats/q8_0.py", "decode/attention.py"])
def test_a_changed_file_in_any_folder_changes_the_name(copy: Path, name: str) -> None:
    path = copy / "quant" / name
    before, text = fingerprint(copy), path.read_text(encoding="utf-8")
    path.write_text(text + "\n# changed\n", encoding="utf-8")
    assert fingerprint(copy) != before
    path.write_text(text, encoding="utf-8")


def test_a_file_more_or_under_another_name_changes_the_name(copy: Path) -> None:
    path = copy / "quant" / "gemm" / "new.py"
    before = fingerprint(copy)
    path.touch()
    added = fingerprint(copy)
    path = path.rename(copy / "quant" / "gemv" / "new.py")
    assert len({before, added, fingerprint(copy)}) == 3
    path.unlink()


TWO = """
import sys, time
from quant.target import jit
real = jit.numba.cfunc
def slow(*args, **options):
    compile_ = real(*args, **options)
    def timed(function):
        before = time.monotonic()
        time.sleep(0.3)  # as long as two processes need to meet
        result = compile_(function)
        print(before, time.monotonic(), result.cache_hits)
        return result
    return timed
jit.numba.cfunc = slow
from quant.formats import registry
registry.get("F32").expand.compiled
"""


def test_two_processes_do_not_compile_the_same_kernel(tmp_path: Path) -> None:
    """The second waits, and finds the kernel in the cache."""
    environment = os.environ | {"LOCALRUN_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", TWO]
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = sorted([float(word) for word in process.communicate()[0].split()] for process in both)
    assert first[1] <= second[0]
    assert first[2] == 0 and second[2] == 1  # hits
