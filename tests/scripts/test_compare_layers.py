"""scripts/compare_layers.py: silent where the step is the network; names the phase where one of them is made wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hf_checkpoints as hf
import pytest
import tiny_deepseek4
import tiny_models
import torch
from cases import slow_but
from paths import SCRIPTS

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.network.rope import Rope


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import compare_layers

    yield compare_layers


V4 = "deepseek4"


def report(script: ModuleType, variant: str, n_tokens: int = 12, type_: Any = "F32") -> dict[str, Any]:
    path = tiny_deepseek4.shared() if variant == V4 else tiny_models.shared(variant, type=type_)
    with localrun.load(path, threads=1, ctx=256) as engine:
        ids = tiny_models.token_ids("v3", n_tokens) if variant != V4 else tiny_deepseek4.token_ids(n_tokens)
        return script.report(engine, ids, None, 1, script.TOLERANCE)


FAST = ["v3", "v3-legacy-kv-b", "v2-lite", "llama", "glm4moe", "minimax-m2", "deepseek32"]


@pytest.mark.parametrize("variant", slow_but([*FAST, "glm-dsa-shared", "gpt-oss", "bailingmoe2"], FAST))
def test_all_phases_are_the_networks(script: ModuleType, variant: str) -> None:
    found = report(script, variant)
    assert found["first"] is None
    errors = [error for phase in found["phases"] for error in phase["errors"].values()]
    # Float32 rounding, and where it tips that of a new row in the cache to 16 bits: half a step of 2^-10 of a value.
    assert max(errors) < 2**-11
    assert len(errors) >= len(found["phases"]) > 6 and found["phases"][-1]["phase"] == "head"


def test_all_phases_of_streams_and_pooled_rows_are_the_networks(script: ModuleType) -> None:
    """Of tokens that see windows, pooled rows of both ratios, and more of these than they choose."""
    found = report(script, V4, 150)
    assert found["first"] is None
    phases = {phase["phase"].split(": ")[-1]: phase["errors"] for phase in found["phases"]}
    assert phases["indexer's choice"] == {"chosen rows": 0.0}
    assert max(error for phase in found["phases"] for error in phase["errors"].values()) < 2**-11
    assert {"streams", "output_a", "output", "experts' down"} <= {name for name, errors in phases.items() if errors}


CHOOSING = [("deepseek32", "blk.0"), (V4, "blk.1")]


@pytest.mark.parametrize(("variant", "phase"), slow_but(CHOOSING, CHOOSING[1:]))
def test_another_choice_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch, variant: str, phase: str) -> None:
    watched = script.WatchedWeights._watched_attend_chosen

    def others(self: Any, parts: list, seen: Any, *arguments: Any) -> None:
        chosen = seen.chosen_TK
        first = torch.arange(chosen.shape[1], dtype=torch.int32).expand_as(chosen) if chosen is not None else None
        watched(self, parts, script.replace(seen, chosen_TK=first if first is None else first.contiguous()), *arguments)

    monkeypatch.setattr(script.WatchedWeights, "_watched_attend_chosen", others)
    assert report(script, variant, 150)["first"] == f"{phase}.attn: indexer's choice"


@pytest.mark.slow
def test_a_wrong_weight_of_streams_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    name, vector = script.names.layer(V4, 2, "ffn_hc.scale"), script.WatchedWeights.vector
    monkeypatch.setattr(
        script.WatchedWeights, "vector", lambda self, which: vector(self, which) * (-1 if which == name else 1)
    )
    assert report(script, V4, 150)["first"] == "blk.2.ffn: router"


def test_few_tokens_of_a_quantised_model(script: ModuleType) -> None:
    assert report(script, "v3", 3, tiny_models.Q4_K_M)["first"] is None


SOURCES = {"DeepseekV3": hf.V3, "Qwen3Moe": hf.QWEN3_MOE, "DeepseekV4": hf.DEEPSEEK4}


@pytest.mark.parametrize(("kind", "config"), slow_but(SOURCES.items(), list(SOURCES.items())[:2]))
def test_the_source_has_the_last_word(script: ModuleType, tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    """Step and network agree with transformers; where the checkpoint is another one, the layer is named."""
    folder = hf.save(hf.make(kind, config), tmp_path / "model")
    path = folder.with_suffix(".gguf")
    convert(make_plan(folder, path, Options(mix="F32")))
    norm = f"model.layers.1.{'ffn_norm' if kind == 'DeepseekV4' else 'post_attention_layernorm'}.weight"
    with localrun.load(path, threads=1, ctx=64) as engine:
        found = script.report(engine, hf.PROMPT, folder, 1, script.TOLERANCE)
        hf.edit_tensors(folder, lambda tensors: tensors.update({norm: 3 * tensors[norm]}))
        changed = script.report(engine, hf.PROMPT, folder, 1, script.TOLERANCE)
    assert found["first"] is None and len(found["layers"]) == config["num_hidden_layers"] - 1
    # 16-bit keys and values in the step's cache; the network by itself keeps 32 bits.
    assert max(layer["errors"]["step"] for layer in found["layers"]) < 2e-3
    assert max(layer["errors"]["network"] for layer in found["layers"]) < 1e-5
    assert changed["first"] == "layer 1 against the source"


def test_a_rope_of_the_wrong_sign_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rope.rotate
    monkeypatch.setattr(Rope, "rotate", lambda self, x, turns: right(self, x, turns.conj().resolve_conj()))
    for variant in ("v3", "llama"):
        assert report(script, variant)["first"] == "blk.0.attn: queries"


@pytest.mark.parametrize(
    ("tensor", "phase"),
    [("post_attention_layernorm", "blk.1.ffn: router"), ("input_layernorm", "blk.1.attn: projections")],
)
def test_a_wrong_norm_of_one_layer_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tensor: str, phase: str
) -> None:
    name, vector = script.names.layer("deepseek2", 1, tensor), script.WatchedWeights.vector
    monkeypatch.setattr(
        script.WatchedWeights, "vector", lambda self, which: vector(self, which) * (1.3 if which == name else 1)
    )
    assert report(script, "v2-lite")["first"] == phase


def test_a_wrong_weight_of_the_router_shows_behind_the_experts(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = script.WatchedWeights.choose_experts
    twice = staticmethod(lambda *arguments: (right(*arguments)[0], 2 * right(*arguments)[1]))
    monkeypatch.setattr(script.WatchedWeights, "choose_experts", twice)
    assert report(script, "v3")["first"].endswith("ffn: experts' down")


@pytest.mark.slow
def test_the_command(script: ModuleType) -> None:
    """One JSON document as the last line, exit 0; exit 1 and the phase's name if it is asked for too much."""
    path = "miniature"
    command = [sys.executable, str(SCRIPTS / "compare_layers.py"), path, "-p", "Once upon a time", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["first"] is None
    done = subprocess.run([*command, "--tolerance", "0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "first beyond its tolerance: blk.0.attn: projections"
