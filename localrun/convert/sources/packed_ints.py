"""Four-bit weights as compressed-tensors packs them, those of Kimi-K2-Thinking's and Kimi-K2.5's routed experts.

NAME_packed, int32 (rows, cols / 8), eight codes each, the first in the low bits; NAME_scale (rows, cols / group), one
for every group of columns; NAME_shape, rows and cols. A weight is (code - 8) * scale. Other ways to pack are refused.
Source: dequant_packed in conversion/base.py of https://github.com/ggml-org/llama.cpp @3f545becc.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.json_file import shown, typed
from localrun.convert.sources.safetensors_file import StoredTensor

METHOD = "compressed-tensors"
_PACKED, _SCALE, _SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"
_FLOATS = ("BF16", "F16", "F32")
_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True}


@dataclass(frozen=True, slots=True)
class PackedInts:
    """Where the parts of a weight lie; group: columns that share a scale."""

    packed: StoredTensor
    scale: StoredTensor
    group: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix: a word of 32 bits holds eight columns."""
        rows, words = self.packed.shape
        return rows, 8 * words

    @property
    def n_bytes(self) -> int:
        """Of the words and their scales, in the checkpoint."""
        return self.packed.n_bytes + self.scale.n_bytes


def group_size(quantization: dict[str, Any], where: str) -> int:
    """Columns that share a scale. Raises CheckpointError unless weights are packed as this module reads them."""
    where = f"{where}: quantization_config"
    if quantization.get("format") != "pack-quantized":
        raise CheckpointError(f"{where}: format is {shown(quantization.get('format'))}; expected pack-quantized")
    groups = list(typed(quantization, "config_groups", dict, where).values())
    if len(groups) != 1 or not isinstance(groups[0], dict):
        raise CheckpointError(f"{where}: has {len(groups)} config_groups; expected one")
    weights = typed(groups[0], "weights", dict, where)
    for key, expected in _WEIGHTS.items():
        if weights.get(key) != expected:
            raise CheckpointError(f"{where}: {key} is {shown(weights.get(key))}; expected {shown(expected)}")
    size = typed(weights, "group_size", int, where)
    if size < 8 or size % 8:
        raise CheckpointError(f"{where}: group_size is {size}; expected a multiple of 8")
    return size


def take(stored: dict[str, StoredTensor], group: int) -> dict[str, PackedInts]:
    """Packed weights by the name of what they are, taken out of the tensors. Raises CheckpointError if parts differ."""
    found = {}
    for name in [name for name in stored if name.endswith(_PACKED)]:
        base = name.removesuffix(_PACKED)
        packed, scale = stored.pop(name), stored.pop(base + _SCALE, None)
        stored.pop(base + _SHAPE, None)
        rows, words = packed.shape if len(packed.shape) == 2 else (0, 0)
        expected = (rows, 8 * words // group)
        where = f"{packed.path}: tensor {shown(name)}"
        if packed.dtype != "I32" or packed.n_bytes != 4 * rows * words or not rows or 8 * words % group:
            raise CheckpointError(
                f"{where} is {shown(packed.dtype)} {list(packed.shape)}; expected I32 of whole groups"
            )
        if scale is None or scale.dtype not in _FLOATS or scale.shape != expected:
            found_ = "missing" if scale is None else f"{shown(scale.dtype)} {list(scale.shape)}"
            raise CheckpointError(f"{where}: its scale is {found_}; expected floats of shape {list(expected)}")
        found[f"{base}.weight"] = PackedInts(packed, scale, group)
    return found


def expand(words: np.ndarray, scales: np.ndarray, group: int, out: np.ndarray) -> None:
    """out, float32 (rows, cols) = codes in words, uint8 (rows, cols / 2), times scales, float32 (rows, groups)."""
    np.subtract(words & 15, 8, out=out[:, 0::2], dtype=np.float32)
    np.subtract(words >> 4, 8, out=out[:, 1::2], dtype=np.float32)
    out.reshape(len(out), -1, group)[...] *= scales[:, :, None]
