"""Configurations: published shapes and tiny variants read right; broken and contradictory ones each with its own error.

Keys, tensors and sizes of the published models: llama.cpp 3f545becc, conversion/deepseek.py and src/llama-model.cpp,
and config.json of deepseek-ai/DeepSeek-V2-Lite, deepseek-ai/DeepSeek-V3, moonshotai/Kimi-K2-Instruct and
moonshotai/Moonlight-16B-A3B. Files are written byte by byte and sparse: weights are holes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import gguf_builder as b
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
from gguf import GGMLQuantizationType as Type

import localrun
from localrun.config import Config, RopeScaling, read_config
from localrun.errors import GGUFError, LocalrunError, UnsupportedModelError
from localrun.gguf import open_gguf
from localrun.names import check_tensors, check_types

Value = tuple[int, object]  # a type code of gguf_builder, and a value; an array is (ARRAY, (item type, items))
Shape = tuple[int, ...]  # NumPy order

MAX_U32 = 2**32 - 1


@dataclass
class Model:
    """What a file holds: keys without the architecture's prefix, and tensors with their shapes."""

    architecture: str
    keys: dict[str, Value]
    tensors: dict[str, Shape]
    type: Type = Type.F32
    types: dict[str, Type] = field(default_factory=dict)

    def changed(self, keys: dict[str, Value | None], tensors: dict[str, Shape | None], types: dict[str, Type]) -> Model:
        """A copy with some keys and tensors replaced, added, or (None) removed."""
        merged = {k: v for k, v in (self.keys | keys).items() if v is not None}
        shapes = {n: s for n, s in (self.tensors | tensors).items() if s is not None}
        return Model(self.architecture, merged, shapes, self.type, types)

    def write(self, path: Path) -> Path:
        """The file, its data a hole."""
        keys = [b.key("general.architecture", b.STRING, self.architecture), b.key("general.name", b.STRING, "made up")]
        keys.append(b.key("tokenizer.ggml.model", b.STRING, "none"))
        for name, (type_, value) in self.keys.items():
            name = f"{self.architecture}.{name}"
            keys.append(b.array(name, *value) if type_ == b.ARRAY else b.key(name, type_, value))
        records, end = [], 0
        for name, shape in self.tensors.items():
            type_ = self.types.get(name, Type.F32 if len(shape) == 1 else self.type)
            records.append(b.tensor(name, shape[::-1], type_, end))
            block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
            end += -(-math.prod(shape) // block * block_bytes // 32) * 32
        with path.open("wb") as file:
            header = b.build(keys, records)
            file.write(header)
            file.truncate(len(header) + end)
        return path


def deepseek2(
    *, d: int, layers: int, dense: int, heads: int, q_lora: int | None, latent: int, nope: int, rope: int, v: int,
    vocab: int, ff: int, expert_ff: int, experts: int, used: int, shared: int, **keys: Value | None,
) -> Model:  # fmt: skip
    """A deepseek2 model with the keys and tensors that llama.cpp's converter writes; `keys` on top."""
    counts = {
        "block_count": layers, "context_length": 163840, "embedding_length": d, "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope, "attention.value_length": latent,
        "attention.key_length_mla": nope + rope, "attention.value_length_mla": v, "vocab_size": vocab,
        "leading_dense_block_count": dense, "expert_feed_forward_length": expert_ff, "expert_count": experts,
        "expert_used_count": used, "expert_shared_count": shared, "rope.dimension_count": rope,
    }  # fmt: skip
    if q_lora is not None:
        counts["attention.q_lora_rank"] = q_lora
    floats = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}
    tensors = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,), "output.weight": (vocab, d)}
    for i in range(layers):
        blk = {"attn_norm.weight": (d,), "attn_kv_a_mqa.weight": (latent + rope, d), "attn_kv_a_norm.weight": (latent,)}
        if q_lora is None:
            blk["attn_q.weight"] = (heads * (nope + rope), d)
        else:
            blk |= {"attn_q_a.weight": (q_lora, d), "attn_q_a_norm.weight": (q_lora,)}
            blk["attn_q_b.weight"] = (heads * (nope + rope), q_lora)
        blk |= {"attn_k_b.weight": (heads, latent, nope), "attn_v_b.weight": (heads, v, latent)}
        blk |= {"attn_output.weight": (d, heads * v), "ffn_norm.weight": (d,)}
        if i < dense:
            blk |= {"ffn_gate.weight": (ff, d), "ffn_up.weight": (ff, d), "ffn_down.weight": (d, ff)}
        else:
            width = expert_ff * shared
            blk |= {"ffn_gate_inp.weight": (experts, d), "exp_probs_b.bias": (experts,)}
            blk |= {f"ffn_{part}_exps.weight": (experts, expert_ff, d) for part in ("gate", "up")}
            blk |= {"ffn_down_exps.weight": (experts, d, expert_ff), "ffn_gate_shexp.weight": (width, d)}
            blk |= {"ffn_up_shexp.weight": (width, d), "ffn_down_shexp.weight": (d, width)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in blk.items()}
    typed = {k: (b.U32, n) for k, n in counts.items()} | {k: (b.F32, x) for k, x in floats.items()}
    return Model("deepseek2", typed, tensors).changed(keys, {}, {})


