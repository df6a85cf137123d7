"""Broken and contradictory configurations, each with its own error; what is sound but not native goes elsewhere."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import gguf_builder as b
import pytest
from config_models import (
    BASES,
    LEGACY,
    LEGACY_KEYS,
    LLAMA,
    MAX_U32,
    Model,
    Shape,
    Value,
    config_of,
    of_layers,
    yarn,
)
from gguf import GGMLQuantizationType as Type

import localrun
from localrun.errors import GGUFError, LocalrunError, UnsupportedModelError
from quant.formats import registry

Case = tuple[str, dict[str, Value | None], dict[str, Shape | None], dict[str, Type], type[LocalrunError], str]
CASES: dict[str, Case] = {}


def case(
    name: str, message: str, *, base: str = "deepseek2", keys: dict | None = None, tensors: dict | None = None,
    types: dict | None = None, error: type[LocalrunError] = GGUFError,
) -> None:  # fmt: skip
    assert name not in CASES
    CASES[name] = (base, keys or {}, tensors or {}, types or {}, error, message)


_COUNTS = {
    "deepseek2": (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.kv_lora_rank", "attention.key_length_mla", "attention.value_length_mla",
        "expert_feed_forward_length", "expert_count", "expert_used_count", "expert_group_used_count",
        "rope.dimension_count",
    ),
    "llama": (
        "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    ),
}  # fmt: skip
_OPTIONAL_COUNTS = {
    "deepseek2": (
        "attention.head_count_kv", "attention.q_lora_rank", "leading_dense_block_count", "expert_shared_count",
        "expert_gating_func", "expert_group_count", "nextn_predict_layers", "rope.scaling.original_context_length",
        "vocab_size",
    ),
    "llama": (
        "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
        "vocab_size", "expert_count", "expert_used_count",
    ),
}  # fmt: skip
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor", "rope.scaling.attn_factor")
_FLOATS_MLA = ("expert_weights_scale", *(f"rope.scaling.yarn_{name}" for name in (
    "log_multiplier", "beta_fast", "beta_slow", "ext_factor", "attn_factor"
)))  # fmt: skip

for _base in BASES:
    for _key in _COUNTS[_base]:
        _full = f"'{_base}.{_key}'"
        case(f"{_base}: {_key} is 0", f"key {_full} is 0; expected a positive", base=_base, keys={_key: (b.U32, 0)})
        if _key.endswith("_mla"):
            continue  # one alone is among the contradictions
        case(f"{_base}: no {_key}", f"key {_full} (uint32) is missing", base=_base, keys={_key: None})
    for _key in _COUNTS[_base] + _OPTIONAL_COUNTS[_base]:
        _full = f"'{_base}.{_key}'"
        _wrong = f"key {_full} has type float32, expected uint32"
        case(f"{_base}: {_key} is a float", _wrong, base=_base, keys={_key: (b.F32, 2.0)})
        _wrong = f"key {_full} has type array of float32, expected uint32"
        case(f"{_base}: {_key} is an array", _wrong, base=_base, keys={_key: (b.ARRAY, (b.F32, [2] * 3))})
    for _key in _FLOATS + (_FLOATS_MLA if _base == "deepseek2" else ()):
        _wrong = f"key '{_base}.{_key}' has type uint32, expected float32"
        case(f"{_base}: {_key} is a count", _wrong, base=_base, keys={_key: (b.U32, 1)})
    for _key, _type in (("rope.scaling.type", "string"), ("rope.scaling.finetuned", "bool")):
        _wrong = f"key '{_base}.{_key}' has type uint32, expected {_type}"
        case(f"{_base}: {_key} is a count", _wrong, base=_base, keys={_key: (b.U32, 1)})
    _eps = "attention.layer_norm_rms_epsilon"
    case(f"{_base}: no epsilon", f"key '{_base}.{_eps}' (float32) is missing", base=_base, keys={_eps: None})
    _wrong = f"key '{_base}.{_eps}' is -1.0; expected not negative"
    case(f"{_base}: epsilon -1", _wrong, base=_base, keys={_eps: (b.F32, -1.0)})
    for _key in _FLOATS + (_FLOATS_MLA if _base == "deepseek2" else ()):
        for _value in (math.nan, math.inf, -math.inf):
            _wrong = f"key '{_base}.{_key}' is {_value}; expected a finite number"
            case(f"{_base}: {_key} {_value}", _wrong, base=_base, keys={_key: (b.F32, _value)})
    for _value in (-1.0, 0.0):
        _wrong = f"key '{_base}.rope.freq_base' is {_value}; expected "
        _wrong += "more than 1 with yarn" if _base == "deepseek2" else "a positive number"
        case(f"{_base}: base {_value}", _wrong, base=_base, keys={"rope.freq_base": (b.F32, _value)})
    _wrong = f"block_count' is {MAX_U32}; expected layers for the {len(BASES[_base].tensors)} tensors of the file"
    case(f"{_base}: 2^32 layers", _wrong, base=_base, keys={"block_count": (b.U32, MAX_U32)})
    for _name in ("blk", "blk.\u00b2.x", "blk..x", "blk.-1.x", "blk.9.x"):
        _wrong = f"tensor '{_name}' has no place in the native network"
        case(f"{_base}: {_name}", _wrong, base=_base, tensors={_name: (4,)}, error=UnsupportedModelError)
    _wrong = f"key '{_base}.vocab_size' is 33; expected 32, the rows of token_embd"
    case(f"{_base}: vocabulary of 33", _wrong, base=_base, keys={"vocab_size": (b.U32, 33)})
    case(
        f"{_base}: unknown key", f"key '{_base}.attention.sinks' is not known to the native backend", base=_base,
        keys={"attention.sinks": (b.U32, 1)}, error=UnsupportedModelError,
    )  # fmt: skip
    for _name in ("rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"):
        _wrong = f"key '{_base}.{_name}' other than 1 is not native"
        case(f"{_base}: {_name} 0.5", _wrong, base=_base, keys={_name: (b.F32, 0.5)}, error=UnsupportedModelError)
    case(
        f"{_base}: longrope", "rope scaling 'longrope' is not native", base=_base,
        keys={"rope.scaling.type": (b.STRING, "longrope")}, error=UnsupportedModelError,
    )  # fmt: skip
    _keys = {"rope.scaling.type": (b.STRING, "lineal")}
    _wrong = f"key '{_base}.rope.scaling.type' is 'lineal'; expected one of none, linear, yarn, longrope"
    case(f"{_base}: lineal", _wrong, base=_base, keys=_keys)
    for _value in (0.0, -4.0):
        _keys = {"rope.scaling.type": (b.STRING, "linear"), "rope.scaling.factor": (b.F32, _value)}
        _wrong = f"key '{_base}.rope.scaling.factor' is {_value}; expected a positive number"
        case(f"{_base}: factor {_value}", _wrong, base=_base, keys=_keys)
    _wrong = "tensor 'blk.0.attn_extra.weight' has no place in the native network"
    case(
        f"{_base}: a tensor too many", _wrong, base=_base, tensors={"blk.0.attn_extra.weight": (64,)},
        error=UnsupportedModelError,
    )  # fmt: skip
    _wrong = "tensor 'blk.0.attn_output.scale', a scale beside NVFP4 weights, is not native"
    _runs = _base != "deepseek2"  # in llama.cpp
    case(
        f"{_base}: a scale", _wrong + ("" if _runs else ", and llama.cpp leaves it out; convert the model"), base=_base,
        tensors={"blk.0.attn_output.scale": (1,)}, error=UnsupportedModelError if _runs else GGUFError,
    )  # fmt: skip
    for _type in (Type.F64, Type.I8, Type.I16, Type.I32, Type.I64, Type.Q8_1):
        _wrong = (
            f"tensor 'output.weight' has type {_type.name}; expected F32, F16, BF16 or a format of quantised weights"
        )
        case(f"{_base}: {_type.name}", _wrong, base=_base, types={"output.weight": _type})
        _wrong = f"tensor 'blk.0.attn_norm.weight' has type {_type.name}; expected F32"
        case(f"{_base}: norm of {_type.name}", _wrong, base=_base, types={"blk.0.attn_norm.weight": _type})

for _base, _model in BASES.items():
    for _name, _shape in _model.tensors.items():
        if _name == "output.weight" or "_q_a.weight" in _name or "exp_probs_b" in _name or _name.startswith("blk.2"):
            continue  # optional, or decides the variant, or as in layer 1
        _label = f"{_base}: no {_name}"
        _found = {"blk.1.ffn_gate_inp.weight": "blk.1.ffn_gate.weight"}.get(_name, _name)  # else a dense layer is meant
        if _name == "blk.1.ffn_gate_shexp.weight":  # no shared experts then
            case(_label, "'blk.1.ffn_up_shexp.weight' has no place", tensors={_name: None}, error=UnsupportedModelError)
        else:
            case(_label, f"tensor '{_found}' not found", base=_base, tensors={_name: None})
        if _name not in ("token_embd.weight", "blk.1.ffn_gate_shexp.weight"):  # these say their own number of rows
            _wrong = f"tensor '{_name}' has shape {(*_shape[:-1], 2 * _shape[-1])}; expected {_shape}"
            case(f"{_base}: {_name} twice as wide", _wrong, base=_base, tensors={_name: (*_shape[:-1], 2 * _shape[-1])})
        _wrong = f"tensor '{_name}' has shape {(1, *_shape)}; expected"
        if _name not in ("token_embd.weight", "blk.1.ffn_gate_shexp.weight") and len(_shape) < 4:
            case(f"{_base}: {_name} one deeper", _wrong, base=_base, tensors={_name: (1, *_shape)})
case("embedding without columns", "tensor 'token_embd.weight' has shape (32,)", tensors={"token_embd.weight": (32,)})
case("no dimensions", "tensor 'output_norm.weight' has shape (); expected (64,)", tensors={"output_norm.weight": ()})
case("bias of 7", "exp_probs_b.bias' has shape (7,); expected (8,)", tensors={"blk.1.exp_probs_b.bias": (7,)})
case("head of 31", "tensor 'output.weight' has shape (31, 64)", tensors={"output.weight": (31, 64)})
case(
    "one shared expert's up of another width", "tensor 'blk.1.ffn_up_shexp.weight' has shape (64, 64)",
    tensors={"blk.1.ffn_up_shexp.weight": (64, 64)},
)  # fmt: skip
case(
    "layers with different queries", "tensor 'blk.1.attn_q_a.weight' not found",
    tensors={"blk.1.attn_q_a.weight": None, "blk.1.attn_q.weight": (96, 64)},
)  # fmt: skip
case(
    "both forms of kv_b", "tensor 'blk.0.attn_k_b.weight' has no place in the native network",
    tensors={"blk.0.attn_kv_b.weight": (128, 32)}, error=UnsupportedModelError,
)  # fmt: skip
case(
    "rope factors beside yarn", "tensor 'rope_freqs.weight' has no place",
    tensors={"rope_freqs.weight": (8,)}, error=UnsupportedModelError,
)  # fmt: skip
case(
    "a layer beyond block_count", "tensor 'blk.3.attn_norm.weight' has no place",
    tensors={"blk.3.attn_norm.weight": (64,)}, error=UnsupportedModelError,
)  # fmt: skip
case("one layer more than there are", "tensor 'blk.3.attn_norm.weight' not found", keys={"block_count": (b.U32, 4)})
case("one layer fewer", "tensor 'blk.2.attn_norm.weight' has no place", keys={"block_count": (b.U32, 2)},
     error=UnsupportedModelError)  # fmt: skip
for _key in ("key_length_mla", "value_length_mla"):
    case(f"no {_key}", "expected both *_mla keys or neither", keys={f"attention.{_key}": None})
case("heads shorter than their rotated part", "attention.key_length_mla' is 16; expected more than rope.dimension_count"
     ", 16", keys={"attention.key_length_mla": (b.U32, 16)})  # fmt: skip
case("odd rotated part", "rope.dimension_count' is 15; expected an even number", keys={"rope.dimension_count":
     (b.U32, 15)})  # fmt: skip
case("only nextn layers", "nextn_predict_layers' is 3; expected fewer than block_count",
     keys={"nextn_predict_layers": (b.U32, 3)})  # fmt: skip
case("nextn beyond all", f"nextn_predict_layers' is {MAX_U32}; expected fewer than block_count",
     keys={"nextn_predict_layers": (b.U32, MAX_U32)})  # fmt: skip
case("more experts used than there are", "expert_used_count' is 9; expected at most expert_count, 8",
     keys={"expert_used_count": (b.U32, 9)})  # fmt: skip
case("more experts used than in the groups", "expert_used_count' is 5; expected at most the experts of the groups",
     keys={"expert_used_count": (b.U32, 5)})  # fmt: skip
case("groups that do not divide", "expert_group_count' is 3; expected a divisor of expert_count, 8",
     keys={"expert_group_count": (b.U32, 3)})  # fmt: skip
case("more groups used than there are", "expert_group_used_count' is 5; expected at most expert_group_count, 4",
     keys={"expert_group_used_count": (b.U32, 5)})  # fmt: skip
case("yarn with base 1", "rope.freq_base' is 1.0; expected more than 1 with yarn",
     keys={"rope.freq_base": (b.F32, 1.0)})  # fmt: skip
for _key in ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"):
    for _value in (0.0, -1.0):
        case(f"{_key} {_value}", f"{_key}' is {_value}; expected a positive number", keys={_key: (b.F32, _value)})
# Numbers by layer, as some converters write them: these models have 3 layers and 1.
for _base, _key, _layers in (
    ("deepseek2", "feed_forward_length", 3), ("deepseek2", "attention.head_count", 3),
    ("deepseek2", "attention.head_count_kv", 3), ("llama", "feed_forward_length", 1),
    ("llama", "attention.head_count", 1), ("llama", "attention.head_count_kv", 1),
):  # fmt: skip
    for _item in (b.U32, b.I32):
        _wrong = f"key '{_base}.{_key}' is {_layers + 1} numbers; expected one, or {_layers}: one a layer"
        case(f"{_base}: {_key} for a layer more, {_item}", _wrong, base=_base,
             keys={_key: (b.ARRAY, (_item, [2] * (_layers + 1)))})  # fmt: skip
    case(f"{_base}: {_key} for no layer", f"key '{_base}.{_key}' is 0 numbers", base=_base,
         keys={_key: (b.ARRAY, (b.U32, []))})  # fmt: skip
    case(f"{_base}: {_key} negative", f"key '{_base}.{_key}' is -1; expected a positive number", base=_base,
         keys={_key: (b.ARRAY, (b.I32, [-1] * _layers))})  # fmt: skip
case("widths by layer", "'deepseek2.feed_forward_length' is another number from layer to layer, which is not native",
     keys={"feed_forward_length": (b.ARRAY, (b.U32, [64, 64, 32]))}, error=UnsupportedModelError)  # fmt: skip
# Tensors without dimensions, where sizes are read off the tensor.
for _name in ("token_embd.weight", "blk.0.attn_q_a.weight", "blk.1.ffn_gate_shexp.weight"):
    for _shape in ((), (64,), (1, 32, 64)):
        _keys = {"attention.q_lora_rank": (b.U32, 0)}  # else the key says it
        case(f"{_name} of shape {_shape}", f"tensor '{_name}' has shape {_shape}; expected", keys=_keys,
             tensors={_name: _shape})  # fmt: skip
case(
    "joint kv_b of an odd latent", "attn_kv_b with a kv_lora_rank of 40, no multiple of 16, is not native",
    keys=LEGACY_KEYS | {"attention.kv_lora_rank": (b.U32, 40)},
    tensors=LEGACY | of_layers("attn_kv_b.weight", (128, 40)), error=UnsupportedModelError,
)  # fmt: skip
for _value in (-3e38, 1001.0):
    case(f"multiplier {_value}", "expected at most 1000", keys={"rope.scaling.yarn_log_multiplier": (b.F32, _value)})
for _type in ((b.STRING, "linear"), None):  # linear is what no type means
    case(f"scaling {_type}", "deepseek2 with linear rope scaling is not native", keys={"rope.scaling.type": _type},
         error=UnsupportedModelError)  # fmt: skip
for _number in (4, 5, MAX_U32):
    case(f"gating function {_number}", f"expert gating function {_number} is not native",
         keys={"expert_gating_func": (b.U32, _number)}, error=UnsupportedModelError)  # fmt: skip
for _key in ("embedding_length", "feed_forward_length", "attention.head_count", "attention.kv_lora_rank",
             "attention.value_length_mla", "attention.key_length_mla", "expert_feed_forward_length", "expert_count",
             "attention.q_lora_rank"):  # fmt: skip
    case(f"{_key} of 2^32", "has shape", keys={_key: (b.U32, MAX_U32 - MAX_U32 % 4)})
case("rotated part of 2^32", "expected more than rope.dimension_count", keys={"rope.dimension_count": (b.U32, MAX_U32)})
case("as many experts used as 2^32", f"expert_used_count' is {MAX_U32}", keys={"expert_used_count": (b.U32, MAX_U32)})
case("2^32 groups", f"expert_group_count' is {MAX_U32}; expected", keys={"expert_group_count": (b.U32, MAX_U32)})
for _key in ("embedding_length", "feed_forward_length", "attention.key_length", "attention.value_length"):
    case(f"llama: {_key} of 2^32", "has shape", base="llama", keys={_key: (b.U32, MAX_U32)})
case("llama: heads of 2^32", "tensor 'blk.0.attn_q.weight' has shape", base="llama",
     keys={"attention.head_count": (b.U32, MAX_U32 - MAX_U32 % 4)})  # fmt: skip
case("llama: heads not shared evenly", "attention.head_count_kv' is 3; expected a divisor of 4", base="llama",
     keys={"attention.head_count_kv": (b.U32, 3)})  # fmt: skip
case("llama: no key-value heads", "tensor 'blk.0.attn_k.weight' has shape (32, 64); expected (0, 64)", base="llama",
     keys={"attention.head_count_kv": (b.U32, 0)})  # fmt: skip
case("llama: rotated beyond the head", "rope.dimension_count' is 18; expected at most the head's 16", base="llama",
     keys={"rope.dimension_count": (b.U32, 18)})  # fmt: skip
case("llama: nothing rotated", "rope.dimension_count' is 0; expected an even number, 2 or more", base="llama",
     keys={"rope.dimension_count": (b.U32, 0)})  # fmt: skip
case("llama: odd rotated part", "rope.dimension_count' is 7; expected an even number", base="llama",
     keys={"rope.dimension_count": (b.U32, 7)})  # fmt: skip
case("llama: experts of which none are used", "expert_used_count' is 0; expected 1 or more", base="llama",
     keys={"expert_count": (b.U32, 8)})  # fmt: skip
case("llama: yarn", "llama with yarn is not native", base="llama", keys=yarn(4.0, None), error=UnsupportedModelError)
case("llama: bias in attention", "tensor 'blk.0.attn_q.bias' has no place", base="llama",
     tensors={"blk.0.attn_q.bias": (64,)}, error=UnsupportedModelError)  # fmt: skip


def broken(name: str, folder: Path) -> tuple[Path, type[LocalrunError], str]:
    base, keys, tensors, types, error, message = CASES[name]
    return BASES[base].changed(keys, tensors, types).write(folder / "model.gguf"), error, message


def assert_error(caught: LocalrunError, path: Path, error: type[LocalrunError], message: str) -> None:
    assert type(caught) is error
    assert str(caught).startswith(f"{path}: ") and message in str(caught) and "\n" not in str(caught)


# localrun.load reads the configuration as config_of does: one case of each type of error shows that its message comes
# out of that as well.
_LOADED_TOO = {error: name for name, (*_, error, _message) in CASES.items()}.values()


@pytest.mark.parametrize("name", CASES)
def test_broken_configurations(name: str, tmp_path: Path) -> None:
    path, error, message = broken(name, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(LocalrunError) as caught:
            config_of(path)
        # Keys and tensor records as Python objects; the sound file's take 60 kB.
        assert tracemalloc.get_traced_memory()[1] < 300_000
    finally:
        tracemalloc.stop()
    assert_error(caught.value, path, error, message)
    if name in _LOADED_TOO:
        with pytest.raises(LocalrunError) as caught:
            localrun.load(path, threads=1, ctx=8, backend="native")
        assert_error(caught.value, path, error, message)


def test_types_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of today's have some; tomorrow's have none."""
    type_ = Type.IQ2_XXS
    monkeypatch.setattr(registry, "NAMES", [name for name in registry.NAMES if name != type_.name])
    keys = {"embedding_length": (b.U32, 256)}
    shapes = {name: (*shape[:-1], 256) if shape[-1] == 64 else shape for name, shape in LLAMA.tensors.items()}
    shapes |= {"blk.0.attn_output.weight": (256, 64), "blk.0.ffn_down.weight": (256, 96)}
    model = LLAMA.changed(keys, shapes, {})
    config_of(model.write(tmp_path / "sound.gguf"))
    path = LLAMA.changed(keys, shapes, {"token_embd.weight": type_}).write(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match=rf"tensor 'token_embd.weight' has type {type_.name}, not native"):
        config_of(path)


