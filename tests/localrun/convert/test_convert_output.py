"""What a conversion writes: each weight in its place, the same bytes every time, parts, importances; bounded memory."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import hf_checkpoints as hf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
import torch
from conversions import DENSE, EXPERTS, UNIT_BYTES, names, plan_for, write_imatrix

import localrun
from localrun.convert import convert
from localrun.errors import LocalrunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("checkpoint") / "model")


def dequantised(path: Path) -> dict[str, np.ndarray]:
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("mix", ["F32", "F16", "BF16", "Q8_0"])
def test_the_files_tensors_are_the_checkpoints_packed_by_gguf(mix: str, folder: Path, tmp_path: Path) -> None:
    """Every unit lands in its place: read back by gguf's reader, packed by gguf's quantize."""
    wide, packed = tmp_path / "wide.gguf", tmp_path / "packed.gguf"
    convert(plan_for(folder, wide, "F32"))
    convert(plan_for(folder, packed, mix), threads=2)
    original = dequantised(wide)
    for tensor in gguf.GGUFReader(packed).tensors:
        expected = gguf.quantize(original[tensor.name].astype(np.float32), tensor.tensor_type)
        assert np.array_equal(
            tensor.data.view(np.uint8), expected.view(np.uint8).reshape(tensor.data.view(np.uint8).shape)
        )


def test_the_bytes_depend_on_neither_threads_nor_units(folder: Path, tmp_path: Path) -> None:
    files = []
    for index, (threads, unit_bytes) in enumerate([(1, UNIT_BYTES), (2, UNIT_BYTES), (2, 1 << 26), (1, 100)]):
        files.append(tmp_path / f"{index}.gguf")
        convert(plan_for(folder, files[-1], unit_bytes=unit_bytes), threads=threads)
    assert len({path.read_bytes() for path in files}) == 1


def test_progress_counts_every_weight_and_byte(folder: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    plan = plan_for(folder, tmp_path / "x.gguf")
    convert(plan, progress=seen.append)
    assert len(seen) == len(plan.units) > 100
    assert seen[-1].weights == seen[-1].total_weights == plan.n_weights
    assert seen[-1].bytes_out == plan.tensor_bytes
    assert seen[-1].bytes_in == sum(tensor.n_bytes for tensor in plan.source.tensors.values())
    assert plan.layout.size == (tmp_path / "x.gguf").stat().st_size


# --- parts, importances, from a GGUF


def test_parts_are_llama_cpps(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    convert(plan_for(folder, whole, "F32"))
    plan = plan_for(folder, parts, "F32", split_max_bytes=300_000)
    convert(plan)
    n = len(plan.layout.parts)
    expected = [f"parts-{i:05d}-of-{n:05d}.gguf" for i in range(1, n + 1)]
    assert n > 2
    assert names(tmp_path) == [*expected, "whole.gguf"]
    first = tmp_path / expected[0]
    with localrun.gguf.file.open_gguf(first) as split, localrun.gguf.file.open_gguf(whole) as one:
        assert [t.data.tobytes() for t in split.tensors.values()] == [t.data.tobytes() for t in one.tensors.values()]
        assert {k: v for k, v in split.metadata.items() if not k.startswith("split.")} == dict(one.metadata)
    assert np.array_equal(llama_cpp_oracle.logits(first, hf.PROMPT), llama_cpp_oracle.logits(whole, hf.PROMPT))
    # and back into one file
    convert(plan_for(first, tmp_path / "joined.gguf", "F32"))
    with localrun.gguf.file.open_gguf(tmp_path / "joined.gguf") as joined:
        assert len(joined.paths) == 1
        assert not joined.has("split.count")


def test_a_gguf_is_copied_with_its_keys(folder: Path, tmp_path: Path) -> None:
    """Types, order and values of all keys but the file type; tensors that keep their type keep their bytes."""
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    convert(plan_for(folder, first))
    convert(plan_for(first, second))
    assert first.read_bytes() == second.read_bytes()


def test_tensors_that_keep_their_type_keep_their_bytes(tmp_path: Path) -> None:
    """Q4_K unpacked and packed again would not come out the same."""
    source = tiny_models.shared("llama-wide", type="Q4_K")
    convert(plan_for(source, tmp_path / "x.gguf", "Q4_K_S", allow_requantize=True))
    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    after = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    same = [name for name in before if before[name].tensor_type == after[name].tensor_type]
    assert 10 < len(same) < len(before)
    for name in same:
        assert np.array_equal(before[name].data, after[name].data)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LocalrunError, match=r"types are known for bailingmoe2, .* and qwen3moe, not for 'mamba2'"):
        plan_for(tmp_path / "x.gguf", tmp_path / "y.gguf")


def test_a_gguf_of_higher_precision_is_packed_like_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    wide, direct, indirect = (tmp_path / f"{name}.gguf" for name in ("wide", "direct", "indirect"))
    convert(plan_for(folder, wide, "F32"))
    convert(plan_for(folder, direct))
    convert(plan_for(wide, indirect))
    ours, theirs = gguf.GGUFReader(indirect), gguf.GGUFReader(direct)
    assert ours.fields["general.file_type"].contents() == theirs.fields["general.file_type"].contents() == 7
    assert [t.data.tobytes() for t in ours.tensors] == [t.data.tobytes() for t in theirs.tensors]


def test_packing_twice_needs_permission(tmp_path: Path) -> None:
    source = tiny_models.shared("llama-wide", type="Q4_K")
    with pytest.raises(LocalrunError, match=r"is Q4_K; packing it again as Q8_0 loses twice \(--allow-requantize"):
        plan_for(source, tmp_path / "x.gguf")
    convert(plan_for(source, tmp_path / "x.gguf", allow_requantize=True))
    expected, found = dequantised(source), dequantised(tmp_path / "x.gguf")
    for name, values in expected.items():
        # Q8_0 rounds to half of 1/127 of a block's largest weight, and its scale to 11 bits
        assert np.abs(found[name] - values).max() <= np.abs(values).max() * (1 / 254 + 2**-11)
    convert(plan_for(source, tmp_path / "f32.gguf", "F32"))  # unpacking loses nothing
    found = dequantised(tmp_path / "f32.gguf")
    assert all(np.array_equal(found[name], values) for name, values in expected.items())
    convert(plan_for(tiny_models.shared("llama-wide", type="Q8_0"), tmp_path / "y.gguf", "Q4_0"))


def test_each_expert_is_packed_by_its_own_importance(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the packer is handed, slice by slice: the mean of the squares, nothing for an expert never reached."""
    rng = np.random.default_rng(0)
    sums = {EXPERTS: rng.uniform(1, 2, (8, 96)), DENSE: rng.uniform(1, 2, (1, 96))}
    counts = {EXPERTS: np.array([[5], [0], [7], [1], [2], [3], [4], [9]]), DENSE: np.array([[10]])}
    imatrix = write_imatrix(tmp_path / "i.gguf", sums, counts)
    plan = plan_for(folder, tmp_path / "x.gguf", imatrix=imatrix, unit_bytes=1 << 26)
    assert plan.importances.unreached == {EXPERTS: [1]}
    seen = []
    from localrun.convert import packing

    def record(_pool: Any, _format: Any, rows: np.ndarray, _out: Any, importance: Any, _first: int) -> None:
        seen.append((rows.copy(), None if importance is None else importance.copy()))

    monkeypatch.setattr(packing, "_pack", record)
    convert(plan)

    def rows_of(name: str, n_rows: int) -> np.ndarray:
        rows = np.empty((n_rows, 96), np.float32)
        plan.source.read(name, 0, n_rows, rows)
        return rows

    for expert in range(8):
        rows = rows_of(f"model.layers.1.mlp.experts.{expert}.up_proj.weight", 64)
        (importance,) = [each for found, each in seen if found.shape == rows.shape and np.array_equal(found, rows)]
        if expert == 1:
            assert importance is None
        else:
            assert np.allclose(importance, sums[EXPERTS][expert] / counts[EXPERTS][expert, 0], rtol=1e-6)
    dense = rows_of("model.layers.0.mlp.up_proj.weight", 160)
    (importance,) = [each for found, each in seen if np.array_equal(found, dense)]
    assert np.allclose(importance, sums[DENSE][0] / 10, rtol=1e-6)


