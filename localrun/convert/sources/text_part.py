"""The text part of a checkpoint that reads images, too: its settings, and its tensors under their own names.

Such a config.json holds a whole one as text_config. Tensors of the text part begin with "language_model.", or
with "model.language_model." where the head stands apart. Source: transformers 5.24 (modeling_kimi_k25.py,
modeling_llava.py), conversion/base.py of https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown, typed
from localrun.convert.sources.safetensors_file import StoredTensor

_KEY = "text_config"
_APART = ("model.language_model.", "model.")  # what stands before a layer, and what in a text model
_WHOLE = ("language_model.", "")
_HEAD = "lm_head."
# By model_type, of text parts that name no class themselves.
_CLASSES = {"deepseek_v3": "DeepseekV3ForCausalLM", "kimi_k2": "DeepseekV3ForCausalLM"}
# Keys that hold for the text part also where they stand outside it.
_SHARED = ("tie_word_embeddings", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")


def has_text_part(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has that of its text model within it."""
    return isinstance(config.get(_KEY), dict)


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config.json of the text part. Raises CheckpointError if it does not say what class it is of."""
    inner = typed(dict(config), _KEY, dict, where)
    if not inner.get("architectures") and inner.get("model_type") in _CLASSES:
        inner = inner | {"architectures": [_CLASSES[inner["model_type"]]]}
    if not inner.get("architectures"):
        whole = shown(config.get("architectures"))
        raise CheckpointError(f"{where}: {_KEY} names no architectures; the text part of {whole} is not known here")
    return {key: config[key] for key in _SHARED if key in config} | inner


def text_name(name: str) -> str | None:
    """The name that a tensor has in a text model; None if it belongs to another part."""
    for prefix, instead in (_APART, _WHOLE):
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name if name.startswith(_HEAD) else None


def text_tensors(stored: Mapping[str, StoredTensor], where: str) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of the text part, and a line on those that are left out. Raises CheckpointError if there are none."""
    tensors: dict[str, StoredTensor] = {}
    others: Counter[str] = Counter()
    for name, tensor in stored.items():
        own = text_name(name)
        if own is None:
            others[".".join(name.split(".")[: 2 if name.startswith("model.") else 1])] += 1
        elif own in tensors:
            raise CheckpointError(f"{where}: tensor {shown(own)} of the text part is there twice")
        else:
            tensors[own] = replace(tensor, name=own)
    if not tensors:
        raise CheckpointError(f"{where}: no tensor begins with {_WHOLE[0]}; expected those of the text part")
    named = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]
    parts = ", ".join(f"{shown(part)} ({count} tensors)" for part, count in named)
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return tensors, f"the text part alone is converted; left out: {parts or 'nothing'}{more}"
