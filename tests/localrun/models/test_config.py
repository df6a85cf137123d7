"""Configurations of sound files: published shapes and tiny variants are read right, and told apart by their tensors.

Keys, tensors and sizes of the published models: llama.cpp 3f545becc, conversion/deepseek.py and src/llama-model.cpp,
and config.json of deepseek-ai/DeepSeek-V2-Lite, deepseek-ai/DeepSeek-V3, moonshotai/Kimi-K2-Instruct and
moonshotai/Moonlight-16B-A3B. Files are written byte by byte and sparse: weights are holes.
"""

from __future__ import annotations

from pathlib import Path

import gguf_builder as b
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
import tiny_shapes
from config_models import (
    BASES,
    FUSED,
    LEGACY,
    LEGACY_KEYS,
    LITE,
    NEXTN,
    NO_BIAS,
    TINY,
    Model,
    Shape,
    Value,
    config_of,
    deepseek2,
    router,
    without_bias,
    yarn,
)
from gguf import GGMLQuantizationType as Type

import localrun
from localrun.errors import UnsupportedModelError
from localrun.models.config import WINDOW_SPARE, RopeScaling

_MLA = {"latent": 512, "nope": 128, "rope": 64, "v": 128}
# Each: the file; bytes of cache a token (layers * 576 * 2); fields that config.json states.
PUBLISHED: dict[str, tuple[Model, int, dict[str, object]]] = {
    "V2-Lite": (
        without_bias(
            deepseek2(
                d=2048, layers=27, dense=1, heads=16, q_lora=None, vocab=102400, ff=10944, expert_ff=1408, experts=64,
                used=6, shared=2, **_MLA, **router(1, 1, 1, 1.0, False), **yarn(40, 0.0707),
            )
        ),
        31_104,
        {
            "num_hidden_layers": 27, "q_lora_rank": None, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_attention_heads": 16, "vocab_size": 102400, "n_routed_experts": 64,
            "num_experts_per_tok": 6, "n_group": 1, "scoring_func": "softmax", "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
    ),
    "V3": (
        deepseek2(
            d=7168, layers=61, dense=3, heads=128, q_lora=1536, vocab=129280, ff=18432, expert_ff=2048, experts=256,
            used=8, shared=1, **_MLA, **router(2, 8, 4, 2.5, True), **yarn(40, 0.1),
        ),
        70_272,
        {
            "num_hidden_layers": 61, "q_lora_rank": 1536, "hidden_size": 7168, "intermediate_size": 18432,
            "moe_intermediate_size": 2048, "num_attention_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
            "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "scoring_func": "sigmoid",
            "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        },
    ),
    "Kimi-K2": (
        deepseek2(
            d=7168, layers=61, dense=1, heads=64, q_lora=1536, vocab=163840, ff=18432, expert_ff=2048, experts=384,
            used=8, shared=1, **_MLA, **router(2, 1, 1, 2.827, True), **yarn(32, 0.1),
        ),
        70_272,
        {
            "num_hidden_layers": 61, "q_lora_rank": 1536, "num_attention_heads": 64, "vocab_size": 163840,
            "n_routed_experts": 384, "num_experts_per_tok": 8, "n_group": 1, "scoring_func": "sigmoid",
            "norm_topk_prob": True, "routed_scaling_factor": 2.827,
        },
    ),
    "Moonlight": (
        deepseek2(
            d=2048, layers=27, dense=1, heads=16, q_lora=None, vocab=163840, ff=11264, expert_ff=1408, experts=64,
            used=6, shared=2, **_MLA, **router(2, 1, 1, 2.446, True),
        ),
        31_104,
        {
            "num_hidden_layers": 27, "q_lora_rank": None, "rope_scaling": None, "scoring_func": "sigmoid",
            "norm_topk_prob": True, "routed_scaling_factor": 2.446, "intermediate_size": 11264,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, tmp_path: Path) -> None:
    model, kv_bytes, fields = PUBLISHED[name]
    model.type = Type.Q4_0  # k_b's rows of 128 are no whole blocks of the K-quants
    config = config_of(model.write(tmp_path / "model.gguf"))
    assert config.kv_bytes_per_token == kv_bytes
    expected = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in fields.items()}
    assert {key: getattr(config, key) for key in fields} == expected
    sizes = config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    assert (config.architecture, *sizes) == ("deepseek2", 512, 128, 64, 128)
    assert (config.rms_norm_eps, config.rope_theta) == (pytest.approx(1e-6), 10000)


@pytest.mark.parametrize(("name", "factor", "mscale"), [("V2-Lite", 40, 0.707), ("V3", 40, 1.0), ("Kimi-K2", 32, 1.0)])
def test_published_yarn(name: str, factor: float, mscale: float, tmp_path: Path) -> None:
    scaling = config_of(PUBLISHED[name][0].write(tmp_path / "model.gguf")).rope_scaling
    assert (scaling.type, scaling.factor, scaling.original_max_position_embeddings) == ("yarn", factor, 4096)
    assert scaling.mscale_all_dim == pytest.approx(mscale, rel=1e-6)
    assert (scaling.beta_fast, scaling.beta_slow) == (32, 1)


# Which layers have an indexer, F, or share one, S.
INDEXERS = {
    "deepseek32": "FFF", "deepseek32-nextn": "FFF", "glm-dsa": "FFF", "glm-dsa-shared": "FSFSS",
    "glm-dsa-default-types": "FFFSSSF",
}  # fmt: skip


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_tiny_variants(variant: str) -> None:
    model = tiny_models.VARIANTS[variant]
    config = config_of(tiny_models.shared(variant))
    fields = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    if isinstance(model, tiny_models.Llama):
        fields += ["num_key_value_heads", "head_dim", "rope_theta"]
        width = model.num_key_value_heads * 2 * model.head_dim
        assert (config.v_head_dim, config.kv_lora_rank, config.n_routed_experts) == (model.head_dim, 0, 0)
        scaling = None if model.rope_linear_factor is None else RopeScaling("linear", model.rope_linear_factor)
        assert config.rope_scaling == scaling
        assert (config.attention, config.rope, config.qk_norm) == ("gqa", "pairs", False)
    elif isinstance(model, tiny_shapes.Grouped):
        fields += ["num_key_value_heads", "head_dim", "rope_theta", "n_routed_experts", "num_experts_per_tok"]
        fields += ["moe_intermediate_size", "scoring_func", "norm_topk_prob"]
        width = model.num_key_value_heads * 2 * model.head_dim
        fields += ["qk_rope_head_dim", "attention_bias", "n_shared_experts", "num_nextn_predict_layers"]
        rope = "pairs" if model.architecture == "llama" else "halves"
        assert (config.attention, config.rope, config.v_head_dim) == ("gqa", rope, model.head_dim)
        assert (config.qk_norm, config.qk_norm_whole) == (model.qk_norm != "", model.qk_norm == "whole")
        assert config.shared_intermediate_size == model.n_shared_experts * model.moe_intermediate_size
        assert (config.n_group, config.topk_group) == (model.n_group or 1, model.topk_group or 1)
        assert config.routed_scaling_factor == pytest.approx(model.routed_scaling_factor or 1.0)
        assert (config.rope_scaling is None) == (model.yarn_factor is None)
    else:
        assert (config.attention, config.rope) == ("mla", "pairs")
        fields += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scoring_func"]
        fields += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
        fields += ["num_nextn_predict_layers"]
        assert (config.n_group, config.topk_group) == (model.n_group or 1, model.topk_group or 1)
        assert config.routed_scaling_factor == pytest.approx(model.routed_scaling_factor or 1.0)
        assert (config.rope_scaling is None) == (model.yarn_factor is None)
        width = model.kv_lora_rank + model.qk_rope_head_dim
    assert {name: getattr(config, name) for name in fields} == {name: getattr(model, name) for name in fields}
    assert config.rms_norm_eps == pytest.approx(model.rms_norm_eps)
    window = getattr(model, "sliding_window", 0)
    n_sliding = -(-model.num_hidden_layers // 2) if window else 0
    if isinstance(model, tiny_models.Sparse):
        assert (config.index_n_heads, config.index_topk) == (model.index_n_heads, model.index_topk)
        assert config.indexer_rope == ("halves" if model.architecture == "deepseek32" else "pairs")
        assert "".join(each[0].upper() for each in config.indexer_types) == INDEXERS[variant]
    index_bytes = 2 * INDEXERS.get(variant, "").count("F") * config.index_head_dim
    assert config.kv_bytes_per_token == 2 * (model.num_hidden_layers - n_sliding) * width + index_bytes
    assert config.kv_window_bytes == 2 * n_sliding * width * (window + WINDOW_SPARE)
    assert config.kv_bytes(10) == (2 * model.num_hidden_layers * width + index_bytes) * 10
    windows = [config.window(index) for index in range(model.num_hidden_layers)]
    assert windows == [0 if index % 2 else window for index in range(model.num_hidden_layers)]


@pytest.mark.parametrize(
    ("pattern", "types"),
    [(None, "sfsf"), (2, "sfsf"), (1, "ffff"), (4, "sssf"), (0, "ssss"), ([True, True, False, True], "ssfs")],
)
def test_which_layers_slide(pattern: int | list[bool] | None, types: str, tmp_path: Path) -> None:
    """By what llama.cpp calls the pattern: every so-many-th layer is full, or one answer a layer."""
    path, key = tmp_path / "model.gguf", "gpt-oss.attention.sliding_window_pattern"
    values = {} if pattern is None else {key: pattern}
    config = config_of(tiny_models.with_keys(tiny_models.shared("gpt-oss"), path, values))
    assert "".join(kind[0] for kind in config.layer_types) == types


def test_another_theta_in_windows_is_not_native(tmp_path: Path) -> None:
    path = tiny_models.with_keys(
        tiny_models.shared("gpt-oss"), tmp_path / "model.gguf", {"gpt-oss.rope.freq_base_swa": 1e4}
    )
    with pytest.raises(UnsupportedModelError, match="freq_base for layers with a window"):
        config_of(path)


# What changes in the sound file TINY, and what the configuration then says.
PRESENCE: dict[str, tuple[dict[str, Value | None], dict[str, Shape | None], dict[str, object]]] = {
    "q_lora tensors, no key": ({"attention.q_lora_rank": None}, {}, {"q_lora_rank": 32}),
    "no q_lora tensors, with its key": ({}, LITE, {"q_lora_rank": None}),
    "a bias, no gating key": ({"expert_gating_func": None}, {}, {"scoring_func": "sigmoid"}),
    "no bias, no gating key": ({"expert_gating_func": None}, NO_BIAS, {"scoring_func": "softmax"}),
    "no bias, but sigmoid": ({}, NO_BIAS, {"scoring_func": "sigmoid"}),
    "a bias, but softmax": ({"expert_gating_func": (b.U32, 1)}, {}, {"scoring_func": "softmax"}),
    "softmax after top-k": ({"expert_gating_func": (b.U32, 3)}, {}, {"scoring_func": "softmax_after_topk"}),
    "one kv_b": (LEGACY_KEYS, LEGACY, {"qk_nope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 32}),
    "gate and up in one": ({}, FUSED, {"moe_intermediate_size": 32}),
    "no head": ({}, {"output.weight": None}, {"vocab_size": 32}),
    "dense layers by their tensors": ({"leading_dense_block_count": (b.U32, 0)}, {}, {"num_hidden_layers": 3}),
    "no dense count": ({"leading_dense_block_count": None}, {}, {"num_hidden_layers": 3}),
    "a nextn layer": (NEXTN, {"blk.3.nextn.eh_proj.weight": (64, 128)}, {"num_hidden_layers": 3}),
    "no groups": ({"expert_group_count": None, "expert_group_used_count": None}, {}, {"n_group": 1, "topk_group": 1}),
    "zero groups": ({"expert_group_count": (b.U32, 0), "expert_group_used_count": None}, {}, {"n_group": 1}),
    "one group": (
        {"expert_group_count": (b.U32, 1), "expert_group_used_count": (b.U32, 0)}, {}, {"n_group": 1, "topk_group": 1}
    ),
    "no scale": ({"expert_weights_scale": None}, {}, {"routed_scaling_factor": 1.0}),
    "scale 0 is none": ({"expert_weights_scale": (b.F32, 0.0)}, {}, {"routed_scaling_factor": 1.0}),
    "no norm flag": ({"expert_weights_norm": None}, {}, {"norm_topk_prob": False}),
    "no rope base": ({"rope.freq_base": None}, {}, {"rope_theta": 10000.0}),
    "scaling none": ({"rope.scaling.type": (b.STRING, "none")}, {}, {"rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESENCE)
def test_variants_by_presence(name: str, tmp_path: Path) -> None:
    keys, tensors, expected = PRESENCE[name]
    config = config_of(TINY.changed(keys, tensors, {}).write(tmp_path / "model.gguf"))
    assert {key: getattr(config, key) for key in expected} == expected


def test_mscale_of_a_file_without_it(tmp_path: Path) -> None:
    path = TINY.changed({"rope.scaling.yarn_log_multiplier": None}, {}, {}).write(tmp_path / "model.gguf")
    assert config_of(path).rope_scaling.mscale_all_dim is None


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("llama-linear-rope", "llama.rope.scaling.type"),  # linear is meant
        ("v3", "deepseek2.rope.scaling.original_context_length"),  # context_length is meant
    ],
)
def test_missing_rope_keys_mean_what_they_mean_to_llama_cpp(variant: str, key: str, tmp_path: Path) -> None:
    path, content = tmp_path / "model.gguf", tiny_models.shared(variant).read_bytes()
    assert content.count(key.encode()) == 1
    path.write_bytes(content.replace(key.encode(), b"x" + key.encode()[1:]))  # a key of no architecture
    ids = tiny_models.prompt(variant)
    expected = llama_cpp_oracle.logits(path, ids)
    with localrun.load(path, threads=1, ctx=64, backend="native") as model:
        found = model.logits(ids)
    assert np.abs(found - expected).max() < 1e-3 * np.ptp(expected)  # as in test_logits.py


@pytest.mark.parametrize("base", BASES)
def test_the_unchanged_bases_run(base: str, tmp_path: Path) -> None:
    path = BASES[base].write(tmp_path / "model.gguf")
    with localrun.load(path, threads=1, ctx=8, backend="native") as model:
        assert model.logits([1, 2]).shape == (2, 32)