def yarn(factor: float, multiplier: float | None, original: int = 4096) -> dict[str, Value]:
    keys: dict[str, Value] = {"type": (b.STRING, "yarn"), "factor": (b.F32, factor)}
    keys["original_context_length"] = (b.U32, original)
    if multiplier is not None:
        keys["yarn_log_multiplier"] = (b.F32, multiplier)
    return {f"rope.scaling.{name}": value for name, value in keys.items()}


def router(gate: int, groups: int, used_groups: int, scale: float, norm: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {"expert_gating_func": (b.U32, gate), "expert_weights_scale": (b.F32, scale)}
    keys |= {"expert_group_count": (b.U32, groups), "expert_group_used_count": (b.U32, used_groups)}
    return keys | ({"expert_weights_norm": (b.BOOL, 1)} if norm else {})


def without_bias(model: Model) -> Model:
    return model.changed({}, {name: None for name in model.tensors if name.endswith("exp_probs_b.bias")}, {})


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


def config_of(path: Path) -> Config:
    """What load() does before it reads weights."""
    with open_gguf(path) as file:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
        return config


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
    else:
        fields += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "scoring_func"]
        fields += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
        fields += ["num_nextn_predict_layers"]
        assert (config.n_group, config.topk_group) == (model.n_group or 1, model.topk_group or 1)
        assert config.routed_scaling_factor == pytest.approx(model.routed_scaling_factor or 1.0)
        assert (config.rope_scaling is None) == (model.yarn_factor is None)
        width = model.kv_lora_rank + model.qk_rope_head_dim
    assert {name: getattr(config, name) for name in fields} == {name: getattr(model, name) for name in fields}
    assert config.rms_norm_eps == pytest.approx(model.rms_norm_eps)
    assert config.kv_bytes_per_token == 2 * model.num_hidden_layers * width


# ------------------------------------------------------------------------- variants are told by tensors, not by counts

TINY = deepseek2(
    d=64, layers=3, dense=1, heads=2, q_lora=32, latent=32, nope=32, rope=16, v=32, vocab=32, ff=64, expert_ff=32,
    experts=8, used=2, shared=1, **router(2, 4, 2, 2.5, True), **yarn(40, 0.1, 256),
)  # fmt: skip
LLAMA = Model(
    "llama",
    {
        "block_count": (b.U32, 1), "context_length": (b.U32, 512), "embedding_length": (b.U32, 64),
        "feed_forward_length": (b.U32, 96), "attention.head_count": (b.U32, 4), "attention.head_count_kv": (b.U32, 2),
        "attention.layer_norm_rms_epsilon": (b.F32, 1e-5), "rope.freq_base": (b.F32, 10000.0),
        "rope.dimension_count": (b.U32, 16), "attention.key_length": (b.U32, 16),
        "attention.value_length": (b.U32, 16), "vocab_size": (b.U32, 32),
    },
    {
        "token_embd.weight": (32, 64), "output_norm.weight": (64,), "output.weight": (32, 64),
        "blk.0.attn_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64), "blk.0.attn_output.weight": (64, 64), "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
    },
)  # fmt: skip
BASES = {"deepseek2": TINY, "llama": LLAMA}


