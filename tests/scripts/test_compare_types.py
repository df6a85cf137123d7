"""scripts/compare_types.py: both files of a type are made and measured."""

import argparse
import runpy
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from paths import SCRIPTS

from localrun.bundled import model_path
from localrun.convert import Options, convert, make_plan

script = runpy.run_path(str(SCRIPTS / "compare_types.py"))


@pytest.mark.slow
def test_the_miniature_in_three_bits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"tokens": 1024, "imatrix_tokens": 1024, "threads": 1, "mirrored": True}
    found = script["run"]("miniature", script["TEXT"], argparse.Namespace(types=["Q3_K_S"], **sizes))
    row = found["types"]["Q3_K_S"]
    assert row["localrun"]["bits_per_weight"] == row["llama.cpp"]["bits_per_weight"] < 3.7  # of the same types
    assert {name.split(".")[2] for name in row["differing_types"]} == {"attn_k_b", "attn_v_b"}
    for who in ("localrun", "llama.cpp"):
        # 3.4 bits change much less than another model would, and more than nothing
        assert 0.001 < row[who]["kl"] < 0.5 and row[who]["perplexity"] < 2 * found["F16"]["perplexity"]
        added = np.log(row[who]["perplexity"] / found["F16"]["perplexity"])
        assert row[who]["by_size"] + row[who]["by_sign"] == pytest.approx(added, abs=1e-5)  # float32 log-probabilities
    assert "| Q3_K_S | 3." in capsys.readouterr().err


def weights(path: Path) -> dict[str, np.ndarray]:
    """float64, flat, by tensor."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64).ravel() for t in tensors}


@pytest.mark.slow
def test_a_mirrored_file_errs_to_the_other_side(tmp_path: Path) -> None:
    f16, packed = tmp_path / "F16.gguf", tmp_path / "Q3_K_S.gguf"
    convert(make_plan(model_path("miniature"), f16, Options(mix="F16", allow_requantize=True)), threads=1)
    convert(make_plan(f16, packed, Options(mix="Q3_K_S")), threads=1)
    values, there, back = (weights(path) for path in (f16, packed, script["mirror"](packed, f16)))
    for name, value in values.items():
        # as far as an F16 rounds
        np.testing.assert_allclose(back[name], 2 * value - there[name], rtol=2**-11, atol=2**-25)
    changed = sum(not np.array_equal(back[name], value) for name, value in values.items())
    assert changed > 50  # all matrices


@pytest.mark.slow
def test_a_text_that_is_too_short_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_types.py", "miniature", "--tokens", "1000000", "-t", "1"])
    with pytest.raises(SystemExit, match="tokens, fewer than --imatrix-tokens and --tokens"):
        script["main"]()
