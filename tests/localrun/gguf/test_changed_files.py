"""Model files that are written to, replaced, removed or cut short while they are in use."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models

import localrun
from localrun.backends.llama_cpp import LlamaCppModel
from localrun.bundled import MINIATURE
from localrun.errors import GGUFError
from localrun.gguf import mapped
from localrun.gguf.file import open_gguf
from localrun.gguf.mapped import path_of
from localrun.text.tokenizer import Tokenizer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_models.shared("llama"), tmp_path / "model.gguf"))


def write_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def replace(path: Path) -> None:
    other = path.with_name("other.gguf")
    shutil.copy(tiny_models.shared("llama", seed=1), other)
    other.replace(path)


@pytest.mark.parametrize("change", [write_a_byte, cut, append])
def test_a_file_that_is_written_to_is_an_error_of_the_next_step(path: Path, change: Callable[[Path], None]) -> None:
    with localrun.load(path, threads=1, ctx=64) as engine:
        session = engine.session()
        assert len(list(session.tokens([1, 2, 3], localrun.Sampling(temperature=0.0), max_tokens=2))) == 2
        change(path)
        with pytest.raises(GGUFError) as caught:
            list(session.tokens([1, 2, 3], localrun.Sampling(temperature=0.0), max_tokens=2))
        assert str(caught.value) == f"{path}: was written to while it was in use; open it again"
        with pytest.raises(GGUFError, match="was written to"):
            engine.logits([1])


def test_a_step_notices_as_well_as_a_request(path: Path) -> None:
    with localrun.load(path, threads=1, ctx=64) as engine:
        tokens = engine.session().tokens([1, 2, 3], localrun.Sampling(temperature=0.0))
        next(tokens)
        write_a_byte(path)
        with pytest.raises(GGUFError, match="was written to while it was in use"):
            list(tokens)


def test_a_file_that_is_replaced_stays_in_use_and_is_said_once(path: Path) -> None:
    notices: list[str] = []
    with localrun.load(path, threads=1, ctx=64, notice=notices.append) as engine:
        before = engine.logits([1, 2, 3])
        replace(path)
        assert (engine.logits([1, 2, 3]) == before).all()
        engine.logits([1])
    assert notices == [f"{path}: was replaced; the file that was opened stays in use until the next start"]


def test_a_file_that_is_removed_is_nobodys_mistake(path: Path) -> None:
    with open_gguf(path) as file:
        path.unlink()
        file.check_unchanged()
        assert file.replaced() is None


def test_llama_cpp_reads_the_file_that_was_checked(path: Path) -> None:
    """Not what its name leads to by then: here a model with other weights, and then none at all."""
    ids = tiny_models.token_ids("llama", 8)
    found = []
    with open_gguf(path) as file:
        for change in (lambda: None, lambda: replace(path), path.unlink):
            change()
            model = LlamaCppModel(path, 64, 1, file=file)
            found.append(model.forward(ids, model.new_cache()))
            model.close()
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()
    model = LlamaCppModel(tiny_models.shared("llama", seed=1), 64, 1)
    assert np.abs(model.forward(ids, model.new_cache()) - found[0]).max() > 0.1  # the other one would have shown
    model.close()


def test_where_descriptors_have_no_paths(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On other systems than Linux llama.cpp opens the name: that it leads elsewhere by then is an error."""
    monkeypatch.setattr(mapped, "_DESCRIPTORS", path / "absent")
    LlamaCppModel(path, 64, 1).close()
    with open_gguf(path) as file:
        replace(path)
        with pytest.raises(GGUFError, match=r"model\.gguf: was replaced just now; open it again"):
            LlamaCppModel(path, 64, 1, file=file)


def test_llama_cpp_reads_all_parts_that_were_checked(tmp_path: Path) -> None:
    """A split model whose parts have been renamed since: llama.cpp by itself looks for their names."""
    import gguf

    reader = gguf.GGUFReader(tiny_models.shared("llama"))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=10)
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    with open_gguf(parts[0]) as file:
        for part in parts:
            part.rename(part.with_name(f"{part.stem[:7]}-renamed.gguf"))
        model = LlamaCppModel(parts[0], 64, 1, file=file)
        assert model.vocab_size == 320
        model.close()


def test_the_tokenizer_reads_the_file_that_was_checked(tmp_path: Path) -> None:
    path = Path(shutil.copy(MINIATURE, tmp_path))
    with open_gguf(path) as file:
        path.unlink()
        tokenizer = Tokenizer(path, file)
    assert tokenizer.decode(tokenizer.encode("Once upon", add_special=False)) == "Once upon"
    tokenizer.close()


@pytest.mark.parametrize("has_memfd", [True, False])
def test_path_of_bytes(has_memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    with path_of(b"content") as path:
        assert Path(path).read_bytes() == b"content"
    assert not Path(path).exists()


def test_descriptors_are_closed(path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    broken = path.with_name("broken.gguf")
    broken.write_bytes(path.read_bytes()[:5000])
    before = count()
    for _ in range(3):
        open_gguf(path).close()
        for wrong in (broken, path.with_name("absent.gguf"), path.parent):
            with pytest.raises(GGUFError):
                open_gguf(wrong)
    assert count() == before


_CUT = """
import mmap, sys, threading
from pathlib import Path
import localrun
from localrun.gguf.file import open_gguf
file = open_gguf(Path(sys.argv[1]))
if sys.argv[2:]:
    from localrun.gguf.bus_error import exit_with
    exit_with("another line")
    exit_with(sys.argv[2])
with open(sys.argv[1], "r+b") as raw:
    raw.truncate(4096)
thread = threading.Thread(target=lambda: file.tensors["output.weight"].data.sum())
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "said"), [(["käse was cut"], 1, "käse was cut\n"), ([], -signal.SIGBUS, "")]
)
def test_reading_what_was_cut_off(path: Path, arguments: list[str], code: int, said: str) -> None:
    """A line and exit code 1 where a program asks for them, in whatever thread; importing alone installs nothing."""
    command = [sys.executable, "-c", _CUT, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)


def test_command_whose_model_is_cut_short(tmp_path: Path) -> None:
    """Whether a step notices that the file has changed or a kernel reads what is gone, it is a line."""
    path = Path(shutil.copy(MINIATURE, tmp_path))
    command = [str(Path(sys.executable).with_name("localrun")), "generate", str(path), "-p", "Once", "-n", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.read(1)
        os.truncate(path, 4096)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    *_, last = said.splitlines()
    assert last.startswith(f"localrun: {path}: was ") and "Traceback" not in said
