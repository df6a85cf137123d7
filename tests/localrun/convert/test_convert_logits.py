"""Converted models against transformers, which made them, and llama.cpp, which must load and agree.

Tolerances are fractions of the logit range. 1e-5: float32 summation in another order gives up to 1e-6 here; a wrong
permutation, split or key moves the logits by over 1e-2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import llama_cpp_oracle
import numpy as np
import pytest
import torch
from cases import slow_but

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.errors import LocalrunError

TOLERANCE = 1e-5
PROJECTIONS = ("_proj.weight", "kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("DeepseekV3", hf.V3),
    "v3-no-groups": ("DeepseekV3", hf.DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "v2": ("DeepseekV2", hf.DEEPSEEK | {"routed_scaling_factor": 2.0}),
    "v2-lite": ("DeepseekV2", hf.LITE),
    "moonlight": ("DeepseekV3", hf.LITE | {"n_group": 1, "topk_group": 1}),
    "v3-tied": ("DeepseekV3", hf.V3 | {"tie_word_embeddings": True}),
    "deepseek32": ("DeepseekV32", hf.DEEPSEEK32),
    "glm-dsa": ("GlmMoeDsa", hf.GLM_DSA),
    "llama": ("Llama", hf.LLAMA),
    "llama-tied": ("Llama", hf.LLAMA | {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", hf.LLAMA | {"rope_parameters": hf.LLAMA3_ROPE}),
    "llama-linear": (
        "Llama",
        hf.LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen3moe": ("Qwen3Moe", hf.QWEN3_MOE),
    "qwen3moe-tied-yarn": (
        "Qwen3Moe",
        hf.QWEN3_MOE
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "glm4-moe-lite": ("Glm4MoeLite", hf.GLM4_MOE_LITE),
    "mixtral": ("Mixtral", hf.MIXTRAL),
    "dots1": ("Dots1", hf.DOTS1),
    "ernie4_5-moe": ("Ernie4_5_Moe", hf.ERNIE4_5_MOE),
    "ernie4_5-moe-untied": (
        "Ernie4_5_Moe",
        hf.ERNIE4_5_MOE | {"tie_word_embeddings": False, "moe_num_shared_experts": 0, "moe_layer_start_index": 2},
    ),
    "glm4moe": ("Glm4Moe", hf.GLM4_MOE),
    "glm4moe-air": ("Glm4Moe", hf.GLM4_MOE | {"use_qk_norm": False, "routed_scaling_factor": 1.0}),
    "glm4moe-groups-tied": (
        "Glm4Moe",
        hf.GLM4_MOE
        | {"attention_bias": False, "n_group": 4, "topk_group": 2, "tie_word_embeddings": True, "n_shared_experts": 2},
    ),
    "minimax-m2": ("MiniMaxM2", hf.MINIMAX_M2),
    "hy_v3": ("HYV3", hf.HY_V3),
    "hy_v3-two-dense-tied": (
        "HYV3",
        hf.HY_V3
        | {
            "mlp_layer_types": ["dense", "dense", "sparse"],
            "num_shared_experts": 2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt-oss": ("GptOss", hf.GPT_OSS),
    "gpt-oss-yarn": ("GptOss", hf.GPT_OSS | {"rope_parameters": hf.TRAINED_YARN, "num_hidden_layers": 4}),
}


# llama.cpp rounds both ends of its yarn to whole pairs: transformers alone is right.
NOT_IN_LLAMA_CPP = {"gpt-oss-yarn"}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.ptp(expected))


def converted(folder: Path, **options: Any) -> Path:
    path = folder.with_suffix(".gguf")
    convert(make_plan(folder, path, Options(**({"mix": "F32"} | options))), force=True)
    return path


def ours(path: Path) -> np.ndarray:
    with localrun.load(path, device="cpu", threads=1, ctx=64, backend="native") as model:
        return model.logits(hf.PROMPT)


# Further variants of architectures that are in the fast suite already.
SLOW = {"glm4moe-air", "glm4moe-groups-tied", "hy_v3-two-dense-tied", "ernie4_5-moe-untied"}


@pytest.mark.parametrize("name", slow_but(MODELS, MODELS.keys() - SLOW))
def test_logits_equal_transformers_and_llama_cpps(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    model = hf.make(kind, config)
    path = converted(hf.save(model, tmp_path / "model"))
    expected = hf.logits(model)
    assert error(ours(path), expected) < TOLERANCE
    if name not in NOT_IN_LLAMA_CPP:
        assert error(llama_cpp_oracle.logits(path, hf.PROMPT), expected) < TOLERANCE


def test_a_checkpoint_of_bailingmoe2(tmp_path: Path) -> None:
    """Of a class that is not in transformers: the weights of one with the same arithmetic, under the other's names."""
    model = hf.make("Glm4Moe", hf.BAILINGMOE2 | {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}})
    path = converted(hf.as_bailingmoe2(hf.save(model, tmp_path / "model")))
    expected = hf.logits(model)
    assert error(ours(path), expected) < TOLERANCE
    assert error(llama_cpp_oracle.logits(path, hf.PROMPT), expected) < TOLERANCE


