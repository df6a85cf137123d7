"""Conversions that end early: killed, interrupted, on a full disk, on a bad weight; and how they go on."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import numpy as np
import pytest
from conversions import EXPERTS, names, plan_for, write_imatrix

from localrun.convert import Options, convert, make_plan
from localrun.convert.errors import CheckpointError
from localrun.convert.journal import Journal
from localrun.errors import LocalrunError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("checkpoint") / "model")


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


def done_in(journal: Path) -> int:
    """Units that are written for good, by the journal's last whole line."""
    lines = journal.read_text().split("\n")[:-1] if journal.exists() else []
    return json.loads(lines[-1]).get("done", 0) if lines else 0


def test_a_killed_conversion_resumes_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of the writing, then to the end; in parts, so that more than one file is at stake.

    However slow the machine is, each run gets some way.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert start(folder, whole / "x.gguf", "Q8_0", False).wait() == 0
    choose = random.Random(0)
    progress, journal = [0], killed / "x.gguf.journal"
    for attempt in range(3):
        process = start(folder, killed / "x.gguf", "Q8_0", attempt > 0)
        while done_in(journal) == progress[-1]:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(choose.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not [name for name in names(killed) if name.endswith(".gguf")]
        progress.append(done_in(journal))
    assert progress == sorted(set(progress))
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


@pytest.mark.parametrize("is_gguf", [False, True])
def test_a_source_that_changes_meanwhile_leaves_no_file(is_gguf: bool, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    changed = copy / "model.safetensors"
    if is_gguf:
        copy = changed = tmp_path / "source.gguf"
        convert(plan_for(folder, copy))
    plan = plan_for(copy, tmp_path / "x.gguf")
    with pytest.raises(CheckpointError) as caught:
        convert(plan, progress=lambda _: os.utime(changed, ns=(0, 0)))
    assert str(caught.value) == f"{changed}: was written to while it was being converted; convert it anew"
    assert not list(tmp_path.glob("x.gguf*"))


# --- files of others, links, journals that say what is not so


def test_a_refused_conversion_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    for _ in range(2):
        with pytest.raises(LocalrunError, match="bytes of disk space"):
            convert(plan_for(folder, tmp_path / "x.gguf"))
        assert names(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["text", "link", "hard link", "broken link", "folder"])
def test_a_partial_file_of_somebody_else_stays(folder: Path, tmp_path: Path, kind: str, force: bool) -> None:
    victim, partial = tmp_path / "victim", tmp_path / "x.gguf.partial"
    victim.write_text("precious")
    if kind == "folder":
        partial.mkdir()
    elif kind == "text":
        partial.write_text("mine")
    elif kind == "hard link":
        partial.hardlink_to(victim)
    else:
        partial.symlink_to(victim if kind == "link" else tmp_path / "none")
    with pytest.raises(LocalrunError, match=r"x\.gguf\.partial: is there, and no part of an unfinished conversion"):
        convert(plan_for(folder, tmp_path / "x.gguf"), force=force)
    assert victim.read_text() == "precious" and names(tmp_path) == ["victim", "x.gguf.partial"]


@pytest.mark.parametrize("kind", ["text", "link", "broken link", "folder", "pipe"])
def test_what_has_a_journals_name_stays(folder: Path, tmp_path: Path, kind: str) -> None:
    victim, journal = tmp_path / "victim", tmp_path / "x.gguf.journal"
    victim.write_text("precious")
    if kind == "folder":
        journal.mkdir()
    elif kind == "pipe":
        os.mkfifo(journal)
    elif kind == "text":
        journal.write_text("my diary\n")
    else:
        journal.symlink_to(victim if kind == "link" else tmp_path / "none")
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(LocalrunError, match=r"x\.gguf\.journal: is (no journal|a link or no file).*in the way"):
            convert(plan_for(folder, tmp_path / "x.gguf"), **options)
    assert victim.read_text() == "precious" and names(tmp_path) == ["victim", "x.gguf.journal"]
    assert kind != "text" or journal.read_text() == "my diary\n"


@pytest.mark.parametrize("kind", ["pipe", "broken link", "endless link"])
def test_only_files_are_replaced(folder: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.gguf"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if kind == "endless link" else tmp_path / "none")
    with pytest.raises(LocalrunError, match="is a device, a pipe or a broken link"):
        convert(plan_for(folder, path), force=True)
    assert os.path.lexists(path) and not path.is_file()


@pytest.mark.parametrize("name", ["config.json", "README.md", "model.safetensors"])
def test_a_file_of_the_source_is_not_replaced(folder: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "README.md").write_text("mine")
    before = (copy / name).read_bytes()
    with pytest.raises(LocalrunError, match="is the source itself"):
        convert(plan_for(copy, copy / name), force=True)
    assert (copy / name).read_bytes() == before


def test_the_imatrix_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    imatrix = write_imatrix(tmp_path / "i.gguf", {EXPERTS: np.ones((8, 96))}, {EXPERTS: np.ones((8, 1))})
    with pytest.raises(LocalrunError, match=r"i\.gguf: is the source itself"):
        convert(plan_for(folder, imatrix, imatrix=imatrix), force=True)


def test_an_imatrix_that_is_a_pipe_is_not_waited_for(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "i.gguf")
    with pytest.raises(LocalrunError, match=r"i\.gguf: is not a regular file"):
        plan_for(folder, tmp_path / "x.gguf", imatrix=tmp_path / "i.gguf")


_LINES = [
    *['{"done": -1}', '{"done": true}', '{"done": "7"}', '{"done": 1e3}', '{"done": 1000000000}', "{}", "[]", "7"],
    *["null", '{"done": 7, "complete": 1}', "[" * 10_000, '{"done": 1000000000, "complete": true}', "\xff"],
    '{"done": 7, "complete": true}',
]


@pytest.mark.parametrize("line", _LINES, ids=range(len(_LINES)))
def test_a_journal_is_checked_before_it_is_believed(folder: Path, tmp_path: Path, line: str) -> None:
    """What no conversion writes does not count, nor what the files don't bear out: the result is whole all the same."""
    path = tmp_path / "x.gguf"
    interrupted(folder, path, 50)
    with (tmp_path / "x.gguf.journal").open("a") as file:
        file.write(line + "\n")
    convert(plan_for(folder, path), resume=True)
    assert path.read_bytes() == whole(folder)
    assert names(tmp_path) == ["x.gguf"]


@pytest.mark.parametrize("loss", ["partial", "header", "size"])
def test_a_journal_that_calls_complete_what_is_not_there(folder: Path, tmp_path: Path, loss: str) -> None:
    path, partial = tmp_path / "x.gguf", tmp_path / "x.gguf.partial"
    plan = interrupted(folder, path, 50)
    journal = Journal(tmp_path / "x.gguf.journal", plan.fingerprint)
    journal.record(len(plan.units), complete=True)
    journal.close()
    if loss == "partial":
        partial.unlink()
    elif loss == "size":
        os.truncate(partial, 1000)
    else:
        partial.write_bytes(bytes(partial.stat().st_size))
    convert(plan_for(folder, path), resume=True)
    assert path.read_bytes() == whole(folder)


@functools.cache
def whole(folder: Path) -> bytes:
    """The result of the conversion, undisturbed."""
    with tempfile.TemporaryDirectory() as name:
        convert(plan_for(folder, Path(name) / "x.gguf"))
        return (Path(name) / "x.gguf").read_bytes()
