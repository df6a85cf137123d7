"""GGUF tensor names against the network's module names, and which tensors with which shapes a model must have.

All of it follows from the declarations of the architectures.
"""

import re
from collections.abc import Callable, Iterable
from typing import NoReturn

from localrun.errors import GGUFError, UnsupportedModelError
from localrun.gguf.file import GGUFFile
from localrun.models import parts
from localrun.models.architecture import Shape, Tensor
from localrun.models.config import Config
from localrun.models.registry import ARCHITECTURES
from quant.formats import registry

EMBED_TOKENS, LM_HEAD, NORM = parts.EMBED_TOKENS.name, parts.LM_HEAD.name, parts.NORM.name
ROPE_FREQS = parts.ROPE_FREQS

# Types of ggml's that no matrix product takes weights in.
_NO_WEIGHTS = ("F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K")
# Tensors of which single rows or columns are read.
READ_BY_ROW = re.compile(r"embd|embed_tokens|attn_(kv|k|v)_b\.|markov_w1")
# Tables of whole numbers, no weights.
INTEGERS = re.compile(r"blk\.\d+\.ffn_gate_tid2eid\.weight")

# Module -> name in a layer, of all architectures; what one lacks is called as in the others, and is in no file of it.
_ANY = {tensor.module: tensor.name for architecture in ARCHITECTURES.values() for tensor in architecture.layer}
_OWN = {
    name: {tensor.module: tensor.name for tensor in architecture.layer} for name, architecture in ARCHITECTURES.items()
}
_LAYER = {name: _ANY | own for name, own in _OWN.items()}


def layer(architecture: str, index: int, module: str) -> str:
    """The GGUF name of a module of a layer: ("llama", 3, "self_attn.o_proj") -> "blk.3.attn_output.weight"."""
    return f"blk.{index}.{_LAYER[architecture][module]}"


def bias(weight: str) -> str:
    """The GGUF name of what is added to a matrix's products: "blk.3.attn_q.weight" -> "blk.3.attn_q.bias"."""
    return weight.removesuffix("weight") + "bias"


def holder(architecture: str, name: str) -> str:
    """The tensor that holds a matrix's rows: itself, but of architectures that join queries, keys and values."""
    match = re.fullmatch(r"(blk\.\d+\.)attn_[qkv]\.weight", name)
    joined = _OWN[architecture].get(parts.QKV)
    return match[1] + joined if match and joined else name


def check_tensors(file: GGUFFile, config: Config) -> None:
    """Every tensor that the model needs is there in its shape, and none that would go unused.

    Raises:
        GGUFError: a tensor is missing or has another shape.
        UnsupportedModelError: a tensor has no place in the native network.
    """
    expected = expected_shapes(file, config)
    for name, shape in expected.items():
        tensor = file.tensors.get(name)
        if tensor is None:
            raise GGUFError(f"{file.path}: tensor '{name}' not found; expected shape {shape}")
        if tensor.shape != shape:
            raise GGUFError(f"{file.path}: tensor '{name}' has shape {tensor.shape}; expected {shape}")
    for name in file.tensors:
        if name not in expected and not is_nextn(name, config):
            _refuse(file, config, name)


def _refuse(file: GGUFFile, config: Config, name: str) -> NoReturn:
    """Raises UnsupportedModelError, or GGUFError where llama.cpp would run the model wrongly.

    Converters write a scale of the whole matrix, or one an expert, beside NVFP4 weights. llama.cpp 3f545becc applies
    them in src/llama-graph.cpp, but src/models/deepseek2.cpp passes none of the feed-forward layers' on.
    """
    if not name.endswith((".scale", ".input_scale")):
        raise UnsupportedModelError(f"{file.path}: tensor '{name}' has no place in the native network")
    what = f"{file.path}: tensor '{name}', a scale beside NVFP4 weights, is not native"
    if config.attention == "mla":
        raise GGUFError(f"{what}, and llama.cpp leaves it out; convert the model to another type")
    raise UnsupportedModelError(what)


