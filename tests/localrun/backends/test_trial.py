"""Files on which llama.cpp ends the process that loads them: found out in another one, and said in a line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz_gguf
import pytest
import tiny_models
from gguf import GGMLQuantizationType as Type

import localrun
from localrun.backends import trial
from localrun.backends.llama_cpp import LlamaCppModel
from localrun.errors import GGUFError, LocalrunError
from localrun.gguf.file import open_gguf

Change = Callable[[fuzz_gguf.Model], None]


def with_type(name: str, type_: Type) -> Change:
    """A tensor said to be of another type; types that take fewer bytes leave the rest of it unused."""

    def change(model: fuzz_gguf.Model) -> None:
        tensor = next(tensor for tensor in model.tensors if tensor.name == name.encode())
        tensor.type = int(type_)
        fuzz_gguf.fit(tensor)

    return change


def write(folder: Path, base: str, change: Change) -> Path:
    model = fuzz_gguf.bases()[base].copy()
    change(model)
    path = folder / "model.gguf"
    path.write_bytes(model.build())
    return path


CRASHES = {
    "a matrix of whole numbers": ("qwen2", with_type("blk.0.attn_q.weight", Type.I32), "it ends with SIG"),
    "an embedding of F64": ("qwen2", with_type("token_embd.weight", Type.F64), "it ends with SIG"),
}
REFUSED = {
    "F16 norm": (
        "llama",
        with_type("output_norm.weight", Type.F16),
        "'output_norm.weight' has type F16; llama.cpp com",
    ),
    "BF16 bias": (
        "qwen2",
        with_type("blk.1.attn_k.bias", Type.BF16),
        "'blk.1.attn_k.bias' has type BF16; llama.cpp com",
    ),
    "I32 norm": (
        "qwen2",
        with_type("blk.1.ffn_norm.weight", Type.I32),
        "'blk.1.ffn_norm.weight' has type I32; llama.cpp",
    ),
}


@pytest.mark.parametrize("name", CRASHES | REFUSED)
def test_what_would_crash_is_a_line(name: str, tmp_path: Path) -> None:
    base, change, problem = (CRASHES | REFUSED)[name]
    path = write(tmp_path, base, change)
    with pytest.raises(LocalrunError) as caught:
        localrun.load(path, threads=1, ctx=64, backend="llama.cpp")
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and problem in said and "\n" not in said and "/proc/" not in said


@pytest.mark.parametrize("type_", [Type.I32, Type.I8, Type.F64])
@pytest.mark.parametrize("base", ["llama", "deepseek2", "qwen3moe"])
def test_a_wrong_type_in_a_known_architecture_is_the_files_fault(base: str, type_: Type, tmp_path: Path) -> None:
    """Not something that another backend may know how to compute."""
    for tensor in ("blk.1.attn_norm.weight", "output.weight"):
        path = write(tmp_path, base, with_type(tensor, type_))
        with pytest.raises(GGUFError, match=f"tensor '{tensor}' has type {type_.name}; expected F32"):
            localrun.load(path, threads=1, ctx=64)


def test_a_file_is_tried_once_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path, "qwen2", lambda model: None)
    LlamaCppModel(path, 64, 1).close()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried again")

    monkeypatch.setattr(subprocess, "run", refuse)
    LlamaCppModel(path, 64, 1).close()
    path.write_bytes(path.read_bytes())
    with pytest.raises(AssertionError, match="tried again"):
        LlamaCppModel(path, 64, 1)


def test_what_llama_cpp_says_names_the_file(tmp_path: Path) -> None:
    def unknown(model: fuzz_gguf.Model) -> None:
        model.tensors.append(fuzz_gguf.Record(b"blk.0.extra.weight", [8], int(Type.F32), bytes(32)))

    path = write(tmp_path, "qwen2", unknown)
    with pytest.raises(LocalrunError) as caught:
        LlamaCppModel(path, 64, 1)
    assert str(caught.value).startswith(f"{path}: llama.cpp cannot load it: ") and "/proc/" not in str(caught.value)


@pytest.mark.parametrize("gone", ["/absent/python", "/bin/false"])
def test_a_trial_that_cannot_be_made(gone: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path, "qwen2", lambda model: None)
    monkeypatch.setattr(sys, "executable", gone)
    with pytest.raises(LocalrunError) as caught:
        LlamaCppModel(path, 64, 1)
    assert "llama.cpp" in str(caught.value) and "\n" not in str(caught.value)


def test_a_trial_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_BASE_S", -1e9)
    with (
        open_gguf(tiny_models.shared("llama-tied")) as file,
        pytest.raises(LocalrunError, match=r"llama\.cpp takes more than .* s to load it"),
    ):
        trial.try_out(file, 1, False)
