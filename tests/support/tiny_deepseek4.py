"""Tiny random deepseek4 files, and transformers' logits for them.

Weights are drawn as in tiny_models; keys and their types are those of llama.cpp's converter (conversion/deepseek.py
@0c1e57098), files are written by gguf.GGUFWriter. llama.cpp wants a layer of ratio 4 in every model, and, where both
head sizes are the same, one of ratio 128.
"""

from __future__ import annotations

import functools
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import tiny_models


@dataclass(frozen=True)
class Deepseek4:
    """One deepseek4 model, named as in config.json."""

    compress_ratios: tuple[int, ...] = (0, 4, 128, 4)
    num_hash_layers: int = 2
    hidden_size: int = 128
    vocab_size: int = 160
    num_attention_heads: int = 8
    head_dim: int = 64
    qk_rope_head_dim: int = 16
    q_lora_rank: int = 64
    o_groups: int = 2
    o_lora_rank: int = 32
    sliding_window: int = 16
    index_n_heads: int = 12  # of fewer, many scores are 0, which ties
    index_head_dim: int = 64
    index_topk: int = 8
    n_routed_experts: int = 16
    num_experts_per_tok: int = 3
    moe_intermediate_size: int = 64
    n_shared_experts: int = 1
    swiglu_limit: float = 2.0
    routed_scaling_factor: float = 1.5
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn_factor: float | None = 16.0
    original_max_position_embeddings: int = 64
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    num_nextn_predict_layers: int = 0

    @property
    def num_hidden_layers(self) -> int:
        return len(self.compress_ratios)


SHARED = Deepseek4()
TYPES = {  # as llama.cpp's converter has them
    r"_exps\.": "MXFP4",
    r"_compressor_(kv|gate)|indexer\.proj|gate_inp\.|token_embd|^output\.": "BF16",
    r"hc_|_ape": "F32",
    r"": "Q8_0",
}


def metadata(m: Deepseek4) -> dict[str, object]:
    """Keys without the architecture's prefix."""
    n_layers = m.num_hidden_layers + m.num_nextn_predict_layers
    keys: dict[str, object] = {
        "block_count": n_layers, "context_length": 4096, "embedding_length": m.hidden_size, "vocab_size": m.vocab_size,
        "attention.head_count": m.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": m.head_dim, "attention.value_length": m.head_dim,
        "attention.layer_norm_rms_epsilon": m.rms_norm_eps, "rope.freq_base": m.rope_theta,
        "rope.dimension_count": m.qk_rope_head_dim, "attention.q_lora_rank": m.q_lora_rank,
        "attention.sliding_window": m.sliding_window, "expert_count": m.n_routed_experts,
        "expert_used_count": m.num_experts_per_tok, "expert_feed_forward_length": m.moe_intermediate_size,
        "expert_shared_count": m.n_shared_experts, "expert_weights_scale": m.routed_scaling_factor,
        "expert_weights_norm": True, "expert_gating_func": 4,
        "swiglu_clamp_exp": [m.swiglu_limit] * n_layers, "swiglu_clamp_shexp": [m.swiglu_limit] * n_layers,
        "attention.indexer.head_count": m.index_n_heads, "attention.indexer.key_length": m.index_head_dim,
        "attention.indexer.top_k": m.index_topk, "attention.output_group_count": m.o_groups,
        "attention.output_lora_rank": m.o_lora_rank,
        "attention.compress_ratios": [*m.compress_ratios, *[0] * m.num_nextn_predict_layers],
        "attention.compress_rope_freq_base": m.compress_rope_theta, "hyper_connection.count": m.hc_mult,
        "hyper_connection.sinkhorn_iterations": m.hc_sinkhorn_iters, "hyper_connection.epsilon": m.hc_eps,
        "hash_layer_count": m.num_hash_layers, "embedding_length_out": m.hc_mult * m.hidden_size,
    }  # fmt: skip
    if m.num_nextn_predict_layers:
        keys["nextn_predict_layers"] = m.num_nextn_predict_layers
    if m.yarn_factor is not None:
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": m.yarn_factor}
        keys["rope.scaling.original_context_length"] = m.original_max_position_embeddings
    return keys


class _Weights:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, name: str, *shape: int, gain: float = 1.0, mean: float = 0.0) -> None:
        generator = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        self.tensors[name] = mean + np.float32(gain) * generator.standard_normal(shape, dtype=np.float32)

    def matrix(self, name: str, *shape: int, gain: float = 1.0) -> None:
        self.add(name, *shape, gain=gain / shape[-1] ** 0.5)

    def norm(self, name: str, n: int) -> None:
        self.add(name, n, gain=0.2, mean=1.0)

    def table(self, name: str, n: int, k: int, below: int) -> None:
        generator = np.random.default_rng([self._seed, zlib.crc32(name.encode())])
        rows = [generator.permutation(below)[:k] for _ in range(n)]
        self.tensors[name] = np.array(rows, np.int32)