def of_layers(pattern: str, shape: Shape | None, layers: range = range(3)) -> dict[str, Shape | None]:
    return {f"blk.{i}.{pattern}": shape for i in layers}


LITE = of_layers("attn_q_a.weight", None) | of_layers("attn_q_a_norm.weight", None) | of_layers("attn_q_b.weight", None)
LITE |= of_layers("attn_q.weight", (96, 64))
NO_BIAS = of_layers("exp_probs_b.bias", None, range(1, 3))
LEGACY = of_layers("attn_k_b.weight", None) | of_layers("attn_v_b.weight", None)
LEGACY |= of_layers("attn_kv_b.weight", (128, 32))
LEGACY_KEYS = {
    "attention.key_length_mla": None, "attention.value_length_mla": None,
    "attention.key_length": (b.U32, 48), "attention.value_length": (b.U32, 32),
}  # fmt: skip
FUSED = of_layers("ffn_gate_exps.weight", None, range(1, 3)) | of_layers("ffn_up_exps.weight", None, range(1, 3))
FUSED |= of_layers("ffn_gate_up_exps.weight", (8, 64, 64), range(1, 3))
NEXTN = {"nextn_predict_layers": (b.U32, 1), "block_count": (b.U32, 4)}

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


# ---------------------------------------------------------------------------------------------------- broken ones

Case = tuple[str, dict[str, Value | None], dict[str, Shape | None], dict[str, Type], type[LocalrunError], str]
CASES: dict[str, Case] = {}


def case(
    name: str, message: str, *, base: str = "deepseek2", keys: dict | None = None, tensors: dict | None = None,
    types: dict | None = None, error: type[LocalrunError] = GGUFError,
) -> None:  # fmt: skip
    assert name not in CASES
    CASES[name] = (base, keys or {}, tensors or {}, types or {}, error, message)


_COUNTS = {
    "deepseek2": (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
        "expert_feed_forward_length", "expert_count", "expert_used_count", "expert_group_used_count",
        "rope.dimension_count",
    ),
    "llama": (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    ),
}  # fmt: skip
_OPTIONAL_COUNTS = {
    "deepseek2": (
        "attention.head_count_kv", "attention.q_lora_rank", "leading_dense_block_count", "expert_shared_count",
        "expert_gating_func", "expert_group_count", "nextn_predict_layers", "rope.scaling.original_context_length",
        "vocab_size",
    ),
    "llama": (
        "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
        "vocab_size", "expert_count", "expert_used_count",
    ),
}  # fmt: skip
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor")
_FLOATS_MLA = ("expert_weights_scale", *(f"rope.scaling.yarn_{name}" for name in (
    "log_multiplier", "beta_fast", "beta_slow", "ext_factor", "attn_factor"
)))  # fmt: skip

