"""Headers as they are published, written otherwise than most: what one tool reads, all of ours read the same way."""

from __future__ import annotations

import json
from pathlib import Path

import fuzz_gguf
import gguf
import gguf_builder as b
import llama_cpp_oracle
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Value
from vocabularies import write_vocabulary

import localrun
from cli.main import run
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.models.summary import summary_of
from localrun.text.tokenizer import Tokenizer

IDS = [1, 5, 7, 2, 40, 11]
EXACT = 1e-3  # of the range: as in network/test_logits.py


def key_of(model: fuzz_gguf.Model, ending: str) -> fuzz_gguf.Key:
    return next(key for key in model.keys if key.name.endswith(ending.encode()))


def by_layer(model: fuzz_gguf.Model, ending: str, items: list[int], item: int = b.U32) -> None:
    key = key_of(model, ending)
    key.type, key.value, key.item = b.ARRAY, items, item


def write(folder: Path, model: fuzz_gguf.Model) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(model.build())
    return path


def narrow_second_layer(architecture: str) -> fuzz_gguf.Model:
    """The llama base under another name, layer 1 with a feed-forward of 64 in place of 96."""
    model = fuzz_gguf.bases()["llama"].copy()
    for key in model.keys:
        key.name = key.name.replace(b"llama.", architecture.encode() + b".")
    key_of(model, "general.architecture").value = architecture.encode()
    by_layer(model, ".feed_forward_length", [96, 64])
    for tensor in model.tensors:
        if tensor.name.startswith(b"blk.1.ffn_") and b"norm" not in tensor.name:
            tensor.ne = [64 if n == 96 else n for n in tensor.ne]
            fuzz_gguf.fit(tensor)
    return model


@pytest.mark.parametrize("item", [b.U32, b.I32])
@pytest.mark.parametrize("base", ["llama", "qwen3moe", "deepseek2"])
def test_the_same_number_for_every_layer_is_that_number(base: str, item: int, tmp_path: Path) -> None:
    for ending in (".feed_forward_length", ".attention.head_count", ".attention.head_count_kv"):
        plain, model = fuzz_gguf.bases()[base], fuzz_gguf.bases()[base].copy()
        number = key_of(model, ending).value
        by_layer(model, ending, [number, number], item)
        path, expected = write(tmp_path, model), tmp_path / "plain.gguf"
        expected.write_bytes(plain.build())
        with open_gguf(path) as file, open_gguf(expected) as other:
            found, wanted = summary_of(file), summary_of(other)
        assert found["native"] and found["config"] == wanted["config"]


def test_numbers_that_differ_by_layer_run_with_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """inspect says so too; bench and plan, which are of native models alone, give the same reason."""
    path, reason = write(tmp_path, narrow_second_layer("deci")), "architecture 'deci' is not native"
    with open_gguf(path) as file:
        found = summary_of(file)
    assert (found["native"], found["backend"], found["not_native_because"]) == (False, "llama.cpp", reason)
    notices: list[str] = []
    expected = llama_cpp_oracle.logits(path, IDS)
    with localrun.load(path, threads=1, ctx=64, notice=notices.append) as engine:
        assert engine.backend == "llama.cpp"
        logits = engine.logits(IDS)
    assert notices == [f"{path}: {reason}; running it with llama.cpp"]
    # llama.cpp's usual context keeps keys and values in 16 bits.
    assert np.abs(logits - expected).max() < 5e-3 * np.ptp(expected)
    for command in (["bench", str(path)], ["plan", str(path), "--machine", "desktop"]):
        assert run(command) == 1
        assert capsys.readouterr().err == f"localrun: {path}: {reason}\n"


def test_numbers_that_nobody_reads_by_layer(tmp_path: Path) -> None:
    """llama.cpp has one width for all layers of a llama, too."""
    path, notices = write(tmp_path, narrow_second_layer("llama")), []
    with pytest.raises(LocalrunError, match=r"llama\.cpp cannot load it: .*blk\.1\.ffn_gate\.weight.* wrong shape"):
        localrun.load(path, threads=1, ctx=64, notice=notices.append)
    reason = "key 'llama.feed_forward_length' is another number from layer to layer, which is not native"
    assert notices == [f"{path}: {reason}; running it with llama.cpp"]


@pytest.mark.parametrize(
    ("base", "width"),
    [("deepseek2", "kv_lora_rank"), ("deepseek2", "qk_nope_head_dim"), ("deepseek2", "v_head_dim")],
)
def test_odd_widths_run(base: str, width: str) -> None:
    """Before a rotated part, rows then begin at odd places."""
    from dataclasses import replace

    import tiny_models

    path = tiny_models.shared(replace(tiny_models.SMALLEST, **{width: 17}))
    expected = llama_cpp_oracle.logits(path, IDS)
    with localrun.load(path, threads=1, ctx=64, backend="native") as engine:
        assert np.abs(engine.logits(IDS) - expected).max() < EXACT * np.ptp(expected)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", "a", "b", "ab", "\u2581a"]


