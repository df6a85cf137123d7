"""verify() against ggml's own validation of rows, with a number that is none at every place of a block."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import ggml
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from kernels import random_blocks

from cli.main import run
from localrun.gguf.file import open_gguf
from localrun.gguf.verify import verify

NAMES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
NAMES += ["IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0"]
GRIDS = ["IQ1_S", "IQ2_XXS", "IQ3_S"]  # which ggml takes seconds to quantise to: blocks are made up


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Type]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def is_valid(data: np.ndarray, kind: Type) -> bool:
    function = ggml.base().ggml_validate_row_data
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return function(int(kind), data.ctypes.data, data.nbytes)


@pytest.mark.parametrize("name", NAMES + GRIDS)
def test_problems_are_ggmls(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """16 bits of ones (NaN as F16, BF16 and upper half of F32; E8M0's NaN) at each even offset of the last block."""
    kind = Type[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 512), dtype=np.float32)
    sound = ggml.quantize(x, kind).reshape(2, -1) if name in NAMES else random_blocks(name, x.shape, rng)
    block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
    tensors, expected = {"sound": (sound, kind)}, set()
    for offset in range(0, max(2, block_bytes - 1), 2):
        broken = sound.copy()
        broken.reshape(-1)[sound.size - block_bytes + offset :][:2] = 0xFF
        tensors[f"at {offset}"] = broken, kind
        if not is_valid(broken, kind):
            expected.add(f"at {offset}")
    assert is_valid(sound, kind)
    assert expected
    with open_gguf(write(tmp_path / "x.gguf", tensors)) as file:
        report = verify(file)
    assert {problem.split("'")[1] for problem in report.problems} == expected
    assert all("not finite" in problem for problem in report.problems)
    assert report.n_tensors == len(tensors)
    assert report.unchecked == {}
    capfd.readouterr()  # ggml's complaints


def test_the_command_names_each_tensor_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.zeros(300_000, np.float32)
    values[299_999] = np.inf
    tensors = {"good": (np.zeros(4, np.float32), Type.F32), "bad": (values, Type.F32)}
    path = write(tmp_path / "x.gguf", tensors)
    assert run(["inspect", str(path), "--verify"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "localrun: tensor 'bad' (F32): weight 299999 is not finite",
        f"localrun: {path}: 1 of 2 tensors are not sound",
    ]
    good = write(tmp_path / "y.gguf", {"good": (np.zeros(4, np.float32), Type.F32)})
    assert run(["inspect", str(good), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"] == {"tensors": 1, "bytes": 16, "unchecked_types": {}}


def test_the_scale_that_lies_in_four_words(tmp_path: Path) -> None:
    data = random_blocks("IQ1_M", (2, 256), np.random.default_rng(0))
    data[1, 48:] = 0xFF
    with open_gguf(write(tmp_path / "x.gguf", {"a": (data[:1], Type.IQ1_M), "b": (data, Type.IQ1_M)})) as file:
        problems = verify(file).problems
    assert problems == ["tensor 'b' (IQ1_M): the scale of block 1 (weights from 256) is not finite"]


def test_types_that_are_not_known_are_told(tmp_path: Path) -> None:
    data = np.zeros((1, gguf.GGML_QUANT_SIZES[Type.Q8_1][1]), np.uint8)
    with open_gguf(write(tmp_path / "x.gguf", {"a": (data, Type.Q8_1)})) as file:
        assert verify(file).unchecked == {"Q8_1": 1}
