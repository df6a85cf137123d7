"""Broken and odd GGUF headers by the thousand: small models taken apart, changed as a structure or as bytes.

Every case follows from the seed and its number alone, so that one can be had again: header_case(seed, number).
"""

from __future__ import annotations

import functools
import itertools
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import gguf_builder as b
import tiny_models
import vocabularies
from gguf import GGMLQuantizationType

from localrun.gguf import types as tensor_types

Type = GGMLQuantizationType
_COUNTS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    15,
    16,
    17,
    31,
    33,
    48,
    63,
    100,
    512,
    513,
    1025,
    2**16,
    2**20,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_SIZES = (
    0,
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    48,
    64,
    255,
    256,
    4096,
    2**31,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e-6, 0.5, 1.0, 2.0, 40.0, 1e30, 3.4e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "", "x", "llama", "deepseek2", "qwen3moe", "qwen2", "bert", "gpt2", "none", "none ", "linear", "yarn", "longrope",
    "imatrix", "\x1b[31m", "\n", "\0", "\u00e4" * 70, "0" * 5000,
)  # fmt: skip
_RANGES = {
    b.U8: (0, 2**8), b.I8: (-(2**7), 2**7), b.U16: (0, 2**16), b.I16: (-(2**15), 2**15), b.U32: (0, 2**32),
    b.I32: (-(2**31), 2**31), b.U64: (0, 2**64), b.I64: (-(2**63), 2**63),
}  # fmt: skip
# Names that mean something to a reader, but that these models do not have; behind them those of an architecture.
_KEYS = (
    "general.alignment", "general.type", "general.name", "general.sampling.temp", "general.sampling.top_k", "split.no",
    "split.count", "split.tensors.count", "tokenizer.chat_template", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
    "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.bos_token_id",
)  # fmt: skip
_ENDINGS = (
    "expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count", "nextn_predict_layers",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.yarn_beta_fast", "rope.dimension_sections",
    "attention.sliding_window", "attention.key_length", "attention.value_length", "attention.q_lora_rank",
    "attention.scale", "vocab_size", "expert_gating_func", "leading_dense_block_count",
)  # fmt: skip


@dataclass
class Key:
    """A key as it stands in a file; value: a number, bytes of a string, or the items of an array of `item`."""

    name: bytes
    type: int
    value: int | float | bytes | list
    item: int = b.U32

    def pack(self) -> bytes:
        if self.type == b.ARRAY:
            return b.array(self.name, self.item, self.value)
        return b.key(self.name, self.type, self.value)


@dataclass
class Record:
    """A tensor; ne in ggml's order."""

    name: bytes
    ne: list[int]
    type: int
    data: bytes


@dataclass
class Model:
    keys: list[Key]
    tensors: list[Record]
    changes: list[str] = field(default_factory=list)

    def copy(self) -> Model:
        return Model([replace(key) for key in self.keys], [replace(t, ne=list(t.ne)) for t in self.tensors])

    def build(self) -> bytes:
        """The file; each tensor behind the one before, as long as its data is."""
        records, data = [], b""
        for tensor in self.tensors:
            records.append(b.tensor(tensor.name, tensor.ne, tensor.type, len(data)))
            data += tensor.data + bytes(-len(tensor.data) % 32)
        return b.build([key.pack() for key in self.keys], records, data)


# ---- small sound models ----------------------------------------------------------------------------------------------

_LLAMA = tiny_models.Llama(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16, vocab_size=48
)
_QWEN3MOE = tiny_models.qwen3moe(
    hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    head_dim=16, vocab_size=48, n_routed_experts=8, num_experts_per_tok=2,
)  # fmt: skip
_GROUPED = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "vocab_size": 48, "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
_OTHERS_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")


