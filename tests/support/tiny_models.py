"""Tiny random GGUF files of every architecture variant, and the reader that the other oracles share.

Weights are random, scaled so that activations stay near 1 through all layers and no layer dominates; every tensor
draws from its own generator (seed, name), so two variants that share a tensor's name and shape share its values.
Metadata keys and their exact types follow llama.cpp's loader (src/models/deepseek2.cpp, src/llama-model.cpp @3f545becc)
and converter (conversion/deepseek.py). Files are written by gguf.GGUFWriter and quantized by libggml: none of our code.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import ggml
import gguf
import numpy as np
from gguf import GGMLQuantizationType

Types = str | Mapping[str, str]

# What llama-quantize falls back to when a row is not whole blocks (llama-quant.cpp, llama_tensor_get_type).
_FALLBACK = {
    **{"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "IQ4_XS": "IQ4_NL"},
    **{"TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "Q1_0": "Q4_0"},
    **{"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"},
}

# The shape of llama-quantize's Q4_K_M: 6 bits for the head and for the down projections of some layers, 4 elsewhere.
Q4_K_M = {r"^output\.": "Q6_K", r"^blk\.[13]\.ffn_down": "Q6_K", r"": "Q4_K"}

TYPES = [
    *["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"],
    *["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0", "Q1_0"],
]
MIXES: dict[str, Types] = {name: name for name in TYPES} | {
    "Q4_K_M": Q4_K_M,
    "MXFP4_MOE": {r"_exps|attn_[kv]_b": "MXFP4", r"": "Q8_0"},
}


@dataclass(frozen=True)
class Deepseek2:
    """One deepseek2 model: sizes (named as in config.json) and the choices in which the published models differ."""

    hidden_size: int = 256
    intermediate_size: int = 320
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 4
    first_k_dense_replace: int = 1
    num_attention_heads: int = 8
    q_lora_rank: int | None = 128
    kv_lora_rank: int = 192
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    vocab_size: int = 320
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "sigmoid"
    e_score_correction_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = 2.5
    yarn_factor: float | None = 40.0
    mscale_all_dim: float | None = 1.0  # None: the key yarn_log_multiplier is left out
    original_max_position_embeddings: int = 256
    rms_norm_eps: float = 1e-6
    split_kv_b: bool = True
    fused_gate_up: bool = False
    num_nextn_predict_layers: int = 0
    write_gating_func: bool = True
    tie_word_embeddings: bool = False
    steady_routing: bool = False


@dataclass(frozen=True)
class Sparse(Deepseek2):
    """One deepseek32 or glm-dsa model: the same with an indexer.

    indexer_types: a letter a layer, F for one with an indexer, S for one that shares; empty for a file without the key.
    unused_indexers: whether layers that share have an indexer's tensors all the same.
    """

    architecture: str = "deepseek32"
    num_hidden_layers: int = 3
    index_n_heads: int = 12
    index_head_dim: int = 64
    index_topk: int = 8
    indexer_types: str = ""
    context_length: int = 1024
    unused_indexers: bool = False

    def has_indexer(self, layer: int) -> bool:
        if self.indexer_types and layer < self.num_hidden_layers and not self.unused_indexers:
            return self.indexer_types[layer] == "F"
        return True


@dataclass(frozen=True)
class Llama:
    """One dense llama model with grouped-query attention."""

    hidden_size: int = 256
    intermediate_size: int = 352
    num_hidden_layers: int = 3
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 320
    rope_theta: float = 10000.0
    rope_linear_factor: float | None = None
    rope_freqs: bool = False
    write_head_dim: bool = True
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5


@dataclass(frozen=True)
class Grouped:
    """One model with grouped-query attention and experts, of one of several architectures.

    qk_norm: "head" for norms of each head, "whole" for norms of all heads as one vector, "" for none.
    sliding_window: of every second layer, the first among them; 0 for none. A model with windows is gpt-oss's kind: its
    heads have sinks, and everything has biases.
    joined_qkv: whether queries, keys and values are one matrix.
    """

    architecture: str
    hidden_size: int = 256
    intermediate_size: int = 320
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 3
    first_k_dense_replace: int = 0
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    qk_rope_head_dim: int = 32
    qk_norm: str = "head"
    attention_bias: bool = False
    vocab_size: int = 320
    n_routed_experts: int = 16
    n_shared_experts: int = 0
    num_experts_per_tok: int = 4
    n_group: int | None = None
    topk_group: int | None = None
    scoring_func: str = "sigmoid"
    e_score_correction_bias: bool = True
    norm_topk_prob: bool = True
    routed_scaling_factor: float | None = None
    rope_theta: float = 1e6
    yarn_factor: float | None = None
    original_max_position_embeddings: int = 256
    sliding_window: int = 0
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0
    tie_word_embeddings: bool = False
    steady_routing: bool = False
    joined_qkv: bool = False
    fused_gate_up: ClassVar[bool] = False


# Which of the keys that not all have a file of an architecture has.
_ROUTER_KEYS = "expert_feed_forward_length", "expert_gating_func", "expert_weights_norm", "expert_weights_scale"
_GROUPED_KEYS = {
    "llama": ("rope.dimension_count",),
    "qwen3moe": ("expert_feed_forward_length",),
    "glm4moe": (
        "rope.dimension_count", "leading_dense_block_count", "nextn_predict_layers", "expert_shared_count",
        "expert_group_count", "expert_group_used_count", *_ROUTER_KEYS,
    ),
    "minimax-m2": ("rope.dimension_count", "expert_feed_forward_length", "expert_gating_func"),
    "gpt-oss": ("attention.sliding_window", "expert_feed_forward_length"),
    "hy_v3": ("nextn_predict_layers", "expert_shared_feed_forward_length", *_ROUTER_KEYS),
    "bailingmoe2": (
        "rope.dimension_count", "leading_dense_block_count", "nextn_predict_layers", "expert_shared_count",
        "expert_group_count", "expert_group_used_count", *_ROUTER_KEYS,
    ),
}  # fmt: skip
# What it calls tensors that the others call otherwise.
_NAMES = {
    "glm4moe": {"ffn_norm.weight": "post_attention_norm.weight"},
    "gpt-oss": {"ffn_norm.weight": "post_attention_norm.weight"},
    "hy_v3": {"exp_probs_b.bias": "exp_probs_b"},
    "bailingmoe2": {"nextn.shared_head_norm.weight": "layer_output_norm.weight"},
}


def qwen3moe(**choices: object) -> Grouped:
    """Normed heads, and experts in every layer."""
    router = {"scoring_func": "softmax", "e_score_correction_bias": False}
    return Grouped("qwen3moe", **router | choices)


def mixtral(**choices: object) -> Grouped:
    """Experts in every layer of a llama."""
    router = {"scoring_func": "softmax", "e_score_correction_bias": False, "n_routed_experts": 8}
    return Grouped("llama", **router | {"intermediate_size": 96, "num_experts_per_tok": 2, "qk_norm": ""} | choices)


def glm4moe(**choices: object) -> Grouped:
    """GLM-4.5 and 4.6, but for its size; Air has no qk_norm."""
    return Grouped(
        "glm4moe",
        **{"qk_rope_head_dim": 16, "attention_bias": True, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"routed_scaling_factor": 2.5, "rms_norm_eps": 1e-5, "n_group": 1, "topk_group": 1}
        | choices,
    )


def minimax_m2(**choices: object) -> Grouped:
    """MiniMax-M2, but for its size."""
    sizes = {"intermediate_size": 96, "qk_rope_head_dim": 16, "qk_norm": "whole", "rope_theta": 5e6}
    return Grouped("minimax-m2", **sizes | choices)


def hy_v3(**choices: object) -> Grouped:
    """Hy3, but for its size."""
    router = {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.826}
    return Grouped("hy_v3", **router | {"rms_norm_eps": 1e-5, "rope_theta": 11158840.0} | choices)


def bailingmoe2(**choices: object) -> Grouped:
    """Ling 2.0, but for its size. llama.cpp takes for granted that all heads together are as wide as hidden states."""
    router = {"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "n_group": 4}
    sizes = {"num_attention_heads": 8, "qk_rope_head_dim": 16, "joined_qkv": True, "rope_theta": 6e5}
    return Grouped("bailingmoe2", **router | {"topk_group": 2} | sizes | choices)


def gpt_oss(**choices: object) -> Grouped:
    """gpt-oss, but for its size and its window."""
    router = {"scoring_func": "softmax_after_topk", "e_score_correction_bias": False, "norm_topk_prob": False}
    sizes = {"num_hidden_layers": 4, "intermediate_size": 96, "qk_norm": "", "attention_bias": True}
    return Grouped(
        "gpt-oss", **router | sizes | {"sliding_window": 16, "rms_norm_eps": 1e-5, "rope_theta": 150000.0} | choices
    )


Model = Deepseek2 | Llama | Grouped
Variant = str | Model  # by name, or as it is

# V2-Lite and Moonlight have no q_lora; llama.cpp tells that by the layer count (26 or 27), hence so deep and narrow.
_LITE = {
    "num_hidden_layers": 27,
    "q_lora_rank": None,
    "hidden_size": 128,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 160,
}
_V2 = {
    "scoring_func": "softmax",
    "e_score_correction_bias": False,
    "norm_topk_prob": False,
    "mscale_all_dim": 0.707,
    "n_shared_experts": 2,
}
# Every row a multiple of 256 but for k_b (64 columns), as in the published models; 8 groups of 2.
_WIDE = {
    "kv_lora_rank": 256,
    "q_lora_rank": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "n_group": 8,
    "topk_group": 4,
    "steady_routing": True,
}

VARIANTS: dict[str, Model] = {
    "v2-lite": Deepseek2(**_V2 | _LITE | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}),
    "v2": Deepseek2(**_V2 | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}),
    "v2-no-groups": Deepseek2(**_V2 | {"routed_scaling_factor": 16.0}),
    "v3": Deepseek2(n_group=8, topk_group=4, first_k_dense_replace=3, num_hidden_layers=5),
    "v3-no-yarn": Deepseek2(n_group=4, topk_group=2, yarn_factor=None),
    "v3-odd": Deepseek2(n_group=4, topk_group=2, qk_nope_head_dim=32, v_head_dim=64, n_routed_experts=12),
    "v3-legacy-kv-b": Deepseek2(n_group=4, topk_group=2, split_kv_b=False),
    "v3-fused-gate-up": Deepseek2(n_group=4, topk_group=2, fused_gate_up=True),
    "v3-nextn": Deepseek2(n_group=4, topk_group=2, num_nextn_predict_layers=1),
    "v3-tied": Deepseek2(n_group=4, topk_group=2, tie_word_embeddings=True),
    "v3-all-moe": Deepseek2(n_group=4, topk_group=2, first_k_dense_replace=0),
    "v3-no-bias": Deepseek2(e_score_correction_bias=False, norm_topk_prob=False, routed_scaling_factor=None),
    "v3-large-eps": Deepseek2(n_group=4, topk_group=2, rms_norm_eps=0.1),  # a hard-coded epsilon shows
    "yarn-no-log-multiplier": Deepseek2(n_group=4, topk_group=2, mscale_all_dim=None),
    "kimi-k2": Deepseek2(n_group=1, topk_group=1, routed_scaling_factor=2.827, yarn_factor=32.0, num_attention_heads=4),
    "moonlight": Deepseek2(
        **_LITE, n_group=1, topk_group=1, routed_scaling_factor=2.446, yarn_factor=None, rms_norm_eps=1e-5
    ),
    # As converters wrote it before April 2025: softmax is what a missing expert_gating_func means.
    "v2-lite-legacy-kv-b": Deepseek2(
        **_V2 | _LITE | {"routed_scaling_factor": None, "split_kv_b": False, "write_gating_func": False}
    ),
    "wide": Deepseek2(**_WIDE),
    "wide-odd": Deepseek2(**_WIDE | {"moe_intermediate_size": 352, "kv_lora_rank": 288}),
    "deepseek32": Sparse(n_group=4, topk_group=2),
    "deepseek32-nextn": Sparse(n_group=4, topk_group=2, yarn_factor=None, num_nextn_predict_layers=1),
    "glm-dsa": Sparse(architecture="glm-dsa", yarn_factor=None, rms_norm_eps=1e-5),
    "glm-dsa-shared": Sparse(
        architecture="glm-dsa", yarn_factor=None, num_hidden_layers=5, indexer_types="FSFSS", v_head_dim=64
    ),
    "glm-dsa-default-types": Sparse(
        architecture="glm-dsa",
        yarn_factor=None,
        num_hidden_layers=7,
        context_length=1 << 20,
        index_n_heads=40,
        indexer_types="",
    ),
    "llama": Llama(),
    "llama-tied": Llama(num_attention_heads=8, tie_word_embeddings=True, write_head_dim=False),
    "llama-rope-freqs": Llama(rope_freqs=True, rope_theta=500000.0),
    "llama-linear-rope": Llama(rope_linear_factor=4.0),
    "llama-mha": Llama(num_key_value_heads=6, head_dim=64, rms_norm_eps=0.1),
    "llama-wide": Llama(num_attention_heads=8, num_key_value_heads=4, head_dim=64, intermediate_size=512),
    "qwen3moe": qwen3moe(),
    "qwen3moe-yarn": qwen3moe(yarn_factor=4.0, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3moe-wide": qwen3moe(
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=64,
        moe_intermediate_size=256,
        rms_norm_eps=1e-3,
        steady_routing=True,
    ),
    "mixtral": mixtral(),
    "glm4moe": glm4moe(num_nextn_predict_layers=1),
    "glm4moe-air": glm4moe(qk_norm="", n_group=4, topk_group=2, routed_scaling_factor=1.0, tie_word_embeddings=True),
    "minimax-m2": minimax_m2(num_attention_heads=3, num_key_value_heads=1, head_dim=40, rms_norm_eps=0.1),
    "hy_v3": hy_v3(num_nextn_predict_layers=1, n_shared_experts=2),
    "bailingmoe2": bailingmoe2(num_nextn_predict_layers=1),
    "gpt-oss": gpt_oss(),
    "gpt-oss-yarn": gpt_oss(num_hidden_layers=3, num_key_value_heads=1, yarn_factor=32.0, sliding_window=7),
    "gpt-oss-wide": gpt_oss(
        num_hidden_layers=2,
        num_attention_heads=8,
        head_dim=64,
        qk_rope_head_dim=64,
        intermediate_size=256,
        moe_intermediate_size=256,
        yarn_factor=32.0,
        original_max_position_embeddings=64,
        steady_routing=True,
    ),
}

# As small as a model can be, for what is computed by an interpreter.
_SMALLEST = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "vocab_size": 64, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_SMALLEST_GROUPS = {"n_group": 4, "topk_group": 2}
SMALLEST = Deepseek2(**_SMALLEST, **_SMALLEST_GROUPS)


def sparse(**choices: object) -> Sparse:
    """As small, with an indexer."""
    return Sparse(**_SMALLEST | choices)


ROUTING_MARGIN = 1.5e-4
_PROMPT_SEED = {  # found by search, checked by test_logits.py; the deep models make some 700 choices a prompt
    "v2-lite": 296,
    "v2-lite-legacy-kv-b": 296,
    "moonlight": 122,
    "v2": 231,
    "v2-no-groups": 173,
    "v3": 1,
    "v3-no-yarn": 1,
    "v3-odd": 3,
    "v3-legacy-kv-b": 3,
    "v3-fused-gate-up": 3,
    "v3-nextn": 3,
    "v3-tied": 3,
    "v3-all-moe": 3,
    "v3-large-eps": 0,
    "kimi-k2": 10,
    "deepseek32": 16,
    "deepseek32-nextn": 5,
    "glm-dsa": 5,
    "glm-dsa-shared": 0,
    "glm-dsa-default-types": 31,
    "wide-odd": 1,
    "qwen3moe": 22,
    "qwen3moe-yarn": 6,
    "qwen3moe-wide": 7,
    "mixtral": 2,
    "minimax-m2": 1,
}

_N_TAGS = 8  # leading hidden dimensions that only the embedding writes, where steady_routing reads the experts from
_N_DRAWN = 4  # experts of those models that are drawn, and quantised: up to a microsecond a weight by libggml


def tiny_model(path: Path | str, variant: Variant, *, type: Types = "F32", seed: int = 0) -> Path:
    """Writes the GGUF file of VARIANTS[variant], or of a variant of one's own, and returns its path.

    type: the quantization type of every matrix, or a mapping from regular expressions on tensor names to types, first
    match wins. 1-D tensors stay F32, and so does the router unless an expression names it; rows that are not whole
    blocks get llama-quantize's fallback type.
    """
    model = VARIANTS[variant] if isinstance(variant, str) else variant
    tensors = _Weights(seed).of(model)
    writer = gguf.GGUFWriter(None, type_name(model))
    _write_metadata(writer, model, f"{_name_of(variant)}, seed {seed}")
    for name, values in tensors.items():
        kind = _type_of(name, values.shape, type)
        importances = np.ones(values.shape[-1], np.float32) if kind.name in ggml.NEED_IMPORTANCES else None
        if name.endswith("_exps.weight") and model.steady_routing:
            blocks = _turned(name, ggml.quantize(values[:_N_DRAWN], kind, importances), len(values))
        else:
            blocks = ggml.quantize(values, kind, importances)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    return _write(writer, path)


def _turned(name: str, experts: np.ndarray, n: int) -> np.ndarray:
    """n experts of a few: the rows of gate and up lie one farther on in each further few, so no two compute the same.

    Not those of down, the first of which write the routing tags.
    """
    turn = 0 if "ffn_down" in name else 1
    return np.concatenate([np.roll(experts, turn * i, axis=1) for i in range(n // len(experts))])


def type_name(model: Model) -> str:
    """general.architecture."""
    return model.architecture if isinstance(model, Grouped | Sparse) else type(model).__name__.lower()


def common_name(architecture: str, name: str) -> str:
    """What other architectures call a layer's tensor (its name without the layer)."""
    return next((common for common, own in _NAMES.get(architecture, {}).items() if own == name), name)