@pytest.mark.parametrize(
    ("sums", "counts", "keys", "expected"),
    [
        (np.ones((8, 95)), np.ones((8, 1)), {}, "has 760 sums and 8 counts, expected 768 and 8"),
        (np.ones((8, 96)), np.ones((7, 1)), {}, "has 768 sums and 7 counts, expected 768 and 8"),
        (np.full((8, 96), np.nan), np.ones((8, 1)), {}, "not finite or below 0"),
        (np.full((8, 96), 1e30), np.full((8, 1), 1e-30), {}, "importances that no float32 number holds"),
        (np.ones((8, 96)), np.ones((8, 1)), {"type": "model"}, "general.type' is 'model', expected 'imatrix'"),
    ],
)
def test_an_imatrix_that_does_not_fit_is_refused(
    sums: np.ndarray, counts: np.ndarray, keys: dict[str, str], expected: str, folder: Path, tmp_path: Path
) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {EXPERTS: sums}, {EXPERTS: counts}, **keys)
    with pytest.raises(LocalrunError, match=expected):
        plan_for(folder, tmp_path / "x.gguf", imatrix=path)


def legacy_imatrix(path: Path, entries: dict[str, tuple[int, np.ndarray]]) -> Path:
    """llama.cpp's format before GGUF: a name has the number of calls, and the means times that."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(entries)))
        for name, (calls, values) in entries.items():
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size))
            file.write(values.astype("<f4").tobytes())
        file.write(struct.pack("<ii", 7, 5) + b"a.txt")  # calls of the last run, the data set
    return path


def test_an_imatrix_of_the_older_format(folder: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    means = {EXPERTS: rng.uniform(1, 2, (8, 96)), DENSE: rng.uniform(1, 2, (1, 96))}
    path = legacy_imatrix(tmp_path / "i.dat", {EXPERTS: (5, means[EXPERTS] * 5), DENSE: (0, means[DENSE])})
    importances = plan_for(folder, tmp_path / "x.gguf", imatrix=path).importances
    assert set(importances) == {EXPERTS, DENSE}
    for name, expected in means.items():
        np.testing.assert_allclose(importances[name], expected, rtol=1e-6)  # two roundings to float32
    assert importances.unreached == {}


@pytest.mark.parametrize("n_bytes", [0, 3, 4, 6, 20, 40, 41, 44, 60, 300, 3000])
def test_an_imatrix_that_is_cut_short_is_refused(n_bytes: int, folder: Path, tmp_path: Path) -> None:
    path = legacy_imatrix(tmp_path / "i.dat", {EXPERTS: (5, np.ones((8, 96)))})
    os.truncate(path, n_bytes)
    with pytest.raises(LocalrunError, match=r"i\.dat: is (no importance matrix|cut off in)"):
        plan_for(folder, tmp_path / "x.gguf", imatrix=path)


def test_a_long_name_in_an_imatrix_is_shortened(folder: Path, tmp_path: Path) -> None:
    """It may hold anything: here what no terminal should be sent."""
    path = legacy_imatrix(tmp_path / "i.dat", {"\x1b[2J" * 200: (5, np.ones((8, 96)))})
    os.truncate(path, 1000)
    with pytest.raises(LocalrunError) as caught:
        plan_for(folder, tmp_path / "x.gguf", imatrix=path)
    assert len(str(caught.value)) < len(str(path)) + 150 and str(caught.value).isprintable()


def test_importances_too_small_to_compute_with(folder: Path, tmp_path: Path) -> None:
    """Products with numbers near the least of float32 are 0 or not finite; packed by them, so were weights."""
    sums = np.full((8, 96), 1e-42)
    path = write_imatrix(tmp_path / "i.gguf", {EXPERTS: sums}, {EXPERTS: np.ones((8, 1))})
    convert(plan_for(folder, tmp_path / "x.gguf", "Q4_0", imatrix=path))
    assert all(np.isfinite(values).all() for values in dequantised(tmp_path / "x.gguf").values())


def test_an_imatrix_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {"other.weight": np.ones((1, 96))}, {"other.weight": np.ones((1, 1))})
    with pytest.raises(LocalrunError, match="no importances for any tensor of this model"):
        plan_for(folder, tmp_path / "x.gguf", imatrix=path)


# --- memory

# VmHWM, not ru_maxrss: that one remembers the process that this one was forked from.
_PEAK = """
import re, sys
from pathlib import Path
from localrun.convert import Options, convert, make_plan
source, destination = map(Path, sys.argv[1:])
convert(make_plan(source, destination, Options(mix="Q8_0", unit_bytes=4 << 20)))
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status is Linux's")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Peak RSS for 10 MB and for 150 MB, in units of 4 MB: apart by less than the units in flight (read ahead, being
    packed, being written), six at most."""
    peaks = []
    for n_experts in (8, 128):
        config = hf.DEEPSEEK | {"n_routed_experts": 8, "hidden_size": 256, "moe_intermediate_size": 192}
        source = hf.save(hf.make("DeepseekV3", config | {"n_group": 1, "topk_group": 1}), tmp_path / f"m{n_experts}")

        def multiply(tensors: dict[str, torch.Tensor], n_experts: int = n_experts) -> None:
            for layer in (1, 2):
                prefix = f"model.layers.{layer}.mlp."
                for expert in range(8, n_experts):
                    for part in ("gate_proj", "up_proj", "down_proj"):
                        name = f"{prefix}experts.{{}}.{part}.weight"
                        tensors[name.format(expert)] = tensors[name.format(expert % 8)].clone()
                for name in ("gate.weight", "gate.e_score_correction_bias"):
                    tensors[prefix + name] = tensors[prefix + name].repeat_interleave(n_experts // 8, 0)

        hf.edit_tensors(source, multiply)
        hf.edit_config(source, n_routed_experts=n_experts)
        arguments = [sys.executable, "-c", _PEAK, str(source), str(tmp_path / f"m{n_experts}.gguf")]
        peaks.append(int(subprocess.run(arguments, capture_output=True, text=True, check=True).stdout))
    assert (tmp_path / "m128" / "model.safetensors").stat().st_size > 120e6
    assert peaks[1] - peaks[0] < 24 << 20
