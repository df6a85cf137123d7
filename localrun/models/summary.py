"""What a GGUF file holds: sizes, types, and what part of the model its bytes belong to. Reads no tensor data.

Works for any architecture; what only a native model's configuration tells is None for the others. Groups go by the
tensor names that llama.cpp gives (gguf-py/gguf/constants.py, TENSOR_NAMES @3f545becc).
"""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import lru_cache
from math import prod
from typing import Any

from localrun.errors import LocalrunError, UnsupportedModelError
from localrun.gguf.file import GGUFFile, Tensor
from localrun.models.config import Config
from localrun.models.names import EMBED_TOKENS, LM_HEAD, check_tensors, check_types
from localrun.models.reader import is_imatrix, read_config

# The first pattern that matches a name decides.
GROUPS = {
    "routed experts": r"blk\.\d+\.ffn_\w+_exps\.",
    "shared experts": r"blk\.\d+\.ffn_\w+_shexp\.",
    "dense ffn": r"blk\.\d+\.ffn_(gate|up|down)\.",
    "compressors": r"blk\.\d+\.(attn|indexer)_compressor_",
    "attention": r"blk\.\d+\.(attn_|indexer\.)",
    "embedding": r"token_embd\.|blk\.\d+\.ffn_gate_tid2eid\.",  # tables of which a token reads a row
    "head": r"output\.",
    "other": r"",
}


@lru_cache(1 << 14)  # planning asks of the same names again and again
def group_of(name: str) -> str:
    """The part of the model a tensor belongs to, a key of GROUPS; routers and norms are "other"."""
    return next(group for group, pattern in GROUPS.items() if re.match(pattern, name))


def weight_bytes_per_token(file: GGUFFile, config: Config) -> int:
    """Bytes of weights that evaluating one token reads: the chosen experts', one row of the embedding, all the rest."""
    total = 0
    for tensor in file.tensors.values():
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            continue  # of a layer for multi-token prediction
        if group_of(tensor.name) == "embedding":
            is_head = tensor.name == EMBED_TOKENS and LM_HEAD not in file.tensors
            total += tensor.n_bytes // tensor.shape[0] + is_head * tensor.n_bytes
        elif group_of(tensor.name) == "routed experts":
            total += tensor.n_bytes * config.num_experts_per_tok // config.n_routed_experts
        else:
            total += tensor.n_bytes
    return total


def summary_of(file: GGUFFile) -> dict[str, Any]:
    """Everything inspect prints, as one JSON document; sizes in bytes, shapes in NumPy order."""
    tensors = list(file.tensors.values())
    weights, n_bytes = sum(map(_weights, tensors)), sum(tensor.n_bytes for tensor in tensors)
    name = file.metadata.get("general.name")
    kind = "importance matrix" if is_imatrix(file) else "model"
    config, backend, reason = _config(file)
    return {
        "paths": [str(path) for path in file.paths],
        "file_bytes": file.file_size,
        "gguf_version": file.version,
        "name": name if isinstance(name, str) else None,
        "kind": kind,
        "architecture": file.string("general.architecture") if kind == "model" else None,
        "native": backend == "native",
        "backend": backend,
        "not_native_because": reason,
        "parameters": weights,
        "tensor_bytes": n_bytes,
        "bits_per_weight": round(8 * n_bytes / weights, 3) if weights else None,
        "kv_bytes_per_token": config.kv_bytes_per_token if config else None,
        "kv_bytes_per_token_in_8_bits": config.kv_token_bytes(8) if config and not config.why_not_8_bits else None,
        "kv_window_bytes": config.kv_window_bytes if config else None,
        "config": asdict(config) if config else None,
        "groups": _groups(tensors),
        "types": _types(tensors),
        "tensors": [
            {"name": tensor.name, "shape": list(tensor.shape), "type": tensor.type.name, "bytes": tensor.n_bytes}
            for tensor in tensors
        ],
    }


def _config(file: GGUFFile) -> tuple[Config | None, str | None, str | None]:
    """The configuration if it can be read, the backend that would run the file, and why not the native one."""
    config = None
    try:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
    except LocalrunError as error:  # of another architecture, or a file without weights: still worth a look
        backend = "llama.cpp" if isinstance(error, UnsupportedModelError) else None
        return config, backend, str(error).removeprefix(f"{file.path}: ")
    return config, "native", None


def _weights(tensor: Tensor) -> int:
    return prod(tensor.shape)


def _groups(tensors: list[Tensor]) -> dict[str, dict[str, float]]:
    total = sum(tensor.n_bytes for tensor in tensors)
    sizes = dict.fromkeys(GROUPS, 0)
    for tensor in tensors:
        sizes[group_of(tensor.name)] += tensor.n_bytes
    return {group: {"bytes": size, "percent": round(100 * size / total, 1)} for group, size in sizes.items() if size}


def _types(tensors: list[Tensor]) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        counts = types.setdefault(tensor.type.name, {"tensors": 0, "weights": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["weights"] += _weights(tensor)
        counts["bytes"] += tensor.n_bytes
    return dict(sorted(types.items(), key=lambda item: -item[1]["bytes"]))
