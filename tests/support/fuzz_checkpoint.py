"""Broken and odd checkpoint folders by the thousand: small ones taken apart, changed as structures or as bytes.

Every case follows from the seed and its number alone, so that one can be had again: checkpoint_case(seed, number).
Weights are zeros: what reads them has no say in what is sound.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from localrun.convert.settings import Settings
from localrun.plan.checkpoint_shapes import checkpoint_shapes

_HUGE = "@1e400@"  # a number that JSON can spell and no float holds
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 7, 33, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64, 10**40, -0.0, 0.0, 0.5,
    1.5, -1.5, 1e-45, 1e-300, 1e38, 1e39, 1e308, _HUGE, float("inf"), float("nan"), "", "0", "1", "silu", "yarn",
    "a" * 3000, "\ud800", "\x1b[31mred", "..", "a\0b", [], [1], [[]], [None], ["a"], [2**40, 2**40], [1] * 4000, {},
    {"a": 1}, {"": []}, [[[[[[[[[[{}]]]]]]]]]],
)  # fmt: skip
_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F64", "I64", "U8", "BOOL", "bf16", "")
_SIZES = {
    "vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
_LATENT = {
    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 0,
}  # fmt: skip
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
CONFIGS = {
    "v3": _SIZES | _LATENT | {
        "architectures": ["DeepseekV3ForCausalLM"], "n_group": 2, "topk_group": 1, "scoring_func": "sigmoid",
        "rope_theta": 10000, "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"},
    },
    "v2": _SIZES | _LATENT | {
        "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "group_limited_greedy", "n_group": 2,
        "topk_group": 1, "q_lora_rank": None,
    },
    "llama": _SIZES | {
        "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "qwen3moe": _SIZES | {
        "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "rope_scaling": _YARN,
    },
    "glm4moe": _SIZES | {
        "architectures": ["Glm4MoeForCausalLM"], "num_key_value_heads": 1, "head_dim": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "attention_bias": True,
        "use_qk_norm": True, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
    },
    "minimax-m2": _SIZES | {
        "architectures": ["MiniMaxM2ForCausalLM"], "num_key_value_heads": 1, "head_dim": 16, "rotary_dim": 8,
        "num_local_experts": 4, "num_experts_per_tok": 2, "attn_type_list": [1, 1],
    },
    "hy_v3": _SIZES | {
        "architectures": ["HYV3ForCausalLM"], "num_key_value_heads": 1, "head_dim": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"],
    },
    "bailingmoe2": _SIZES | {
        "architectures": ["BailingMoeV2ForCausalLM"], "num_key_value_heads": 1, "head_dim": 16, "rotary_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
}  # fmt: skip
_HINTS = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1, "min_p": 0.0}
_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"


@dataclass
class Checkpoint:
    """A checkpoint in pieces.

    Attributes:
        config, hints, index: config.json, generation_config.json, the index; any JSON. None for no file.
        headers: shard -> header of a safetensors file.
        content: files as bytes, in place of what the pieces say; None for a folder of that name.
    """

    config: Any
    hints: Any
    index: Any
    headers: dict[str, Any]
    content: dict[str, bytes | None] = field(default_factory=dict)

    def files(self) -> dict[str, bytes | None]:
        """Name -> content of all files."""
        documents = {"config.json": self.config, "generation_config.json": self.hints}
        documents["model.safetensors.index.json"] = self.index
        files = {name: spelled(value) for name, value in documents.items() if value is not None}
        return files | {name: safetensors(header) for name, header in self.headers.items()} | self.content


def spelled(value: Any) -> bytes:
    """JSON, which may hold what only Python's reads."""
    return json.dumps(value).replace(f'"{_HUGE}"', "1e400").encode()


def safetensors(header: Any) -> bytes:
    """A file of that header, with as many zeros as the base's tensors take; the length as it should be."""
    text = spelled(header)
    return len(text).to_bytes(8, "little") + text + bytes(_end(header))


