"""A file of DSpark's blocks, which draft for a DeepSeek-V4: GGUF architecture dflash with hyper-connections.

A few layers of the model's kind without pooled rows; `fc` makes what they keep of a token of what the model's target
layers left of it; the Markov head adds to a draft's logits what the token before it says. Embedding and head are the
model's.
Source: llama.cpp 0c1e57098, src/models/dflash.cpp (graph_dsv4) and conversion/deepseek.py (DeepseekV4DSparkModel).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Real

from localrun.errors import GGUFError, LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.models import parts
from localrun.models.architecture import Plain, Shape, Tensor
from localrun.models.config import Config
from localrun.models.deepseek4 import DEEPSEEK4, HC_HEAD
from localrun.models.keys import Keys
from localrun.models.names import check_types

NAME = "dflash"
FC, ENC_NORM, MARKOV_W1, MARKOV_W2, CONFIDENCE = (
    f"{name}.weight" for name in ("fc", "enc.output_norm", "markov_w1", "markov_w2", "conf_proj")
)
NOISE = "tokenizer.ggml.mask_token_id"
FC_SOURCE, MARKOV_SOURCE = "main_proj.weight", "markov_head.markov_w1.weight"  # in a checkpoint, of some block
_MOST_BLOCK, _MOST_LAYERS = 64, 16  # published: 5 and 3
# Of the model, and no matter here; a draft's layers see a window alone, which no scaling reaches.
_NOT_COMPARED = (
    "attention.compress", "attention.indexer", "rope.scaling", "hash_layer_count", "block_count", "context_length",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class DSpark:
    """What drafts.

    Attributes:
        config: of its layers.
        block_size: tokens of a pass: the last one, and noise in place of those to come.
        target_layers: of the model, those whose output it reads, in rising order.
        noise_token: an id.
    """

    config: Config
    block_size: int
    target_layers: tuple[int, ...]
    noise_token: int


def is_dspark(file: GGUFFile) -> bool:
    """Whether a file holds blocks that draft for a DeepSeek-V4."""
    return file.metadata.get("general.architecture") == NAME and f"{NAME}.hyper_connection.count" in file.metadata


def draft_config(model: Config, n_layers: int) -> Config:
    """Of so many layers that draft for a model."""
    return replace(
        model, num_hidden_layers=n_layers, compress_ratios=(0,) * n_layers, num_hash_layers=0, rope_scaling=None,
        num_nextn_predict_layers=0,
    )  # fmt: skip


def read_dspark(file: GGUFFile, model: Config) -> DSpark:
    """What a file says. Raises LocalrunError if it drafts for another model, or lacks something."""
    if model.architecture != DEEPSEEK4.name:
        raise LocalrunError(f"{file.path}: drafts for a {DEEPSEEK4.name}; the model is a {model.architecture}")
    keys = Keys(file, NAME)
    n_layers, block = keys.u32("block_count"), keys.u32("block_size")
    if n_layers > _MOST_LAYERS:
        keys.fail("block_count", n_layers, f"at most {_MOST_LAYERS}")
    if block > _MOST_BLOCK:
        keys.fail("block_size", block, f"at most {_MOST_BLOCK}")
    # llama.cpp counts what goes into a layer: the output of the one before.
    target = tuple(layer - 1 for layer in keys.i32s("target_layers"))
    if not target or list(target) != sorted(set(target)) or not 0 <= target[0] <= target[-1] < model.num_hidden_layers:
        keys.fail("target_layers", str(target)[:100], f"1 to {model.num_hidden_layers}, in rising order")
    noise = file.u32(NOISE)
    if noise >= model.vocab_size:
        raise GGUFError(f"{file.path}: key '{NOISE}' is {noise}; the model has {model.vocab_size} tokens")
    config = draft_config(model, n_layers)
    _check_keys(keys, config)
    _check_shapes(file, config, len(target))
    check_types(file)
    return DSpark(config, block, target, noise)


def _check_keys(keys: Keys, config: Config) -> None:
    """What decides results must be the model's."""
    for key in DEEPSEEK4.keys:
        expected = key.written(config)
        found = keys.file.metadata.get(keys.prefix + key.name)
        if expected is None or found is None or key.name.startswith(_NOT_COMPARED):
            continue
        both = {*found, *expected} if key.type.endswith("s") else {found, expected}  # of arrays all items are the same
        if len(both) > 1 and not _are_near(both):
            what = f"{key.name} is {str(found)[:60]}, expected {expected}"
            raise LocalrunError(f"{keys.file.path}: drafts for another model: {what}")


def _are_near(values: set) -> bool:
    """Whether they are the same number, in 32 bits."""
    return all(isinstance(each, Real) for each in values) and max(values) - min(values) <= 1e-6 * abs(max(values))


def ends(n_target: int, rank: int) -> tuple[Tensor, ...]:
    """The tensors that belong to no block, of so many target layers and a Markov head of this rank."""
    return (
        Tensor("fc", FC, lambda c: (c.hidden_size, n_target * c.hidden_size), Plain(FC_SOURCE)),
        Tensor("enc_norm", ENC_NORM, lambda c: (c.hidden_size,), Plain("main_norm.weight")),
        Tensor("markov_w1", MARKOV_W1, lambda c: (c.vocab_size, rank), Plain(MARKOV_SOURCE)),
        Tensor("markov_w2", MARKOV_W2, lambda c: (c.vocab_size, rank), Plain("markov_head.markov_w2.weight")),
        Tensor("confidence", CONFIDENCE, lambda c: (1, c.hidden_size + rank), Plain("confidence_head.proj.weight"),
               may_lack=True),
        replace(parts.NORM, source=Plain("norm.weight")),
        *HC_HEAD,
    )  # fmt: skip


def _check_shapes(file: GGUFFile, config: Config, n_target: int) -> None:
    expected = dict(_shapes(file, config, n_target))
    for name, shape in expected.items():
        found = file.tensors[name].shape if name in file.tensors else "missing"
        if found != shape:
            raise GGUFError(f"{file.path}: tensor '{name}' is {found}; expected {shape}")
    unknown = next((name for name in file.tensors if name not in expected), None)
    if unknown is not None:
        raise GGUFError(f"{file.path}: tensor '{unknown[:100]}' has no place in DSpark's blocks")


def _shapes(file: GGUFFile, config: Config, n_target: int) -> Iterator[tuple[str, Shape]]:
    w1 = file.tensors.get(MARKOV_W1)
    for tensor in ends(n_target, w1.shape[-1] if w1 is not None else 0):
        if not tensor.may_lack or tensor.name in file.tensors:
            yield tensor.name, tensor.shape(config)
    for index in range(config.num_hidden_layers):
        for tensor in DEEPSEEK4.layer_in_file(config, index, lambda module: module == "mlp.gate"):
            yield f"blk.{index}.{tensor.name}", tensor.shape(config)
