"""The bundled SmolLM2, real weights: text that repeats, and quality equal to llama.cpp's."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = Path(__file__).parent / "data" / "text" / "wikitext2.txt"


def output_of(*command: str) -> dict:
    """The JSON document in the last line of a command's output."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_greedy_text_is_the_same_twice_and_is_english():
    command = ("-m", "cli.main", "generate", "-p", "Why is the sky blue?", "--temp", "0", "-n", "24", "--json")
    first, second = output_of(*command), output_of(*command)
    assert first["ids"] == second["ids"] and first["text"] == second["text"]
    assert "sky" in first["text"] and first["generated_tokens"] == 24


def test_perplexity_is_llama_cpps():
    """0.5% of 24, over 6,120 predictions: the roundings of two programs differ by 0.04%; a wrong scale by far more."""
    result = output_of("scripts/compare_perplexity.py", "-f", str(TEXT))
    assert result["bytes"] >= 50_000 and result["native"]["backend"] == "native"
    assert result["llama.cpp"]["backend"] == "llama.cpp"
    assert result["relative_difference"] < 0.005