@functools.cache
def bases() -> dict[str, Model]:
    """One small model of each native architecture, some variants, two with words, and one that llama.cpp alone runs."""
    smallest = tiny_models.SMALLEST
    files = {
        "deepseek2": tiny_models.shared(smallest),
        "deepseek2 joint": tiny_models.shared(replace(smallest, split_kv_b=False, fused_gate_up=True)),
        "deepseek2 Q8_0": tiny_models.shared(
            replace(smallest, q_lora_rank=None, num_nextn_predict_layers=1), type="Q8_0"
        ),
        "llama": tiny_models.shared(_LLAMA),
        "qwen3moe": tiny_models.shared(_QWEN3MOE, type="Q4_0"),
        "glm4moe": tiny_models.shared(tiny_models.glm4moe(**_GROUPED, num_nextn_predict_layers=1)),
        "minimax-m2": tiny_models.shared(tiny_models.minimax_m2(**_GROUPED | {"intermediate_size": 32})),
        "hy_v3": tiny_models.shared(tiny_models.hy_v3(**_GROUPED | {"qk_rope_head_dim": 16}), type="Q8_0"),
        "bailingmoe2": tiny_models.shared(tiny_models.bailingmoe2(**_GROUPED, num_nextn_predict_layers=1)),
    }
    models = {name: parse(path) for name, path in files.items()}
    for name, vocabulary in (("llama byte pairs", _byte_pairs()), ("llama pieces", _pieces())):
        n_tokens = len(next(key.value for key in vocabulary if key.name == b"tokenizer.ggml.tokens"))
        model = parse(tiny_models.shared(replace(_LLAMA, vocab_size=n_tokens)))
        model.keys = [key for key in model.keys if not key.name.startswith(b"tokenizer.")] + vocabulary
        models[name] = model
    return models | {"qwen2": _as_qwen2(models["llama"])}


def _byte_pairs() -> list[Key]:
    """A byte-level vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        keys = parse(vocabularies.write_vocabulary(Path(folder, "vocabulary.gguf"))).keys
    return [key for key in keys if key.name.startswith(b"tokenizer.")]


def _pieces() -> list[Key]:
    """A SentencePiece vocabulary."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    types = [2, 3, 3, *[6] * 256, *[1] * 5]
    return [
        Key(b"tokenizer.ggml.model", b.STRING, b"llama"),
        Key(b"tokenizer.ggml.tokens", b.ARRAY, tokens, b.STRING),
        Key(b"tokenizer.ggml.token_type", b.ARRAY, types, b.I32),
        Key(b"tokenizer.ggml.scores", b.ARRAY, [-float(i) for i in range(len(tokens))], b.F32),
        Key(b"tokenizer.ggml.bos_token_id", b.U32, 1),
        Key(b"tokenizer.ggml.eos_token_id", b.U32, 2),
        Key(b"tokenizer.ggml.add_bos_token", b.BOOL, 1),
        Key(b"tokenizer.ggml.add_space_prefix", b.BOOL, 1),
        Key(b"tokenizer.chat_template", b.STRING, b"{{ messages[0].content }}"),
    ]


def parse(path: Path) -> Model:
    from gguf import GGUFReader, GGUFValueType

    reader, keys = GGUFReader(path), []
    for name, entry in reader.fields.items():
        if name.startswith("GGUF."):
            continue
        value, type_ = entry.contents(), int(entry.types[0])
        value = value.encode() if type_ == b.STRING else value
        keys.append(Key(name.encode(), type_, value, int(entry.types[-1]) if type_ == GGUFValueType.ARRAY else b.U32))
    tensors = [
        Record(t.name.encode(), [int(n) for n in t.shape], int(t.tensor_type), t.data.tobytes()) for t in reader.tensors
    ]
    return Model(keys, tensors)


def _as_qwen2(llama: Model) -> Model:
    """The same sizes as qwen2: with biases of queries, keys and values."""
    model = llama.copy()
    for key in model.keys:
        key.name = key.name.replace(b"llama.", b"qwen2.")
        key.value = b"qwen2" if key.value == b"llama" else key.value
    for tensor in list(model.tensors):
        bias = tensor.name.replace(b".weight", b".bias")
        if bias.decode().endswith(_OTHERS_BIASES):
            model.tensors.append(Record(bias, tensor.ne[1:], int(Type.F32), bytes(4 * tensor.ne[1])))
    return model


# ---- changes of the structure ----------------------------------------------------------------------------------------


def _value(rng: random.Random, type_: int) -> int | float | bytes:
    """An odd value of a scalar type."""
    if type_ == b.STRING:
        return rng.choice(_TEXTS).encode()
    if type_ in (b.F32, b.F64):
        return rng.choice(_FLOATS)
    if type_ == b.BOOL:
        return rng.choice((0, 1, 1, 2, 255))
    low, high = _RANGES[type_]
    return min(max(rng.choice((*_COUNTS, -1, low, high - 1, rng.randrange(low, high))), low), high - 1)


def _change_value(rng: random.Random, model: Model) -> str:
    key = rng.choice(model.keys)
    if key.type == b.ARRAY:
        return _change_items(rng, key)
    key.value = _value(rng, key.type)
    return f"{key.name!r} = {key.value!r:.40}"


