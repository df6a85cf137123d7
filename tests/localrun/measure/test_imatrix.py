"""Importance matrices: what is collected against transformers' own inputs; the file for our reader and llama.cpp."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import gguf
import hf_checkpoints as hf
import hf_oracle
import llama_quantize
import numpy as np
import pytest
import tiny_models
from watched_inputs import Watched

import localrun
from cli.main import run
from localrun.convert import Options, convert, make_plan
from localrun.convert.gguf_source import GGUFSource, read_model
from localrun.convert.imatrix import Importances
from localrun.errors import LocalrunError
from localrun.measure import imatrix
from localrun.network.model import Network
from quant.threads.pool import Pool

N_CTX = 20
# Two implementations in float32 differ by 1e-5 of an activation after some layers, and squares by twice that.
CLOSE = 1e-4


def collect(path: Path, ids: list[int], n_ctx: int = N_CTX) -> imatrix.Importance:
    with localrun.load(path, threads=2, backend="native") as engine:
        return imatrix.collect(engine, ids, n_ctx)


def agree(found: imatrix.Importance, watched: Watched, tolerance: float = CLOSE) -> None:
    """The same counts, and sums that differ by less than this part of a matrix's largest."""
    assert found.squares
    for name, squares in found.squares.items():
        assert np.array_equal(found.counts[name], watched.counts[name]), name
        expected = watched.squares[name]
        assert squares.shape == expected.shape, name
        assert np.abs(squares - expected).max() <= tolerance * expected.max(), name


@pytest.mark.parametrize(
    "variant", ["v2-lite", "v3", "v3-odd", "v3-legacy-kv-b", "v3-fused-gate-up", "v3-nextn", "qwen3moe"]
)
def test_inputs_are_transformers(variant: str) -> None:
    """Every matrix of every layer, experts and heads each by themselves; not head, embedding, prediction layer."""
    path, ids = tiny_models.shared(variant), tiny_models.prompt(variant)
    found, watched = collect(path, ids), Watched(hf_oracle.model(path))
    for start in (0, N_CTX):
        watched.run(ids[start : start + N_CTX])
    agree(found, watched)
    with localrun.gguf.file.open_gguf(path) as file:
        prefix = file.string("general.architecture")
        layers = file.u32(f"{prefix}.block_count") - file.u32(f"{prefix}.nextn_predict_layers", 0)
        matrices = {t.name for t in file.tensors.values() if len(t.shape) > 1 and t.name.startswith("blk.")}
    assert set(found.squares) == {name for name in matrices if int(name.split(".")[1]) < layers}
    assert (found.n_chunks, found.n_ctx) == (2, N_CTX)


def test_observing_biased_experts_changes_nothing() -> None:
    """gpt-oss's: between what is observed lie biases and another activation."""
    path, ids = tiny_models.shared("gpt-oss"), tiny_models.prompt("gpt-oss")
    with localrun.load(path, device="cpu", threads=2, ctx=64) as engine, closing(Pool(2)) as pool:
        inputs = imatrix._Inputs()
        model = Network(engine.config, imatrix._ObservedWeights(engine.file, pool, inputs))
        found, expected = imatrix._evaluate(model, ids, inputs), engine.logits(ids)[-1:]
    # float32 sums in another order
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)


def test_inputs_are_transformers_llama(tmp_path: Path) -> None:
    model = hf.make("Llama", hf.LLAMA)
    convert(make_plan(hf.save(model, tmp_path / "model"), tmp_path / "x.gguf", Options(mix="F32")))
    ids = np.random.default_rng(0).integers(0, 320, 40).tolist()
    found, watched = collect(tmp_path / "x.gguf", ids), Watched(model)
    for start in (0, N_CTX):
        watched.run(ids[start : start + N_CTX])
    agree(found, watched)
    assert len(found.squares) == 3 * 7
    assert found.n_experts == found.unreached == {}