def write_pieces(path: Path, scores: list, item: Value) -> Path:
    """A SentencePiece vocabulary, whose scores say what is merged first."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(PIECES) - 259)])
    writer.add_key_value("tokenizer.ggml.scores", scores, Value.ARRAY, item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_whole_numbers_as_scores(tmp_path: Path) -> None:
    scores = [0] * 259 + [-9, -8, -7, -3, -2]
    tokenizers = [
        Tokenizer(write_pieces(tmp_path / f"{item}.gguf", [kind(score) for score in scores], item))
        for item, kind in ((Value.FLOAT32, float), (Value.INT32, int))
    ]
    for text in ("ab", "ab a b", " aabb ab"):
        expected, found = (tokenizer.encode(text) for tokenizer in tokenizers)
        assert found == expected and len(found) < len(text) + 2  # something was merged
    other = Tokenizer(write_pieces(tmp_path / "other.gguf", [-score for score in scores], Value.INT32))
    assert other.encode("ab") != tokenizers[0].encode("ab")  # so the scores count


@pytest.mark.parametrize("item", [Value.INT32, Value.UINT32])
def test_whole_numbers_as_scores_of_byte_pairs(item: Value, tmp_path: Path) -> None:
    n_tokens = (
        len(write_vocabulary(tmp_path / "count.gguf").read_bytes()) and Tokenizer(tmp_path / "count.gguf").n_vocab
    )
    path = tmp_path / "scores.gguf"
    raw = fuzz_gguf.parse(tmp_path / "count.gguf")
    raw.keys.append(fuzz_gguf.Key(b"tokenizer.ggml.scores", b.ARRAY, list(range(n_tokens)), int(item)))
    path.write_bytes(raw.build())
    assert Tokenizer(path).encode("he said") == Tokenizer(tmp_path / "count.gguf").encode("he said")


@pytest.mark.parametrize("item", [b.I8, b.I16, b.U64, b.F64, b.STRING])
def test_scores_that_are_none(item: int, tmp_path: Path) -> None:
    model = fuzz_gguf.parse(write_vocabulary(tmp_path / "plain.gguf"))
    model.keys.append(fuzz_gguf.Key(b"tokenizer.ggml.scores", b.ARRAY, [b"0"] if item == b.STRING else [0], item))
    path = write(tmp_path, model)
    with pytest.raises(
        LocalrunError, match=r"key 'tokenizer.ggml.scores' has type array of .*, expected array of float32"
    ):
        Tokenizer(path)


def write_imatrix(path: Path) -> Path:
    keys = [b.key("general.type", b.STRING, "imatrix")]
    path.write_bytes(b.build(keys, [b.tensor("blk.0.ffn_down.weight.counts", [1, 1], Type.F32, 0)], bytes(32)))
    return path


def test_an_importance_matrix_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_imatrix(tmp_path / "imatrix.gguf")
    assert run(["inspect", str(path)]) == 0
    assert f"{'kind':<24} importance matrix, no model\n" in capsys.readouterr().out
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "importance matrix"
    for command in (["generate", "-p", "x"], ["bench"], ["plan"], ["convert"]):
        target = [str(tmp_path / "out.gguf"), "--type", "F16"] if command == ["convert"] else []
        assert run([command[0], str(path), *target, *command[1:]]) == 1
        assert capsys.readouterr().err == f"localrun: {path}: is an importance matrix, expected a model\n"


@pytest.mark.parametrize("items", [[], [17], [17, 17]], ids=len)
def test_a_kind_of_file_that_is_no_text(items: list[int], tmp_path: Path) -> None:
    """It is no importance matrix."""
    model = fuzz_gguf.bases()["llama"].copy()
    model.keys = [key for key in model.keys if key.name != b"general.type"]
    model.keys.append(fuzz_gguf.Key(b"general.type", b.ARRAY, items))
    with open_gguf(write(tmp_path, model)) as file:
        assert summary_of(file)["kind"] == "model"


def no_dimensions(tensor: fuzz_gguf.Record) -> None:
    tensor.ne.clear()
    fuzz_gguf.fit(tensor)


@pytest.mark.parametrize(
    ("change", "backend", "reason"),
    [
        (lambda t: setattr(t, "type", int(Type.I32)), None, "tensor 'output_norm.weight' has type I32; expected F32"),
        (no_dimensions, None, "tensor 'output_norm.weight' has shape (); expected (64,)"),
        (lambda t: setattr(t, "name", b"another.weight"), None, "tensor 'output_norm.weight' not found"),
    ],
)
def test_inspect_and_load_agree_on_what_is_broken(
    change, backend: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fuzz_gguf.bases()["llama"].copy()
    change(next(tensor for tensor in model.tensors if tensor.name == b"output_norm.weight"))
    path = write(tmp_path, model)
    with open_gguf(path) as file:
        found = summary_of(file)
    assert (found["native"], found["backend"]) == (False, backend) and reason in found["not_native_because"]
    assert run(["inspect", str(path)]) == 0
    assert "llama, which cannot be run" in capsys.readouterr().out
    with pytest.raises(LocalrunError) as caught:
        localrun.load(path, threads=1, ctx=8)
    assert str(caught.value) == f"{path}: {found['not_native_because']}"
    capsys.readouterr()
    assert run(["convert", str(path), str(tmp_path / "out.gguf"), "--type", "F16"]) == 1
    assert capsys.readouterr().err == f"localrun: {caught.value}\n" and not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("mix", ["F16", "Q4_K_M"])
def test_what_is_not_native_can_be_packed(mix: str, tmp_path: Path) -> None:
    """Counts by layer do not disturb the mix; a tensor without dimensions has no rows to pack."""
    model = narrow_second_layer("llama")
    by_layer(model, ".attention.head_count_kv", [2, 2])
    path = write(tmp_path, model)
    assert run(["convert", str(path), str(tmp_path / "out.gguf"), "--type", mix]) == 0
    no_dimensions(next(tensor for tensor in model.tensors if tensor.name == b"output_norm.weight"))
    path = write(tmp_path, model)
    assert run(["convert", str(path), str(tmp_path / "other.gguf"), "--type", mix]) == 1
    assert not list(tmp_path.glob("other*"))
