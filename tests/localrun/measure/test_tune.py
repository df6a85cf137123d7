"""localrun tune: what follows from figures, and a whole run with small layers. The figures themselves are no test's."""

import json
from pathlib import Path

import pytest
import tiny_models

from cli.main import run
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.measure import tune
from quant.target import tuning


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"HIDDEN": 512, "INNER": 256, "TOP_K": 2, "_CACHES": 0, "_TRY_S": 0.0}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setenv("LOCALRUN_CACHE", str(tmp_path))


def test_a_distance_must_gain_more_than_noise() -> None:
    assert tune._best({"3456": 1.0, "8192": 0.9, "6144": 0.95}) == 8192
    assert tune._best({"3456": 1.0, "8192": 0.99, "6144": 1.3}) == 3456


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"3": 1.9, "4": 1.3, "5": 0.9, "6": 0.7}, 5),
        ({"3": 0.9, "4": 1.1, "5": 0.8, "6": 0.7}, 5),  # never slower from there on
        ({"3": 0.9, "4": 0.8, "5": 0.8, "6": 0.7}, 3),
        ({"3": 1.9, "4": 1.3, "5": 1.2, "6": 1.1}, 7),
    ],
)
def test_repacking_begins_where_it_is_never_slower(ratios: dict[str, float], expected: int) -> None:
    assert tune._pays_from(ratios) == expected


def test_a_run_is_kept_for_this_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tune", "miniature", "-t", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["types"] == ["Q5_K", "Q6_K"] and found["threads"] == 2
    assert list(found["measured"]) == [*tune._ASKED, *tune._ASKED_OF_INTERLEAVED]
    assert all(0 < ratio < 1e3 for ratios in found["measured"].values() for ratio in ratios.values())
    kept = json.loads(Path(found["path"]).read_text())
    assert kept == {key: found[key] for key in kept}
    assert tuning._of_this_cpu.__wrapped__() == tuning.Found(tuning.read(found["tuning"]), "tuned")


def test_a_file_without_such_types_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_models.shared("wide", type={"": "F32"})
    assert run(["tune", str(path)]) == 1
    assert capsys.readouterr().err.endswith("no matrices of a type that there is anything to tune for\n")


def test_where_it_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = tune.Tuned(tuning.Tuning(), [], {})
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCALRUN_CACHE", str(tmp_path / "file"))
    with pytest.raises(LocalrunError, match="Not a directory; set LOCALRUN_CACHE"):
        tune.keep(found)


def test_too_little_memory_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune.hardware, "free_ram", lambda: 1000)
    with open_gguf(tiny_models.shared("wide", type={"": "Q4_K"})) as file, pytest.raises(LocalrunError, match="GiB"):
        tune.tune(file, None)
