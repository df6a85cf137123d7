"""Values of any type and size in a checkpoint's JSON: taken, or one line that names file and key."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import fuzz_checkpoint
import pytest

from localrun.convert import Options, make_plan
from localrun.errors import LocalrunError
from localrun.models.registry import CHECKPOINTS
from localrun.plan.shapes import load_model

ODD = (
    None,
    True,
    0,
    -1,
    2**31,
    2**32,
    2**64,
    0.5,
    1e39,
    "@1e400@",
    float("nan"),
    "",
    "a" * 3000,
    [],
    [[]],
    {},
    {"a": 1},
)
ROPE = (
    "rope_type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "mscale",
)


def refusal(folder: Path, files: dict[str, bytes | None], plan_too: bool = False) -> str:
    """What a conversion says that refuses a folder, in one short line; empty if it takes it."""
    fuzz_checkpoint.write(files, folder)
    said = ""
    for read in (lambda: make_plan(folder, folder / "x.gguf", Options()), lambda: load_model(str(folder)))[
        : 1 + plan_too
    ]:
        try:
            read()
        except LocalrunError as error:
            said = str(error)
            assert "\n" not in said and len(said) < 600 + len(str(folder))
    return said


def with_config(base: fuzz_checkpoint.Checkpoint, key: str, value: Any) -> fuzz_checkpoint.Checkpoint:
    """A copy with a key of config.json, or with one of its rotary settings as "rope.<key>"."""
    checkpoint = copy.deepcopy(base)
    if key.startswith("rope."):
        scaling = checkpoint.config.get("rope_scaling") or checkpoint.config["rope_parameters"]
        scaling[key.removeprefix("rope.")] = value
    else:
        checkpoint.config[key] = value
    return checkpoint


# Sizes are numbers: what they contradict is named, a tensor or what reads models; head_dim follows from others.
NAMED = ("tensor '", "key '", "rope scaling", "its sizes give '", "head_dim")


@pytest.mark.parametrize("name", ["v3", "llama"])
def test_odd_values_in_config_json_are_taken_or_named(name: str, tmp_path: Path) -> None:
    base, unnamed = fuzz_checkpoint.bases()[name], []
    rope = [f"rope.{key}" for key in ROPE if name != "v2"]
    for key in [*base.config, *rope, "transformers_weights", "partial_rotary_factor"]:
        for value in ODD:
            said = refusal(tmp_path / "m", with_config(base, key, value).files(), plan_too=value in (0, [[]], 2**31))
            if said and not any(word in said for word in (key.removeprefix("rope."), *NAMED)):
                unnamed.append((key, value, said))
    assert unnamed == []


TELLING: dict[str, tuple[str, Any, str]] = {
    "a list of lists": ("architectures", [[]], "config.json: architectures is [[]]; expected one of"),
    "text": ("architectures", "LlamaForCausalLM", "architectures is 'LlamaForCausalLM'; expected a list"),
    "a word": ("quantization_config", "fp8", "config.json: quantization_config is 'fp8'; expected an object"),
    "no method": ("quantization_config", {"a": 1}, "quantization_config: quant_method is missing; expected text"),
    "infinity": ("rms_norm_eps", "@1e400@", "config.json: rms_norm_eps is inf; expected a number"),
    "beyond 32 bits": ("vocab_size", 2**32, "config.json: vocab_size is 4294967296; expected a whole number"),
    "theta 0": ("rope.rope_theta", 0.0, "rope settings: rope_theta is 0; expected a positive number"),
    "theta below 0": ("rope.rope_theta", -1.0, "rope settings: rope_theta is -1; expected a positive number"),
    "factor 0": ("rope.factor", 0, "rope settings: factor is 0; expected a positive"),
    "a type of lists": ("rope.rope_type", [[]], "rope scaling is [[]]; expected default, linear"),
    "a folder": ("transformers_weights", "..", "transformers_weights is in '..'; expected the name of a file"),
    "a NUL": ("transformers_weights", "a\0.safetensors", "expected the name of a file"),
    "much": ("hidden_act", "a" * 10**6, "hidden_act is 'aaaa"),
}  # fmt: skip


@pytest.mark.parametrize("case", TELLING)
def test_what_is_said_of_a_value(case: str, tmp_path: Path) -> None:
    key, value, expected = TELLING[case]
    said = refusal(tmp_path / "m", with_config(fuzz_checkpoint.bases()["llama"], key, value).files(), plan_too=False)
    assert expected in said
    without_classes = said.replace(", ".join(CHECKPOINTS), "")
    assert len(without_classes) < 300 + len(str(tmp_path))


HEADER: dict[str, tuple[Any, str]] = {
    "no object": ([], "has a broken header entry, []"),
    "dtype of a list": ({"dtype": [], "shape": [32], "data_offsets": [0, 64]}, "dtype is []; expected text"),
    "no dtype": ({"shape": [32], "data_offsets": [0, 64]}, "dtype is missing; expected text"),
    "shape of truth values": ({"dtype": "BF16", "shape": [True], "data_offsets": [0, 2]}, "shape is [True]"),
    "shape of fractions": ({"dtype": "BF16", "shape": [32.0], "data_offsets": [0, 64]}, "shape is [32.0]"),
    "shape beyond 64 bits": ({"dtype": "BF16", "shape": [0, 2**70], "data_offsets": [0, 0]}, "shape is [0, "),
    "many dimensions": ({"dtype": "BF16", "shape": [1] * 10**5, "data_offsets": [0, 2]}, "shape has 100000 dimensions"),
    "backwards": ({"dtype": "BF16", "shape": [32], "data_offsets": [64, 0]}, "data_offsets is [64, 0]"),
    "one offset": ({"dtype": "BF16", "shape": [32], "data_offsets": [64]}, "data_offsets is [64]"),
    "beyond the file": ({"dtype": "BF16", "shape": [2**61], "data_offsets": [0, 2**62]}, "cut off"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADER)
def test_what_is_said_of_an_entry_of_a_header(case: str, tmp_path: Path) -> None:
    entry, expected = HEADER[case]
    checkpoint = copy.deepcopy(fuzz_checkpoint.bases()["llama"])
    checkpoint.headers["model.safetensors"] = {"model.norm.weight": entry}
    said = refusal(tmp_path / "m", checkpoint.files())
    assert "model.safetensors: " in said and "'model.norm.weight'" in said and expected in said


@pytest.mark.parametrize(
    "value", [1, [], "..", "", "a.bin", "/etc/passwd", "a\0.safetensors", "\ud800.safetensors", {}]
)
def test_an_index_that_names_no_file_is_one_line(value: Any, tmp_path: Path) -> None:
    checkpoint = copy.deepcopy(fuzz_checkpoint.bases()["v3"])
    checkpoint.index["weight_map"]["lm_head.weight"] = value
    said = refusal(tmp_path / "m", checkpoint.files())
    assert "model.safetensors.index.json: tensor 'lm_head.weight' is in " in said


HINTS: dict[str, tuple[Any, Any]] = {
    "all": ({"top_k": -1}, 0),
    "a fraction of 0": ({"top_k": 50.0}, 50),
    "2^31": ({"top_k": 2**31}, "top_k is 2147483648, not a whole number, 0 or more; left out"),
    "text": ({"top_p": "0.9"}, "top_p is '0.9', not above 0 and at most 1; left out"),
    "nothing": ({"top_p": 0}, "top_p is 0, not above 0 and at most 1; left out"),
    "below 0": ({"temperature": -1.0}, "temperature is -1.0, not 0 or more; left out"),
    "no penalty at all": ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, not above 0; left out"),
    "infinity": ({"temperature": "@1e400@"}, "temperature is inf, not 0 or more; left out"),
    "a list": ({"min_p": [0.1]}, "min_p is [0.1], not between 0 and 1; left out"),
    "truth": ({"top_k": True}, "top_k is True, not a whole number, 0 or more; left out"),
}


@pytest.mark.parametrize("case", HINTS)
def test_hints_of_sampling_are_hints(case: str, tmp_path: Path) -> None:
    """An odd one is left out with a line, and the others count."""
    hints, expected = HINTS[case]
    checkpoint = copy.deepcopy(fuzz_checkpoint.bases()["llama"])
    checkpoint.hints = {"do_sample": True, "temperature": 0.6, "top_p": 0.5} | hints
    plan = make_plan(fuzz_checkpoint.write(checkpoint.files(), tmp_path / "m"), tmp_path / "x.gguf", Options())
    (name,) = hints
    if isinstance(expected, str):
        assert [line for line in plan.warnings if "generation_config.json: " in line and expected in line]
    else:
        assert plan.metadata.get(f"general.sampling.{name}") == expected
    kept = "top_p" if name == "temperature" else "temp"
    assert plan.metadata.get(f"general.sampling.{kept}") in (0.5, 0.6)


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{", b"[" * 10**5, b"\xff\xfe"])
def test_hints_that_are_no_document_are_left_out(content: bytes, tmp_path: Path) -> None:
    files = fuzz_checkpoint.bases()["llama"].files() | {"generation_config.json": content}
    plan = make_plan(fuzz_checkpoint.write(files, tmp_path / "m"), tmp_path / "x.gguf", Options())
    assert [line for line in plan.warnings if line.endswith("no sampling is recommended")]
    assert not [key for key in plan.metadata.entries if key.startswith("general.sampling")]


def test_keys_that_nobody_knows_are_told(tmp_path: Path) -> None:
    checkpoint = with_config(fuzz_checkpoint.bases()["llama"], "new_key", json.loads("[1]"))
    checkpoint.config["rope_parameters"]["odd"] = 1
    plan = make_plan(fuzz_checkpoint.write(checkpoint.files(), tmp_path / "m"), tmp_path / "x.gguf", Options())
    assert any(line.endswith("new_key, odd of the rope settings") for line in plan.warnings)
