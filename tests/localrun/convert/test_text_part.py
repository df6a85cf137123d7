"""The text part of a checkpoint that reads images: the same file as of the text model alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import pytest
import torch
from conversions import plan_for
from safetensors.torch import load_file, save_file

from localrun.convert import convert
from localrun.convert.errors import CheckpointError
from localrun.errors import LocalrunError
from localrun.plan.shapes import load_model

OTHERS = {"vision_tower.a.weight": torch.zeros(3, 3), "mm_projector.proj.0.weight": torch.ones(2, 2)}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("text") / "model")


def whole(folder: Path, text: Path, name: Any, **settings: Any) -> Path:
    """The same in a model that reads images; name: what a tensor is called there."""
    folder.mkdir(parents=True)
    inner = json.loads((text / "config.json").read_text()) | settings
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "vision_config": {}, "text_config": inner}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": inner.pop("eos_token_id")}))
    tensors = {name(own): tensor for own, tensor in load_file(text / "model.safetensors").items()}
    save_file(tensors | OTHERS, folder / "model.safetensors")
    return folder


def apart(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


LAYOUTS = {"kimi": "language_model.{}".format, "apart": apart}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_is_that_of_the_text_model(layout: str, text: Path, tmp_path: Path) -> None:
    alone, part = tmp_path / "alone.gguf", tmp_path / "part.gguf"
    convert(plan_for(text, alone))
    folder = whole(tmp_path / "whole" / "model", text, LAYOUTS[layout])
    plan = plan_for(folder, part)
    convert(plan)
    assert part.read_bytes() == alone.read_bytes()
    line = "the text part alone is converted; left out: 'mm_projector' (1 tensors), 'vision_tower' (1 tensors)"
    assert line in plan.warnings
    shape = load_model(str(folder / "config.json"))
    assert [(t.name, t.shape) for t in shape.tensors] == [
        (t.name, t.shape) for t in load_model(str(text / "config.json")).tensors
    ]


def test_a_text_part_of_another_kind_is_one_line(text: Path, tmp_path: Path) -> None:
    named = LAYOUTS["kimi"]
    plan_for(whole(tmp_path / "a", text, named, architectures=None, model_type="kimi_k2"), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"text_config names no architectures; the text part of \['KimiK25For"):
        plan_for(whole(tmp_path / "b", text, named, architectures=None, model_type="x"), tmp_path / "x.gguf")
    with pytest.raises(LocalrunError, match=r"architectures is .* expected one of"):
        plan_for(whole(tmp_path / "c", text, named, architectures=["Other"]), tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"no tensor begins with language_model\."):
        plan_for(whole(tmp_path / "d", text, "other.{}".format), tmp_path / "x.gguf")