def check_types(file: GGUFFile) -> None:
    """Every tensor has a type that there are kernels for.

    Raises:
        GGUFError: a type that no weights have, or of which no vectors are.
        UnsupportedModelError: a type that other tools compute with.
    """
    for tensor in file.tensors.values():
        if INTEGERS.fullmatch(tensor.name):
            if tensor.type.name != "I32":
                raise GGUFError(f"{file.path}: tensor '{tensor.name}' has type {tensor.type.name}; expected I32")
            continue
        known = registry.NAMES if READ_BY_ROW.search(tensor.name) else (*registry.NAMES, *registry.INTERLEAVED)
        if tensor.type.name in known:
            continue
        found = f"{file.path}: tensor '{tensor.name}' has type {tensor.type.name}"
        if len(tensor.shape) < 2:
            raise GGUFError(f"{found}; expected F32")
        if tensor.type.name in _NO_WEIGHTS:
            raise GGUFError(f"{found}; expected F32, F16, BF16 or a format of quantised weights")
        raise UnsupportedModelError(f"{found}, not native")


def expected_shapes(file: GGUFFile, config: Config) -> dict[str, Shape]:
    """Name -> shape (NumPy order) of all tensors that the model reads, given which optional ones the file has."""
    ends = ARCHITECTURES[config.architecture].ends
    shapes = _shapes((tensor for tensor in ends if tensor.in_file(config, _has(file, ends, ""))), config, "")
    for index in range(config.num_hidden_layers):
        shapes |= _layer_shapes(file, config, index)
    return shapes


def _layer_shapes(file: GGUFFile, config: Config, index: int) -> dict[str, Shape]:
    architecture, prefix = ARCHITECTURES[config.architecture], f"blk.{index}."
    has = _has(file, architecture.layer, prefix)
    return _shapes(architecture.layer_in_file(config, index, has), config, prefix)


def _has(file: GGUFFile, tensors: Iterable[Tensor], prefix: str) -> Callable[[str], bool]:
    """Whether the file has a module, by the module's name."""
    names = {tensor.module: prefix + tensor.name for tensor in tensors}
    return lambda module: names.get(module) in file.tensors


def _shapes(tensors: Iterable[Tensor], config: Config, prefix: str) -> dict[str, Shape]:
    return {prefix + tensor.name: tensor.shape(config) for tensor in tensors}


def has_mtp(file: GGUFFile, config: Config) -> bool:
    """Whether all of the first layer for multi-token prediction is there, in its shapes."""
    if config.num_nextn_predict_layers == 0:
        return False
    index = config.num_hidden_layers
    shapes = _layer_shapes(file, config, index)
    norm = layer(config.architecture, index, "shared_head.norm")  # the converter lets a checkpoint do without
    shapes[norm] = (config.hidden_size,)
    return all(name in file.tensors and file.tensors[name].shape == shape for name, shape in shapes.items())


def mtp_shared(has: Callable[[str], bool], config: Config) -> tuple[str, str]:
    """Names of the embedding and the head of the layer for multi-token prediction: its own, or the model's."""
    embedding, head = (
        layer(config.architecture, config.num_hidden_layers, module) for module in ("embed_tokens", "shared_head.head")
    )
    return embedding if has(embedding) else EMBED_TOKENS, head if has(head) else lm_head(has)


def lm_head(has: Callable[[str], bool]) -> str:
    """Name of the model's head: where the file has none of its own, the embedding is both."""
    return LM_HEAD if has(LM_HEAD) else EMBED_TOKENS


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to, None if to no single one."""
    match = re.match(r"blk\.([0-9]+)\.", name)
    return None if match is None else int(match[1])


def is_nextn(name: str, config: Config) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, behind the last ordinary one."""
    index = layer_of(name)
    return index is not None and 0 <= index - config.num_hidden_layers < config.num_nextn_predict_layers
