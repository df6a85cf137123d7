"""scripts/make_synthetic.py: files of the published sizes and types, that llama.cpp reads as we do."""

import json
import runpy
import subprocess
import sys
from math import prod
from pathlib import Path

import gguf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from paths import SCRIPTS

import localrun
from localrun.plan.shapes import load_model

SCRIPT = SCRIPTS / "make_synthetic.py"
script = runpy.run_path(str(SCRIPT))


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "tiny.gguf"
    done = run("tiny", path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["path"] == str(path) and document["file_bytes"] == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]
    return path


def test_v2_lite_is_llama_quantize_s_size() -> None:
    """15.7 billion weights as on the model's card; 9,883.84 MiB is what llama-quantize --dry-run says for Q4_K_M.

    It packs k_b as Q5_0 and v_b as Q4_K (5.5 and 4.5 bits a weight), which we keep at Q8_0 (8.5).
    """
    tensors, types, layout = script["plan"]("v2-lite", Path("v2-lite.gguf"))
    assert sum(prod(tensor.shape) for tensor in tensors) == 15_706_484_224
    more = 27 * 16 * 128 * 512 * ((8.5 - 5.5) + (8.5 - 4.5)) / 8
    assert round((sum(place.n_bytes for place in layout.places) - more) / 2**20, 2) == 9883.84
    kinds = {tensor.name: type_ for tensor, type_ in zip(tensors, types, strict=True)}
    assert [kinds[f"blk.{i}.ffn_down_exps.weight"] for i in (1, 3, 5, 26)] == ["Q8_0", "Q5_0", "Q8_0", "Q8_0"]
    assert (kinds["blk.0.attn_k_b.weight"], kinds["blk.0.attn_v_b.weight"]) == ("Q8_0", "Q8_0")


@pytest.mark.parametrize(("name", "mix"), [("ud-q2_k_xl", "Q2_K"), ("ud-iq2_xxs", "IQ2_XXS")])
def test_published_mixes_of_the_16b_shape(name: str, mix: str) -> None:
    """Experts of two bits, the rest larger; rows of 1536 and 2048 weights are whole blocks."""
    tensors, types, layout = script["plan"]("16b-v3-style", Path("x.gguf"), SCRIPTS / "mixes" / f"{name}.mix")
    experts = [type_ for tensor, type_ in zip(tensors, types, strict=True) if "_exps" in tensor.name]
    assert len(experts) == 3 * 26 and experts.count(mix) >= 2 * 26
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    assert 2.5 < 8 * sum(place.n_bytes for place in layout.places) / n_weights < 3.1


def test_v3_slice_has_v3_s_layers() -> None:
    """A MoE layer of V3 has 11.5 billion weights: 671 billion, less embedding, head and dense layers, by 58."""
    tensors, _, _ = script["plan"]("v3-slice", Path("v3-slice.gguf"))
    weights = sum(prod(tensor.shape) for tensor in tensors if tensor.name.startswith("blk.1."))
    assert weights == pytest.approx((671e9 - 2 * 129280 * 7168 - 3 * 0.58e9) / 58, rel=0.002)  # 671 is rounded


FEWER = ("v3-slice", "v4-flash-slice")  # of the vocabulary, and of V4's experts, in the whole model
SLICES = [name for name in script["SHAPES"] if name.endswith("-slice") and name not in FEWER]


@pytest.mark.parametrize("name", slow_but(SLICES, {"minimax-m2-slice"}))
def test_slices_have_published_widths_and_fit(name: str) -> None:
    tensors, types, layout = script["plan"](name, Path("slice.gguf"))
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    model = load_model(name.removesuffix("-slice"))
    whole = {tensor.name: tensor.shape for tensor in model.tensors}
    assert shapes.items() <= whole.items()
    assert {"MXFP4" if model.config.architecture == "gpt-oss" else "Q4_K", "F32"} <= set(types)
    assert 6e9 < layout.size < 10e9


def test_llama_cpp_computes_what_we_compute(tiny: Path, tmp_path: Path) -> None:
    """Of the same weights unpacked by gguf: its own 8-bit activations can send a token to another expert."""
    check_logits(tiny, tiny_models.dequantized_twin(tiny, tmp_path / "twin.gguf"))
    with localrun.load(tiny, threads=2, backend="native") as engine:
        assert engine.tokenizer.decode(engine.tokenizer.encode("the moth")[1:]) == "the moth"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ud-q2_k_xl", "ud-iq2_xxs"])
def test_published_mixes_are_what_llama_cpp_computes_in_floats(name: str, tmp_path: Path) -> None:
    """As test_llama_cpp_computes_what_we_compute."""
    script["write"]("tiny", tmp_path / "x.gguf", SCRIPTS / "mixes" / f"{name}.mix")
    check_logits(tmp_path / "x.gguf", tiny_models.dequantized_twin(tmp_path / "x.gguf", tmp_path / "twin.gguf"))


def check_logits(path: Path, theirs: Path) -> None:
    """On tokens none of whose experts is chosen so narrowly that our rounding chooses another (0.97 elsewhere)."""
    ids = [256, 251, 303, 485]
    expected = llama_cpp_oracle.logits(theirs, ids)
    with localrun.load(path, threads=2, backend="native") as engine:
        found = engine.logits(ids)
    alike = [np.corrcoef(row, other)[0, 1] for row, other in zip(found, expected, strict=True)]
    assert min(alike) > 0.999  # activations rounded to 8 bits: 0.9999 here
    assert all(0.5 < row.std() < 2 for row in found)  # activations stay near 1


def test_weights_are_gaussian_and_varied(tiny: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny).tensors}
    stack = tensors["blk.1.ffn_gate_exps.weight"]
    values = gguf.dequantize(stack.data, stack.tensor_type)
    assert values.shape == (16, 256, 256)
    assert values.std() == pytest.approx(1 / 16, rel=0.02)  # 1/sqrt(256); a draw of blocks deviates by less than 1%
    assert abs(values.mean()) < 0.001
    blocks = stack.data.reshape(-1, 144)
    assert len(np.unique(blocks, axis=0)) > 0.7 * len(blocks)  # 4,096 draws from 8,192 blocks: 0.79 differ
    norm = tensors["blk.1.attn_norm.weight"].data
    assert norm.mean() == pytest.approx(1, abs=0.03) and norm.std() == pytest.approx(0.1, rel=0.2)


def test_the_same_bytes_again(tiny: Path, tmp_path: Path) -> None:
    script["write"]("tiny", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == tiny.read_bytes()


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(script["Weights"], "chunks", fail)
    with pytest.raises(KeyboardInterrupt):
        script["write"]("tiny", path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.gguf"] and path.read_bytes() == b"old"
