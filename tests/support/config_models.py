"""Model files of made-up configurations: keys and shapes as they come from the converters, their data a hole."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import gguf_builder as b
from gguf import GGMLQuantizationType as Type

from localrun.gguf.file import open_gguf
from localrun.models.config import Config
from localrun.models.names import check_tensors, check_types
from localrun.models.reader import read_config

Value = tuple[int, object]  # a type code of gguf_builder, and a value; an array is (ARRAY, (item type, items))
Shape = tuple[int, ...]  # NumPy order

MAX_U32 = 2**32 - 1


@dataclass
class Model:
    """What a file holds: keys without the architecture's prefix, and tensors with their shapes."""

    architecture: str
    keys: dict[str, Value]
    tensors: dict[str, Shape]
    type: Type = Type.F32
    types: dict[str, Type] = field(default_factory=dict)

    def changed(self, keys: dict[str, Value | None], tensors: dict[str, Shape | None], types: dict[str, Type]) -> Model:
        """A copy with some keys and tensors replaced, added, or (None) removed."""
        merged = {k: v for k, v in (self.keys | keys).items() if v is not None}
        shapes = {n: s for n, s in (self.tensors | tensors).items() if s is not None}
        return Model(self.architecture, merged, shapes, self.type, types)

    def write(self, path: Path) -> Path:
        """The file, its data a hole."""
        keys = [b.key("general.architecture", b.STRING, self.architecture), b.key("general.name", b.STRING, "made up")]
        keys.append(b.key("tokenizer.ggml.model", b.STRING, "none"))
        for name, (type_, value) in self.keys.items():
            name = f"{self.architecture}.{name}"
            keys.append(b.array(name, *value) if type_ == b.ARRAY else b.key(name, type_, value))
        records, end = [], 0
        for name, shape in self.tensors.items():
            type_ = self.types.get(name, Type.F32 if len(shape) == 1 else self.type)
            records.append(b.tensor(name, shape[::-1], type_, end))
            block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
            end += -(-math.prod(shape) // block * block_bytes // 32) * 32
        with path.open("wb") as file:
            header = b.build(keys, records)
            file.write(header)
            file.truncate(len(header) + end)
        return path


def deepseek2(
    *, d: int, layers: int, dense: int, heads: int, q_lora: int | None, latent: int, nope: int, rope: int, v: int,
    vocab: int, ff: int, expert_ff: int, experts: int, used: int, shared: int, **keys: Value | None,
) -> Model:  # fmt: skip
    """A deepseek2 model with the keys and tensors that llama.cpp's converter writes; `keys` on top."""
    counts = {
        "block_count": layers, "context_length": 163840, "embedding_length": d, "feed_forward_length": ff,
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope, "attention.value_length": latent,
        "attention.key_length_mla": nope + rope, "attention.value_length_mla": v, "vocab_size": vocab,
        "leading_dense_block_count": dense, "expert_feed_forward_length": expert_ff, "expert_count": experts,
        "expert_used_count": used, "expert_shared_count": shared, "rope.dimension_count": rope,
    }  # fmt: skip
    if q_lora is not None:
        counts["attention.q_lora_rank"] = q_lora
    floats = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0}
    tensors = {"token_embd.weight": (vocab, d), "output_norm.weight": (d,), "output.weight": (vocab, d)}
    for i in range(layers):
        blk = {"attn_norm.weight": (d,), "attn_kv_a_mqa.weight": (latent + rope, d), "attn_kv_a_norm.weight": (latent,)}
        if q_lora is None:
            blk["attn_q.weight"] = (heads * (nope + rope), d)
        else:
            blk |= {"attn_q_a.weight": (q_lora, d), "attn_q_a_norm.weight": (q_lora,)}
            blk["attn_q_b.weight"] = (heads * (nope + rope), q_lora)
        blk |= {"attn_k_b.weight": (heads, latent, nope), "attn_v_b.weight": (heads, v, latent)}
        blk |= {"attn_output.weight": (d, heads * v), "ffn_norm.weight": (d,)}
        if i < dense:
            blk |= {"ffn_gate.weight": (ff, d), "ffn_up.weight": (ff, d), "ffn_down.weight": (d, ff)}
        else:
            width = expert_ff * shared
            blk |= {"ffn_gate_inp.weight": (experts, d), "exp_probs_b.bias": (experts,)}
            blk |= {f"ffn_{part}_exps.weight": (experts, expert_ff, d) for part in ("gate", "up")}
            blk |= {"ffn_down_exps.weight": (experts, d, expert_ff), "ffn_gate_shexp.weight": (width, d)}
            blk |= {"ffn_up_shexp.weight": (width, d), "ffn_down_shexp.weight": (d, width)}
        tensors |= {f"blk.{i}.{name}": shape for name, shape in blk.items()}
    typed = {k: (b.U32, n) for k, n in counts.items()} | {k: (b.F32, x) for k, x in floats.items()}
    return Model("deepseek2", typed, tensors).changed(keys, {}, {})


