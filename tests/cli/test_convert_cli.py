"""localrun convert: the plan, the report, exit codes and one-line errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import hf_checkpoints as hf
import pytest

from cli.convert import _duration
from cli.main import run
from localrun.gguf.file import open_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("checkpoint") / "model")


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_a_dry_run_tells_what_a_run_then_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    arguments = ["convert", str(folder), str(path), "--type", "q8_0", "--tensor-type", "ffn_down=F16", "--json"]
    assert run([*arguments, "--dry-run"]) == 0
    planned = document(capsys)
    assert not path.exists()
    assert run([*arguments, "-t", "2"]) == 0
    done = document(capsys)
    plan = planned.pop("plan")
    assert planned.items() <= done.items()
    assert done["type"] == "Q8_0"
    assert done["bytes_out"] == done["tensor_bytes"] == sum(tensor["bytes"] for tensor in plan)
    assert path.stat().st_size == done["file_bytes"]
    assert done["bits_per_weight"] == pytest.approx(8 * done["tensor_bytes"] / done["parameters"], abs=5e-4)
    assert "multi-token prediction" in done["warnings"][0]
    with open_gguf(path) as file:
        written = [(t.name, list(t.shape), t.type.name, t.n_bytes) for t in file.tensors.values()]
    assert written == [(t["name"], t["shape"], t["to"], t["bytes"]) for t in plan]
    assert {t["to"] for t in plan if "ffn_down" in t["name"]} == {"F16"}


def test_the_plan_as_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(folder), str(tmp_path / "x.gguf"), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["tensor", "shape", "from", "to", "size"]
    row = next(line for line in lines if line.startswith("blk.1.ffn_up_exps.weight"))
    assert row.split() == ["blk.1.ffn_up_exps.weight", "8", "x", "64", "x", "96", "F32", "Q5_0", "33.0", "KiB"]
    assert lines[-1].startswith("52 tensors, ")
    assert lines[-1].endswith(" bits per weight")
    assert all(line.startswith("localrun: ") for line in err.splitlines())


def test_the_report_names_the_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    assert run(["convert", str(folder), str(path), "--type", "F32"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: ")
    assert run(["convert", str(folder), str(path), "--type", "F32"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"localrun: {path}: exists already; --force replaces it"
    assert run(["convert", str(folder), str(path), "--type", "F32", "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type", "Q9"], "unknown type 'Q9'"),
        (["--tensor-type", "x"], "expected REGEX=TYPE"),
        (["--split-max-size", "40"], "--split-max-size '40'; expected a number and M or G"),
        (["--split-max-size", "0G"], "--split-max-size '0G'"),
        (["-t", "0"], "threads is 0; expected 1 to 512"),
        (["--imatrix", "/no/such/file"], "/no/such/file: no such file"),
        (["--pre", "x"], "--pre 'x'"),
    ],
)
def test_a_wrong_option_is_one_line(
    options: list[str], expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(folder), str(tmp_path / "x.gguf"), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("source", ["nothing", "empty", "file"])
def test_a_source_that_is_none_is_one_line(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "source"
    if source == "empty":
        path.mkdir()
    if source == "file":
        path.write_text("not a model")
    assert run(["convert", str(path), str(tmp_path / "x.gguf")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line


def test_parts_by_size(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(folder), str(tmp_path / "x.gguf"), "--type", "F32", "--split-max-size", "1M", "--json"]
    assert run(arguments) == 0
    paths = [Path(path) for path in document(capsys)["paths"]]
    assert [path.name for path in paths] == [f"x-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert all(path.exists() for path in paths)


def test_an_interrupt_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    """SIGINT from within, once some of the weights are done."""
    code = (
        "import sys, os, signal, localrun.convert.run as r\n"
        "count = r._Pipeline._count\n"
        "def interrupted(self, unit):\n"
        "    state = count(self, unit)\n"
        "    if state.weights > 50_000: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return state\n"
        "r._Pipeline._count = interrupted\n"
        "from cli.main import main\n"
        "main()"
    )
    path = tmp_path / "x.gguf"
    command = [sys.executable, "-c", code, "convert", str(folder), str(path), "--type", "F32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "localrun: interrupted; --resume goes on from here"
    assert not path.exists()
    assert run(["convert", str(folder), str(path), "--type", "F32", "--resume"]) == 0
    assert path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert os.listdir(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
