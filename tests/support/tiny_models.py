"""Tiny random GGUF files of every architecture variant, and the reader that the other oracles share.

Weights are random (tiny_weights): two variants that share a tensor's name and shape share its values. Metadata keys and
their exact types follow llama.cpp's loader (src/models/deepseek2.cpp, src/llama-model.cpp @3f545becc) and converter
(conversion/deepseek.py). Files are written by gguf.GGUFWriter and quantized by libggml: none of our code.
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
from pathlib import Path

import ggml
import gguf
import numpy as np
from gguf import GGMLQuantizationType
from tiny_metadata import write_metadata
from tiny_shapes import (
    Deepseek2,
    Llama,
    Model,
    Sparse,
    bailingmoe2,
    glm4moe,
    gpt_oss,
    hy_v3,
    minimax_m2,
    mixtral,
    qwen3moe,
    type_name,
)
from tiny_weights import N_DRAWN, Weights, turned

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


def tiny_model(path: Path | str, variant: Variant, *, type: Types = "F32", seed: int = 0) -> Path:
    """Writes the GGUF file of VARIANTS[variant], or of a variant of one's own, and returns its path.

    type: the quantization type of every matrix, or a mapping from regular expressions on tensor names to types, first
    match wins. 1-D tensors stay F32, and so does the router unless an expression names it; rows that are not whole
    blocks get llama-quantize's fallback type.
    """
    model = VARIANTS[variant] if isinstance(variant, str) else variant
    tensors = Weights(seed).of(model)
    writer = gguf.GGUFWriter(None, type_name(model))
    write_metadata(writer, model, f"{_name_of(variant)}, seed {seed}")
    for name, values in tensors.items():
        kind = _type_of(name, values.shape, type)
        importances = np.ones(values.shape[-1], np.float32) if kind.name in ggml.NEED_IMPORTANCES else None
        if name.endswith("_exps.weight") and model.steady_routing:
            blocks = turned(name, ggml.quantize(values[:N_DRAWN], kind, importances), len(values))
        else:
            blocks = ggml.quantize(values, kind, importances)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    return write(writer, path)


def _name_of(variant: Variant) -> str:
    return variant if isinstance(variant, str) else f"own-{zlib.crc32(repr(variant).encode()):08x}"


def dequantized_twin(path: Path | str, twin: Path | str) -> Path:
    """Writes the same model with every tensor as F32, unpacked by gguf-py, and returns `twin`."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(None, reader.get_field("general.architecture").contents())
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, _unpacked(tensor))
    return write(writer, twin)


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
    return write(writer, out)


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
    return write(writer, out)


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


def write(writer: gguf.GGUFWriter, path: Path | str) -> Path:
    """To a file of its own first: other processes of the tests may look for this one."""
    partial = Path(f"{path}.{os.getpid()}")
    writer.write_header_to_file(partial)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.replace(path)