def _end(header: Any) -> int:
    """Where the last tensor ends, if anything sensible says so."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if isinstance(offsets, list) and offsets and isinstance(offsets[-1], int) and 0 <= offsets[-1] < 1 << 22:
            ends.append(offsets[-1])
    return max(ends)


@functools.cache
def bases() -> dict[str, Checkpoint]:
    """Sound checkpoints: one a class, whole, and DeepSeek-V3's in FP8 shards with an index."""
    return {name: _base(name, config) for name, config in CONFIGS.items()}


def _base(name: str, config: dict[str, Any]) -> Checkpoint:
    shapes = {n: list(shape) for n, shape in checkpoint_shapes(Settings(config, name)).items()}
    if name != "v3":
        return Checkpoint(config, _HINTS, None, {"model.safetensors": _header(shapes)})
    matrices = [n for n, shape in shapes.items() if n.endswith("_proj.weight") and len(shape) == 2]
    scales = {n + "_scale_inv": [-(-size // 16) for size in shapes[n]] for n in matrices}
    names = [*shapes, *scales]
    places = {n: f"model-0000{1 + at * 2 // len(names)}-of-00002.safetensors" for at, n in enumerate(names)}
    headers = {
        shard: _header({n: (shapes | scales)[n] for n in names if places[n] == shard}, matrices, set(scales))
        for shard in sorted(set(places.values()))
    }
    return Checkpoint(config, _HINTS, {"metadata": {"total_size": 1}, "weight_map": places}, headers)


def _header(shapes: dict[str, list[int]], fp8: Any = (), scales: Any = ()) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        dtype, size = ("F8_E4M3", 1) if name in fp8 else ("F32", 4) if name in scales else ("BF16", 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + prod(shape) * size]}
        at += prod(shape) * size
    return header


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a JSON value."""
    found, pending = [], [value]
    while pending:
        container = pending.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            found.append((container, key))
            if isinstance(container[key], dict | list):
                pending.append(container[key])
    return found


def _number_near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return rng.choice(ODD)
    return rng.choice((value + 1, value - 1, value * 2, -value, value / 2, str(value), [value], value + 0.5))


def change_json(rng: random.Random, value: Any) -> str:
    """One value of a JSON document becomes another, goes, or comes."""
    places = _places(value)
    if not places:
        return "nothing to change"
    container, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0 and isinstance(container, dict):
        del container[key]
        return f"{key} gone"
    if how == 1 and isinstance(container, dict):
        new = rng.choice(("x", "", "\ud800", "a" * 3000, str(key).upper(), str(key) + "s"))
        container[new] = container.pop(key)
        return f"{key} renamed"
    if how == 2:
        container[key] = _number_near(rng, container[key])
    else:
        container[key] = copy.deepcopy(rng.choice(ODD))
    return f"{str(key)[:60]} = {repr(container[key])[:60]}"


def _config(rng: random.Random, checkpoint: Checkpoint) -> str:
    return "config: " + change_json(rng, checkpoint.config)


def _config_key(rng: random.Random, checkpoint: Checkpoint) -> str:
    """A key that some class knows gets an odd value."""
    known = sorted({key for config in CONFIGS.values() for key in config} | {
        "num_local_experts", "moe_layer_freq", "rope_interleave", "attention_bias", "partial_rotary_factor",
        "original_max_position_embeddings", "transformers_weights", "topk_method", "mlp_only_layers",
        "decoder_sparse_step", "per_layer_config", "head_dim", "num_mtp_layers", "rope_theta", "norm_topk_prob",
    })  # fmt: skip
    key = rng.choice(known)
    checkpoint.config[key] = copy.deepcopy(rng.choice(ODD))
    return f"config: {key} = {repr(checkpoint.config[key])[:60]}"


def _rope(rng: random.Random, checkpoint: Checkpoint) -> str:
    key = rng.choice(("rope_scaling", "rope_parameters"))
    if not isinstance(checkpoint.config.get(key), dict):
        checkpoint.config[key] = dict(_YARN)
    name = rng.choice((*_YARN, "rope_type", "rope_theta", "attention_factor", "truncate", "mscale", "mscale_all_dim",
                       "low_freq_factor", "high_freq_factor", "partial_rotary_factor"))  # fmt: skip
    value = rng.choice((*ODD, "linear", "llama3", "default", 1.0, 4.0, 40.0))
    checkpoint.config[key][name] = copy.deepcopy(value)
    return f"config: {key}.{name} = {repr(value)[:60]}"


def _hints(rng: random.Random, checkpoint: Checkpoint) -> str:
    return "hints: " + change_json(rng, checkpoint.hints)


def _index(rng: random.Random, checkpoint: Checkpoint) -> str:
    if checkpoint.index is None:
        shard = next(iter(checkpoint.headers))
        checkpoint.index = {"weight_map": dict.fromkeys(checkpoint.headers[shard], shard)}
    return "index: " + change_json(rng, checkpoint.index)


def _entry(rng: random.Random, checkpoint: Checkpoint) -> str:
    """One entry of a header: its dtype, shape or place, or the whole."""
    shard = rng.choice(list(checkpoint.headers))
    header = checkpoint.headers[shard]
    name = rng.choice(list(header))
    how = rng.randrange(5)
    entry = header[name]
    if how == 0 or not isinstance(entry, dict) or "shape" not in entry:
        header[name] = copy.deepcopy(rng.choice(ODD))
    elif how == 1:
        entry["dtype"] = rng.choice((*_DTYPES, *ODD))
    elif how == 2:
        entry["shape"] = copy.deepcopy(rng.choice((*ODD, entry["shape"][::-1], [*entry["shape"], 1], [0, 2**70])))
    elif how == 3:
        entry["data_offsets"] = copy.deepcopy(rng.choice((*ODD, entry["data_offsets"][::-1], [0, 2**62])))
    else:
        return f"{shard}: " + change_json(rng, header)
    return f"{shard}: {name[:60]} = {repr(header[name])[:80]}"


def _bytes(rng: random.Random, checkpoint: Checkpoint) -> str:
    """One file as bytes: a byte changed, cut, grown, or another content."""
    files = checkpoint.files()
    name = rng.choice(sorted(files))
    raw = bytearray(files[name] or b"")
    at = rng.randrange(min(len(raw), 4096) + 1)
    how = rng.randrange(9)
    if how == 0:
        raw[at : at + 1] = rng.randbytes(1)
    elif how == 1:
        del raw[at:]
    elif how == 2:
        del raw[at : at + rng.randrange(1, 64)]
    elif how == 3:
        raw[at:at] = rng.randbytes(rng.randrange(1, 64))
    elif how == 4:
        raw[:8] = rng.choice((0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1, len(raw))).to_bytes(8, "little")
    elif how == 5:
        raw = bytearray(rng.choice((b"", b"null", b"[]", b"{}", b"1", b'"a"', b"[" * 3000, b"{" * 5, _POINTER)))
    elif how == 6:
        raw[:0] = b"\xef\xbb\xbf"
    elif how == 7:
        raw[at : at + 8] = b"\xff" * 8
    else:
        checkpoint.content[name] = None
        return f"{name} is a folder"
    checkpoint.content[name] = bytes(raw)
    return f"{name}: bytes, way {how} at {at}"


_CHANGES: tuple[Callable[[random.Random, Checkpoint], str], ...] = (
    _config, _config_key, _config_key, _rope, _hints, _index, _entry, _entry, _bytes,
)  # fmt: skip


def checkpoint_case(seed: int, number: int) -> tuple[str, dict[str, bytes | None]]:
    """Case `number` of checkpoint_cases(seed)."""
    rng = random.Random(f"{seed} {number}")
    name = rng.choice(sorted(bases()))
    checkpoint, changes = copy.deepcopy(bases()[name]), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        change = rng.choice(_CHANGES)
        try:
            changes.append(change(rng, checkpoint))
        except (TypeError, AttributeError, IndexError, KeyError):  # an earlier change has left nothing to change there
            changes.append(_bytes(rng, checkpoint))
    return f"{number}: {name}: {'; '.join(changes)}", checkpoint.files()


def checkpoint_cases(seed: int) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """What was done to which checkpoint, and its files, without end; the same for the same seed."""
    for number in itertools.count():
        yield checkpoint_case(seed, number)


def write(files: dict[str, bytes | None], folder: Path) -> Path:
    """A folder with these files and no others; None is a folder within it."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    for name, content in files.items():
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
    return folder
