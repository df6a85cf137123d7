"""The name of the kernel cache covers all of quant: a stale kernel would give wrong numbers without a word."""

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