def tensors(m: Deepseek4, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 by GGUF name, NumPy order; tables int32."""
    w, d, streams = _Weights(seed), m.hidden_size, m.hc_mult * m.hidden_size
    w.add("token_embd.weight", m.vocab_size, d)
    w.matrix("output.weight", m.vocab_size, d)
    w.norm("output_norm.weight", d)
    _mixer(w, "output_hc", m.hc_mult, streams, 1)
    for index in range(m.num_hidden_layers + m.num_nextn_predict_layers):
        _layer(w, m, f"blk.{index}.", index)
    return w.tensors


def _mixer(w: _Weights, name: str, n: int, streams: int, n_scales: int) -> None:
    w.matrix(f"{name}_fn.weight", n, streams)
    w.add(f"{name}_base.weight", n, gain=0.5)
    w.add(f"{name}_scale.weight", n_scales, gain=0.2, mean=1.0)


def _compressor(w: _Weights, name: str, ratio: int, width: int, d: int) -> None:
    wide = width * (2 if ratio == 4 else 1)
    for part in ("kv", "gate"):
        w.matrix(f"{name}_{part}.weight", wide, d)
    w.add(f"{name}_ape.weight", ratio, wide)
    w.norm(f"{name}_norm.weight", width)


def _layer(w: _Weights, m: Deepseek4, blk: str, index: int) -> None:
    d, rows, expert = m.hidden_size, m.num_attention_heads * m.head_dim, m.moe_intermediate_size
    for part in ("attn", "ffn"):
        _mixer(w, f"{blk}hc_{part}", m.hc_mult * (2 + m.hc_mult), m.hc_mult * d, 3)
        w.norm(f"{blk}{part}_norm.weight", d)
    w.matrix(f"{blk}attn_q_a.weight", m.q_lora_rank, d)
    w.norm(f"{blk}attn_q_a_norm.weight", m.q_lora_rank)
    w.matrix(f"{blk}attn_q_b.weight", rows, m.q_lora_rank)
    w.matrix(f"{blk}attn_kv.weight", m.head_dim, d)
    w.norm(f"{blk}attn_kv_a_norm.weight", m.head_dim)
    w.add(f"{blk}attn_sinks.weight", m.num_attention_heads)
    w.matrix(f"{blk}attn_output_a.weight", m.o_groups * m.o_lora_rank, rows // m.o_groups)
    w.matrix(f"{blk}attn_output_b.weight", d, m.o_groups * m.o_lora_rank)
    ratio = m.compress_ratios[index] if index < m.num_hidden_layers else 0
    if ratio:
        _compressor(w, f"{blk}attn_compressor", ratio, m.head_dim, d)
    if ratio == 4:
        w.matrix(f"{blk}indexer.attn_q_b.weight", m.index_n_heads * m.index_head_dim, m.q_lora_rank)
        w.matrix(f"{blk}indexer.proj.weight", m.index_n_heads, d)
        _compressor(w, f"{blk}indexer_compressor", 4, m.index_head_dim, d)
    w.matrix(f"{blk}ffn_gate_inp.weight", m.n_routed_experts, d, gain=2.0)
    if index < m.num_hash_layers:
        w.table(f"{blk}ffn_gate_tid2eid.weight", m.vocab_size, m.num_experts_per_tok, m.n_routed_experts)
    else:
        w.add(f"{blk}exp_probs_b.bias", m.n_routed_experts, gain=0.3)
    for part in ("gate", "up"):
        w.matrix(f"{blk}ffn_{part}_exps.weight", m.n_routed_experts, expert, d)
        w.matrix(f"{blk}ffn_{part}_shexp.weight", m.n_shared_experts * expert, d)
    w.matrix(f"{blk}ffn_down_exps.weight", m.n_routed_experts, d, expert)
    w.matrix(f"{blk}ffn_down_shexp.weight", d, m.n_shared_experts * expert)
    if index >= m.num_hidden_layers:
        w.matrix(f"{blk}nextn.eh_proj.weight", d, 2 * d)
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            w.norm(f"{blk}nextn.{norm}.weight", d)


def write(
    path: Path, m: Deepseek4 = SHARED, types: tiny_models.Types = "F32", seed: int = 0, leave_out: str = "$^"
) -> Path:
    """The GGUF file of a model without tensors of some names; returns its path."""
    import ggml

    writer = gguf.GGUFWriter(None, "deepseek4")
    writer.add_string("general.name", "tiny deepseek4")
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in metadata(m).items():
        _add_key(writer, f"deepseek4.{key}", value)
    patterns = {"": types} if isinstance(types, str) else types
    for name, values in tensors(m, seed).items():
        if re.match(leave_out, name):
            continue
        named = next(type_ for pattern, type_ in patterns.items() if re.search(pattern, name))
        kind = gguf.GGMLQuantizationType[named if values.ndim > 1 and values.dtype == np.float32 else "F32"]
        if values.dtype == np.int32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, ggml.quantize(values, kind, None), raw_dtype=kind)
    return tiny_models.write(writer, path)


def _add_key(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (add.get(type(value)) or writer.add_array)(key, value)


@functools.cache
def shared(m: Deepseek4 = SHARED, seed: int = 0, as_published: bool = False) -> Path:
    """As write, into a folder that lives as long as the tests; as_published: in llama.cpp's types."""
    path = tiny_models.folder() / f"deepseek4-{zlib.crc32(repr((m, as_published)).encode()):08x}-{seed}.gguf"
    return path if path.exists() else write(path, m, TYPES if as_published else "F32", seed)


# transformers

_TYPES_OF = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{part}_{x}.weight": f"{part}_hc.{x}" for part in ("attn", "ffn") for x in ("fn", "base", "scale")},
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_a_norm.weight": "self_attn.q_a_norm.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv.weight": "self_attn.kv_proj.weight",
    "attn_kv_a_norm.weight": "self_attn.kv_norm.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "attn_output_a.weight": "self_attn.o_a_proj.weight",
    "attn_output_b.weight": "self_attn.o_b_proj.weight",
    "indexer.attn_q_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "indexer.proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    **{
        f"{name}_{old}.weight": f"self_attn.{module}.{new}"
        for name, module in (("attn_compressor", "compressor"), ("indexer_compressor", "compressor.indexer"))
        for old, new in (("kv", "kv_proj.weight"), ("gate", "gate_proj.weight"), ("ape", "position_bias"),
                         ("norm", "kv_norm.weight"))
    },
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_tid2eid.weight": "mlp.gate.tid2eid",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
}  # fmt: skip
_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
    **{f"output_hc_{x}.weight": f"model.hc_head.hc_{x}" for x in ("fn", "base", "scale")},
}