for _base in BASES:
    for _key in _COUNTS[_base]:
        _full = f"'{_base}.{_key}'"
        case(f"{_base}: {_key} is 0", f"key {_full} is 0; expected a positive", base=_base, keys={_key: (b.U32, 0)})
        if _key.endswith("_mla"):
            continue  # one alone is among the contradictions
        case(f"{_base}: no {_key}", f"key {_full} (uint32) is missing", base=_base, keys={_key: None})
    for _key in _COUNTS[_base] + _OPTIONAL_COUNTS[_base]:
        _full = f"'{_base}.{_key}'"
        _wrong = f"key {_full} has type float32, expected uint32"
        case(f"{_base}: {_key} is a float", _wrong, base=_base, keys={_key: (b.F32, 2.0)})
        _wrong = f"key {_full} has type array of uint32, expected uint32"
        case(f"{_base}: {_key} is an array", _wrong, base=_base, keys={_key: (b.ARRAY, (b.U32, [2] * 3))})
    for _key in _FLOATS + (_FLOATS_MLA if _base == "deepseek2" else ()):
        _wrong = f"key '{_base}.{_key}' has type uint32, expected float32"
        case(f"{_base}: {_key} is a count", _wrong, base=_base, keys={_key: (b.U32, 1)})
    for _key, _type in (("rope.scaling.type", "string"), ("rope.scaling.finetuned", "bool")):
        _wrong = f"key '{_base}.{_key}' has type uint32, expected {_type}"
        case(f"{_base}: {_key} is a count", _wrong, base=_base, keys={_key: (b.U32, 1)})
    _eps = "attention.layer_norm_rms_epsilon"
    case(f"{_base}: no epsilon", f"key '{_base}.{_eps}' (float32) is missing", base=_base, keys={_eps: None})
    _wrong = f"key '{_base}.{_eps}' is -1.0; expected not negative"
    case(f"{_base}: epsilon -1", _wrong, base=_base, keys={_eps: (b.F32, -1.0)})
    for _key in _FLOATS + (_FLOATS_MLA if _base == "deepseek2" else ()):
        for _value in (math.nan, math.inf, -math.inf):
            _wrong = f"key '{_base}.{_key}' is {_value}; expected a finite number"
            case(f"{_base}: {_key} {_value}", _wrong, base=_base, keys={_key: (b.F32, _value)})
    for _value in (-1.0, 0.0):
        _wrong = f"key '{_base}.rope.freq_base' is {_value}; expected "
        _wrong += "more than 1 with yarn" if _base == "deepseek2" else "a positive number"
        case(f"{_base}: base {_value}", _wrong, base=_base, keys={"rope.freq_base": (b.F32, _value)})
    _wrong = f"block_count' is {MAX_U32}; expected layers for the {len(BASES[_base].tensors)} tensors of the file"
    case(f"{_base}: 2^32 layers", _wrong, base=_base, keys={"block_count": (b.U32, MAX_U32)})
    for _name in ("blk", "blk.\u00b2.x", "blk..x", "blk.-1.x", "blk.9.x"):
        _wrong = f"tensor '{_name}' has no place in the native network"
        case(f"{_base}: {_name}", _wrong, base=_base, tensors={_name: (4,)}, error=UnsupportedModelError)
    _wrong = f"key '{_base}.vocab_size' is 33; expected 32, the rows of token_embd"
    case(f"{_base}: vocabulary of 33", _wrong, base=_base, keys={"vocab_size": (b.U32, 33)})
    case(
        f"{_base}: unknown key", f"key '{_base}.attention.sinks' is not known to the native backend", base=_base,
        keys={"attention.sinks": (b.U32, 1)}, error=UnsupportedModelError,
    )  # fmt: skip
    for _name in ("rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        _wrong = f"key '{_base}.{_name}' other than 1 is not native"
        case(f"{_base}: {_name} 0.5", _wrong, base=_base, keys={_name: (b.F32, 0.5)}, error=UnsupportedModelError)
    case(
        f"{_base}: longrope", "rope scaling 'longrope' is not native", base=_base,
        keys={"rope.scaling.type": (b.STRING, "longrope")}, error=UnsupportedModelError,
    )  # fmt: skip
    for _value in (0.0, -4.0):
        _keys = {"rope.scaling.type": (b.STRING, "linear"), "rope.scaling.factor": (b.F32, _value)}
        _wrong = f"key '{_base}.rope.scaling.factor' is {_value}; expected a positive number"
        case(f"{_base}: factor {_value}", _wrong, base=_base, keys=_keys)
    _wrong = "tensor 'blk.0.attn_extra.weight' has no place in the native network"
    case(
        f"{_base}: a tensor too many", _wrong, base=_base, tensors={"blk.0.attn_extra.weight": (64,)},
        error=UnsupportedModelError,
    )  # fmt: skip
    for _type in (Type.Q2_K, Type.IQ1_S, Type.F64, Type.I32, Type.TQ1_0):
        _rows = gguf.GGML_QUANT_SIZES[_type][0]
        if _rows == 1:  # the others' rows are longer than these models'
            _wrong = f"tensor 'output.weight' has type {_type.name}, not native"
            _types = {"output.weight": _type}
            case(f"{_base}: {_type.name}", _wrong, base=_base, types=_types, error=UnsupportedModelError)

for _base, _model in BASES.items():
    for _name, _shape in _model.tensors.items():
        if _name == "output.weight" or "_q_a.weight" in _name or "exp_probs_b" in _name or _name.startswith("blk.2"):
            continue  # optional, or decides the variant, or as in layer 1
        _label = f"{_base}: no {_name}"
        _found = {"blk.1.ffn_gate_inp.weight": "blk.1.ffn_gate.weight"}.get(_name, _name)  # else a dense layer is meant
        if _name == "blk.1.ffn_gate_shexp.weight":  # no shared experts then
            case(_label, "'blk.1.ffn_up_shexp.weight' has no place", tensors={_name: None}, error=UnsupportedModelError)
        else:
            case(_label, f"tensor '{_found}' not found", base=_base, tensors={_name: None})
        if _name not in ("token_embd.weight", "blk.1.ffn_gate_shexp.weight"):  # these say their own number of rows
            _wrong = f"tensor '{_name}' has shape {(*_shape[:-1], 2 * _shape[-1])}; expected {_shape}"
            case(f"{_base}: {_name} twice as wide", _wrong, base=_base, tensors={_name: (*_shape[:-1], 2 * _shape[-1])})
        _wrong = f"tensor '{_name}' has shape {(1, *_shape)}; expected"
        if _name not in ("token_embd.weight", "blk.1.ffn_gate_shexp.weight") and len(_shape) < 4:
            case(f"{_base}: {_name} one deeper", _wrong, base=_base, tensors={_name: (1, *_shape)})
case("embedding without columns", "tensor 'token_embd.weight' has shape (32,)", tensors={"token_embd.weight": (32,)})
case("no dimensions", "tensor 'output_norm.weight' has shape (); expected (64,)", tensors={"output_norm.weight": ()})
case("bias of 7", "exp_probs_b.bias' has shape (7,); expected (8,)", tensors={"blk.1.exp_probs_b.bias": (7,)})
case("head of 31", "tensor 'output.weight' has shape (31, 64)", tensors={"output.weight": (31, 64)})
case(
    "one shared expert's up of another width", "tensor 'blk.1.ffn_up_shexp.weight' has shape (64, 64)",
    tensors={"blk.1.ffn_up_shexp.weight": (64, 64)},
)  # fmt: skip
case(
    "layers with different queries", "tensor 'blk.1.attn_q_a.weight' not found",
    tensors={"blk.1.attn_q_a.weight": None, "blk.1.attn_q.weight": (96, 64)},
)  # fmt: skip
case(
    "both forms of kv_b", "tensor 'blk.0.attn_k_b.weight' has no place in the native network",
    tensors={"blk.0.attn_kv_b.weight": (128, 32)}, error=UnsupportedModelError,
)  # fmt: skip
case(
    "rope factors beside yarn", "tensor 'rope_freqs.weight' has no place",
    tensors={"rope_freqs.weight": (8,)}, error=UnsupportedModelError,
)  # fmt: skip
case(
    "a layer beyond block_count", "tensor 'blk.3.attn_norm.weight' has no place",
    tensors={"blk.3.attn_norm.weight": (64,)}, error=UnsupportedModelError,
)  # fmt: skip
case("one layer more than there are", "tensor 'blk.3.attn_norm.weight' not found", keys={"block_count": (b.U32, 4)})
case("one layer fewer", "tensor 'blk.2.attn_norm.weight' has no place", keys={"block_count": (b.U32, 2)},
     error=UnsupportedModelError)  # fmt: skip
for _key in ("key_length_mla", "value_length_mla"):
    case(f"no {_key}", "expected both *_mla keys or neither", keys={f"attention.{_key}": None})
case("heads shorter than their rotated part", "attention.key_length_mla' is 16; expected more than rope.dimension_count"
     ", 16", keys={"attention.key_length_mla": (b.U32, 16)})  # fmt: skip
case("odd rotated part", "rope.dimension_count' is 15; expected an even number", keys={"rope.dimension_count":
     (b.U32, 15)})  # fmt: skip
case("only nextn layers", "nextn_predict_layers' is 3; expected fewer than block_count",
     keys={"nextn_predict_layers": (b.U32, 3)})  # fmt: skip
case("nextn beyond all", f"nextn_predict_layers' is {MAX_U32}; expected fewer than block_count",
     keys={"nextn_predict_layers": (b.U32, MAX_U32)})  # fmt: skip
case("more experts used than there are", "expert_used_count' is 9; expected at most expert_count, 8",
     keys={"expert_used_count": (b.U32, 9)})  # fmt: skip
case("more experts used than in the groups", "expert_used_count' is 5; expected at most the experts of the groups",
     keys={"expert_used_count": (b.U32, 5)})  # fmt: skip
case("groups that do not divide", "expert_group_count' is 3; expected a divisor of expert_count, 8",
     keys={"expert_group_count": (b.U32, 3)})  # fmt: skip
case("more groups used than there are", "expert_group_used_count' is 5; expected at most expert_group_count, 4",
     keys={"expert_group_used_count": (b.U32, 5)})  # fmt: skip
case("yarn with base 1", "rope.freq_base' is 1.0; expected more than 1 with yarn",
     keys={"rope.freq_base": (b.F32, 1.0)})  # fmt: skip
for _key in ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"):
    for _value in (0.0, -1.0):
        case(f"{_key} {_value}", f"{_key}' is {_value}; expected a positive number", keys={_key: (b.F32, _value)})
for _type in ((b.STRING, "linear"), None):  # linear is what no type means
    case(f"scaling {_type}", "deepseek2 with linear rope scaling is not native", keys={"rope.scaling.type": _type},
         error=UnsupportedModelError)  # fmt: skip
for _number in (4, 5, MAX_U32):
    case(f"gating function {_number}", f"expert gating function {_number} is not native",
         keys={"expert_gating_func": (b.U32, _number)}, error=UnsupportedModelError)  # fmt: skip
for _key in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.kv_lora_rank",
             "attention.value_length_mla", "attention.key_length_mla", "expert_feed_forward_length", "expert_count",
             "attention.q_lora_rank"):  # fmt: skip
    case(f"{_key} of 2^32", "has shape", keys={_key: (b.U32, MAX_U32 - MAX_U32 % 4)})
