"""localrun pull, list and remove against a hub of our own: every way to fail is one line, and nothing half is whole."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import Hub, serving

from cli.main import run
from localrun.bundled import MINIATURE, model_path
from localrun.errors import LocalrunError
from localrun.hub import download, names, remote, store

REPO = "someone/Tiny-GGUF"
PARTS = [f"Q8_0/tiny-Q8_0-0000{index}-of-00003.gguf" for index in (1, 2, 3)]


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    rng = random.Random(1)
    return {
        "tiny-Q5_K_M.gguf": MINIATURE.read_bytes(),
        **{path: rng.randbytes(300_000 + index) for index, path in enumerate(PARTS)},
        "mmproj-tiny-F16.gguf": b"x" * 100,
        "README.md": b"# words",
    }


@pytest.fixture
def hub(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving({REPO: contents}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("LOCALRUN_MODELS", str(tmp_path / "models"))
        monkeypatch.setattr(download, "PAUSE_S", 0.0)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # other tests' imports want no network
        yield hub


@pytest.fixture
def models(hub: Hub, tmp_path: Path) -> Path:
    return tmp_path / "models"


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path) -> list[str]:
    return [str(each.reference) for each in store.stored(folder)]


def failed(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that fails."""
    assert run(args) == 1
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("localrun: "), err
    return err