def _name_of(variant: Variant) -> str:
    return variant if isinstance(variant, str) else f"own-{zlib.crc32(repr(variant).encode()):08x}"


def dequantized_twin(path: Path | str, twin: Path | str) -> Path:
    """Writes the same model with every tensor as F32, unpacked by gguf-py, and returns `twin`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(None, reader.get_field("general.architecture").contents())
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _unpacked(tensor))
    return _write(writer, twin)


def without(
    path: Path | str, out: Path | str, names: Collection[str], instead: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Writes the same model without some tensors, and with others, and returns `out`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(None, reader.get_field("general.architecture").contents())
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        if tensor.name not in names:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in (instead or {}).items():
        writer.add_tensor(name, values)
    return _write(writer, out)


def with_keys(path: Path | str, out: Path | str, values: Mapping[str, int | float | list[bool]]) -> Path:
    """Writes the same model with more keys, and returns `out`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(None, reader.get_field("general.architecture").contents())
    _copy_metadata(reader, writer)
    for key, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[type(value)]
        add(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    return _write(writer, out)


def _copy_metadata(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])


def _unpacked(tensor: gguf.ReaderTensor) -> np.ndarray:
    """float32 by gguf-py, or by libggml where that has no code for the type."""
    if tensor.tensor_type == GGMLQuantizationType.Q1_0:
        return ggml.dequantize(tensor.data, tensor.tensor_type)
    return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def read(path: Path | str) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """(metadata, tensors as float32 in NumPy order) of a GGUF file, by gguf-py's reader."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: _unpacked(tensor) for tensor in reader.tensors}
    return metadata, tensors


@functools.cache
def folder() -> Path:
    """One that lives as long as the tests and that all their processes share; else as long as the process."""
    if "TINY_MODELS" in os.environ:
        return Path(os.environ["TINY_MODELS"])
    folder = Path(tempfile.mkdtemp(prefix="tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _file_of(variant: Variant, types: tuple[tuple[str, str], ...], seed: int) -> Path:
    # A test may have put another model in place of a variant, so its shape is part of the name.
    what = repr((VARIANTS.get(variant, variant) if isinstance(variant, str) else variant, types))
    path = folder() / f"{_name_of(variant)}-{zlib.crc32(what.encode()):08x}-{seed}.gguf"
    return path if path.exists() else tiny_model(path, variant, type=dict(types), seed=seed)


def shared(variant: Variant, *, type: Types = "F32", seed: int = 0) -> Path:
    """As tiny_model, into a folder that lives as long as the tests; the same arguments give the same file."""
    types = {"": type} if isinstance(type, str) else type
    return _file_of(variant, tuple(types.items()), seed)


@functools.cache
def shared_twin(path: Path) -> Path:
    """The dequantized twin of a shared file, written once."""
    twin = path.with_name(f"{path.stem}-twin.gguf")
    return twin if twin.exists() else dequantized_twin(path, twin)


def token_ids(variant: str, n: int, *, seed: int = 0) -> list[int]:
    """n random token ids of the variant's vocabulary."""
    return np.random.default_rng([seed, 77]).integers(0, VARIANTS[variant].vocab_size, n).tolist()


