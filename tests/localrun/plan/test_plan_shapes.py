"""The planner's models: what it lists is what the converter writes, what transformers builds, what a file holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from cases import slow_but
from hf_checkpoints import GLM4_MOE, LITE, LLAMA, LLAMA3_ROPE, QWEN3_MOE, V3, edit_config, make, save

from cli.main import run
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.plan.known import load_data
from localrun.plan.shapes import from_config, known_config, known_models, load_model, n_bytes


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DeepseekV3", V3),
        ("DeepseekV2", LITE),
        ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
        ("Llama", LLAMA | {"tie_word_embeddings": True}),
        ("Qwen3Moe", QWEN3_MOE),
        ("Glm4Moe", GLM4_MOE),
    ],
    ids=["v3", "lite", "llama", "tied", "qwen3moe", "glm4moe"],
)
@pytest.mark.parametrize("type_", ["Q4_K_M", "Q8_0"])
def test_bytes_are_those_of_convert(
    kind: str, config: dict[str, Any], type_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every tensor's name, type and bytes, from config.json alone, against convert --dry-run of the checkpoint."""
    folder = save(make(kind, config), tmp_path / "model")
    edit_config(folder, num_nextn_predict_layers=0)  # transformers names a layer for it that it does not write
    assert run(["convert", str(folder), str(tmp_path / "x.gguf"), "--type", type_, "--dry-run", "--json"]) == 0
    dry_run = json.loads(capsys.readouterr().out)
    for argument in (folder, folder / "config.json"):
        planned = load_model(str(argument), type_)
        expected = {(row["name"], row["to"], row["bytes"]) for row in dry_run["plan"]}
        assert {(t.name, t.type, t.n_bytes) for t in planned.tensors} == expected
        assert n_bytes(planned.tensors) == dry_run["tensor_bytes"]


# K2's class is V3's, Ling's is not in transformers.
COUNTED = [name for name in load_data("models") if not name.startswith(("kimi-k2", "ling-"))]
OF_OTHER_CLASSES = {"glm-4.5", "minimax-m2", "hy3", "qwen3-30b-a3b", "deepseek-v3", "deepseek-v2-lite"}


@pytest.mark.parametrize("name", slow_but(COUNTED, OF_OTHER_CLASSES))
def test_known_models_have_as_many_weights_as_transformers_says(name: str) -> None:
    import torch
    import transformers

    values = load_data("models")[name]["config"]
    kind = values["architectures"][0].removesuffix("ForCausalLM")
    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.device("meta"):
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    # Selection biases are buffers, in the state but no parameters; the layer for multi-token prediction is not built.
    expected = sum(tensor.numel() for name_, tensor in theirs.state_dict().items() if "inv_freq" not in name_)
    model = load_model(name)
    ours = sum(t.n_weights for t in model.tensors if not model.is_nextn(t) and "rope_freqs" not in t.name)
    assert ours == expected


@pytest.mark.parametrize("variant", ["v2-lite", "v3", "llama", "qwen3moe"])
def test_a_gguf_is_as_it_is(variant: str) -> None:
    path = tiny_models.shared(variant)
    model = load_model(str(path))
    with open_gguf(path) as file:
        assert {t.name: (t.shape, t.n_bytes) for t in model.tensors} == {
            t.name: (t.shape, t.n_bytes) for t in file.tensors.values()
        }
    assert model.type == "as in the file"
    assert n_bytes(model.tensors) < path.stat().st_size


def test_a_gguf_in_another_type() -> None:
    model = load_model(str(tiny_models.shared("llama")), "F16")
    assert {t.type for t in model.tensors} == {"F16", "F32"}
    assert model.with_type("F32").type == "F32"


def test_known_models_have_a_source_and_their_layers() -> None:
    for name, entry in load_data("models").items():
        assert entry["source"].startswith("https://")
        assert known_config(name).num_hidden_layers == entry["config"]["num_hidden_layers"]
    assert known_models() == list(load_data("models"))


@pytest.mark.parametrize("name", slow_but(load_data("models"), OF_OTHER_CLASSES))
def test_a_configuration_is_known_without_the_tensors(name: str) -> None:
    """Hy3's file says otherwise how many layers are dense, which decides nothing once tensors are named."""
    model = load_model(name)
    assert model.name == load_data("models")[name]["title"]
    assert known_config(name) == replace(model.config, first_k_dense_replace=known_config(name).first_k_dense_replace)


def test_names_are_in_any_case() -> None:
    assert load_model("DeepSeek-V2-Lite").name == "DeepSeek-V2-Lite 16B"


def test_prediction_layers_are_told_apart() -> None:
    model = load_model("deepseek-v3")
    assert sum(t.n_weights for t in model.groups()["mtp"]) == pytest.approx(13.5e9, rel=0.01)  # 11.5 G and copies
    assert "mtp" not in load_model("deepseek-v2").groups()


def changed(tmp_path: Path, **changes: Any) -> str:
    values = load_data("models")["deepseek-v2-lite"]["config"] | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))
    return str(path)


BAD = {
    "no architecture": ({"architectures": "absent"}, "architectures is missing"),
    "unknown architecture": ({"architectures": ["GPT2LMHeadModel"]}, "architectures is ['GPT2LMHeadModel']"),
    "no experts a token": ({"num_experts_per_tok": "absent"}, "num_experts_per_tok is missing"),
    "endless layers": ({"num_hidden_layers": 2**31}, "num_hidden_layers is 2147483648; expected at most 512"),
    "endless experts": ({"n_routed_experts": 2**31}, "n_routed_experts is 2147483648; expected at most 1024"),
    "endless heads": ({"num_attention_heads": 2**31}, "num_attention_heads is 2147483648; expected at most 16384"),
    "endless rotation": ({"qk_rope_head_dim": 2**31}, "qk_rope_head_dim is 2147483648; expected at most 65536"),
    "text": ({"hidden_size": "wide"}, "hidden_size is 'wide'; expected a whole number"),
    "negative": ({"moe_intermediate_size": -1}, "moe_intermediate_size is -1; expected a whole number"),
    "zero": ({"hidden_size": 0}, "config.json: its sizes give 'model.embed_tokens.weight' the shape [102400, 0]"),
    "no heads": ({"num_attention_heads": 0}, "o_proj.weight' the shape [2048, 0]"),
    "null": ({"vocab_size": None}, "vocab_size is None; expected a whole number"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_configurations_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LocalrunError) as caught:
        load_model(changed(tmp_path, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not JSON"), ("[1]", "holds no JSON object"), ("{}", "architectures is missing"), ("{", "JSON")],
)
def test_broken_configuration_files(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(LocalrunError, match=message) as caught:
        load_model(str(path))
    assert "other.json" in str(caught.value)


def test_unknown_names() -> None:
    with pytest.raises(LocalrunError, match="known models: deepseek-v3"):
        load_model("deepseek-v9")
    with pytest.raises(LocalrunError, match="unknown type"):
        load_model("deepseek-v3", "Q3_X")


def test_a_configuration_without_a_folder() -> None:
    values = load_data("models")["llama-3.1-405b"]["config"]
    assert from_config(values, Path("x")).config.num_key_value_heads == 8
