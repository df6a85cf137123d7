"""What inspect tells of a file: the groups of tensor names, and the sums, on a file written for it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
from paths import DATA

from localrun.bundled import model_path
from localrun.gguf.file import open_gguf
from localrun.models.summary import group_of, summary_of


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "head"),
        ("output_norm.weight", "other"),
        ("blk.0.attn_q_a.weight", "attention"),
        ("blk.60.attn_kv_a_mqa.weight", "attention"),
        ("blk.60.attn_norm.weight", "attention"),
        ("blk.0.ffn_norm.weight", "other"),
        ("blk.0.ffn_gate.weight", "dense ffn"),
        ("blk.0.ffn_down.weight", "dense ffn"),
        ("blk.3.ffn_gate_inp.weight", "other"),
        ("blk.3.exp_probs_b.bias", "other"),
        ("blk.3.ffn_gate_exps.weight", "routed experts"),
        ("blk.3.ffn_gate_up_exps.weight", "routed experts"),
        ("blk.3.ffn_down_shexp.weight", "shared experts"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_file_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba2")
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), np.float32))
    writer.add_tensor(
        "blk.0.ffn_up_exps.weight", np.zeros((2, 4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        found = summary_of(file)
    assert (found["architecture"], found["native"], found["config"], found["kv_bytes_per_token"]) == (
        "mamba2",
        False,
        None,
        None,
    )
    assert found["not_native_because"] == "architecture 'mamba2' is not native"
    assert found["parameters"] == 8 * 64 + 2 * 4 * 32
    assert found["tensor_bytes"] == 8 * 64 * 4 + 2 * 4 * 34
    assert found["bits_per_weight"] == round((32 * 512 + 8.5 * 256) / 768, 3)
    assert found["groups"] == {
        "routed experts": {"bytes": 272, "percent": 11.7},
        "embedding": {"bytes": 2048, "percent": 88.3},
    }
    assert found["types"] == {
        "F32": {"tensors": 1, "weights": 512, "bytes": 2048},
        "Q8_0": {"tensors": 1, "weights": 256, "bytes": 272},
    }
    assert found["tensors"][1] == {
        "name": "blk.0.ffn_up_exps.weight",
        "shape": [2, 4, 32],
        "type": "Q8_0",
        "bytes": 272,
    }


def test_the_demo_model() -> None:
    """Against its model card: 135 million parameters, 30 layers, 3 key-value heads of 64."""
    with open_gguf(model_path("smollm2")) as file:
        found = summary_of(file)
    assert found["native"] and found["parameters"] == 134_515_008
    assert found["kv_bytes_per_token"] == 30 * 3 * (64 + 64) * 2
    assert sum(group["bytes"] for group in found["groups"].values()) == found["tensor_bytes"]


@pytest.mark.parametrize(
    ("variant", "kinds"),
    [("v3", ("mla", "pairs", False)), ("llama", ("gqa", "pairs", False)), ("qwen3moe", ("gqa", "halves", True))],
)
def test_every_architecture_says_what_it_is(variant: str, kinds: tuple[str, str, bool]) -> None:
    with open_gguf(tiny_models.shared(variant)) as file:
        found = json.loads(json.dumps(summary_of(file)))
    config = found["config"]
    assert found["native"] and found["not_native_because"] is None
    assert (config["attention"], config["rope"], config["qk_norm"]) == kinds
    assert config["hidden_act"] == "silu"
    assert set(found["groups"]) >= {"attention", "embedding"}
    assert ("routed experts" in found["groups"]) == (config["n_routed_experts"] > 0)


def test_a_file_without_tensors() -> None:
    path = DATA / "vocab" / "ggml-vocab-gpt-2.gguf"
    with open_gguf(path) as file:
        found = summary_of(file)
    assert (found["parameters"], found["bits_per_weight"], found["tensors"]) == (0, None, [])