def test_other_architectures_are_not_native(tmp_path: Path) -> None:
    path = Model("qwen3", {}, {}).write(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="architecture 'qwen3' is not native"):
        config_of(path)


@pytest.mark.parametrize("name", ["x" * 65, "0" * 5000, "a\nb", "\x1b[31m"])
def test_what_is_no_name_of_an_architecture(name: str, tmp_path: Path) -> None:
    path = Model(name, {}, {}).write(tmp_path / "model.gguf")
    with pytest.raises(GGUFError) as caught:
        config_of(path)
    found = f"key 'general.architecture' is {name[:64]!r}"
    assert str(caught.value) == f"{path}: {found}, expected the name of an architecture"


def test_no_architecture(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b.build([b.key("general.name", b.STRING, "x")]))
    with pytest.raises(GGUFError, match=r"key 'general.architecture' \(string\) is missing"):
        config_of(path)


_LOAD_ALL = """
import json, sys
import localrun
answers = {}
for path in sys.argv[1:]:
    try:
        with localrun.load(path, threads=1, ctx=8) as model:
            answers[path] = model.backend
    except localrun.LocalrunError as error:
        answers[path] = str(error)
print(json.dumps(answers))
"""


def test_what_is_not_native_goes_to_llama_cpp_or_is_refused(tmp_path: Path) -> None:
    """In a process of its own: a failed assertion of llama.cpp would end it. One file for each message."""
    kinds = {re.sub("llama|deepseek2|[0-9.]+", "", case[-1]): name for name, case in CASES.items()}
    paths = {}
    for i, name in enumerate(kinds.values()):
        if CASES[name][-2] is UnsupportedModelError:
            (tmp_path / str(i)).mkdir()
            paths[str(broken(name, tmp_path / str(i))[0])] = name
    command = [sys.executable, "-c", _LOAD_ALL, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = {paths[path]: answer for path, answer in json.loads(done.stdout).items()}
    assert answers.keys() == set(paths.values())
    assert "native" not in answers.values()
    assert answers["llama: unknown key"] == "llama.cpp"
    assert all("\n" not in answer for answer in answers.values())
