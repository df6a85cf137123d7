"""DeepSeek-V4's tensors under the names of the published checkpoints, whatever a checkpoint calls them.

Those are DeepSeek's own ("layers.3.attn.wq_a.weight"). transformers 5.24 (conversion_mapping.py, "deepseek_v4") writes
them behind "model." and calls both norms of a layer's rows "norm"; or, where it is told not to map names back, writes
its own ("model.layers.3.self_attn.q_a_proj.weight"). Experts lie in one tensor then: (experts, rows, columns), gate's
rows before up's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown
from localrun.convert.sources.safetensors_file import DTYPE_BYTES, StoredTensor

CLASS = "DeepseekV4ForCausalLM"
_HC = ("fn", "base", "scale")
_ENDS = {"embed_tokens": "embed", "lm_head": "head", **{f"hc_head.hc_{name}": f"hc_head_{name}" for name in _HC}}
_COMPRESSOR = {"kv_proj": "wkv", "gate_proj": "wgate", "position_bias": "ape", "kv_norm": "norm"}
_MLP = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"{part}_hc.{name}": f"hc_{part}_{name}" for part in ("attn", "ffn") for name in _HC},
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "attn.norm": "attn.kv_norm",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    **{f"self_attn.compressor.{own}": f"attn.compressor.{name}" for own, name in _COMPRESSOR.items()},
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    **{f"self_attn.compressor.indexer.{own}": f"attn.indexer.compressor.{name}" for own, name in _COMPRESSOR.items()},
    "mlp.gate": "ffn.gate",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    **{f"mlp.shared_experts.{own}": f"ffn.shared_experts.{name}" for own, name in _MLP.items()},
}
_ENDINGS = (".weight", ".weight_scale_inv")


def published(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors by the published names. Raises CheckpointError if two have the same."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        for part in _parts(replace(tensor, name=_name(name))):
            if part.name in tensors:
                raise CheckpointError(f"{tensor.path}: tensor {shown(name)} is there twice, under two names")
            tensors[part.name] = part
    return tensors


def _name(name: str) -> str:
    """The published name; the same where it is that, or none that is known."""
    ending = next((ending for ending in _ENDINGS if name.endswith(ending)), "")
    base = name.removesuffix(ending).removeprefix("model.")
    match = re.fullmatch(r"(layers\.\d+\.)(.+)", base)
    if match is None:
        return _ENDS.get(base, base) + ending
    expert = re.fullmatch(r"mlp\.experts\.(\d+)\.((?:gate|down|up)_proj)", match[2])
    module = f"ffn.experts.{expert[1]}.{_MLP[expert[2]]}" if expert else _LAYER.get(match[2], match[2])
    return match[1] + module + ending


def _parts(tensor: StoredTensor) -> Iterator[StoredTensor]:
    """The matrices of each expert, where one tensor holds those of all; else the tensor."""
    match = re.fullmatch(r"(layers\.\d+)\.mlp\.experts\.(gate_up|down)_proj", tensor.name)
    names = ("w1", "w3") if match and match[2] == "gate_up" else ("w2",)
    is_whole = len(tensor.shape) == 3 and tensor.shape[1] % len(names) == 0 and 0 not in tensor.shape
    if match is None or not is_whole or tensor.dtype not in DTYPE_BYTES:
        yield tensor
        return
    n_experts, n_rows, n_cols = tensor.shape
    rows, n_bytes = n_rows // len(names), tensor.n_bytes // (n_experts * len(names))
    for index in range(n_experts * len(names)):
        expert, which = divmod(index, len(names))
        name, offset = f"{match[1]}.ffn.experts.{expert}.{names[which]}.weight", tensor.offset + index * n_bytes
        yield replace(tensor, name=name, shape=(rows, n_cols), offset=offset, n_bytes=n_bytes)


def applies(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a checkpoint."""
    return config.get("architectures") == [CLASS]
