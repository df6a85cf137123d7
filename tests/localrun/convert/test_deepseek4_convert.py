"""DeepSeek-V4's checkpoints, as published and as transformers writes them, to GGUF: bits, and llama.cpp's logits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import hf_checkpoints as hf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_deepseek4 as tiny
import tiny_dspark
import torch
from closeness import error
from safetensors.torch import load_file, save_file

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.measure.reference import check_weights
from localrun.models.dspark import read_dspark
from localrun.models.mtp_file import is_mtp_only
from localrun.models.reader import read_config
from localrun.network.cache import Cache
from quant.formats import registry

IN_FP8 = re.compile(r"attn\.(w|indexer\.wq_b)|shared_experts|main_proj\.")
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, as transformers writes it."""
    return hf.save(tiny.hf_model(tiny.SHARED), tmp_path_factory.mktemp("deepseek4") / "model")


@pytest.fixture(scope="module")
def published(saved: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """The same as DeepSeek publishes: its names, FP4 experts, FP8; and what the weights mean, by those names."""
    folder = saved.with_name("published")
    return folder, publish(saved, folder)


def converted(folder: Path, mix: str | None, path: Path) -> Path:
    convert(make_plan(folder, path, Options(mix=mix)), force=True)
    return path


def values(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor's weights, float32."""
    tensor = file.tensors[name]
    if tensor.type.name == "I32":
        return tensor.data.view(np.int32).reshape(tensor.shape)
    return registry.get(tensor.type.name).unpack(tensor.data.reshape(-1)).reshape(tensor.shape)


def published_name(name: str) -> str:
    name = name.removeprefix("model.").replace("attn.norm.", "attn.kv_norm.").replace("hc_head.hc_", "hc_head_")
    return name.replace("embed_tokens", "embed")


def publish(folder: Path, to: Path) -> dict[str, torch.Tensor]:
    """What the weights mean that are written."""
    tensors, meant = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        name = published_name(name)
        scale = name.removesuffix("weight") + "scale"
        if ".experts." in name:
            blocks, exponents, meant[name] = hf.to_mxfp4(weight)
            tensors[name] = blocks.flatten(1).view(torch.int8)
            tensors[scale] = exponents.view(torch.float8_e8m0fnu)
        elif IN_FP8.search(name):
            tensors[name], scales, meant[name] = hf.to_fp8(weight, (128, 128), powers=True)
            tensors[scale] = scales.to(torch.float8_e8m0fnu)
        else:
            tensors[name] = meant[name] = weight
    to.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, to / "model.safetensors")
    (to / "config.json").write_text((folder / "config.json").read_text())
    hf.edit_config(to, quantization_config=FP8, expert_dtype="fp4", num_nextn_predict_layers=1)
    return meant


def test_a_folder_of_transformers_is_the_file_that_its_weights_make(saved: Path, tmp_path: Path) -> None:
    path = converted(saved, "F32", tmp_path / "x.gguf")
    with open_gguf(path) as found, open_gguf(Path(tiny.shared(tiny.SHARED))) as expected:
        assert {n: (t.type, t.shape) for n, t in found.tensors.items()} == {
            n: (t.type, t.shape) for n, t in expected.tensors.items()
        }
        for name, tensor in expected.tensors.items():
            assert np.array_equal(found.tensors[name].data, tensor.data), name
        for key, value in expected.metadata.items():
            if key != "general.name":
                assert str(found.metadata[key]) == str(value), key


@pytest.mark.slow
def test_transformers_own_names_mean_the_same(saved: Path, tmp_path: Path) -> None:
    """Those of its modules, experts in one tensor."""
    own = hf.save(tiny.hf_model(tiny.SHARED), tmp_path / "model", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(own / "model.safetensors")
    found = converted(own, "F32", tmp_path / "own.gguf").read_bytes()
    assert found == converted(saved, "F32", tmp_path / "saved.gguf").read_bytes()


def test_published_weights_keep_their_bits(published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, meant = published
    with open_gguf(converted(folder, None, tmp_path / "x.gguf")) as file:
        types = {name: tensor.type.name for name, tensor in file.tensors.items()}
        experts = np.stack([meant[f"layers.1.ffn.experts.{expert}.w2.weight"].numpy() for expert in range(16)])
        found = values(file, "blk.1.ffn_down_exps.weight")
        assert np.array_equal(found, experts) and np.array_equal(np.signbit(found), np.signbit(experts))
        assert np.array_equal(values(file, "blk.0.ffn_gate_tid2eid.weight"), meant["layers.0.ffn.gate.tid2eid"])
    expected = {"ffn_down_exps": "MXFP4", "ffn_gate_tid2eid": "I32", "attn_q_a": "Q8_0", "attn_output_b": "Q8_0",
                "ffn_up_shexp": "Q8_0", "hc_attn_fn": "F32", "ffn_gate_inp": "F32", "attn_sinks": "F32"}  # fmt: skip
    assert {part: types[f"blk.0.{part}.weight"] for part in expected} == expected
    assert types["blk.1.attn_compressor_kv.weight"] == types["blk.1.indexer_compressor_gate.weight"] == "BF16"
    assert types["blk.1.attn_compressor_ape.weight"] == types["output_hc_fn.weight"] == "F32"
    exact = converted(folder, "F32", tmp_path / "exact.gguf")
    assert 0.002 < check_weights(tmp_path / "x.gguf", exact) < 0.008  # Q8_0's: a step is 1/127 of a block's largest


@pytest.mark.slow
def test_logits_of_a_published_checkpoint_are_transformers(
    saved: Path, published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Of the weights that it means; more tokens than an indexer chooses rows of, and two windows of ratio 128."""
    (folder, meant), reference = published, tmp_path / "reference"
    reference.mkdir()
    save_file(meant, reference / "model.safetensors")
    (reference / "config.json").write_text((saved / "config.json").read_text())
    model = type(tiny.hf_model(tiny.SHARED)).from_pretrained(reference, attn_implementation="eager").eval()
    ids = np.random.default_rng(0).integers(0, 160, 300).tolist()
    expected = hf.logits(model, ids)
    found = llama_cpp_oracle.logits(converted(folder, "F32", tmp_path / "x.gguf"), ids)
    assert np.abs(found - expected).max() < 1e-5 * np.ptp(expected)  # measured: 5e-7; sums in another order


def test_what_makes_drafts_is_left_out_with_a_line(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    hf.edit_tensors(folder, lambda t: t.update({"mtp.0.enorm.weight": torch.ones(128)}))
    plan = make_plan(folder, tmp_path / "x.gguf", Options(mix="F32"))
    assert any("1 tensors only make drafts and are left out: --drafts writes" in line for line in plan.warnings)
    assert plan.metadata.get(".nextn_predict_layers") is None


def test_a_table_has_no_other_type(saved: Path, tmp_path: Path) -> None:
    from localrun.convert.mixes import parse_override

    with pytest.raises(LocalrunError, match=r"tid2eid\.weight' is a table of whole numbers and stays I32"):
        make_plan(saved, tmp_path / "x.gguf", Options(overrides=[parse_override("tid2eid=Q8_0")]))


MTP = tiny.replace(tiny.SHARED, compress_ratios=(0, 4), num_hash_layers=1, num_nextn_predict_layers=1)
OF_LAYER = {  # GGUF's names to published ones
    "attn_norm": "attn_norm.weight", "attn_q_a": "attn.wq_a.weight", "attn_q_a_norm": "attn.q_norm.weight",
    "attn_q_b": "attn.wq_b.weight", "attn_kv": "attn.wkv.weight", "attn_kv_a_norm": "attn.kv_norm.weight",
    "attn_sinks": "attn.attn_sink", "attn_output_a": "attn.wo_a.weight", "attn_output_b": "attn.wo_b.weight",
    "ffn_norm": "ffn_norm.weight", "ffn_gate_inp": "ffn.gate.weight", "exp_probs_b": "ffn.gate.bias",
    "nextn.enorm": "enorm.weight", "nextn.hnorm": "hnorm.weight", "nextn.shared_head_norm": "norm.weight",
    **{f"hc_{part}_{x}": f"hc_{part}_{x}" for part in ("attn", "ffn") for x in ("fn", "base", "scale")},
    "ffn_gate_shexp": "ffn.shared_experts.w1.weight", "ffn_up_shexp": "ffn.shared_experts.w3.weight",
    "ffn_down_shexp": "ffn.shared_experts.w2.weight",
}  # fmt: skip


def mtp_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The prediction layer of a file, blk.2, as a checkpoint has it, with an end of streams of its own."""
    tensors = {}
    for name, values in weights.items():
        module = re.sub(r"\.(weight|bias)$", "", name.removeprefix("blk.2."))
        if not name.startswith("blk.2."):
            continue
        if module == "nextn.eh_proj":
            tensors["e_proj.weight"], tensors["h_proj.weight"] = np.split(values, 2, axis=1)
        elif module.endswith("_exps"):
            w = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}[module]
            tensors |= {f"ffn.experts.{i}.{w}.weight": expert for i, expert in enumerate(values)}
        else:
            tensors[OF_LAYER[module]] = values
    tensors |= {f"hc_head_{x}": 2 * weights[f"output_hc_{x}.weight"] for x in ("fn", "base", "scale")}
    return {f"mtp.0.{name}": values for name, values in tensors.items()}


def checkpoint_with_prediction(folder: Path, m: tiny.Deepseek4) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint with a prediction layer, and that layer's tensors."""
    folder = hf.save(tiny.hf_model(tiny.replace(m, num_nextn_predict_layers=0)), folder)
    added = {name: torch.from_numpy(values.copy()) for name, values in mtp_tensors(tiny.tensors(m)).items()}
    hf.edit_tensors(folder, lambda tensors: tensors.update(added))
    hf.edit_config(folder, num_nextn_predict_layers=1)
    return folder, added


@pytest.mark.slow
def test_llama_cpp_runs_the_prediction_layers_file(tmp_path: Path) -> None:
    """Where both head sizes are the same it divides by zero, so they are not."""
    m = tiny.replace(MTP, head_dim=128)
    folder, _ = checkpoint_with_prediction(tmp_path / "model", m)
    for name, drafts in (("model.gguf", False), ("mtp.gguf", True)):
        convert(make_plan(folder, tmp_path / name, Options(mix="F32", drafts=drafts)))
    ids, n_tokens = tiny.token_ids(20), 20
    streams = np.random.default_rng(0).standard_normal((n_tokens, 4 * m.hidden_size), dtype=np.float32)
    np.save(tmp_path / "streams.npy", streams)
    expected = llama_cpp_oracle.prediction_logits(tmp_path / "mtp.gguf", ids, tmp_path / "streams.npy")
    with localrun.load(tmp_path / "model.gguf", draft=tmp_path / "mtp.gguf", device="cpu", threads=1, ctx=64) as engine:
        cache, forward = Cache([engine.config.rows(2)], n_tokens, np.float32), engine.model.mtp.forward
        rows = [forward(ids[t : t + 1], streams[t : t + 1], cache)[0] for t in range(n_tokens)]
    assert error(np.concatenate(rows), expected) < 1e-5  # float32 in another order


def test_the_prediction_layer_becomes_a_file_of_its_own(tmp_path: Path) -> None:
    """The one that its weights make, but for the end of streams, which is the layer's."""
    folder, added = checkpoint_with_prediction(tmp_path / "model", MTP)
    convert(make_plan(folder, tmp_path / "mtp.gguf", Options(mix="F32", drafts=True)))
    expected_path = tiny.write(tmp_path / "expected.gguf", MTP, leave_out=r"blk\.[01]\.")
    with open_gguf(tmp_path / "mtp.gguf") as found, open_gguf(expected_path) as expected:
        assert is_mtp_only(found) and found.tensors.keys() == expected.tensors.keys()
        for name in expected.tensors:
            factor = 2 if name.startswith("output_hc_") else 1
            assert np.array_equal(values(found, name), factor * values(expected, name)), name
        for key, value in expected.metadata.items():
            if key != "general.name":
                assert str(found.metadata[key]) == str(value), key
    with pytest.raises(LocalrunError, match="--drafts: it holds no tensors that only make drafts"):
        hf.edit_tensors(folder, lambda tensors: [tensors.pop(name) for name in added])
        make_plan(folder, tmp_path / "x.gguf", Options(drafts=True))
    with pytest.raises(LocalrunError, match=r"it holds neither mtp\.0, one prediction layer, nor DSpark's blocks"):
        hf.edit_tensors(folder, lambda tensors: tensors.update({"mtp.2.enorm.weight": torch.ones(128)}))
        make_plan(folder, tmp_path / "x.gguf", Options(drafts=True))


OF_DSPARK = {
    "fc": "0.main_proj", "enc.output_norm": "0.main_norm", "markov_w1": "1.markov_head.markov_w1",
    "markov_w2": "1.markov_head.markov_w2", "conf_proj": "1.confidence_head.proj", "output_norm": "1.norm",
}  # fmt: skip


def checkpoint_with_dspark(saved: Path, folder: Path) -> Path:
    """A checkpoint with the blocks of tiny_dspark, whose ends lie in one block and another."""
    shutil.copytree(saved, folder)
    added: dict[str, torch.Tensor] = {}
    for name, array in tiny_dspark.tensors(tiny.SHARED).items():
        match, base = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(?:weight|bias)", name), name.removesuffix(".weight")
        weight = torch.from_numpy(array)
        if match is None:
            end = f"{OF_DSPARK[base]}.weight" if base in OF_DSPARK else f"1.hc_head_{base.removeprefix('output_hc_')}"
            added[f"mtp.{end}"] = weight
        elif match[2].endswith("_exps"):
            w = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}[match[2]]
            added |= {f"mtp.{match[1]}.ffn.experts.{i}.{w}.weight": each.clone() for i, each in enumerate(weight)}
        else:
            added[f"mtp.{match[1]}.{OF_LAYER[match[2]]}"] = weight
    hf.edit_tensors(folder, lambda tensors: tensors.update(added))
    keys = {"dspark_block_size": tiny_dspark.BLOCK, "dspark_noise_token_id": tiny_dspark.NOISE}
    hf.edit_config(folder, **keys, dspark_target_layer_ids=list(tiny_dspark.TARGET))
    return folder


@pytest.mark.slow
def test_dsparks_blocks_become_a_file_of_their_own(saved: Path, tmp_path: Path) -> None:
    """The one that their weights make; as published, experts keep their bits."""
    folder = checkpoint_with_dspark(saved, tmp_path / "model")
    meant = publish(folder, tmp_path / "published")
    convert(make_plan(folder, tmp_path / "dspark.gguf", Options(mix="F32", drafts=True)))
    convert(make_plan(tmp_path / "published", tmp_path / "packed.gguf", Options(drafts=True)))
    expected_path = tiny_dspark.write(tmp_path / "expected.gguf", tiny.SHARED)
    with open_gguf(tiny.shared()) as model:
        config = read_config(model)
    with open_gguf(tmp_path / "dspark.gguf") as found, open_gguf(expected_path) as expected:
        assert found.tensors.keys() == expected.tensors.keys()
        for name in expected.tensors:
            assert np.array_equal(values(found, name), values(expected, name)), name
        assert read_dspark(found, config) == read_dspark(expected, config)
    with open_gguf(tmp_path / "packed.gguf") as packed:
        experts = "blk.1.ffn_down_exps.weight"
        assert packed.tensors[experts].type.name == "MXFP4" and packed.tensors["fc.weight"].type.name == "Q8_0"
        parts = [meant[f"mtp.1.ffn.experts.{i}.w2.weight"].numpy() for i in range(tiny.SHARED.n_routed_experts)]
        assert np.array_equal(values(packed, experts).ravel(), np.stack(parts).ravel())
        assert read_dspark(packed, config).block_size == tiny_dspark.BLOCK
    hf.edit_config(folder, dspark_block_size=None)
    with pytest.raises(LocalrunError, match="dspark_block_size or dspark_target_layer_ids is missing"):
        make_plan(folder, tmp_path / "x.gguf", Options(drafts=True))
