"""Writing: killed and resumed, disk full, bad weights, parts, the same bytes every time, memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import hf_checkpoints as hf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
import torch

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.convert.errors import CheckpointError
from localrun.convert.journal import Journal
from localrun.errors import LocalrunError

UNIT_BYTES = 1 << 14  # small units, so that a tiny model takes hundreds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("checkpoint") / "model")


def plan_for(source: Path, destination: Path, mix: str = "Q8_0", **options: Any) -> Any:
    return make_plan(source, destination, Options(**({"mix": mix, "unit_bytes": UNIT_BYTES} | options)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


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


# --- interrupted

_SLOWLY = """
import sys, time
from pathlib import Path
from localrun.convert import Options, convert, make_plan
source, destination, mix, resume = sys.argv[1:]
plan = make_plan(Path(source), Path(destination), Options(mix=mix, unit_bytes=1 << 14, split_max_bytes=400_000))
print("ready", flush=True)
convert(plan, resume=resume == "yes", sync_bytes=20_000, progress=lambda _: time.sleep(0.01))
"""


def start(source: Path, destination: Path, mix: str, resume: bool) -> subprocess.Popen[str]:
    arguments = [str(source), str(destination), mix, "yes" if resume else "no"]
    process = subprocess.Popen([sys.executable, "-c", _SLOWLY, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_killed_conversion_resumes_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of the writing, then to the end; in parts, so that more than one file is at stake."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert start(folder, whole / "x.gguf", "Q8_0", False).wait() == 0
    choose = random.Random(0)
    progress = []
    for attempt in range(4):
        process = start(folder, killed / "x.gguf", "Q8_0", attempt > 0)
        time.sleep(choose.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not [name for name in names(killed) if name.endswith(".gguf")]
        lines = (killed / "x.gguf.journal").read_text().splitlines()
        progress.append(json.loads(lines[-1]).get("done", 0))
    assert progress == sorted(progress)
    assert progress[-1] > 0, "nothing was journalled before the kills: the resuming below would test nothing"
    assert start(folder, killed / "x.gguf", "Q8_0", True).wait() == 0
    assert names(killed) == names(whole)
    for name in names(whole):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def stop_after(n_units: int) -> Any:
    seen = []

    def count(_: Any) -> None:
        seen.append(None)
        if len(seen) == n_units:
            raise KeyboardInterrupt

    return count


def interrupted(folder: Path, destination: Path, n_units: int, **options: Any) -> Any:
    plan = plan_for(folder, destination, **options)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, progress=stop_after(n_units))
    return plan


def test_an_interrupt_keeps_what_is_written(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    interrupted(folder, path, 50)
    assert names(tmp_path) == ["x.gguf.journal", "x.gguf.partial"]
    with pytest.raises(LocalrunError, match=r"x\.gguf: an unfinished conversion is there; --resume goes on"):
        convert(plan_for(folder, path))
    seen: list[Any] = []
    plan = plan_for(folder, path)
    convert(plan, resume=True, progress=seen.append)
    assert len(seen) <= len(plan.units) - 49
    convert(plan_for(folder, tmp_path / "y.gguf"))
    assert path.read_bytes() == (tmp_path / "y.gguf").read_bytes()
    assert names(tmp_path) == ["x.gguf", "y.gguf"]


def test_what_the_journal_does_not_vouch_for_is_written_anew(folder: Path, tmp_path: Path) -> None:
    """A crash of the machine may lose what was written since the last sync: here it is overwritten with junk."""
    path = tmp_path / "x.gguf"
    plan = plan_for(folder, path)
    with pytest.raises(KeyboardInterrupt):
        convert(plan, progress=stop_after(50), sync_bytes=30_000)
    done = json.loads((tmp_path / "x.gguf.journal").read_text().splitlines()[-1])["done"]
    assert 10 < done <= 50
    unit = plan.units[done]
    place, target = plan.layout.places[unit.target], plan.targets[unit.target]
    offset = place.offset + place.n_bytes // target.n_rows * unit.first_row
    with (tmp_path / "x.gguf.partial").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * (plan.layout.size - offset))
    convert(plan_for(folder, path), resume=True)
    convert(plan_for(folder, tmp_path / "y.gguf"))
    assert path.read_bytes() == (tmp_path / "y.gguf").read_bytes()


def test_resuming_with_other_options_or_sources_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "x.gguf"
    interrupted(copy, path, 50)
    with pytest.raises(LocalrunError, match="belongs to a conversion of other files or with other options"):
        convert(plan_for(copy, path, "F16"), resume=True)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    with pytest.raises(LocalrunError, match="belongs to a conversion of other files or with other options"):
        convert(plan_for(copy, path), resume=True)
    convert(plan_for(copy, path), force=True)
    assert names(tmp_path) == ["model", "x.gguf"]


def test_a_partial_file_that_has_gone_is_written_anew(folder: Path, tmp_path: Path) -> None:
    interrupted(folder, tmp_path / "x.gguf", 50)
    (tmp_path / "x.gguf.partial").unlink()
    convert(plan_for(folder, tmp_path / "x.gguf"), resume=True)
    convert(plan_for(folder, tmp_path / "y.gguf"), resume=True)  # with nothing to resume
    assert (tmp_path / "x.gguf").read_bytes() == (tmp_path / "y.gguf").read_bytes()


@pytest.mark.parametrize("n_renamed", [0, 1, 3])
def test_a_kill_between_the_renames_is_made_good(n_renamed: int, folder: Path, tmp_path: Path) -> None:
    """The state after the last sync, with the last parts renamed and the first not."""
    plan = plan_for(folder, tmp_path / "x.gguf", split_max_bytes=100_000)
    convert(plan)
    contents = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    parts = [part.path for part in plan.layout.parts]
    assert len(parts) > 3
    for path in parts[: len(parts) - n_renamed]:
        path.rename(path.with_name(path.name + ".partial"))
    journal = Journal(tmp_path / "x.gguf.journal", plan.fingerprint)
    journal.record(len(plan.units), complete=True)
    journal.close()
    convert(plan_for(folder, tmp_path / "x.gguf", split_max_bytes=100_000), resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == contents


def test_the_first_part_gets_its_name_last(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds the first part, which is the one to open, finds all of them."""
    renamed: list[str] = []
    replace = os.replace

    def record(old: Path, new: Path) -> None:
        renamed.append(new.name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", record)
    convert(plan_for(folder, tmp_path / "x.gguf", split_max_bytes=100_000))
    assert renamed == sorted(renamed, reverse=True)
    assert len(renamed) > 3


def test_a_line_of_the_journal_that_was_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "x.journal"
    journal = Journal(path, "f")
    journal.record(7)
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"done": 99')
    journal = Journal(path, "f")
    assert journal.done == 7
    journal.record(8)
    journal.close()
    again = Journal(path, "f")
    assert again.done == 8
    with pytest.raises(LocalrunError, match="another conversion to the same file is running"):
        Journal(path, "f")
    again.close()


# --- in the way, full, broken


def test_nothing_is_overwritten_unasked(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_text("mine")
    with pytest.raises(LocalrunError, match=r"x\.gguf: exists already; --force replaces it"):
        convert(plan_for(folder, path))
    assert path.read_text() == "mine"
    convert(plan_for(folder, path), force=True)
    assert path.read_bytes()[:4] == b"GGUF"
    with pytest.raises(LocalrunError, match="is the source itself"):
        convert(plan_for(path, path), force=True)
    with pytest.raises(LocalrunError, match="is a folder"):
        convert(plan_for(folder, tmp_path))
    with pytest.raises(LocalrunError, match="does not exist"):
        convert(plan_for(folder, tmp_path / "no" / "x.gguf"))


def test_too_small_a_disk_is_refused_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(LocalrunError, match=r"x\.gguf: needs [\d,]+ bytes of disk space, 1,000 are free"):
        convert(plan_for(folder, tmp_path / "x.gguf"))


_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from cli.main import run
sys.exit(run(sys.argv[2:]))
"""


def test_a_disk_that_fills_up_is_one_line_and_resumable(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: both fail in pwrite or ftruncate."""
    path = tmp_path / "x.gguf"
    command = [sys.executable, "-c", _LIMITED, "200000", "convert", str(folder), str(path), "--type", "Q8_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[-1].startswith(f"localrun: {path}: the disk is full")
    assert lines[-1].endswith("make room and go on with --resume")
    assert "Traceback" not in done.stderr
    assert not path.exists()
    convert(make_plan(folder, path, Options(mix="Q8_0")), resume=True)
    convert(make_plan(folder, tmp_path / "y.gguf", Options(mix="Q8_0")))
    assert path.read_bytes() == (tmp_path / "y.gguf").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.1.mlp.experts.5.up_proj.weight", 63),
        ("model.layers.2.self_attn.kv_b_proj.weight", 3 * 64 + 63),  # goes into v_b
        ("model.layers.2.self_attn.kv_b_proj.weight", 2 * 64 + 5),  # into k_b, transposed
        ("model.layers.0.input_layernorm.weight", 0),
    ],
)
def test_a_weight_that_is_no_number_is_named(name: str, row: int, value: float, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    hf.edit_tensors(copy, lambda tensors: tensors[name].view(-1, tensors[name].shape[-1])[row].__setitem__(7, value))
    with pytest.raises(CheckpointError) as raised:
        convert(plan_for(copy, tmp_path / "x.gguf"))
    assert str(raised.value) == f"{copy}: tensor '{name}' has {value} at row {row}, column 7"
    assert names(tmp_path) == ["model"]  # nothing is left that --resume could use


def test_a_weight_of_a_reordered_head_is_named(tmp_path: Path) -> None:
    copy = hf.save(hf.make("Llama", hf.LLAMA), tmp_path / "model")
    name = "model.layers.1.self_attn.q_proj.weight"
    hf.edit_tensors(copy, lambda tensors: tensors[name][32 + 19].__setitem__(7, float("nan")))
    with pytest.raises(CheckpointError, match=f"'{name}' has nan at row 51, column 7"):
        convert(plan_for(copy, tmp_path / "x.gguf"))


def test_a_weight_is_named_where_each_expert_is_packed_apart(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    hf.edit_tensors(copy, lambda tensors: tensors[name][3].__setitem__(7, float("nan")))
    imatrix = write_imatrix(tmp_path / "i.gguf", {EXPERTS: np.ones((8, 96))}, {EXPERTS: np.ones((8, 1))})
    with pytest.raises(CheckpointError, match=f"'{name}' has nan at row 3, column 7"):
        convert(plan_for(copy, tmp_path / "x.gguf", imatrix=imatrix, unit_bytes=1 << 26))


def test_a_weight_too_large_for_f16_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    hf.edit_tensors(copy, lambda tensors: tensors["lm_head.weight"][3].__setitem__(7, 70000.0))
    with pytest.raises(
        CheckpointError, match=r"'lm_head\.weight' has 70000 at row 3, column 7, too large for F16; BF16"
    ):
        convert(plan_for(copy, tmp_path / "x.gguf", "F16"))
    convert(plan_for(copy, tmp_path / "x.gguf", "BF16"))


def test_a_shard_that_shrinks_meanwhile_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    plan = plan_for(copy, tmp_path / "x.gguf")
    os.truncate(copy / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is cut off in tensor"):
        convert(plan)


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
    with localrun.gguf.open_gguf(first) as split, localrun.gguf.open_gguf(whole) as one:
        assert [t.data.tobytes() for t in split.tensors.values()] == [t.data.tobytes() for t in one.tensors.values()]
        assert {k: v for k, v in split.metadata.items() if not k.startswith("split.")} == dict(one.metadata)
    assert np.array_equal(llama_cpp_oracle.logits(first, hf.PROMPT), llama_cpp_oracle.logits(whole, hf.PROMPT))
    # and back into one file
    convert(plan_for(first, tmp_path / "joined.gguf", "F32"))
    with localrun.gguf.open_gguf(tmp_path / "joined.gguf") as joined:
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
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LocalrunError, match="types are known for deepseek2 and llama, not for 'qwen3moe'"):
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


def write_imatrix(path: Path, sums: dict[str, np.ndarray], counts: dict[str, np.ndarray], **keys: str) -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", keys.get("type", "imatrix"))
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", sums[name].astype(np.float32))
        writer.add_tensor(f"{name}.counts", counts[name].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


EXPERTS, DENSE = "blk.1.ffn_up_exps.weight", "blk.0.ffn_up.weight"


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
        (np.ones((8, 96)), np.ones((8, 1)), {"type": "model"}, "general.type' is 'model', expected 'imatrix'"),
    ],
)
def test_an_imatrix_that_does_not_fit_is_refused(
    sums: np.ndarray, counts: np.ndarray, keys: dict[str, str], expected: str, folder: Path, tmp_path: Path
) -> None:
    path = write_imatrix(tmp_path / "i.gguf", {EXPERTS: sums}, {EXPERTS: counts}, **keys)
    with pytest.raises(LocalrunError, match=expected):
        plan_for(folder, tmp_path / "x.gguf", imatrix=path)


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