case("rotated part of 2^32", "expected more than rope.dimension_count", keys={"rope.dimension_count": (b.U32, MAX_U32)})
case("as many experts used as 2^32", f"expert_used_count' is {MAX_U32}", keys={"expert_used_count": (b.U32, MAX_U32)})
case("2^32 groups", f"expert_group_count' is {MAX_U32}; expected", keys={"expert_group_count": (b.U32, MAX_U32)})
for _key in ("embedding_length", "feed_forward_length", "attention.key_length", "attention.value_length"):
    case(f"llama: {_key} of 2^32", "has shape", base="llama", keys={_key: (b.U32, MAX_U32)})
case("llama: heads of 2^32", "tensor 'blk.0.attn_q.weight' has shape", base="llama",
     keys={"attention.head_count": (b.U32, MAX_U32 - MAX_U32 % 4)})  # fmt: skip
case("llama: heads not shared evenly", "attention.head_count_kv' is 3; expected a divisor of 4", base="llama",
     keys={"attention.head_count_kv": (b.U32, 3)})  # fmt: skip
case("llama: no key-value heads", "tensor 'blk.0.attn_k.weight' has shape (32, 64); expected (0, 64)", base="llama",
     keys={"attention.head_count_kv": (b.U32, 0)})  # fmt: skip
