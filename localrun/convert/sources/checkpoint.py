"""A Hugging Face checkpoint folder: config.json, the tensors of its shards, and their rows as float32.

Knows nothing of what tensors mean. FP8 follows the published checkpoints' scheme: weight * scale_inv, one scale a block
of weight_block_size, the last blocks trimmed to the weight's shape (conversion/base.py of
https://github.com/ggml-org/llama.cpp @3f545becc does the same); without a block size, one scale a row or a tensor.
DeepSeek-V4's scales are exponents, named <module>.scale beside <module>.weight.

MXFP4 is gpt-oss's: <name>_blocks, uint8 (..., blocks, 16), 32 codes each, two neighbours a byte, the first in the low
half; <name>_scales, uint8 (..., blocks), exponents (transformers 5.24, integrations/mxfp4.py). The pair counts as one
tensor <name> in ggml's blocks, whose byte j holds codes j and j + 16 (ggml-common.h @d99724f, block_mxfp4).
DeepSeek-V4's FP4 is the same: <module>.weight, int8 (rows, cols / 2), and <module>.scale, exponents (rows, cols / 32).

Tables of whole numbers count as I32. Of DeepSeek-V4's prediction layer two matrices side by side, e_proj and h_proj,
count as one, eh_proj.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from localrun.convert.errors import CheckpointError
from localrun.convert.sources import deepseek4_names, packed_ints, text_part
from localrun.convert.sources.json_file import is_kind, read_json, shown, typed
from localrun.convert.sources.packed_ints import PackedInts
from localrun.convert.sources.reading import Reader
from localrun.convert.sources.safetensors_file import DTYPE_BYTES, StoredTensor, read_header
from quant.formats import fp8

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_NAMED = "transformers_weights"  # the key of config.json that names another
_SCALE = "_scale_inv"
_EXPONENTS = "F8_E8M0"  # dtype of scales that are powers of 2, in FP8 and FP4
_WEIGHTS = ("F32", "F16", "BF16", "F8_E4M3")
_TABLES = {"I32": np.int32, "I64": np.int64}
TABLE = "I32"  # what they count as
MXFP4 = "MXFP4"  # dtype of a pair of these
_BLOCKS, _SCALES = "_blocks", "_scales"
_HALF_BLOCK = 16  # bytes of codes, and half the codes
# Not weights: what a runner computes itself, and the activation scales of other FP8 runtimes.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.activation_scale$|\.input_scale$")
_COMPARED_BYTES = 16 << 20  # of two tensors at a time


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor as a source offers it: rows are the last dimension, all others together count them."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int

    @property
    def n_cols(self) -> int:
        """Of the last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Of all dimensions but the last."""
        return prod(self.shape[:-1])


class Checkpoint:
    """The folder; tensors by Hugging Face name, the scales of FP8 weights left out.

    Attributes:
        path: the folder.
        config: config.json.
        tensors: name -> SourceTensor.
        files: all files that results depend on.
        index: tensor -> shard, as the index says; empty without one.
        is_part: whether it is the text part of a model that reads images, too.
        warnings: one line each.
        block_types: the types whose blocks it gives.
    """

    block_types = (MXFP4, TABLE)

    def __init__(self, path: Path) -> None:
        """Read and check config, index and all shards' headers. Raises CheckpointError."""
        self.path = path
        self.config = read_json(path / "config.json")
        shards, self.index = _shards(path, self.config)
        self.warnings = _not_read(path, shards, bool(self.index))
        stored = _collect(shards)
        self.is_part = text_part.has_text_part(self.config)
        if self.is_part:
            self.config = text_part.text_config(self.config, str(path / "config.json"))
            self.index = {own: shard for name, shard in self.index.items() if (own := text_part.text_name(name))}
            stored, line = text_part.text_tensors(stored, str(path))
            self.warnings.append(line)
        if deepseek4_names.applies(self.config):
            stored = deepseek4_names.published(stored)
        self._pairs = _take_pairs(stored) | _take_fp4(stored)
        self._packed = _take_packed(stored, self.config, path)
        self._stored = {name: tensor for name, tensor in stored.items() if not _is_scale(name, stored)}
        self._scales = {name: stored[scale] for name in self._stored if (scale := _scale_of(name, stored))}
        self._block = _block_size(self.config, path)
        self.tensors = {name: self._checked(tensor) for name, tensor in self._stored.items()}
        self.tensors |= {name: _checked_pair(name, *pair) for name, pair in self._pairs.items()}
        for name, packed in self._packed.items():  # floats to all that ask
            self.tensors[name] = SourceTensor(name, packed.shape, packed.scale.dtype, packed.n_bytes)
        self._joined = _take_joined(self.tensors)
        self.files = [path / "config.json", *shards]
        self._reader = Reader()

    def _checked(self, tensor: StoredTensor) -> SourceTensor:
        where = f"{tensor.path}: tensor {shown(tensor.name)}"
        if tensor.dtype in _TABLES:
            return SourceTensor(tensor.name, tensor.shape, TABLE, tensor.n_bytes)
        if tensor.dtype not in _WEIGHTS:
            raise CheckpointError(f"{where} has dtype {shown(tensor.dtype)}; expected one of {', '.join(_WEIGHTS)}")
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
                f"{tensor.path}: tensor {shown(tensor.name)} is FP8 with shape {tensor.shape}; expected 2-D"
            )
        rows, cols = tensor.shape
        allowed = [(), (1,), (1, 1), (rows,), (rows, 1)]
        if self._block is not None:
            allowed = [(-(-rows // self._block[0]), -(-cols // self._block[1]))]
        if scale.dtype not in ("F32", "BF16", "F16", _EXPONENTS) or scale.shape not in allowed:
            shapes = " or ".join(map(str, allowed))
            found = f"{shown(scale.dtype)} {scale.shape}"
            raise CheckpointError(
                f"{scale.path}: tensor {shown(scale.name)} is {found}; expected F32 of shape {shapes}"
            )

    def read(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """out = rows start..stop of a tensor, float32 (stop - start, n_cols), C order. Raises CheckpointError."""
        if name in self._pairs:
            self._reader.widen(self.blocks(name, start, stop), MXFP4, out)
            return
        if name in self._packed:
            self._expand(self._packed[name], start, stop, out)
            return
        if name in self._joined:
            half = np.empty((stop - start, out.shape[1] // 2), np.float32)
            for part, first in zip(self._joined[name], (0, half.shape[1]), strict=True):
                self.read(part, start, stop, half)
                out[:, first : first + half.shape[1]] = half
            return
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

    def _expand(self, weight: PackedInts, start: int, stop: int, out: np.ndarray) -> None:
        scales = np.empty((stop - start, weight.scale.shape[1]), np.float32)
        row_bytes = scales.shape[1] * DTYPE_BYTES[weight.scale.dtype]
        self._reader.widen(self._rows_of(weight.scale, start, stop, row_bytes).reshape(-1), weight.scale.dtype, scales)
        words = self._rows_of(weight.packed, start, stop, 4 * weight.packed.shape[1])
        packed_ints.expand(words, scales, weight.group, out)

    def blocks(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes): rows of an MXFP4 tensor in ggml's blocks, or of a table as int32.

        Raises CheckpointError.
        """
        if name not in self._pairs:
            return self._whole_numbers(self._stored[name], start, stop)
        blocks, scales = self._pairs[name]
        n_blocks = scales.shape[-1]
        out = np.empty((stop - start, n_blocks, 1 + _HALF_BLOCK), np.uint8)
        out[..., 0] = self._rows_of(scales, start, stop, n_blocks)
        low = self._rows_of(blocks, start, stop, n_blocks * _HALF_BLOCK).reshape(-1, _HALF_BLOCK)
        codes = np.stack([low & 15, low >> 4], -1).reshape(stop - start, n_blocks, 2, _HALF_BLOCK)
        out[..., 1:] = codes[:, :, 0] | codes[:, :, 1] << 4
        return out.reshape(stop - start, -1)

    def _whole_numbers(self, stored: StoredTensor, start: int, stop: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes): rows of a table as int32."""
        rows = self._rows_of(stored, start, stop, stored.n_bytes // prod(stored.shape[:-1]))
        numbers = rows.view(_TABLES[stored.dtype])
        narrow = numbers.astype(np.int32)
        if not np.array_equal(narrow, numbers):
            raise CheckpointError(f"{stored.path}: tensor {shown(stored.name)} has a number of more than 32 bits")
        return narrow.view(np.uint8)

    def _rows_of(self, stored: StoredTensor, start: int, stop: int, row_bytes: int) -> np.ndarray:
        """uint8 (stop - start, row_bytes), in memory that the next fetch overwrites."""
        offset, n_bytes = stored.offset + start * row_bytes, (stop - start) * row_bytes
        return self._reader.fetch(stored.path, offset, n_bytes, stored.name).reshape(-1, row_bytes)

    def _scale(self, name: str) -> np.ndarray:
        """float32 (blocks,): all scales of an FP8 tensor."""
        stored = self._scales[name]
        scale = np.empty((1, prod(stored.shape)), np.float32)
        raw = self._reader.fetch(stored.path, stored.offset, stored.n_bytes, stored.name)
        if stored.dtype == _EXPONENTS:
            return np.where(raw == 255, np.float32(np.nan), np.ldexp(np.float32(1), raw.astype(np.int32) - 127))
        self._reader.widen(raw, stored.dtype, scale)
        return scale[0]

    def _scale_block(self, name: str) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        rows, cols = self._stored[name].shape
        if self._block is not None:
            return self._block
        return (1 if prod(self._scales[name].shape) > 1 else rows, cols)

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors hold the same bytes."""
        if not {first, second} <= self._stored.keys():
            return False
        one, other = self._stored[first], self._stored[second]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for at in range(0, one.n_bytes, _COMPARED_BYTES):
            n_bytes = min(_COMPARED_BYTES, one.n_bytes - at)
            part = self._reader.fetch(one.path, one.offset + at, n_bytes, first).tobytes()
            if self._reader.fetch(other.path, other.offset + at, n_bytes, second).tobytes() != part:
                return False
        return True

    def close(self) -> None:
        """Close the shard that was read last."""
        self._reader.close()


def _shards(path: Path, config: dict[str, Any]) -> tuple[list[Path], dict[str, str]]:
    """The files that transformers' from_pretrained reads, and which tensor the index says is in which.

    That is what config.json's transformers_weights names, else a whole model.safetensors, else what the index names.
    """
    name = WHOLE if (path / WHOLE).is_file() else INDEX
    if config.get(_NAMED) is not None:
        name = typed(config, _NAMED, str, str(path / "config.json"))
        _check_name(name, (".safetensors", ".safetensors.index.json"), f"{path / 'config.json'}: {_NAMED}")
    if not name.endswith(".json"):
        return [path / name], {}
    if not (path / name).exists():
        others = ", ".join(sorted(other.name for other in path.glob("*.safetensors"))) or "none"
        others = others if len(others) <= 200 else others[:200] + "..."
        raise CheckpointError(f"{path}: has no {WHOLE} and no {name}; other safetensors files: {others}")
    index = typed(read_json(path / name), "weight_map", dict, str(path / name))
    if not index:
        raise CheckpointError(f"{path / name}: weight_map is empty")
    for tensor, shard in index.items():
        _check_name(shard, (".safetensors",), f"{path / name}: tensor {shown(tensor)}")
    return [path / shard for shard in sorted(set(index.values()))], index


def _check_name(name: Any, endings: tuple[str, ...], what: str) -> None:
    """Raises CheckpointError unless it is the name of a file in the folder."""
    sound = isinstance(name, str) and name.isprintable() and PurePath(name).name == name and name.endswith(endings)
    if not sound:
        raise CheckpointError(f"{what} is in {shown(name)}; expected the name of a file, *{endings[0]}")


def _collect(shards: list[Path]) -> dict[str, StoredTensor]:
    """All shards' tensors, no name twice, without what every runner computes itself."""
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(shard).items():
            if name in tensors:
                raise CheckpointError(f"{shard}: tensor {shown(name)} is also in {tensors[name].path.name}")
            if not _COMPUTED.search(name):
                tensors[name] = tensor
    return tensors


def _not_read(path: Path, shards: list[Path], has_index: bool) -> list[str]:
    """A line on weights in the folder that are left alone, as transformers leaves them."""
    others = {other for other in path.glob("*.safetensors") if not other.name.startswith(".")} - set(shards)
    names = [*sorted(other.name for other in others), *([INDEX] if (path / INDEX).exists() and not has_index else [])]
    if not names:
        return []
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    read = shards[0].name if len(shards) == 1 else f"{len(shards)} shards"
    return [f"not read, as in transformers: {', '.join(names[:3])}{more}; the model is in {read}"]


def _take_pairs(stored: dict[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """Blocks and scales by the name of what they are together, taken out of the tensors."""
    names = [name.removesuffix(_BLOCKS) for name in stored if name.endswith(_BLOCKS)]
    return {
        name: (stored.pop(name + _BLOCKS), stored.pop(name + _SCALES)) for name in names if name + _SCALES in stored
    }


def _take_fp4(stored: dict[str, StoredTensor]) -> dict[str, tuple[StoredTensor, StoredTensor]]:
    """DeepSeek-V4's FP4 as such pairs, taken out of the tensors. Raises CheckpointError if parts differ."""
    pairs = {}
    for name in [name for name, tensor in stored.items() if tensor.dtype == "I8"]:
        codes, scale = stored[name], stored.get(_beside(name))
        rows, n_bytes = codes.shape if len(codes.shape) == 2 else (0, 0)
        expected = (rows, n_bytes // _HALF_BLOCK)
        if scale is None or scale.dtype != _EXPONENTS or scale.shape != expected or n_bytes % _HALF_BLOCK:
            found = "missing" if scale is None else f"{shown(scale.dtype)} {list(scale.shape)}"
            what = f"{codes.path}: tensor {shown(name)} is I8 {list(codes.shape)}, FP4; its scale is {found}"
            raise CheckpointError(f"{what}; expected {_EXPONENTS} {list(expected)}, one for 32 weights")
        del stored[name], stored[scale.name]
        pairs[name] = replace(codes, dtype="U8", shape=(*expected, _HALF_BLOCK)), replace(scale, dtype="U8")
    return pairs


def _take_joined(tensors: dict[str, SourceTensor]) -> dict[str, tuple[str, str]]:
    """Matrices that count as one, side by side, by the name of that; it takes their place among the tensors."""
    joined = {}
    for name in [name for name in tensors if name.endswith(".e_proj.weight")]:
        other, whole = (name.replace(".e_proj.", part) for part in (".h_proj.", ".eh_proj."))
        if other in tensors and tensors[other].shape == tensors[name].shape and len(tensors[name].shape) == 2:
            left, right = tensors.pop(name), tensors.pop(other)
            shape, n_bytes = (left.n_rows, 2 * left.n_cols), left.n_bytes + right.n_bytes
            tensors[whole], joined[whole] = SourceTensor(whole, shape, left.dtype, n_bytes), (name, other)
    return joined


def _take_packed(stored: dict[str, StoredTensor], config: dict[str, Any], path: Path) -> dict[str, PackedInts]:
    """Packed integers by name, if config.json says that there are some, taken out of the tensors."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != packed_ints.METHOD:
        return {}
    return packed_ints.take(stored, packed_ints.group_size(quantization, str(path / "config.json")))


def _checked_pair(name: str, blocks: StoredTensor, scales: StoredTensor) -> SourceTensor:
    """The tensor that they are. Raises CheckpointError if they do not belong together."""
    for part, shape in ((scales, blocks.shape[:-1]), (blocks, (*scales.shape, _HALF_BLOCK))):
        if part.dtype != "U8" or part.shape != shape or part.n_bytes != prod(shape) or len(shape) < 2:
            found = f"{shown(part.dtype)} {list(part.shape)}"
            raise CheckpointError(f"{part.path}: tensor {shown(part.name)} is {found}; expected U8 {list(shape)}")
    *rows, n_blocks = scales.shape
    return SourceTensor(name, (*rows, 2 * _HALF_BLOCK * n_blocks), MXFP4, blocks.n_bytes + scales.n_bytes)


def _beside(name: str) -> str:
    """DeepSeek-V4's name of a weight's scale."""
    return name.removesuffix("weight") + "scale"


def _scale_of(name: str, tensors: dict[str, StoredTensor]) -> str:
    """The name of a weight's scale; empty if it has none."""
    return next((each for each in (name + _SCALE, _beside(name)) if each in tensors and each != name), "")


def _is_scale(name: str, tensors: dict[str, StoredTensor]) -> bool:
    if name.endswith(_SCALE):
        return name.removesuffix(_SCALE) in tensors
    return name.endswith(".scale") and name.removesuffix("scale") + "weight" in tensors


def _block_size(config: dict[str, Any], path: Path) -> tuple[int, int] | None:
    """Rows and columns that share an FP8 scale. Raises CheckpointError for other ways of quantisation."""
    if not config.get("quantization_config"):
        return None
    where = str(path / "config.json")
    quantization = typed(config, "quantization_config", dict, where)
    method = typed(quantization, "quant_method", str, f"{where}: quantization_config")
    if method in ("mxfp4", packed_ints.METHOD):  # which tensors are packed shows
        return None
    if method != "fp8":
        raise CheckpointError(
            f"{where}: quantization_config is {shown(method)}; only fp8, mxfp4 and four-bit compressed-tensors can be "
            "converted"
        )
    block = quantization.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(is_kind(n, int) and n for n in block):
        raise CheckpointError(f"{where}: weight_block_size is {shown(block)}; expected two positive numbers")
    return block[0], block[1]