def yarn(factor: float, multiplier: float | None, original: int = 4096) -> dict[str, Value]:
    keys: dict[str, Value] = {"type": (b.STRING, "yarn"), "factor": (b.F32, factor)}
    keys["original_context_length"] = (b.U32, original)
    if multiplier is not None:
        keys["yarn_log_multiplier"] = (b.F32, multiplier)
    return {f"rope.scaling.{name}": value for name, value in keys.items()}


def router(gate: int, groups: int, used_groups: int, scale: float, norm: bool) -> dict[str, Value]:
    keys: dict[str, Value] = {"expert_gating_func": (b.U32, gate), "expert_weights_scale": (b.F32, scale)}
    keys |= {"expert_group_count": (b.U32, groups), "expert_group_used_count": (b.U32, used_groups)}
    return keys | ({"expert_weights_norm": (b.BOOL, 1)} if norm else {})


def without_bias(model: Model) -> Model:
    return model.changed({}, {name: None for name in model.tensors if name.endswith("exp_probs_b.bias")}, {})


def config_of(path: Path) -> Config:
    """What load() does before it reads weights."""
    with open_gguf(path) as file:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
        return config


TINY = deepseek2(
    d=64, layers=3, dense=1, heads=2, q_lora=32, latent=32, nope=32, rope=16, v=32, vocab=32, ff=64, expert_ff=32,
    experts=8, used=2, shared=1, **router(2, 4, 2, 2.5, True), **yarn(40, 0.1, 256),
)  # fmt: skip
LLAMA = Model(
    "llama",
    {
        "block_count": (b.U32, 1), "context_length": (b.U32, 512), "embedding_length": (b.U32, 64),
        "feed_forward_length": (b.U32, 96), "attention.head_count": (b.U32, 4), "attention.head_count_kv": (b.U32, 2),
        "attention.layer_norm_rms_epsilon": (b.F32, 1e-5), "rope.freq_base": (b.F32, 10000.0),
        "rope.dimension_count": (b.U32, 16), "attention.key_length": (b.U32, 16),
        "attention.value_length": (b.U32, 16), "vocab_size": (b.U32, 32),
    },
    {
        "token_embd.weight": (32, 64), "output_norm.weight": (64,), "output.weight": (32, 64),
        "blk.0.attn_norm.weight": (64,), "blk.0.attn_q.weight": (64, 64), "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64), "blk.0.attn_output.weight": (64, 64), "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64), "blk.0.ffn_up.weight": (96, 64), "blk.0.ffn_down.weight": (64, 96),
    },
)  # fmt: skip
BASES = {"deepseek2": TINY, "llama": LLAMA}


def of_layers(pattern: str, shape: Shape | None, layers: range = range(3)) -> dict[str, Shape | None]:
    return {f"blk.{i}.{pattern}": shape for i in layers}


LITE = of_layers("attn_q_a.weight", None) | of_layers("attn_q_a_norm.weight", None) | of_layers("attn_q_b.weight", None)
LITE |= of_layers("attn_q.weight", (96, 64))
NO_BIAS = of_layers("exp_probs_b.bias", None, range(1, 3))
LEGACY = of_layers("attn_k_b.weight", None) | of_layers("attn_v_b.weight", None)
LEGACY |= of_layers("attn_kv_b.weight", (128, 32))
LEGACY_KEYS = {
    "attention.key_length_mla": None, "attention.value_length_mla": None,
    "attention.key_length": (b.U32, 48), "attention.value_length": (b.U32, 32),
}  # fmt: skip
FUSED = of_layers("ffn_gate_exps.weight", None, range(1, 3)) | of_layers("ffn_up_exps.weight", None, range(1, 3))
FUSED |= of_layers("ffn_gate_up_exps.weight", (8, 64, 64), range(1, 3))
NEXTN = {"nextn_predict_layers": (b.U32, 1), "block_count": (b.U32, 4)}
