"""The bundled SmolLM2, real weights: quality equal to llama.cpp's."""

import json
import subprocess
import sys

import pytest
from paths import DATA, ROOT

TEXT = DATA / "text" / "wikitext2.txt"


def output_of(*command: str) -> dict:
    """The JSON document in the last line of a command's output."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


@pytest.mark.slow
@pytest.mark.first
def test_perplexity_is_llama_cpps():
    """0.5% of 24, over 2,040 predictions: the roundings of two programs differ by 0.04%; a wrong scale by far more."""
    # One thread: two that spin for each other beside another process of tests take twice the processor time.
    result = output_of("scripts/compare_perplexity.py", "smollm2", "-f", str(TEXT), "--bytes", "18000", "-t", "1")
    assert result["native"]["backend"] == "native" and result["native"]["tokens"] >= 8 * 512
    assert result["llama.cpp"]["backend"] == "llama.cpp"
    assert result["relative_difference"]["llama.cpp"] < 0.005