case("llama: rotated beyond the head", "rope.dimension_count' is 18; expected at most the head's 16", base="llama",
     keys={"rope.dimension_count": (b.U32, 18)})  # fmt: skip
case("llama: nothing rotated", "rope.dimension_count' is 0; expected an even number, 2 or more", base="llama",
     keys={"rope.dimension_count": (b.U32, 0)})  # fmt: skip
case("llama: odd rotated part", "rope.dimension_count' is 7; expected an even number", base="llama",
     keys={"rope.dimension_count": (b.U32, 7)})  # fmt: skip
case("llama: experts", "llama with experts is not native", base="llama", keys={"expert_count": (b.U32, 8)},
     error=UnsupportedModelError)  # fmt: skip
case("llama: yarn", "llama with yarn is not native", base="llama", keys=yarn(4.0, None), error=UnsupportedModelError)
case("llama: bias in attention", "tensor 'blk.0.attn_q.bias' has no place", base="llama",
     tensors={"blk.0.attn_q.bias": (64,)}, error=UnsupportedModelError)  # fmt: skip


def broken(name: str, folder: Path) -> tuple[Path, type[LocalrunError], str]:
    base, keys, tensors, types, error, message = CASES[name]
    return BASES[base].changed(keys, tensors, types).write(folder / "model.gguf"), error, message


