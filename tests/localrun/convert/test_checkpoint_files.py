"""Which files and tensors are the checkpoint: those that transformers' from_pretrained reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from localrun.convert import Options, convert, make_plan
from localrun.convert.errors import CheckpointError
from localrun.errors import GGUFError
from localrun.gguf.file import open_gguf

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n"
INDEX, SHARD, EMBEDDING = (
    "model.safetensors.index.json",
    "model-00001-of-00001.safetensors",
    "model.embed_tokens.weight",
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("Llama", hf.LLAMA | {"num_hidden_layers": 1}), tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "model")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def add_shard(folder: Path, factor: float, **index: Any) -> None:
    """A shard with an index beside what is there, its weights multiplied."""
    scaled = {name: tensor * factor for name, tensor in tensors(folder).items()}
    save_file(scaled, folder / SHARD, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(scaled, SHARD) | index}))


def embedding_of(folder: Path) -> np.ndarray:
    """What the converted file has for the embedding."""
    path = folder.with_suffix(".gguf")
    convert(make_plan(folder, path, Options(mix="F32")))
    with open_gguf(path) as file:
        tensor = file.tensors["token_embd.weight"]
        return tensor.data.view(np.float32).reshape(tensor.shape).copy()


def theirs(folder: Path) -> np.ndarray:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).model.embed_tokens.weight.detach().numpy()


def appledouble(folder: Path) -> None:
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7" + bytes(200))


def half_precision(folder: Path) -> None:
    save_file({name: tensor.half() for name, tensor in tensors(folder).items()}, folder / "model.fp16.safetensors")


def stale_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {EMBEDDING: "model-00001-of-00002.safetensors"}}))


def other(name: str) -> Callable[[Path], None]:
    return lambda folder: save_file({"layers.0.x": torch.zeros(4, 4)}, folder / name)


BESIDE: dict[str, tuple[Callable[[Path], None], str]] = {
    "an adapter": (other("adapter_model.safetensors"), "adapter_model.safetensors"),
    "the original format": (other("consolidated.safetensors"), "consolidated.safetensors"),
    "an optimizer": (other("optimizer.safetensors"), "optimizer.safetensors"),
    "a variant": (half_precision, "model.fp16.safetensors"),
    "macOS's": (appledouble, ""),
    "shards with an index": (lambda folder: add_shard(folder, 0.5), SHARD),
    "an index without shards": (stale_index, INDEX),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_a_whole_model_is_left_alone(case: str, folder: Path) -> None:
    change, named = BESIDE[case]
    change(folder)
    assert np.array_equal(embedding_of(folder), theirs(folder))
    warnings = make_plan(folder, folder / "x.gguf", Options(mix="F32")).warnings
    lines = [line for line in warnings if "not read, as in transformers" in line]
    assert len(lines) == bool(named) and all(named in line for line in lines)


def test_an_index_is_read_where_there_is_no_whole_model(folder: Path) -> None:
    """Its entries for tensors that nobody needs, or that no shard has, are no matter, as in transformers."""
    add_shard(folder, 0.5, **{"model.layers.0.self_attn.rotary_emb.inv_freq": SHARD})
    (folder / "model.safetensors").unlink()
    assert np.array_equal(embedding_of(folder), theirs(folder))


def test_a_file_that_config_json_names_is_read(folder: Path) -> None:
    save_file(
        {name: tensor * 2 for name, tensor in tensors(folder).items()}, folder / "w.safetensors", {"format": "pt"}
    )
    hf.edit_config(folder, transformers_weights="w.safetensors")
    assert np.array_equal(embedding_of(folder), theirs(folder))


def test_a_tensor_that_the_index_names_and_its_shard_lacks_is_missing(folder: Path) -> None:
    add_shard(folder, 1.0)
    hf.edit_tensors(folder, lambda t: t.pop(EMBEDDING), SHARD)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"'{EMBEDDING}' is missing; .* the index says it is in {SHARD}"):
        make_plan(folder, folder / "x.gguf", Options(mix="F32"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_what_every_runner_computes_may_have_any_dtype(dtype: torch.dtype, folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    hf.edit_tensors(folder, lambda t: t.update({name: torch.zeros(8, dtype=dtype)}))
    assert make_plan(folder, folder / "x.gguf", Options(mix="F32")).targets


@pytest.mark.parametrize("differs", [True, False])
def test_a_head_of_its_own_beside_a_tie_flag(differs: bool, folder: Path) -> None:
    """transformers ties only what is equal, whatever config.json says."""
    if not differs:
        hf.edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    hf.edit_config(folder, tie_word_embeddings=True)
    plan = make_plan(folder, folder / "x.gguf", Options(mix="F32"))
    assert [target.name for target in plan.targets if target.name == "output.weight"] == ["output.weight"] * differs
    assert any("has another head, which is kept" in line for line in plan.warnings) == differs


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", INDEX])
def test_a_git_lfs_pointer_is_named_as_one(name: str, folder: Path) -> None:
    if name == INDEX:
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(POINTER)
    if name == "generation_config.json":  # hints, which stop nothing
        (line,) = [line for line in make_plan(folder, folder / "x.gguf", Options()).warnings if name in line]
    else:
        with pytest.raises(CheckpointError) as raised:
            make_plan(folder, folder / "x.gguf", Options())
        line = str(raised.value)
    assert f"{folder / name}: is a Git LFS pointer" in line and "git lfs pull" in line


def test_a_gguf_that_is_a_git_lfs_pointer_is_named_as_one(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(POINTER)
    with pytest.raises(GGUFError, match=r"x\.gguf: is a Git LFS pointer"):
        open_gguf(path)


def test_a_byte_order_mark_is_no_matter(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert make_plan(folder, folder / "x.gguf", Options(mix="F32")).targets
