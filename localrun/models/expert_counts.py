"""How often a text sent tokens to each routed expert: the counts that an importance matrix holds (localrun imatrix).

Only llama.cpp's GGUF form has them by expert: <name>.counts, float32 (experts, 1), the rows that each expert's matrix
was multiplied with (tools/imatrix/imatrix.cpp of https://github.com/ggml-org/llama.cpp @3f545becc). All matrices of an
expert see the same tokens, so one of them is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

import numpy as np

from localrun.errors import GGUFError
from localrun.gguf.file import GGUFFile, Tensor, open_gguf
from localrun.models.parts import DOWN_EXPERTS
from localrun.models.reader import IMATRIX

_MOST = 2.0**53  # far more than any text has


def read_usage(path: str | os.PathLike[str], layers: Sequence[int], n_experts: int) -> dict[int, list[int]]:
    """Layer -> how often each of its routed experts was chosen.

    Args:
        layers: those of the model that have routed experts, n_experts each.

    Raises:
        GGUFError: no such file, no importance matrix, or one of a model with other layers or experts.
    """
    with open_gguf(path) as file:
        kind = file.string("general.type", "")
        if kind != IMATRIX:
            raise GGUFError(f"{path}: is no importance matrix: key 'general.type' is {kind[:50]!r}, expected 'imatrix'")
        found = _by_layer(file)
        if sorted(found) != sorted(layers):
            raise GGUFError(f"{path}: counts experts of {_span(found)}; this model has them in {_span(layers)}")
        return {layer: _counts(file, tensor, n_experts) for layer, tensor in sorted(found.items())}


def _by_layer(file: GGUFFile) -> dict[int, Tensor]:
    """The counts of each layer's experts; whatever layers there are."""
    pattern = rf"blk\.(\d+)\.{re.escape(DOWN_EXPERTS.name)}\.counts"
    matches = ((re.fullmatch(pattern, name), tensor) for name, tensor in file.tensors.items())
    return {int(match[1]): tensor for match, tensor in matches if match}


def _counts(file: GGUFFile, tensor: Tensor, n_experts: int) -> list[int]:
    if tensor.type.name != "F32" or tensor.shape != (n_experts, 1):
        found = f"{tensor.type.name} of shape {tensor.shape}"
        raise GGUFError(f"{file.path}: '{tensor.name}' is {found}, expected F32 of shape {(n_experts, 1)}")
    counts = tensor.data.view(np.float32)
    if not ((counts >= 0) & (counts <= _MOST)).all():
        raise GGUFError(f"{file.path}: '{tensor.name}' holds numbers that are no counts")
    return counts.astype(np.int64).tolist()


def _span(layers: Iterable[int]) -> str:
    """ "no layer", "layer 3", or "26 layers, 1 to 26"."""
    layers = sorted(layers)
    if len(layers) < 2:
        return f"layer {layers[0]}" if layers else "no layer"
    return f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