def _change_number(rng: random.Random, model: Model) -> str:
    """A count moved a little, which is what most mistakes do."""
    counts = [key for key in model.keys if key.type == b.U32]
    if not counts:
        return ""
    key = rng.choice(counts)
    step = rng.choice((-2, -1, 1, 2, key.value, -(key.value // 2)))
    key.value = min(max(key.value + step, 0), 2**32 - 1)
    return f"{key.name!r} = {key.value}"


def _change_items(rng: random.Random, key: Key) -> str:
    items = list(key.value)
    if items and rng.random() < 0.5:
        items[rng.randrange(len(items))] = _value(rng, key.item)
    else:
        items = items[: rng.randrange(len(items) + 1)]
    key.value = items
    return f"{key.name!r} has other items"


def _change_key_type(rng: random.Random, model: Model) -> str:
    key = rng.choice(model.keys)
    key.type = rng.choice([*_RANGES, b.F32, b.F64, b.BOOL, b.STRING])
    key.value = _value(rng, key.type)
    return f"{key.name!r} of type {key.type}, {key.value!r:.40}"


def _by_layer(rng: random.Random, model: Model) -> str:
    """A number as an array: one for each layer, or too few or too many."""
    numbers = [key for key in model.keys if key.type == b.U32]
    if not numbers:
        return ""
    key = rng.choice(numbers)
    count = rng.choice((0, 1, 2, 2, 2, 3, 600))
    key.item = rng.choice((b.U32, b.I32, b.U64, b.F32, b.U8))
    value = key.value if key.value < 256 else 1
    items = [value] * count
    if items and rng.random() < 0.3:
        items[-1] = rng.choice((0, 1, 2, 3, value // 2))
    key.type, key.value = b.ARRAY, items
    return f"{key.name!r} by layer, {items[:4]} of type {key.item}"


def _drop_key(rng: random.Random, model: Model) -> str:
    key = model.keys.pop(rng.randrange(len(model.keys)))
    return f"without {key.name!r}"


def _repeat_key(rng: random.Random, model: Model) -> str:
    key = rng.choice(model.keys)
    model.keys.append(replace(key))
    return f"{key.name!r} twice"


def _rename_key(rng: random.Random, model: Model) -> str:
    key = rng.choice(model.keys)
    before, key.name = key.name, _misspelt(rng, key.name)
    return f"{before!r} named {key.name!r}"


def _add_key(rng: random.Random, model: Model) -> str:
    architecture = next((key.value for key in model.keys if key.name == b"general.architecture"), b"llama")
    prefix = architecture.decode() if isinstance(architecture, bytes) else "llama"
    name = rng.choice((*_KEYS, *(f"{prefix}.{ending}" for ending in _ENDINGS)))
    type_ = rng.choice([b.U32, b.U32, b.F32, b.STRING, b.BOOL, b.U16, b.I32, b.ARRAY])
    if type_ == b.ARRAY:
        item = rng.choice((b.U32, b.F32, b.STRING, b.I32))
        key = Key(name.encode(), type_, [_value(rng, item) for _ in range(rng.choice((0, 1, 2, 48)))], item)
    else:
        key = Key(name.encode(), type_, _value(rng, type_))
    model.keys.append(key)
    return f"and {name!r} of type {type_}"


def _misspelt(rng: random.Random, name: bytes) -> bytes:
    letters = bytearray(name)
    if letters:
        letters[rng.randrange(len(letters))] = rng.choice(b"abz.0159_-\x1b\n\xff\x00 ")
    return bytes(letters)


def _n_bytes(ne: list[int], type_: int) -> int:
    """Bytes of a tensor, or 0 where there is no saying."""
    try:
        block, block_bytes = tensor_types.block_size(tensor_types.from_number(type_))
    except (ValueError, KeyError):
        return 0
    return prod(ne) // block * block_bytes


def fit(tensor: Record) -> None:
    """Data of the right length, if that is a length that a test can have."""
    n_bytes = _n_bytes(tensor.ne, tensor.type)
    if 0 < n_bytes < 1 << 20:
        tensor.data = tensor.data[:n_bytes].ljust(n_bytes, b"\0")


def _change_tensor_type(rng: random.Random, model: Model) -> str:
    tensor = rng.choice(model.tensors)
    own = [int(type_) for type_ in tensor_types.InterleavedType]
    tensor.type = rng.choice(
        [*map(int, Type), *map(int, (Type.I32, Type.F16, Type.BF16, Type.F64)), rng.choice(own), 4, 99]
    )
    if rng.random() < 0.8:
        fit(tensor)
    return f"{tensor.name!r} of type {tensor.type}"


def _change_shape(rng: random.Random, model: Model) -> str:
    tensor = rng.choice(model.tensors)
    ne, how = tensor.ne, rng.randrange(7)
    if how == 0:
        rng.shuffle(ne)
    elif how == 1 and ne:
        ne[rng.randrange(len(ne))] = rng.choice(_SIZES)
    elif how == 2 and ne:
        at = rng.randrange(len(ne))
        ne[at] = max(1, ne[at] + rng.choice((-1, 1, -16, 16, 32, ne[at])))
    elif how == 3:
        ne.append(rng.choice((1, 1, 2)))
    elif how == 4:
        ne[:] = ne[: rng.randrange(len(ne) + 1)]
    elif how == 5:
        ne[:] = [prod(ne)]
    else:
        ne.clear()
    if rng.random() < 0.8:
        fit(tensor)
    return f"{tensor.name!r} of shape {ne}"


def _change_tensors(rng: random.Random, model: Model) -> str:
    tensors, how = model.tensors, rng.randrange(5)
    at = rng.randrange(len(tensors))
    name = tensors[at].name
    if how == 0:
        del tensors[at]
        return f"without {name!r}"
    if how == 1:
        tensors.insert(rng.randrange(len(tensors)), replace(tensors[at]))
        return f"{name!r} twice"
    if how == 2:
        tensors[at].name = _misspelt(rng, name)
        return f"{name!r} named {tensors[at].name!r}"
    if how == 3:
        other = rng.randrange(len(tensors))
        tensors[at].name, tensors[other].name = tensors[other].name, name
        return f"{name!r} and {tensors[at].name!r} with names exchanged"
    known = rng.choice(list(itertools.chain.from_iterable(base.tensors for base in bases().values())))
    tensors.append(replace(known, ne=list(known.ne)))
    return f"and {known.name!r}"


STRUCTURE: list[Callable[[random.Random, Model], str]] = [
    _change_value, _change_value, _change_number, _change_number, _change_key_type, _by_layer, _drop_key, _repeat_key,
    _rename_key, _add_key, _add_key, _change_tensor_type, _change_tensor_type, _change_shape, _change_shape,
    _change_tensors, _change_tensors,
]  # fmt: skip


# ---- changes of the bytes --------------------------------------------------------------------------------------------


def change_bytes(rng: random.Random, content: bytes, header: int) -> tuple[bytes, str]:
    """One thing that a disk, a cable or a hand does to the bytes of a header."""
    raw, how, at = bytearray(content), rng.randrange(7), rng.randrange(header)
    if how == 0:
        raw[at] ^= 1 << rng.randrange(8)
    elif how == 1:
        raw[at] = rng.randrange(256)
    elif how == 2 and len(raw) >= 8:
        at = rng.randrange(max(1, header - 8))
        struct.pack_into("<Q", raw, at, rng.choice(_SIZES))
    elif how == 3 and len(raw) >= 4:
        at = rng.randrange(max(1, header - 4))
        struct.pack_into("<I", raw, at, rng.choice(_COUNTS))
    elif how == 4:
        del raw[at:]
    elif how == 5:
        del raw[at : at + rng.randrange(1, 64)]
    else:
        raw[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(raw), f"bytes, way {how} at {at}"


def header_case(seed: int, number: int) -> tuple[str, bytes]:
    """Case `number` of header_cases(seed)."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(list(bases()))
    model, changes = bases()[name].copy(), []
    by_bytes = rng.random() < 0.35
    for _ in range(0 if by_bytes else rng.choice((1, 1, 1, 2, 2, 3))):
        if model.keys and model.tensors:
            changes.append(rng.choice(STRUCTURE)(rng, model))
    try:
        content = model.build()
    except struct.error:  # a number that has no place in its field
        return f"{number}: {name}: as it was", bases()[name].build()
    if by_bytes:
        header = len(content) - sum(len(t.data) + -len(t.data) % 32 for t in model.tensors)
        for _ in range(rng.choice((1, 1, 1, 2))):
            if content:
                content, change = change_bytes(rng, content, min(header, len(content)))
                changes.append(change)
    return f"{number}: {name}: {'; '.join(changes)}", content


def header_cases(seed: int) -> Iterator[tuple[str, bytes]]:
    """What was done to which model, and the file, without end; the same for the same seed."""
    for number in itertools.count():
        yield header_case(seed, number)
