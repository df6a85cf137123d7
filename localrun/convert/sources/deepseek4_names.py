"""DeepSeek-V4's tensors under the names that transformers gives them, whatever the checkpoint calls them.

The published checkpoints have names of DeepSeek's own ("layers.3.attn.wq_a.weight"); transformers 5.24 maps them
(conversion_mapping.py, "deepseek_v4"), and writes them back when it saves. Its own names are known as well, among them
those of experts that lie in one tensor: (experts, rows, columns), gate's rows before up's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown
from localrun.convert.sources.safetensors_file import DTYPE_BYTES, StoredTensor

CLASSES = ("DeepseekV4ForCausalLM",)
_ENDS = {
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_COMPRESSOR = {"wkv": "kv_proj", "wgate": "gate_proj", "ape": "position_bias", "norm": "kv_norm"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"hc_{part}_{name}": f"{part}_hc.{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    **{f"attn.compressor.{old}": f"self_attn.compressor.{new}" for old, new in _COMPRESSOR.items()},
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    **{f"attn.indexer.compressor.{old}": f"self_attn.compressor.indexer.{new}" for old, new in _COMPRESSOR.items()},
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.bias_vl": "mlp.gate.bias_vl",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    **{f"ffn.shared_experts.{old}": f"mlp.shared_experts.{new}_proj" for old, new in zip(
        ("w1", "w2", "w3"), ("gate", "down", "up"), strict=True)},
}  # fmt: skip
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MTP = {
    "norm": "shared_head.norm",
    "hc_head_fn": "hc_head.hc_fn",
    "hc_head_base": "hc_head.hc_base",
    "hc_head_scale": "hc_head.hc_scale",
}


def applies(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a checkpoint."""
    return config.get("architectures") in [[name] for name in CLASSES]


def renamed(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by transformers' names. Raises CheckpointError if two have the same."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for part in _parts(replace(tensor, name=_name(name))):
            if part.name in tensors:
                raise CheckpointError(f"{tensor.path}: tensor {shown(name)} is there twice, under other names too")
            tensors[part.name] = part
    return tensors


def _name(name: str) -> str:
    """transformers' name; the same where it has that, or none that is known."""
    base, ending = _split(name)
    if base in _ENDS:
        return _ENDS[base] + ending
    match = re.fullmatch(r"(layers|mtp)\.(\d+)\.(.+)", base)
    if match is None:
        return name
    place = f"model.layers.{match[2]}." if match[1] == "layers" else f"mtp.{match[2]}."
    return place + _in_layer(match[3], match[1] == "mtp") + ending


def _split(name: str) -> tuple[str, str]:
    """A module's name, and ".weight" or its scale's ending."""
    for ending in (".weight", ".scale"):
        if name.endswith(ending):
            return name.removesuffix(ending), ending
    return name, ""


def _in_layer(module: str, is_mtp: bool) -> str:
    if is_mtp and module in _MTP:
        return _MTP[module]
    match = re.fullmatch(r"ffn\.experts\.(\d+)\.(w[123])", module)
    return f"mlp.experts.{match[1]}.{_EXPERT[match[2]]}" if match else _LAYER.get(module, module)


def _parts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """The matrices of each expert, where one tensor holds those of all; else the tensor."""
    match = re.fullmatch(r"(.+\.mlp\.experts)\.(gate_up|down)_proj", tensor.name)
    modules = ("gate_proj", "up_proj") if match and match[2] == "gate_up" else ("down_proj",)
    is_whole = len(tensor.shape) == 3 and tensor.shape[1] % len(modules) == 0 and 0 not in tensor.shape
    if match is None or not is_whole or tensor.dtype not in DTYPE_BYTES:
        yield tensor
        return
    n_experts, n_rows, n_cols = tensor.shape
    rows, n_bytes = n_rows // len(modules), tensor.n_bytes // (n_experts * len(modules))
    places = ((expert, module) for expert in range(n_experts) for module in modules)
    for index, (expert, module) in enumerate(places):
        name, offset = f"{match[1]}.{expert}.{module}.weight", tensor.offset + index * n_bytes
        yield replace(tensor, name=name, shape=(rows, n_cols), offset=offset, n_bytes=n_bytes)