def assert_error(caught: LocalrunError, path: Path, error: type[LocalrunError], message: str) -> None:
    assert type(caught) is error
    assert str(caught).startswith(f"{path}: ") and message in str(caught) and "\n" not in str(caught)


@pytest.mark.parametrize("name", CASES)
def test_broken_configurations(name: str, tmp_path: Path) -> None:
    path, error, message = broken(name, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(LocalrunError) as caught:
            config_of(path)
        # Keys and tensor records as Python objects; the sound file's take 60 kB.
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()
    assert_error(caught.value, path, error, message)
    with pytest.raises(LocalrunError) as caught:
        localrun.load(path, threads=1, ctx=8, backend="native")
    assert_error(caught.value, path, error, message)


@pytest.mark.parametrize("type_", [Type.Q2_K, Type.Q3_K, Type.IQ1_S, Type.IQ2_XXS, Type.IQ3_S, Type.TQ1_0])
def test_types_without_kernels(type_: Type, tmp_path: Path) -> None:
    keys = {"embedding_length": (b.U32, 256)}
    shapes = {name: (*shape[:-1], 256) if shape[-1] == 64 else shape for name, shape in LLAMA.tensors.items()}
    shapes |= {"blk.0.attn_output.weight": (256, 64), "blk.0.ffn_down.weight": (256, 96)}
    model = LLAMA.changed(keys, shapes, {})
    config_of(model.write(tmp_path / "sound.gguf"))
    path = LLAMA.changed(keys, shapes, {"token_embd.weight": type_}).write(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match=rf"tensor 'token_embd.weight' has type {type_.name}, not native"):
        config_of(path)


def test_other_architectures_are_not_native(tmp_path: Path) -> None:
    path = Model("qwen3", {}, {}).write(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="architecture 'qwen3' is not native"):
        config_of(path)


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b.build([b.key("general.name", b.STRING, "x")]))
    with pytest.raises(GGUFError, match=r"key 'general.architecture' \(string\) is missing"):
        config_of(path)


_LOAD_ALL = """
import json, sys
import localrun
answers = {}
for path in sys.argv[1:]:
    try:
        with localrun.load(path, threads=1, ctx=8) as model:
            answers[path] = model.backend
    except localrun.LocalrunError as error:
        answers[path] = str(error)
print(json.dumps(answers))
"""


def test_what_is_not_native_goes_to_llama_cpp_or_is_refused(tmp_path: Path) -> None:
    """In a process of its own: a failed assertion of llama.cpp would end it."""
    paths = {}
    for i, (name, (*_, error, _message)) in enumerate(CASES.items()):
        if error is UnsupportedModelError:
            (tmp_path / str(i)).mkdir()
            paths[str(broken(name, tmp_path / str(i))[0])] = name
    command = [sys.executable, "-c", _LOAD_ALL, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {paths[path]: answer for path, answer in json.loads(done.stdout).items()}
    assert answers.keys() == set(paths.values())
    assert "native" not in answers.values()
    assert answers["deepseek2: unknown key"] == "llama.cpp"
    assert all("\n" not in answer for answer in answers.values())
