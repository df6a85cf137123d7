"""convert --check: sound checkpoints pass, a misread key is refused before anything is written, and what cannot be
compared is said."""

from __future__ import annotations

import json
from pathlib import Path

import hf_checkpoints as hf
import numpy as np
import pytest
import tiny_models

from cli.main import run
from localrun.convert import Options, convert, make_plan
from localrun.convert.settings import Rope
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.measure import reference

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf.LLAMA | {"rope_parameters": LINEAR, "hidden_size": 192}
    return hf.save(hf.make("Llama", config), tmp_path_factory.mktemp("check") / "model")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("options", [["Q4_0"], ["Q8_0", "--pack"]], ids=str)
def test_a_sound_conversion_passes(
    options: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(folder), str(tmp_path / "x.gguf"), "--type", *options, "--check", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["check"]
    assert 0 < found["logits_difference"] < 1e-5  # float32 sums in another order
    assert 0.001 < found["worst_weight_error"] < 0.15  # 4 bits: 9%; 8 bits: 0.5%
    assert "checked: logits" in err
    assert names(tmp_path) == ["x.gguf"]


def test_a_setting_that_is_misread_is_refused_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Rope, "scaling", lambda *_: None)
    assert run(["convert", str(folder), str(tmp_path / "x.gguf"), "--type", "Q8_0", "--check"]) == 1
    assert "of their range from transformers', before any rounding; expected at most 0.001" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_what_cannot_be_compared_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["convert", str(folder), str(tmp_path / "x.gguf"), "--type", "Q8_0", "--check", "--force"]
    monkeypatch.setattr(reference, "is_available", lambda: False)
    assert run(arguments) == 0
    assert "--check: transformers is not installed; nothing is compared" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("localrun.hardware.free_ram", lambda: 1000)
    assert run(arguments) == 0
    assert "of memory for weights in float32, 1000 B are free; nothing is compared" in capsys.readouterr().err
    assert names(tmp_path) == ["x.gguf"]


def test_a_gguf_has_no_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(tiny_models.shared("llama", type="F32"))
    assert run(["convert", source, str(tmp_path / "x.gguf"), "--type", "Q8_0", "--check"]) == 1
    assert "--check compares a checkpoint folder; a GGUF has no reference" in capsys.readouterr().err


@pytest.mark.parametrize("type_", ["Q4_0", "Q8_0", "F16"])
def test_a_tensor_that_its_type_does_not_explain_is_named(type_: str, folder: Path, tmp_path: Path) -> None:
    """One tensor's blocks in another order: the right weights in the wrong places."""
    for mix in ("F32", type_):
        convert(make_plan(folder, tmp_path / f"{mix}.gguf", Options(mix=mix)))
    packed = tmp_path / f"{type_}.gguf"
    assert reference.check_weights(packed, tmp_path / "F32.gguf") < 0.15
    with open_gguf(packed) as file:
        tensor = file.tensors["blk.1.ffn_up.weight"]
        blocks = np.array(tensor.data.reshape(-1))
    raw = packed.read_bytes()
    packed.write_bytes(raw.replace(blocks.tobytes(), blocks.reshape(2, -1)[::-1].tobytes()))
    with pytest.raises(
        LocalrunError, match=r"tensor 'blk\.1\.ffn_up\.weight' is 1\.\d of its size off; expected at most"
    ):
        reference.check_weights(packed, tmp_path / "F32.gguf")
