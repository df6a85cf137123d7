"""A Hugging Face checkpoint folder: config.json, the tensors of its shards, and their rows as float32.

Knows nothing of what tensors mean. FP8 follows the published checkpoints' scheme: weight * scale_inv, one scale a block
of weight_block_size, the last blocks trimmed to the weight's shape (conversion/base.py of
https://github.com/ggml-org/llama.cpp @3f545becc does the same); without a block size, one scale a row or a tensor.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from localrun.convert.errors import CheckpointError
from localrun.convert.sources.reading import Reader
from localrun.convert.sources.safetensors_file import DTYPE_BYTES, StoredTensor, read_header
from quant.formats import fp8

INDEX = "model.safetensors.index.json"
_SCALE = "_scale_inv"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor as a source offers it: rows are the last dimension, all others together count them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int

    @property
    def n_cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])


class Checkpoint:
    """The folder; tensors by Hugging Face name, the scales of FP8 weights left out.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: name -> SourceTensor.
        files: all files that results depend on.
    """

    def __init__(self, path: Path) -> None:
        """Read and check config, index and all shards' headers. Raises CheckpointError."""
        self.path = path
        self.config = read_json(path / "config.json")
        shards, index = _shards(path)
        stored = _collect(shards, index, path / INDEX)
        self._stored = {name: tensor for name, tensor in stored.items() if not _is_scale(name, stored)}
        self._scales = {name: stored[name + _SCALE] for name in self._stored if name + _SCALE in stored}
        self._block = _block_size(self.config, path)
        self.tensors = {name: self._checked(tensor) for name, tensor in self._stored.items()}
        self.files = [path / "config.json", *shards]
        self._reader = Reader()

    def _checked(self, tensor: StoredTensor) -> SourceTensor:
        where = f"{tensor.path}: tensor '{tensor.name}'"
        if tensor.dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{where} has dtype {tensor.dtype}; expected one of {', '.join(DTYPE_BYTES)}")
        scale = self._scales.get(tensor.name)
        if (tensor.dtype == "F8_E4M3") != (scale is not None):
            state = "no scale" if scale is None else f"a scale but dtype {tensor.dtype}"
            raise CheckpointError(f"{where} has {state}; expected F8_E4M3 together with '{tensor.name}{_SCALE}'")
        if scale is not None:
            self._check_scale(tensor, scale)
        return SourceTensor(tensor.name, tensor.shape, tensor.dtype, tensor.n_bytes)

    def _check_scale(self, tensor: StoredTensor, scale: StoredTensor) -> None:
        if len(tensor.shape) != 2:
            raise CheckpointError(
                f"{tensor.path}: tensor '{tensor.name}' is FP8 with shape {tensor.shape}; expected 2-D"
            )
        rows, cols = tensor.shape
        allowed = [(), (1,), (1, 1), (rows,), (rows, 1)]
        if self._block is not None:
            allowed = [(-(-rows // self._block[0]), -(-cols // self._block[1]))]
        if scale.dtype not in ("F32", "BF16", "F16") or scale.shape not in allowed:
            shapes = " or ".join(map(str, allowed))
            found = f"{scale.dtype} {scale.shape}"
            raise CheckpointError(f"{scale.path}: tensor '{scale.name}' is {found}; expected F32 of shape {shapes}")

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """out = rows start..stop of a tensor, float32 (stop - start, n_cols), C order. Raises CheckpointError."""
        stored, reader = self._stored[name], self._reader
        item = DTYPE_BYTES[stored.dtype]
        offset = stored.offset + start * out.shape[1] * item
        if stored.dtype == "F32":
            reader.read(stored.path, offset, out.reshape(-1).view(np.uint8), name)
            return
        scale = self._scale(name) if stored.dtype == "F8_E4M3" else None
        raw = reader.fetch(stored.path, offset, out.size * item, name)
        if scale is not None:
            fp8.expand(raw.reshape(out.shape), scale, start, self._scale_block(name), out)
        else:
            reader.widen(raw, stored.dtype, out)

    def _scale(self, name: str) -> np.ndarray:
        """float32 (blocks,): all scales of an FP8 tensor."""
        stored = self._scales[name]
        scale = np.empty((1, prod(stored.shape)), np.float32)
        raw = self._reader.fetch(stored.path, stored.offset, stored.n_bytes, stored.name)
        self._reader.widen(raw, stored.dtype, scale)
        return scale[0]

    def _scale_block(self, name: str) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, cols = self._stored[name].shape
        if self._block is not None:
            return self._block
        return (1 if prod(self._scales[name].shape) > 1 else rows, cols)

    def close(self) -> None:
        self._reader.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def _shards(path: Path) -> tuple[list[Path], dict[str, str]]:
    """The shards, and which tensor the index says is in which; without an index, every safetensors file there is."""
    if not (path / INDEX).exists():
        shards = sorted(path.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{path}: has no safetensors file; expected model.safetensors or {INDEX}")
        return shards, {}
    index = read_json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path / INDEX}: has no weight_map")
    for name, shard in index.items():
        if not isinstance(shard, str) or PurePath(shard).name != shard:
            raise CheckpointError(f"{path / INDEX}: tensor '{name}' is in {shard!r}; expected a file name")
    return [path / shard for shard in sorted(set(index.values()))], index


def _collect(shards: list[Path], index: dict[str, str], index_path: Path) -> dict[str, StoredTensor]:
    """All shards' tensors, no name twice, each where the index says."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor '{name}' is also in {tensors[name].path.name}")
            tensors[name] = tensor
    for name, shard in index.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(f"{index_path}: tensor '{name}' should be in {shard}, which lacks it")
    return tensors


def _is_scale(name: str, tensors: dict[str, StoredTensor]) -> bool:
    return name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors


def _block_size(config: dict[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns that share an FP8 scale. Raises CheckpointError for other ways of quantisation."""
    quantization = config.get("quantization_config")
    if not quantization:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is {method!r}; only 'fp8' can be converted")
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    with suppress(TypeError, ValueError):
        rows, cols = block
        if isinstance(rows, int) and isinstance(cols, int) and min(rows, cols) > 0:
            return rows, cols
    raise CheckpointError(f"{path / 'config.json'}: weight_block_size is {block}; expected two positive numbers")