def hf_config(m: Deepseek4):
    """transformers' configuration."""
    from transformers import DeepseekV4Config

    rope = {"rope_type": "default"}
    if m.yarn_factor is not None:
        rope = {"rope_type": "yarn", "factor": m.yarn_factor, "beta_fast": 32.0, "beta_slow": 1.0}
        rope["original_max_position_embeddings"] = m.original_max_position_embeddings
    names = (
        "vocab_size", "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
        "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok",
        "moe_intermediate_size", "n_shared_experts", "swiglu_limit", "routed_scaling_factor", "rope_theta",
        "compress_rope_theta", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "num_hidden_layers",
        "num_hash_layers", "qk_rope_head_dim",
    )  # fmt: skip
    return DeepseekV4Config(
        **{name: getattr(m, name) for name in names},
        layer_types=[_TYPES_OF[ratio] for ratio in m.compress_ratios],
        rope_parameters=rope,
        max_position_embeddings=4096,
        num_nextn_predict_layers=0,
        attn_implementation="eager",
    )


def hf_model(m: Deepseek4, seed: int = 0):
    """transformers' model with the same weights."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    state = {}
    found = tensors(m, seed)
    for index in range(m.num_hidden_layers):
        gate_up = [found.pop(f"blk.{index}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        state[f"model.layers.{index}.mlp.experts.gate_up_proj"] = np.concatenate(gate_up, 1)
    for name, values in found.items():
        blk = re.match(r"blk\.(\d+)\.(.*)", name)
        if blk is None:
            state[_ENDS[name]] = values
        elif int(blk[1]) < m.num_hidden_layers:
            state[f"model.layers.{blk[1]}.{_NAMES[blk[2]]}"] = values
    model = DeepseekV4ForCausalLM(hf_config(m)).eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    return model


@functools.cache
def hf_logits(m: Deepseek4, ids: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32 (T, vocab): transformers' logits after every token."""
    import torch

    with torch.no_grad():
        return hf_model(m, seed)(torch.tensor([ids])).logits[0].numpy()


def hf_mtp_layer(m: Deepseek4, streams: np.ndarray, seed: int = 0) -> np.ndarray:
    """float32 (T, 4, D): streams after the layer for multi-token prediction, whose input they are, by transformers.

    The layer is one without pooled rows in a model of its own.
    """
    import torch

    blk, n_tokens = f"blk.{m.num_hidden_layers}.", len(streams)
    layer = {name.removeprefix(blk): values for name, values in tensors(m, seed).items() if name.startswith(blk)}
    gate_up = [layer.pop(f"ffn_{part}_exps.weight") for part in ("gate", "up")]
    state = {_NAMES[name]: values for name, values in layer.items() if not name.startswith("nextn.")}
    state["mlp.experts.gate_up_proj"] = np.concatenate(gate_up, 1)
    alone = replace(m, compress_ratios=(0,), num_hash_layers=0, num_nextn_predict_layers=0)
    model = hf_model(alone, seed).model
    model.layers[0].load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
    positions = torch.arange(n_tokens)[None]
    distance = positions[0][:, None] - positions
    mask = torch.zeros(n_tokens, n_tokens).masked_fill((distance < 0) | (distance >= m.sliding_window), -torch.inf)
    x = torch.from_numpy(streams)[None]
    turns = {"main": model.rotary_emb(x, positions, layer_type="main")}
    with torch.no_grad():
        return model.layers[0](x, position_embeddings=turns, position_ids=positions, attention_mask=mask[None, None])[
            0
        ].numpy()


def token_ids(n: int, seed: int = 0, m: Deepseek4 = SHARED) -> list[int]:
    """n random token ids."""
    return np.random.default_rng([seed, 77]).integers(0, m.vocab_size, n).tolist()