def prompt(variant: str) -> list[int]:
    """40 token ids on which no expert of the F32 model is chosen by less than ROUTING_MARGIN.

    A 16-bit cache or another order of summation moves a score by less than that; nearer to a tie, two right
    implementations choose different experts and the logits say nothing.
    """
    return token_ids(variant, 40, seed=_PROMPT_SEED.get(variant, 0))


class _Weights:
    """Random tensors by GGUF name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _normal(self, name: str, *shape: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return generator.standard_normal(shape, dtype=np.float32)

    def _matrix(self, name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
        """Rows that map unit-variance inputs to outputs of standard deviation `gain`."""
        return self._normal(name, *shape) * np.float32(gain / np.sqrt(shape[-1]))

    def _norm(self, name: str, n: int) -> np.ndarray:
        return 1 + 0.1 * self._normal(name, n)

    def of(self, m: Model) -> dict[str, np.ndarray]:
        embedding = self._normal("token_embd.weight", m.vocab_size, m.hidden_size)
        if not isinstance(m, Llama) and m.steady_routing:
            embedding[:, :_N_TAGS] = np.sign(embedding[:, :_N_TAGS]) * 2
        tensors = {
            "token_embd.weight": embedding,
            "output_norm.weight": self._norm("output_norm.weight", m.hidden_size),
        }
        if m.tie_word_embeddings:  # the embedding's rows are sqrt(D) longer than a head's
            tensors["output_norm.weight"] /= np.float32(np.sqrt(m.hidden_size))
        else:
            tensors["output.weight"] = self._matrix("output.weight", m.vocab_size, m.hidden_size)
        if isinstance(m, Llama):
            return tensors | self._llama(m)
        attention = self._mla if isinstance(m, Deepseek2) else self._normed_gqa
        for i in range(m.num_hidden_layers + m.num_nextn_predict_layers):
            tensors |= attention(m, f"blk.{i}.")
            tensors |= self._dense(m, f"blk.{i}.") if i < m.first_k_dense_replace else self._moe(m, f"blk.{i}.")
        for i in range(m.num_hidden_layers, m.num_hidden_layers + m.num_nextn_predict_layers):
            tensors |= self._nextn(m, f"blk.{i}.nextn.")
        return {self._own_name(m, name): values for name, values in tensors.items()}

    def _own_name(self, m: Model, name: str) -> str:
        match = re.fullmatch(r"(blk\.\d+\.)(.+)", name)
        return match[1] + _NAMES.get(type_name(m), {}).get(match[2], match[2]) if match else name

    def _residual_gain(self, m: Model) -> float:
        """Two branches a layer add up to about the embedding's own variance over all layers."""
        return 1.5 / np.sqrt(2 * m.num_hidden_layers)

    def _mla(self, m: Deepseek2, blk: str) -> dict[str, np.ndarray]:
        heads, nope, rope, v, rank = (
            m.num_attention_heads,
            m.qk_nope_head_dim,
            m.qk_rope_head_dim,
            m.v_head_dim,
            m.kv_lora_rank,
        )
        w, d = {}, m.hidden_size
        w["attn_norm.weight"] = self._norm(blk + "attn_norm", d)
        if m.q_lora_rank is None:
            w["attn_q.weight"] = self._matrix(blk + "attn_q", heads * (nope + rope), d, gain=1.5)
        else:
            w["attn_q_a.weight"] = self._matrix(blk + "attn_q_a", m.q_lora_rank, d, gain=0.7)
            w["attn_q_a_norm.weight"] = self._norm(blk + "attn_q_a_norm", m.q_lora_rank)
            w["attn_q_b.weight"] = self._matrix(blk + "attn_q_b", heads * (nope + rope), m.q_lora_rank, gain=1.5)
        if isinstance(m, Sparse) and m.has_indexer(int(blk.split(".")[1])):
            w |= self._indexer(m, blk)
        w["attn_kv_a_mqa.weight"] = self._matrix(blk + "attn_kv_a_mqa", rank + rope, d)
        w["attn_kv_a_norm.weight"] = self._norm(blk + "attn_kv_a_norm", rank)
        k_b = self._normal(blk + "attn_k_b", heads, rank, nope) / np.float32(np.sqrt(rank))
        v_b = self._matrix(blk + "attn_v_b", heads, v, rank)
        if m.split_kv_b:
            w["attn_k_b.weight"], w["attn_v_b.weight"] = k_b, v_b
        else:
            kv_b = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
            w["attn_kv_b.weight"] = kv_b.reshape(heads * (nope + v), rank)
        w["attn_output.weight"] = self._writer(m, blk + "attn_output", d, heads * v)
        return {blk + name: values for name, values in w.items()}

    def _indexer(self, m: Sparse, blk: str) -> dict[str, np.ndarray]:
        return {
            "indexer.attn_q_b.weight": self._matrix(
                blk + "indexer.attn_q_b", m.index_n_heads * m.index_head_dim, m.q_lora_rank
            ),
            "indexer.attn_k.weight": self._matrix(blk + "indexer.attn_k", m.index_head_dim, m.hidden_size),
            "indexer.k_norm.weight": 1 + 0.3 * self._normal(blk + "indexer.k_norm", m.index_head_dim),
            "indexer.k_norm.bias": 0.3 * self._normal(blk + "indexer.k_norm_bias", m.index_head_dim),
            "indexer.proj.weight": self._matrix(blk + "indexer.proj", m.index_n_heads, m.hidden_size),
        }

    def _writer(self, m: Model, name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
        """A matrix whose output is added to the residual stream: the routing tags are left as they are."""
        matrix = self._matrix(name, *shape, gain=gain * self._residual_gain(m))
        if not isinstance(m, Llama) and m.steady_routing:
            matrix[..., :_N_TAGS, :] = 0
        return matrix

    def _mlp(self, m: Model, blk: str, suffix: str, width: int, *stack: int) -> dict[str, np.ndarray]:
        # silu(gate) * up has a standard deviation near 0.6 for unit gate and up: 1.6 brings the output back to 1.
        return {
            f"{blk}ffn_gate{suffix}.weight": self._matrix(f"{blk}ffn_gate{suffix}", *stack, width, m.hidden_size),
            f"{blk}ffn_up{suffix}.weight": self._matrix(f"{blk}ffn_up{suffix}", *stack, width, m.hidden_size),
            f"{blk}ffn_down{suffix}.weight": self._writer(
                m, f"{blk}ffn_down{suffix}", *stack, m.hidden_size, width, gain=1.6
            ),
        }

    def _dense(self, m: Model, blk: str) -> dict[str, np.ndarray]:
        norm = {blk + "ffn_norm.weight": self._norm(blk + "ffn_norm", m.hidden_size)}
        return norm | self._mlp(m, blk, "", m.intermediate_size)

    def _moe(self, m: Deepseek2 | Grouped, blk: str) -> dict[str, np.ndarray]:
        w = {
            blk + "ffn_norm.weight": self._norm(blk + "ffn_norm", m.hidden_size),
            blk + "ffn_gate_inp.weight": self._router(m, blk + "ffn_gate_inp"),
        }
        if isinstance(m, Grouped) and m.sliding_window:
            w |= self._expert_biases(m, blk)
        if m.e_score_correction_bias:
            w[blk + "exp_probs_b.bias"] = 0.2 * self._normal(blk + "exp_probs_b", m.n_routed_experts)
        n_drawn = _N_DRAWN if m.steady_routing else m.n_routed_experts
        experts = self._mlp(m, blk, "_exps", m.moe_intermediate_size, n_drawn)
        w |= {name: _turned(name, values, m.n_routed_experts) for name, values in experts.items()}
        if m.n_shared_experts:
            w |= self._mlp(m, blk, "_shexp", m.moe_intermediate_size * m.n_shared_experts)
        if (
            m.scoring_func == "softmax" and not m.norm_topk_prob
        ):  # unnormalised probabilities are near 1/experts: bring the sum back to 1
            total = m.num_experts_per_tok / m.n_routed_experts * (m.routed_scaling_factor or 1.0)
            w[blk + "ffn_down_exps.weight"] /= np.float32(total)
        if m.fused_gate_up:
            gate, up = w.pop(blk + "ffn_gate_exps.weight"), w.pop(blk + "ffn_up_exps.weight")
            w[blk + "ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
        return w

    def _expert_biases(self, m: Grouped, blk: str) -> dict[str, np.ndarray]:
        """Such that the activation's bounds, 7, are met by some."""
        n, width = m.n_routed_experts, m.moe_intermediate_size
        return {
            f"{blk}ffn_gate_inp.bias": 0.5 * self._normal(f"{blk}ffn_gate_inp.bias", n),
            f"{blk}ffn_gate_exps.bias": 4 * self._normal(f"{blk}ffn_gate_exps.bias", n, width),
            f"{blk}ffn_up_exps.bias": 4 * self._normal(f"{blk}ffn_up_exps.bias", n, width),
            f"{blk}ffn_down_exps.bias": self._small(m, f"{blk}ffn_down_exps.bias", n, m.hidden_size),
        }

    def _small(self, m: Grouped, name: str, *shape: int) -> np.ndarray:
        """Biases of what is added to the residual stream, whose tags stay as they are."""
        bias = np.float32(0.3 * self._residual_gain(m)) * self._normal(name, *shape)
        if m.steady_routing:
            bias[..., :_N_TAGS] = 0
        return bias

    def _router(self, m: Deepseek2 | Grouped, name: str) -> np.ndarray:
        router = self._matrix(name, m.n_routed_experts, m.hidden_size, gain=2.0)
        if m.steady_routing:
            router[:, _N_TAGS:] = 0
            router[:, :_N_TAGS] *= np.float32(np.sqrt(m.hidden_size / _N_TAGS) / 2)
        return router

    def _nextn(self, m: Deepseek2 | Grouped, blk: str) -> dict[str, np.ndarray]:
        d = m.hidden_size
        w = {"eh_proj.weight": self._matrix(blk + "eh_proj", d, 2 * d)}
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            w[f"{norm}.weight"] = self._norm(blk + norm, d)
        for matrix in ("embed_tokens", "shared_head_head"):
            w[f"{matrix}.weight"] = self._matrix(blk + matrix, m.vocab_size, d)
        return {blk + name: values for name, values in w.items()}

    def _gqa(self, m: Llama | Grouped, blk: str) -> dict[str, np.ndarray]:
        d, q_width, kv_width = m.hidden_size, m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        return {
            blk + "attn_norm.weight": self._norm(blk + "attn_norm", d),
            blk + "attn_q.weight": self._matrix(blk + "attn_q", q_width, d, gain=1.5),
            blk + "attn_k.weight": self._matrix(blk + "attn_k", kv_width, d),
            blk + "attn_v.weight": self._matrix(blk + "attn_v", kv_width, d),
            blk + "attn_output.weight": self._writer(m, blk + "attn_output", d, q_width),
        }

    def _normed_gqa(self, m: Grouped, blk: str) -> dict[str, np.ndarray]:
        w, heads = self._gqa(m, blk), {"q": m.num_attention_heads, "k": m.num_key_value_heads}
        if m.attention_bias:
            for part, n_heads in (heads | {"v": m.num_key_value_heads}).items():
                name = f"{blk}attn_{part}.bias"
                w[name] = 0.5 * self._normal(name, n_heads * m.head_dim)
        if m.sliding_window:
            w[blk + "attn_sinks.weight"] = 1 + self._normal(blk + "attn_sinks", m.num_attention_heads)
            w[blk + "attn_output.bias"] = self._small(m, blk + "attn_output.bias", m.hidden_size)
        # Far from 1, and queries' from keys': a norm that is left out, or the other's, shows.
        for part, gain in (("q", np.float32(1.5)), ("k", np.float32(1))) if m.qk_norm else ():
            name, width = f"{blk}attn_{part}_norm", m.head_dim * (heads[part] if m.qk_norm == "whole" else 1)
            w[name + ".weight"] = gain + 0.3 * self._normal(name, width)
        if m.joined_qkv:
            w[blk + "attn_qkv.weight"] = np.concatenate([w.pop(f"{blk}attn_{part}.weight") for part in "qkv"])
        return w

    def _llama(self, m: Llama) -> dict[str, np.ndarray]:
        w = {}
        for blk in (f"blk.{i}." for i in range(m.num_hidden_layers)):
            w |= self._gqa(m, blk) | self._dense(m, blk)
        if m.rope_freqs:  # llama 3.1's divisors: 1 for high frequencies, growing to 8 for low ones
            w["rope_freqs.weight"] = np.linspace(1, 8, m.head_dim // 2, dtype=np.float32)
        return w


def _type_of(name: str, shape: tuple[int, ...], types: Types) -> GGMLQuantizationType:
    router = "ffn_gate_inp"
    stays = router in name and (isinstance(types, str) or not any(router in key for key in types))
    if len(shape) == 1 or name.endswith(".bias") or stays:
        return GGMLQuantizationType.F32
    if not isinstance(types, str):
        types = next((kind for pattern, kind in types.items() if re.search(pattern, name)), "F32")
    for kind in (types, _FALLBACK.get(types, "F16")):
        if shape[-1] % gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] == 0:
            return GGMLQuantizationType[kind]
    return GGMLQuantizationType.F16


def _write_metadata(writer: gguf.GGUFWriter, m: Model, name: str) -> None:
    prefix = writer.arch + "."

    def u32(key: str, value: int) -> None:
        writer.add_uint32(prefix + key, value)

    writer.add_string("general.type", "model")
    writer.add_string("general.name", name)
    writer.add_uint32("general.quantization_version", 2)
    writer.add_string("tokenizer.ggml.model", "none")
    u32("vocab_size", m.vocab_size)
    u32("context_length", m.context_length if isinstance(m, Sparse) else 1024)
    u32("embedding_length", m.hidden_size)
    u32("feed_forward_length", m.intermediate_size)
    u32("attention.head_count", m.num_attention_heads)
    writer.add_float32(prefix + "attention.layer_norm_rms_epsilon", m.rms_norm_eps)
    if isinstance(m, Llama):
        _write_llama_metadata(writer, m)
    elif isinstance(m, Grouped):
        _write_grouped_metadata(writer, m)
    else:
        _write_deepseek2_metadata(writer, m)


def _write_llama_metadata(writer: gguf.GGUFWriter, m: Llama) -> None:
    writer.add_uint32("llama.block_count", m.num_hidden_layers)
    writer.add_uint32("llama.attention.head_count_kv", m.num_key_value_heads)
    writer.add_uint32("llama.rope.dimension_count", m.head_dim)
    writer.add_float32("llama.rope.freq_base", m.rope_theta)
    if m.write_head_dim:
        writer.add_uint32("llama.attention.key_length", m.head_dim)
        writer.add_uint32("llama.attention.value_length", m.head_dim)
    if m.rope_linear_factor is not None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", m.rope_linear_factor)


def _write_grouped_metadata(writer: gguf.GGUFWriter, m: Grouped) -> None:
    optional = {
        "expert_feed_forward_length": m.moe_intermediate_size,
        "rope.dimension_count": m.qk_rope_head_dim,
        "leading_dense_block_count": m.first_k_dense_replace,
        "nextn_predict_layers": m.num_nextn_predict_layers or None,
        "expert_shared_count": m.n_shared_experts,
        "expert_shared_feed_forward_length": m.n_shared_experts * m.moe_intermediate_size,
        "expert_gating_func": {"softmax": 1, "sigmoid": 2, "softmax_after_topk": 3}[m.scoring_func],
        "expert_group_count": m.n_group,
        "expert_group_used_count": m.topk_group,
        "attention.sliding_window": m.sliding_window,
        "expert_weights_norm": m.norm_topk_prob,
        "expert_weights_scale": m.routed_scaling_factor,
    }
    for key, value in optional.items():
        if key in _GROUPED_KEYS[m.architecture] and value is not None:
            add = {bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}[type(value)]
            add(f"{m.architecture}.{key}", value)
    counts = {
        "block_count": m.num_hidden_layers + m.num_nextn_predict_layers,
        "attention.head_count_kv": m.num_key_value_heads,
        "attention.key_length": m.head_dim,
        "attention.value_length": m.head_dim,
        "expert_count": m.n_routed_experts,
        "expert_used_count": m.num_experts_per_tok,
    }
    for key, value in counts.items():
        writer.add_uint32(f"{m.architecture}.{key}", value)
    writer.add_float32(f"{m.architecture}.rope.freq_base", m.rope_theta)
    if m.yarn_factor is not None:
        scaling = f"{m.architecture}.rope.scaling."
        writer.add_string(scaling + "type", "yarn")
        writer.add_float32(scaling + "factor", m.yarn_factor)
        writer.add_uint32(scaling + "original_context_length", m.original_max_position_embeddings)


def _write_deepseek2_metadata(writer: gguf.GGUFWriter, m: Deepseek2) -> None:
    nope, rope, v, rank = m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim, m.kv_lora_rank
    counts = {
        "block_count": m.num_hidden_layers + m.num_nextn_predict_layers,
        # The legacy files run MLA as multi-head attention: every head has its own decompressed key and value.
        "attention.head_count_kv": 1 if m.split_kv_b else m.num_attention_heads,
        "attention.key_length": rank + rope if m.split_kv_b else nope + rope,
        "attention.value_length": rank if m.split_kv_b else v,
        "attention.kv_lora_rank": rank,
        "leading_dense_block_count": m.first_k_dense_replace,
        "expert_feed_forward_length": m.moe_intermediate_size,
        "expert_count": m.n_routed_experts,
        "expert_used_count": m.num_experts_per_tok,
        "expert_shared_count": m.n_shared_experts,
        "rope.dimension_count": rope,
    }
    if m.write_gating_func:
        counts["expert_gating_func"] = {"softmax": 1, "sigmoid": 2}[m.scoring_func]
    if m.q_lora_rank is not None:
        counts["attention.q_lora_rank"] = m.q_lora_rank
    if m.split_kv_b:
        counts |= {"attention.key_length_mla": nope + rope, "attention.value_length_mla": v}
    if m.n_group is not None:
        counts |= {"expert_group_count": m.n_group, "expert_group_used_count": m.topk_group}
    if m.num_nextn_predict_layers:
        counts["nextn_predict_layers"] = m.num_nextn_predict_layers
    if isinstance(m, Sparse):
        counts |= {
            "attention.indexer.head_count": m.index_n_heads,
            "attention.indexer.key_length": m.index_head_dim,
            "attention.indexer.top_k": m.index_topk,
        }
    prefix = writer.arch + "."
    for key, value in counts.items():
        writer.add_uint32(prefix + key, value)
    if isinstance(m, Sparse) and m.indexer_types:
        writer.add_array(prefix + "attention.indexer.types", [letter == "F" for letter in m.indexer_types])
    writer.add_float32(prefix + "rope.freq_base", 10000.0)
    if m.norm_topk_prob:
        writer.add_bool(prefix + "expert_weights_norm", True)
    if m.routed_scaling_factor is not None:
        writer.add_float32(prefix + "expert_weights_scale", m.routed_scaling_factor)
    if m.yarn_factor is not None:
        _write_yarn_metadata(writer, m)


def _write_yarn_metadata(writer: gguf.GGUFWriter, m: Deepseek2) -> None:
    scaling = f"{writer.arch}.rope.scaling."
    writer.add_string(scaling + "type", "yarn")
    writer.add_float32(scaling + "factor", m.yarn_factor)
    writer.add_uint32(scaling + "original_context_length", m.original_max_position_embeddings)
    if m.mscale_all_dim is not None:
        writer.add_float32(scaling + "yarn_log_multiplier", 0.1 * m.mscale_all_dim)


def _write(writer: gguf.GGUFWriter, path: Path | str) -> Path:
    """To a file of its own first: other processes of the tests may look for this one."""
    partial = Path(f"{path}.{os.getpid()}")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.replace(path)