def pack_experts(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pack the experts of a gpt-oss checkpoint as published: blocks and scales by name of the matrix.

    What they stand for is transformers' own unpacking; it must be what was meant here.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            blocks, scales, meant = hf.to_mxfp4(tensors.pop(name).transpose(1, 2))
            unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            assert torch.equal(unpacked, meant.transpose(1, 2))
            tensors[name + "_blocks"], tensors[name + "_scales"] = packed[name] = blocks, scales

    hf.edit_tensors(folder, pack)
    hf.edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return packed


def test_mxfp4_experts_keep_their_bits(tmp_path: Path) -> None:
    """And mean what transformers makes of them; with another type they are packed anew."""
    model = hf.make("GptOss", hf.GPT_OSS)
    folder = hf.save(model, tmp_path / "model")
    packed = pack_experts(folder)
    path = converted(folder, mix=None)
    with localrun.gguf.file.open_gguf(path) as file:
        for part, name, rows in (
            ("gate", "gate_up_proj", slice(0, None, 2)), ("up", "gate_up_proj", slice(1, None, 2)),
            ("down", "down_proj", slice(None)),
        ):  # fmt: skip
            stored = file.tensors[f"blk.1.ffn_{part}_exps.weight"]
            assert stored.type.name == "MXFP4"
            blocks, scales = (each[:, rows].numpy() for each in packed[f"model.layers.1.mlp.experts.{name}"])
            found = stored.data.reshape(*scales.shape, 17)
            assert np.array_equal(found[..., 0], scales)
            codes = np.concatenate([found[..., 1:] & 15, found[..., 1:] >> 4], -1)
            assert np.array_equal(codes[..., ::2] | codes[..., 1::2] << 4, blocks)
        assert file.tensors["blk.1.attn_q.weight"].type.name == "Q8_0"
    exact = converted(folder, mix="F32")
    from transformers import GptOssForCausalLM, Mxfp4Config

    loaded = GptOssForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    loaded = loaded.float().eval()  # the transformers of Python 3.10 keeps experts in BF16 and multiplies in it
    expected = hf.logits(loaded)
    assert error(hf.logits(model), expected) > 1e-3  # or packing would have rounded nothing
    assert error(ours(exact), expected) < TOLERANCE
    with localrun.gguf.file.open_gguf(converted(folder, mix="BF16")) as file:
        assert file.tensors["blk.1.ffn_up_exps.weight"].type.name == "BF16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda blocks, scales: (blocks[..., :8], scales), r"expected U8 \[8, 96, 2, 16\]"),
        (lambda blocks, scales: (blocks, scales[:, :-1]), r"expected U8 \[8, 96, 2\]"),
        (lambda blocks, scales: (blocks, scales.float()), r"is 'F32' \[8, 96, 2\]; expected U8"),
    ],
    ids=["narrow blocks", "too few scales", "scales of another type"],
)
def test_mxfp4_parts_that_do_not_belong_together_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    folder = hf.save(hf.make("GptOss", hf.GPT_OSS), tmp_path / "model")
    name = "model.layers.1.mlp.experts.down_proj"
    pack_experts(folder)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        parts = name + "_blocks", name + "_scales"
        tensors.update(zip(parts, change(*(tensors[part] for part in parts)), strict=True))

    hf.edit_tensors(folder, edit)
    with pytest.raises(LocalrunError, match=message):
        make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))


@pytest.mark.parametrize(
    ("name", "block"), [("v3", (32, 32)), ("v3", (40, 56)), ("v3", (128, 128)), ("deepseek32", (128, 128))], ids=str
)
def test_an_fp8_checkpoint_means_its_dequantised_weights(name: str, block: tuple[int, int], tmp_path: Path) -> None:
    """Most block sizes here divide no shape: 96, 160, 112 and 48 rows; 96, 64 and 48 columns."""
    model = hf.make(*MODELS[name])
    folder = hf.save(model, tmp_path / "model")
    meant: dict[str, torch.Tensor] = {}

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(PROJECTIONS)]:
            tensors[name], tensors[name + "_scale_inv"], meant[name] = hf.to_fp8(tensors[name], block)

    hf.edit_tensors(folder, pack)
    hf.edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    reference = hf.save(model, tmp_path / "reference")
    hf.edit_tensors(reference, lambda tensors: tensors.update(meant))
    expected = hf.logits(type(model).from_pretrained(reference, attn_implementation="eager").eval())
    assert error(hf.logits(model), expected) > 1e-3  # or FP8 would have rounded nothing
    path = converted(folder)
    assert error(ours(path), expected) < TOLERANCE
    assert error(llama_cpp_oracle.logits(path, hf.PROMPT), expected) < TOLERANCE


