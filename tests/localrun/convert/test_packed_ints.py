"""Four-bit weights of compressed-tensors: rows against the formula in torch, and one line for other ways to pack."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.checkpoint import Checkpoint

ROWS, COLS, GROUP = 6, 96, 32
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}


def parts() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weights, and the same as they are stored: eight codes a word, the first in the low bits."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (ROWS, COLS), generator=generator)
    scale = (torch.rand(ROWS, COLS // GROUP, generator=generator) + 0.5).bfloat16()
    shifts = 4 * torch.arange(8)
    words = (codes.reshape(ROWS, -1, 8) << shifts).sum(-1)
    packed = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    stored = {"e.weight_packed": packed, "e.weight_scale": scale, "e.weight_shape": torch.tensor([ROWS, COLS])}
    return (codes - 8).float() * scale.float().repeat_interleave(GROUP, 1), stored | {"n.weight": torch.ones(4)}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_are_codes_times_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    weight, stored = parts()
    stored["e.weight_scale"] = stored["e.weight_scale"].to(dtype)
    source = checkpoint(tmp_path, stored, CONFIG)
    assert set(source.tensors) == {"e.weight", "n.weight"} and source.tensors["e.weight"].shape == (ROWS, COLS)
    for start, stop in ((0, ROWS), (2, 5)):
        out = np.full((stop - start, COLS), np.nan, np.float32)
        source.read("e.weight", start, stop, out)
        assert np.array_equal(out, weight[start:stop].numpy())
    source.close()


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, torch.Tensor]], Any], str]] = {
    "another format": (lambda c, t: c.update(format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
    "eight bits": (
        lambda c, t: c["config_groups"]["group_0"]["weights"].update(num_bits=8),
        "num_bits is 8; expected 4",
    ),
    "zero points": (
        lambda c, t: c["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "symmetric is False",
    ),
    "odd groups": (lambda c, t: c["config_groups"]["group_0"]["weights"].update(group_size=12), "group_size is 12"),
    "two groups": (lambda c, t: c["config_groups"].update(more={}), "has 2 config_groups; expected one"),
    "no scale": (lambda c, t: t.pop("e.weight_scale"), "its scale is missing; expected floats of shape"),
    "a short scale": (
        lambda c, t: t.update({"e.weight_scale": torch.ones(6, 2)}),
        "its scale is 'F32' [6, 2]; expected",
    ),
    "floats": (lambda c, t: t.update({"e.weight_packed": torch.ones(6, 12)}), "is 'F32' [6, 12]; expected I32"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_other_ways_to_pack_are_one_line(case: str, tmp_path: Path) -> None:
    change, expected = BROKEN[case]
    config, (_, tensors) = copy.deepcopy(CONFIG), parts()
    change(config, tensors)
    with pytest.raises(CheckpointError) as error:
        checkpoint(tmp_path, tensors, config)
    assert expected in str(error.value)
