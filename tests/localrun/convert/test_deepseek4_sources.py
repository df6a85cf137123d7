"""DeepSeek-V4's ways to store weights: FP4 and FP8 with exponents for scales, tables, and names of two kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.checkpoint import Checkpoint
from quant.formats import registry

ROWS, COLS = 6, 96
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
W1, W_KV = "layers.0.ffn.experts.1.w1", "layers.0.attn.wkv"
GATE, KV, TABLE = f"{W1}.weight", f"{W_KV}.weight", "layers.0.ffn.gate.tid2eid"


def fp4() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An expert's matrix, and the same as it is stored: two neighbours a byte, the first in the low half."""
    blocks, exponents, meant = hf.to_mxfp4(torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)))
    codes = blocks.flatten(1).view(torch.int8)
    return meant, {f"{W1}.weight": codes, f"{W1}.scale": exponents.view(torch.float8_e8m0fnu)}


def fp8() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A matrix of 2 x 3 blocks, those at the edges trimmed, and the same as it is stored."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(150, 300, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(110, 140, (2, 3), generator=generator)
    scales = (exponents - 127).float().exp2().repeat_interleave(128, 0).repeat_interleave(128, 1)[:150, :300]
    stored = {f"{W_KV}.weight": codes, f"{W_KV}.scale": exponents.to(torch.uint8).view(torch.float8_e8m0fnu)}
    return codes.float() * scales, stored


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    config = {"architectures": ["DeepseekV4ForCausalLM"], "quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder)


def rows_of(source: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    out = np.full((stop - start, source.tensors[name].n_cols), np.nan, np.float32)
    source.read(name, start, stop, out)
    return out


def test_fp4_and_fp8_mean_codes_times_powers_of_two(tmp_path: Path) -> None:
    (expert, stored), (matrix, others) = fp4(), fp8()
    source = checkpoint(tmp_path, stored | others)
    assert {name: tensor.dtype for name, tensor in source.tensors.items()} == {GATE: "MXFP4", KV: "F8_E4M3"}
    assert np.array_equal(rows_of(source, KV, 0, 150), matrix.numpy())
    assert np.array_equal(rows_of(source, KV, 120, 140), matrix[120:140].numpy())
    assert np.array_equal(rows_of(source, GATE, 2, 5), expert[2:5].numpy())
    blocks = source.blocks(GATE, 2, 5)
    assert np.array_equal(registry.get("MXFP4").unpack(blocks.reshape(-1)).reshape(3, COLS), expert[2:5].numpy())
    assert np.array_equal(blocks.reshape(3, -1, 17)[..., 0], stored[f"{W1}.scale"].view(torch.uint8)[2:5].numpy())
    source.close()


def test_a_table_of_whole_numbers_is_kept_as_32_bits(tmp_path: Path) -> None:
    table = torch.randint(0, 256, (9, 6), generator=torch.Generator().manual_seed(2))
    source = checkpoint(tmp_path, {TABLE: table})
    assert source.tensors[TABLE].dtype == "I32"
    assert np.array_equal(source.blocks(TABLE, 3, 8).view(np.int32), table[3:8].numpy())
    source.close()


Change = Callable[[dict[str, torch.Tensor]], Any]
BROKEN: dict[str, tuple[Change, str]] = {
    "no scale": (lambda t: t.pop(f"{W1}.scale"), "its scale is missing; expected F8_E8M0 [6, 3], one for 32 weights"),
    "a short scale": (
        lambda t: t.update({f"{W1}.scale": torch.zeros(6, 2, dtype=torch.uint8).view(torch.float8_e8m0fnu)}),
        "its scale is 'F8_E8M0' [6, 2]; expected F8_E8M0 [6, 3]",
    ),
    "a scale of floats": (lambda t: t.update({f"{W1}.scale": torch.ones(6, 3)}), "its scale is 'F32' [6, 3]"),
    "rows of half a block": (
        lambda t: t.update({f"{W1}.weight": t[f"{W1}.weight"][:, :40].contiguous()}),
        "is I8 [6, 40], FP4",
    ),
    "both names": (lambda t: t.update({"model.layers.0.self_attn.kv_proj.weight": torch.ones(2, 2)}), "there twice"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_belong_together_are_refused(case: str, tmp_path: Path) -> None:
    change, message = BROKEN[case]
    tensors = fp4()[1] | fp8()[1]
    change(tensors)
    with pytest.raises(CheckpointError) as caught:
        checkpoint(tmp_path, tensors)
    assert message in str(caught.value)


def test_a_number_beyond_32_bits_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, {TABLE: torch.full((2, 6), 1 << 40)})
    with pytest.raises(CheckpointError, match="a number of more than 32 bits"):
        source.blocks(TABLE, 0, 2)
    source.close()