def test_both_spellings_of_rope_settings_give_the_same_file(tmp_path: Path) -> None:
    folder = hf.save(hf.make("DeepseekV3", hf.V3), tmp_path / "model")
    new = converted(folder).read_bytes()
    scaling = {key: value for key, value in hf.YARN.items() if key not in ("rope_type", "rope_theta")}
    hf.edit_config(folder, rope_parameters=None, rope_theta=10000, rope_scaling=scaling | {"type": "yarn"})
    (tmp_path / "model.gguf").unlink()
    assert converted(folder).read_bytes() == new


def add_mtp(folder: Path, index: int = 3) -> dict[str, torch.Tensor]:
    """Give a checkpoint a layer for multi-token prediction, as DeepSeek-V3's: a copy of the last layer and its own."""
    config, added = hf.V3, {}
    generator = torch.Generator().manual_seed(1)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        last = f"model.layers.{index - 1}."
        for name in [name for name in tensors if name.startswith(last)]:
            added[f"model.layers.{index}." + name.removeprefix(last)] = tensors[name].clone()
        hidden, vocab = config["hidden_size"], config["vocab_size"]
        shapes = {"eh_proj": (hidden, 2 * hidden), "enorm": (hidden,), "hnorm": (hidden,)}
        shapes |= {"embed_tokens": (vocab, hidden), "shared_head.head": (vocab, hidden), "shared_head.norm": (hidden,)}
        for module, shape in shapes.items():
            added[f"model.layers.{index}.{module}.weight"] = torch.randn(shape, generator=generator)
        tensors.update(added)

    hf.edit_tensors(folder, change)
    return added


def test_the_layer_for_multi_token_prediction_is_kept(tmp_path: Path) -> None:
    model = hf.make("DeepseekV3", hf.V3)
    folder = hf.save(model, tmp_path / "model")
    added = add_mtp(folder)
    path = converted(folder)
    with localrun.gguf.file.open_gguf(path) as file:
        assert file.u32("deepseek2.block_count") == 4
        assert file.u32("deepseek2.nextn_predict_layers") == 1
        for gguf_name, name in {
            "blk.3.nextn.eh_proj.weight": "model.layers.3.eh_proj.weight",
            "blk.3.nextn.shared_head_head.weight": "model.layers.3.shared_head.head.weight",
            "blk.3.attn_q_a.weight": "model.layers.3.self_attn.q_a_proj.weight",
        }.items():
            stored = file.tensors[gguf_name]
            assert np.array_equal(stored.data.view(np.float32).reshape(stored.shape), added[name].numpy())
    assert error(ours(path), hf.logits(model)) < TOLERANCE
    assert error(llama_cpp_oracle.logits(path, hf.PROMPT), hf.logits(model)) < TOLERANCE


def test_the_layer_for_multi_token_prediction_can_be_left_out(tmp_path: Path) -> None:
    folder = hf.save(hf.make("DeepseekV3", hf.V3), tmp_path / "model")
    add_mtp(folder)
    with localrun.gguf.file.open_gguf(converted(folder, keep_mtp=False)) as file:
        assert file.u32("deepseek2.block_count") == 3
        assert not file.has("deepseek2.nextn_predict_layers")
        assert not [name for name in file.tensors if name.startswith("blk.3.")]


def test_a_config_that_names_a_layer_the_shards_lack_is_warned_of(tmp_path: Path) -> None:
    """transformers writes num_nextn_predict_layers: 1 but never such a layer."""
    folder = hf.save(hf.make("DeepseekV3", hf.V3), tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    plan = make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))
    assert "multi-token prediction" in plan.warnings[0]
    assert plan.metadata.get(".block_count") == 3


def test_shards_and_wider_types_give_the_same_tensors(tmp_path: Path) -> None:
    """One BF16 file, the same in many shards, and the same as F32."""
    model = hf.make("DeepseekV3", hf.V3).to(torch.bfloat16)
    folders = [hf.save(model, tmp_path / "one"), hf.save(model, tmp_path / "wide")]
    folders.append(hf.save(model, tmp_path / "shards", max_shard_size="200KB"))
    assert len(list(folders[2].glob("*.safetensors"))) > 3
    hf.edit_tensors(folders[1], lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    contents = []
    for folder in folders:
        with localrun.gguf.file.open_gguf(converted(folder)) as file:
            contents.append({name: tensor.data.tobytes() for name, tensor in file.tensors.items()})
    assert contents[0] == contents[1] == contents[2]
