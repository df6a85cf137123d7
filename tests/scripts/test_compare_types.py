"""scripts/compare_types.py: both files of a type are made and measured."""

import argparse
import runpy
import sys

import pytest
from paths import SCRIPTS

script = runpy.run_path(str(SCRIPTS / "compare_types.py"))


@pytest.mark.slow
def test_the_miniature_in_three_bits(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"tokens": 1024, "imatrix_tokens": 1024, "threads": 1}
    found = script["run"]("miniature", script["TEXT"], argparse.Namespace(types=["Q3_K_S"], **sizes))
    row = found["types"]["Q3_K_S"]
    assert row["localrun"]["bits_per_weight"] == row["llama.cpp"]["bits_per_weight"] < 3.7  # of the same types
    assert {name.split(".")[2] for name in row["differing_types"]} == {"attn_k_b", "attn_v_b"}
    for who in ("localrun", "llama.cpp"):
        # 3.4 bits change much less than another model would, and more than nothing
        assert 0.001 < row[who]["kl"] < 0.5 and row[who]["perplexity"] < 2 * found["F16"]["perplexity"]
    assert "| Q3_K_S | 3." in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_that_is_too_short_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_types.py", "miniature", "--tokens", "1000000", "-t", "1"])
    with pytest.raises(SystemExit, match="tokens, fewer than --imatrix-tokens and --tokens"):
        script["main"]()
