"""Reading checkpoints: every dtype and kind of scale against torch, and one line for each way of being broken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_checkpoints as hf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from localrun.convert import Options, layout, make_plan
from localrun.convert.errors import CheckpointError
from localrun.convert.sources.checkpoint import Checkpoint
from localrun.errors import LocalrunError

FP8 = torch.float8_e4m3fn


def folder_with(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def rows_of(checkpoint: Checkpoint, name: str, start: int, stop: int) -> np.ndarray:
    out = np.full((stop - start, checkpoint.tensors[name].n_cols), np.nan, np.float32)
    checkpoint.read(name, start, stop, out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_are_torchs(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = (torch.randn(37, 23, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    checkpoint = Checkpoint(folder_with(tmp_path, {"a": torch.zeros(5), "w": weight, "z": weight[0].clone()}))
    for start, stop in ((0, 37), (0, 1), (36, 37), (5, 29)):
        assert np.array_equal(rows_of(checkpoint, "w", start, stop), weight[start:stop].float().numpy())
    assert np.array_equal(rows_of(checkpoint, "z", 0, 1), weight[:1].float().numpy())
    checkpoint.close()


def test_every_fp8_byte_means_what_torch_says(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(1, 256)
    tensors = {"w": codes, "w_scale_inv": torch.ones(1)}
    checkpoint = Checkpoint(folder_with(tmp_path, tensors, quantization_config={"quant_method": "fp8"}))
    assert np.array_equal(rows_of(checkpoint, "w", 0, 1), codes.float().numpy(), equal_nan=True)
    checkpoint.close()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (70,), (70, 1)], ids=str)
def test_fp8_scales_of_a_tensor_and_of_rows(shape: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(70, 33, generator=generator).to(FP8), torch.rand(shape, generator=generator) + 0.5
    tensors = {"w": weight, "w_scale_inv": scale}
    checkpoint = Checkpoint(folder_with(tmp_path, tensors, quantization_config={"quant_method": "fp8"}))
    expected = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
    assert np.array_equal(rows_of(checkpoint, "w", 9, 64), expected[9:64].numpy())
    checkpoint.close()


@pytest.mark.parametrize("block", [(16, 16), (13, 40), (128, 128), (70, 1)], ids=str)
def test_fp8_scales_of_blocks(block: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    quantized, scale, meant = hf.to_fp8(torch.randn(70, 33, generator=generator), block)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    checkpoint = Checkpoint(folder_with(tmp_path, {"w": quantized, "w_scale_inv": scale}, **config))
    for start, stop in ((0, 70), (1, 2), (12, 14), (15, 69)):
        assert np.array_equal(rows_of(checkpoint, "w", start, stop), meant[start:stop].numpy())
    checkpoint.close()


# --- what can be broken

TENSORS = {"a": torch.zeros(4, 8), "b": torch.zeros(4, 8)}


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_off_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def longer(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"tail")


def header_of_a_terabyte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def header_edited(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])

    return edit


def name_twice(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"b":', b'"a":'))


def index(shards: dict[str, list[str]], weight_map: dict[str, Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for shard, names in shards.items():
            save_file({name: TENSORS[name] for name in names}, folder / shard)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def quantization(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))


def stored(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        block = {"quant_method": "fp8", "weight_block_size": [2, 2]}
        folder_with(folder, tensors, quantization_config=block)

    return write


BROKEN: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json", "no such file"]),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not JSON"]),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ["config.json", "no JSON object"]),
    "no shard": (lambda folder: (folder / "model.safetensors").unlink(), ["has no model.safetensors and no", "none"]),
    "cut off": (cut_off, ["model.safetensors", "cut off in tensor 'b'"]),
    "cut off in the header": (cut_off_in_header, ["model.safetensors", "cut off"]),
    "too long": (longer, ["model.safetensors", "bytes; expected"]),
    "huge header": (header_of_a_terabyte, ["model.safetensors", "1099511627776"]),
    "a name twice in a shard": (name_twice, ["tensor 'a' is there twice"]),
    "overlap": (
        header_edited(lambda header: header["b"].update(data_offsets=[0, 128])),
        ["model.safetensors", "tensor 'b' starts at"],
    ),
    "size": (header_edited(lambda header: header["b"].update(shape=[4, 9])), ["tensor 'b'", "F32 [4, 9]"]),
    "shape of strings": (header_edited(lambda header: header["b"].update(shape=["4"])), ["tensor 'b'", "broken"]),
    "dtype": (stored(a=torch.zeros(4, 8, dtype=torch.int16)), ["tensor 'a'", "I16"]),
    "shard missing": (
        index({"s1.safetensors": ["a"]}, {"a": "s1.safetensors", "b": "s2.safetensors"}),
        ["s2.safetensors", "no such file"],
    ),
    "duplicate across shards": (
        index({"s1.safetensors": ["a"], "s2.safetensors": ["a", "b"]}, {"a": "s1.safetensors", "b": "s2.safetensors"}),
        ["s2.safetensors", "tensor 'a' is also in s1.safetensors"],
    ),
    "index leads out of the folder": (index({}, {"a": "../s1.safetensors"}), ["'a'", "expected the name of a file"]),
    "index without a map": (index({}, {}), ["index.json", "weight_map is empty"]),
    "quantised otherwise": (quantization(quant_method="gptq"), ["config.json", "'gptq'"]),
    "block size": (quantization(quant_method="fp8", weight_block_size=[0, 2]), ["weight_block_size", "[0, 2]"]),
    "FP8 without a scale": (stored(a=torch.zeros(4, 8).to(FP8)), ["tensor 'a'", "no scale"]),
    "a scale of the wrong shape": (
        stored(a=torch.zeros(4, 8).to(FP8), a_scale_inv=torch.ones(2, 5)),
        ["'a_scale_inv'", "(2, 5)", "(2, 4)"],
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    breaks, expected = BROKEN[case]
    folder = folder_with(tmp_path / "model", TENSORS)
    breaks(folder)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(folder)
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in expected:
        assert part in message


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("DeepseekV3", hf.V3), tmp_path_factory.mktemp("good") / "model")


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: hf.edit_tensors(folder, change)


def with_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: hf.edit_config(folder, **changes)


GATE = "model.layers.1.mlp.gate.weight"


def empty_vocabulary(folder: Path) -> None:
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    hf.edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(0, 96) for name in ends}))
    hf.edit_config(folder, vocab_size=0)


def one_prediction_layer_of_two(folder: Path) -> None:
    hf.edit_tensors(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(96, 192)}))
    hf.edit_config(folder, num_nextn_predict_layers=2)


UNSUITED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "unknown tensor": (with_tensors(lambda t: t.update(extra=torch.zeros(3))), ["'extra'", "unknown"]),
    "bias": (
        with_tensors(lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.zeros(96)})),
        ["o_proj.bias"],
    ),
    "missing tensor": (with_tensors(lambda t: t.pop(GATE)), [GATE, "missing", "blk.1.ffn_gate_inp.weight"]),
    "missing expert": (
        with_tensors(lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight")),
        ["experts.7.up_proj"],
    ),
    "shape": (with_tensors(lambda t: t.update({GATE: torch.zeros(9, 96)})), [GATE, "[9, 96]", "[8, 96]"]),
    "an expert too many": (with_config(n_routed_experts=7), ["[8, 96]", "[7, 96]"]),
    "another architecture": (with_config(architectures=["GPT2LMHeadModel"]), ["config.json", "GPT2LMHeadModel"]),
    "no architecture": (with_config(architectures=None), ["config.json", "architectures is missing"]),
    "a size missing": (with_config(kv_lora_rank=None), ["[80, 96]", "[528, 96]", "config.json"]),  # DeepseekV3's 512
    "a size that is null": (with_config(kv_lora_rank=hf.NULL), ["config.json", "kv_lora_rank is None"]),
    "a size of the wrong kind": (with_config(kv_lora_rank="64"), ["kv_lora_rank is '64'"]),
    "negative size": (with_config(vocab_size=-1), ["vocab_size is -1"]),
    "rotation by halves": (with_config(rope_interleave=False), ["rope_interleave is False"]),
    "another gate": (with_config(scoring_func="sqrtsoftplus"), ["scoring_func is 'sqrtsoftplus'"]),
    "another activation": (with_config(hidden_act="gelu"), ["hidden_act is 'gelu'"]),
    "unequal mscale": (with_config(rope_parameters=hf.YARN | {"mscale": 0.5}), ["mscale 0.5"]),
    "a number that is none": (with_config(rms_norm_eps=float("nan")), ["rms_norm_eps is nan"]),
    "too large for 32 bits": (with_config(routed_scaling_factor=1e300), ["routed_scaling_factor is 1e+300"]),
    "a size of 0": (with_config(vocab_size=0), ["model.embed_tokens.weight", "[0, 96]"]),
    "no end of layers": (with_config(num_hidden_layers=2**31), ["model.layers.3.input_layernorm.weight", "missing"]),
    "no end of experts": (with_config(n_routed_experts=2**31), [GATE, "[2147483648, 96]"]),
    "no end of heads": (with_config(num_attention_heads=2**31), ["o_proj.weight", "[96, 68719476736]"]),
    "tensors without weights": (empty_vocabulary, ["model.embed_tokens.weight", "[0, 96]"]),
    "one prediction layer of two": (one_prediction_layer_of_two, ["names 2 prediction layers; the shards hold 1"]),
    "unknown rope": (with_config(rope_parameters={"rope_type": "longrope"}), ["'longrope'"]),
    "yarn without a factor": (with_config(rope_parameters={"rope_type": "yarn"}), ["factor is missing"]),
}


@pytest.mark.parametrize("case", UNSUITED)
def test_what_has_no_place_in_a_gguf_is_refused_in_one_line(case: str, good: Path, tmp_path: Path) -> None:
    breaks, expected = UNSUITED[case]
    folder = shutil.copytree(good, tmp_path / "model")
    breaks(folder)
    with pytest.raises(CheckpointError) as raised:
        make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    for part in expected:
        assert part in message


def test_no_end_of_prediction_layers_is_but_a_warning(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    hf.edit_config(folder, num_nextn_predict_layers=2**31)
    for keep_mtp in (True, False):
        plan = make_plan(folder, tmp_path / "x.gguf", Options(mix="F32", keep_mtp=keep_mtp))
        assert plan.metadata.get(".block_count") == 3


LLAMA_UNSUITED: dict[str, tuple[dict[str, Any], str]] = {
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    "odd heads": ({"head_dim": 33}, "head_dim is 33"),
    "huge heads": ({"head_dim": 2**31, "rope_parameters": hf.LLAMA3_ROPE}, "has shape [192, 96]"),
    "bad factors": ({"rope_parameters": hf.LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "biases of the MLP": ({"mlp_bias": True}, "mlp_bias is True"),
}


@pytest.mark.parametrize("case", LLAMA_UNSUITED)
def test_what_has_no_place_in_a_llama_gguf_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, expected = LLAMA_UNSUITED[case]
    folder = hf.save(hf.make("Llama", hf.LLAMA), tmp_path / "model")
    hf.edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))


QWEN3_MOE_UNSUITED: dict[str, tuple[dict[str, Any], str]] = {
    "weights as they are": ({"norm_topk_prob": False}, "norm_topk_prob is False"),
    "nothing said of weights": ({"norm_topk_prob": None}, "norm_topk_prob is False"),
    "dense layers between": ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    "dense layers by number": ({"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
    "biases": ({"attention_bias": True}, "attention_bias is True"),
    "a window": ({"use_sliding_window": True}, "use_sliding_window is True"),
    "no experts named": ({"num_experts": None, "num_local_experts": None}, "expected [128, 96]"),  # Qwen3Moe's
    "llama 3's rope": ({"rope_parameters": hf.LLAMA3_ROPE}, "rope scaling is 'llama3'"),
    "yarn's factor": (
        {"rope_parameters": hf.YARN | {"mscale": None, "mscale_all_dim": None, "attention_factor": 1.5}},
        "yarn has attention_factor",
    ),
}


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.save(hf.make("Qwen3Moe", hf.QWEN3_MOE), tmp_path_factory.mktemp("qwen3moe") / "model")


@pytest.mark.parametrize("case", QWEN3_MOE_UNSUITED)
def test_what_has_no_place_in_a_qwen3moe_gguf_is_refused_in_one_line(
    case: str, qwen3_moe: Path, tmp_path: Path
) -> None:
    changes, expected = QWEN3_MOE_UNSUITED[case]
    folder = shutil.copytree(qwen3_moe, tmp_path / "model")
    hf.edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))


def test_both_spellings_of_the_number_of_experts(qwen3_moe: Path, tmp_path: Path) -> None:
    """Published files say num_experts, transformers 5 num_local_experts."""
    assert json.loads((qwen3_moe / "config.json").read_text())["num_local_experts"] == 8
    folder = shutil.copytree(qwen3_moe, tmp_path / "model")
    hf.edit_config(folder, num_local_experts=None, num_experts=8)
    for source in (qwen3_moe, folder):
        plan = make_plan(source, tmp_path / "x.gguf", Options(mix="F32"))
        assert plan.metadata.get(".expert_count") == 8


def test_too_many_parts_are_refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_PARTS", 20)
    with pytest.raises(LocalrunError, match=r"x\.gguf: would be \d+ parts, more than 20; allow larger ones"):
        make_plan(good, tmp_path / "x.gguf", Options(mix="F32", split_max_bytes=1000))


def test_what_every_runner_computes_itself_is_ignored(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "model")
    hf.edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    plan = make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))
    assert len(plan.targets) == len(make_plan(good, tmp_path / "x.gguf", Options(mix="F32")).targets)