def test_long_chunks_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 7, 7 and 6 tokens see what came before them in their chunk."""
    path, ids = tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd")
    watched = Watched(hf_oracle.model(path))
    for start in (0, N_CTX):
        watched.run(ids[start : start + N_CTX])
    parts, forward = [], Network.forward
    monkeypatch.setattr(
        Network, "forward", lambda self, ids, *rest: parts.append(len(ids)) or forward(self, ids, *rest)
    )
    monkeypatch.setattr(imatrix, "PREFILL_CHUNK", 7)
    agree(collect(path, ids), watched)
    assert parts == [7, 7, 6] * 2


@pytest.mark.parametrize("type_", ["Q4_K", "Q8_0"])
def test_inputs_of_a_quantised_model(type_: str) -> None:
    """Against the same weights as float32. Inputs are rounded to 8 bits on the way, half of 1/127 of the largest of 32:
    0.4% of most values, and 0.8% of their squares, in each of three layers; twice that for single columns."""
    path, ids = tiny_models.shared("wide", type=type_), tiny_models.prompt("wide")
    watched = Watched(hf_oracle.model(tiny_models.shared_twin(path)))
    for start in (0, N_CTX):
        watched.run(ids[start : start + N_CTX])
    agree(collect(path, ids), watched, 0.05)


def test_experts_that_the_text_never_reaches(tmp_path: Path) -> None:
    """One token, over and over: the experts beyond its own are named by us and by the reader, and packed without."""
    path = tiny_models.shared("v3-odd")
    found = collect(path, [5] * 16, 8)
    assert found.n_experts and found.unreached.keys() <= found.n_experts.keys()
    for index, missed in found.unreached.items():
        counts = found.counts[f"blk.{index}.ffn_up_exps.weight"]
        assert missed == np.flatnonzero(counts == 0).tolist() != []
    imatrix.write(tmp_path / "i.gguf", found, "t.txt")
    plan = make_plan(path, tmp_path / "x.gguf", Options(mix="Q4_0", imatrix=tmp_path / "i.gguf"))
    assert plan.importances is not None
    parts = [f"ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    expected = {f"blk.{i}.{part}": missed for i, missed in found.unreached.items() for part in parts}
    assert plan.importances.unreached == expected
    convert(plan)


def test_the_prediction_layer_is_packed_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runner does not run it, so its matrices are told of."""
    path = tiny_models.shared("v3-nextn")
    imatrix.write(tmp_path / "i.gguf", collect(path, tiny_models.prompt("v3-nextn")), "t.txt")
    arguments = [
        "convert",
        str(path),
        str(tmp_path / "x.gguf"),
        "--type",
        "Q4_0",
        "--imatrix",
        str(tmp_path / "i.gguf"),
    ]
    assert run(arguments) == 0
    with localrun.gguf.file.open_gguf(path) as file:
        last = file.u32("deepseek2.block_count") - 1
        missing = [t.name for t in file.tensors.values() if t.name.startswith(f"blk.{last}.") and len(t.shape) > 1]
    assert f" and {len(missing)} others have no importance in the imatrix" in capsys.readouterr().err
    assert run([*arguments, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["matrices_without_importance"] == missing


def test_our_reader_gets_the_means(tmp_path: Path) -> None:
    path = tiny_models.shared("v3-odd")
    found = collect(path, tiny_models.prompt("v3-odd"))
    imatrix.write(tmp_path / "i.gguf", found, "t.txt")
    read = Importances(tmp_path / "i.gguf", read_model(GGUFSource(path)).targets)
    assert set(read) == set(found.squares)
    assert read.missing == []
    for name, means in read.items():
        reached = found.counts[name] > 0
        expected = found.squares[name][reached] / found.counts[name][reached, None]
        np.testing.assert_allclose(means[reached], expected, rtol=1e-6)  # a division in float32
        assert np.isnan(means[~reached]).all()


def test_the_file_is_as_llama_cpp_writes_it(tmp_path: Path) -> None:
    """Keys, their types and order, names and shapes, as tools/imatrix/imatrix.cpp's save_imatrix has them."""
    found = collect(tiny_models.shared("v3-odd"), tiny_models.prompt("v3-odd"))
    imatrix.write(tmp_path / "i.gguf", found, "t.txt")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    fields = {key: (field.contents(), field.types) for key, field in reader.fields.items() if key[:4] != "GGUF"}
    kinds = gguf.GGUFValueType
    assert list(fields.items()) == [
        ("general.type", ("imatrix", [kinds.STRING])),
        ("imatrix.datasets", (["t.txt"], [kinds.ARRAY, kinds.STRING])),
        ("imatrix.chunk_count", (2, [kinds.UINT32])),
        ("imatrix.chunk_size", (N_CTX, [kinds.UINT32])),
    ]
    tensors = {t.name: (t.shape.tolist(), t.tensor_type) for t in reader.tensors}
    names = sorted(found.squares)
    assert list(tensors) == [name + part for name in names for part in (".in_sum2", ".counts")]
    assert {kind for _, kind in tensors.values()} == {gguf.GGMLQuantizationType.F32}
    assert tensors["blk.2.ffn_down_exps.weight.in_sum2"][0] == [96, 12]
    assert tensors["blk.2.ffn_down_exps.weight.counts"][0] == [1, 12]
    assert tensors["blk.0.attn_q_a.weight.in_sum2"][0] == [256, 1]


def test_llama_cpp_packs_by_it(tmp_path: Path) -> None:
    """Its 2-bit types demand an importance of the right size for every matrix; without any it refuses."""
    path, ids = tiny_models.shared("llama-wide"), tiny_models.prompt("llama-wide")
    imatrix.write(tmp_path / "i.gguf", collect(path, ids), "t.txt")
    means = dict(Importances(tmp_path / "i.gguf", read_model(GGUFSource(path)).targets))
    llama_quantize.quantize(path, tmp_path / "x.gguf", "IQ2_XXS", means)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert "IQ2_XXS" in types
    means.pop("blk.1.attn_q.weight")
    with pytest.raises(llama_quantize.QuantizeError, match="quantize"):
        llama_quantize.quantize(path, tmp_path / "y.gguf", "IQ2_XXS", means)


@pytest.mark.parametrize(
    ("n_ids", "n_ctx", "message"),
    [(39, 20, "39 tokens; chunks of 20 need at least 40"), (40, 3, "chunks of 3 tokens; expected 4 or more")],
)
def test_too_little_text(n_ids: int, n_ctx: int, message: str) -> None:
    with pytest.raises(LocalrunError, match=message):
        collect(tiny_models.shared("llama"), [0] * n_ids, n_ctx)


def test_a_model_that_makes_no_sense(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_models.shared("llama").read_bytes())
    tensor = next(t for t in gguf.GGUFReader(path, "r+").tensors if t.name == "blk.1.attn_norm.weight")
    tensor.data[:] = np.nan
    with pytest.raises(LocalrunError, match="chunk 1 of 2: the model gives logits that make no sense"):
        collect(path, [0] * 40)


def test_an_interrupted_writing_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect(tiny_models.shared("llama"), [0] * 40)
    path = tmp_path / "i.gguf"
    path.write_text("an older one")

    def interrupt(writer: gguf.GGUFWriter) -> None:
        writer.fout[0].write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        imatrix.write(path, found, "t.txt")
    assert path.read_text() == "an older one"
    assert os.listdir(tmp_path) == ["i.gguf"]


def test_a_full_disk_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect(tiny_models.shared("llama"), [0] * 40)

    def fail(_: gguf.GGUFWriter) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(LocalrunError, match=r"i\.gguf: cannot be written: No space left on device"):
        imatrix.write(tmp_path / "i.gguf", found, "t.txt")
    assert os.listdir(tmp_path) == []


# --- the command

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 4


def test_the_command_on_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT)
    out = tmp_path / "i.gguf"
    arguments = ["imatrix", "smollm2", "-f", str(tmp_path / "t.txt"), "-o", str(out), "-c", "16", "--chunks", "2"]
    assert run(arguments) == 0
    printed, err = capsys.readouterr()
    assert printed == f"{out}: 210 matrices, 2 chunks of 16 tokens\n"
    assert err.startswith("localrun: 2 chunks, about ") and err.count("\n") == 1
    first = out.read_bytes()
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    expected = {"matrices": 210, "chunks": 2, "chunk_tokens": 16, "tokens": 32, "experts": 0, "unreached_experts": {}}
    assert {key: document[key] for key in expected} == expected
    assert out.read_bytes() == first
    assert sorted(os.listdir(tmp_path)) == ["i.gguf", "t.txt"]


def test_an_interrupt_leaves_no_file(tmp_path: Path) -> None:
    """SIGINT after the first chunk."""
    code = (
        "import os, signal, localrun.measure.imatrix as i\n"
        "evaluate = i._evaluate\n"
        "def interrupted(*arguments):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return evaluate(*arguments)\n"
        "i._evaluate = interrupted\n"
        "from cli.main import main\n"
        "main()"
    )
    (tmp_path / "t.txt").write_text(TEXT)
    command = [sys.executable, "-c", code, "imatrix", "-f", str(tmp_path / "t.txt"), "-o", str(tmp_path / "i.gguf")]
    done = subprocess.run([*command, "-c", "16"], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGINT
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["t.txt"]


def test_the_command_names_experts_never_reached(capsys: pytest.CaptureFixture[str]) -> None:
    from cli.imatrix import _report

    found = imatrix.Importance({}, {}, 1, 4, {3: 8, 4: 8}, {3: [1, 2], 4: [7]})
    _report(found, Path("i.gguf"), {"seconds": 1.0}, "t.txt", as_json=False)
    expected = "3 of 16 experts were never reached and will be packed without importance: 2 in layer 3, 1 in layer 4"
    assert capsys.readouterr().err == f"localrun: {expected}\n"