def test_a_repository_is_listed(hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", REPO]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["Q8_0", "Q5_K_M"]
    assert "878.9 KiB  fits, 3 parts" in out and "to download one: localrun pull someone/Tiny-GGUF:QUANT" in err
    assert not models.exists()
    assert run(["pull", REPO, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    from localrun.plan.measure import unmeasured
    from localrun.plan.memory import plan_memory
    from localrun.plan.shapes import load_model, n_bytes

    shape = load_model(str(MINIATURE))
    planned = sum(plan_memory(shape, unmeasured(), 8192).needed.values())
    besides = rows[0]["needed_bytes"] - rows[0]["bytes"]
    assert abs(besides - (planned - n_bytes(shape.tensors))) < 64 << 20  # of which this process's own size moves
    assert rows[0]["files"] == PARTS


def test_a_model_is_pulled_and_used(
    hub: Hub, models: Path, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = models / REPO / "tiny-Q5_K_M.gguf"
    assert run(["pull", f"{REPO}:q5_k_m"]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert path.read_bytes() == contents[path.name] and list(files(models)) == [f"{REPO}/{path.name}"]
    assert model_path(f"{REPO}:Q5_K_M") == model_path(REPO) == path
    hub.asked.clear()
    assert run(["pull", f"{REPO}:Q5_K_M"]) == 0
    assert not hub.asked
    assert run(["pull", f"{REPO}:Q8_0", "--json"]) == 0
    capsys.readouterr()
    assert whole(models) == [f"{REPO}:Q8_0", f"{REPO}:Q5_K_M"]
    assert [(models / REPO / part).read_bytes() for part in PARTS] == [contents[part] for part in PARTS]
    assert run(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == whole(models)
    assert run(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["path"] == str(models / REPO / PARTS[0])
    assert run(["inspect", f"{REPO}:Q5_K_M", "--json"]) == 0
    assert run(["remove", f"{REPO}:Q8_0"]) == 0
    assert whole(models) == [f"{REPO}:Q5_K_M"] and run(["remove", REPO]) == 0
    assert files(models) == {} and not (models / "someone").exists()


def test_a_file_that_git_keeps_itself_is_checked_too(
    hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.is_plain = True
    assert run(["pull", f"{REPO}:Q8_0"]) == 0
    hub.spoilt[PARTS[0]] = bytes(300_000)
    shutil.rmtree(models)
    capsys.readouterr()
    assert "has the hash" in failed(["pull", f"{REPO}:Q8_0"], capsys)


def test_what_was_interrupted_goes_on(
    hub: Hub, models: Path, contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks within the second part, again and again; then the program is ended."""
    monkeypatch.setattr(remote, "_CHUNK", 1000)
    monkeypatch.setattr(download, "N_TRIES", 3)
    hub.cuts = [400_000, 100_000, 0, 50_000, 0, 0]
    repository = remote.Repository(REPO)
    model = names.choose(names.models_of(repository.files), names.reference(f"{REPO}:Q8_0"), "there")
    with pytest.raises(LocalrunError, match=r"the hub cannot be reached|the connection ended early"):
        download.download(repository, model, models)
    left = files(models)
    assert whole(models) == [] and set(left) == {f"{REPO}/.unfinished/{part}" for part in PARTS[:2]}
    assert left[f"{REPO}/.unfinished/{PARTS[1]}"] == 150_000 and not hub.cuts
    hub.asked.clear()
    at_end = []
    path = download.download(repository, model, models, lambda *progress: at_end.append(progress))
    assert hub.asked == [(150_000, 300_001), (0, 300_002)]
    assert path == models / REPO / PARTS[0] and whole(models) == [f"{REPO}:Q8_0"]
    assert [(models / REPO / part).read_bytes() for part in PARTS] == [contents[part] for part in PARTS]
    assert at_end[0][:2] > (450_000, 900_003) and at_end[-1] == (900_003, 900_003, "Checking")


def test_a_server_without_ranges_gives_whole_files_only(
    hub: Hub, models: Path, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.ignores_ranges = True
    waiting = store.unfinished(models, REPO, PARTS[1])
    waiting.parent.mkdir(parents=True)
    waiting.write_bytes(contents[PARTS[1]][:7])
    assert "the hub gives no part of" in failed(["pull", f"{REPO}:Q8_0"], capsys)
    waiting.unlink()
    assert run(["pull", f"{REPO}:Q8_0"]) == 0 and whole(models) == [f"{REPO}:Q8_0"]


def test_wrong_sizes_and_hashes_keep_nothing_as_whole(
    hub: Hub, models: Path, contents: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.spoilt[PARTS[2]] = b"short"
    assert "has 5 bytes there, expected 300002" in failed(["pull", f"{REPO}:Q8_0"], capsys)
    hub.spoilt[PARTS[2]] = bytes(300_002)
    assert "has the hash" in failed(["pull", f"{REPO}:Q8_0"], capsys)
    assert whole(models) == [] and f"{REPO}/.unfinished/{PARTS[2]}" not in files(models)
    with pytest.raises(LocalrunError, match=f"{REPO}:Q8_0: not in .*; localrun pull {REPO}:Q8_0"):
        model_path(f"{REPO}:Q8_0")
    hub.spoilt.clear()
    hub.asked.clear()
    assert run(["pull", f"{REPO}:Q8_0"]) == 0 and whole(models) == [f"{REPO}:Q8_0"]
    assert hub.asked[0] == (0, 300_002)  # the first two parts have come before


def test_a_part_that_the_repository_lacks_is_told(hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files = {REPO: {path: content for path, content in hub.files[REPO].items() if path != PARTS[1]}}
    assert "Q8_0 has 2 of 3 parts there" in failed(["pull", f"{REPO}:Q8_0"], capsys)


ANSWERS = {
    "gated": (401, "GatedRepo", "is gated; accept its terms at"),
    "forbidden": (403, "GatedRepo", "is gated; accept its terms at"),
    "missing": (404, "RepoNotFound", "no such repository, or a private one"),
    "not logged in": (401, "RepoNotFound", "no such repository, or a private one"),
    "teapot": (418, "", "the hub answers with status 418"),
    "no hub": (200, "", "the answer is not a hub's"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_a_repository_that_cannot_be_had_is_one_line(
    case: str, hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, word, expected = ANSWERS[case]
    hub.statuses[REPO] = (status, word)
    assert expected in failed(["pull", f"{REPO}:Q8_0"], capsys)
    assert not models.exists()


def test_wrong_names_are_one_line(hub: Hub, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "not there; there is Q8_0, Q5_K_M" in failed(["pull", f"{REPO}:Q9"], capsys)
    assert "expected OWNER/NAME" in failed(["pull", "https://x/y/z"], capsys)
    assert "no such repository" in failed(["pull", "someone/else"], capsys)
    hub.files[REPO] = {"../../up-Q8_0.gguf": b"xx"}
    assert "which is no name that can be used here" in failed(["pull", f"{REPO}:Q8_0"], capsys)
    hub.files[REPO] = {"README.md": b"x"}
    assert "no GGUF file is there" in failed(["pull", REPO], capsys)
    assert "not in" in failed(["remove", f"{REPO}:Q8_0"], capsys)


def test_without_a_network_it_is_one_line(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for endpoint in ("http://127.0.0.1:9", "foo"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        assert "the hub cannot be reached" in failed(["pull", f"{REPO}:Q8_0"], capsys)


def test_a_full_disk_is_one_line(
    hub: Hub, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "900,003 bytes are still to come, 1,000 are free" in failed(["pull", f"{REPO}:Q8_0"], capsys)
        assert not models.exists()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "cannot be written: No space left on device" in failed(
        ["pull", f"{REPO}:Q8_0", "--folder", str(models)], capsys
    )
    assert whole(models) == []


def test_quants_are_told_apart() -> None:
    paths = ["m-UD-Q4_K_XL.gguf", "m.Q4_K_M.gguf", "m-IQ2_XXS.gguf", "BF16/m-BF16-00001-of-00002.gguf", "ggml.gguf"]
    paths += ["a-q8_0.gguf", "b-q8_0.gguf", "imatrix-Q4_0.gguf", "m-MXFP4_MOE.gguf", "m-7B.gguf"]
    found = names.models_of(names.File(path, 1) for path in paths)
    assert sorted(model.quant for model in found) == [
        "BF16", "IQ2_XXS", "MXFP4_MOE", "Q4_K_M", "UD-Q4_K_XL", "a-q8_0", "b-q8_0", "ggml", "m-7B"
    ]  # fmt: skip
    assert [model.is_whole for model in found if model.quant == "BF16"] == [False]
    assert names.parse("a/b:Q4_0") == names.Reference("a/b", "Q4_0") and names.parse("models/") is None
