"""Random weights of tiny models, by GGUF name: scaled so that activations stay near 1 and no layer dominates.

Every tensor draws from its own generator (seed, name).
"""

from __future__ import annotations

import re
import zlib

import numpy as np
from tiny_shapes import Deepseek2, Grouped, Llama, Model, Sparse, type_name

N_TAGS = 8  # leading hidden dimensions that only the embedding writes, where steady_routing reads the experts from
N_DRAWN = 4  # experts of those models that are drawn, and quantised: up to a microsecond a weight by libggml

# What it calls tensors that the others call otherwise.
_NAMES = {
    "glm4moe": {"ffn_norm.weight": "post_attention_norm.weight"},
    "gpt-oss": {"ffn_norm.weight": "post_attention_norm.weight"},
    "hy_v3": {"exp_probs_b.bias": "exp_probs_b"},
    "bailingmoe2": {"nextn.shared_head_norm.weight": "layer_output_norm.weight"},
}


def common_name(architecture: str, name: str) -> str:
    """What other architectures call a layer's tensor (its name without the layer)."""
    return next((common for common, own in _NAMES.get(architecture, {}).items() if own == name), name)


def turned(name: str, experts: np.ndarray, n: int) -> np.ndarray:
    """n experts of a few: the rows of gate and up lie one farther on in each further few, so no two compute the same.

    Not those of down, the first of which write the routing tags.
    """
    turn = 0 if "ffn_down" in name else 1
    return np.concatenate([np.roll(experts, turn * i, axis=1) for i in range(n // len(experts))])


class Weights:
    """Random tensors by GGUF name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _normal(self, name: str, *shape: int) -> np.ndarray:
        generator = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return generator.standard_normal(shape, dtype=np.float32)

    def _matrix(self, name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
        """Rows that map unit-variance inputs to outputs of standard deviation `gain`."""
        return self._normal(name, *shape) * np.float32(gain / np.sqrt(shape[-1]))

    def _norm(self, name: str, n: int) -> np.ndarray:
        return 1 + 0.1 * self._normal(name, n)

    def of(self, m: Model) -> dict[str, np.ndarray]:
        embedding = self._normal("token_embd.weight", m.vocab_size, m.hidden_size)
        if not isinstance(m, Llama) and m.steady_routing:
            embedding[:, :N_TAGS] = np.sign(embedding[:, :N_TAGS]) * 2
        tensors = {
            "token_embd.weight": embedding,
            "output_norm.weight": self._norm("output_norm.weight", m.hidden_size),
        }
        if m.tie_word_embeddings:  # the embedding's rows are sqrt(D) longer than a head's
            tensors["output_norm.weight"] /= np.float32(np.sqrt(m.hidden_size))
        else:
            tensors["output.weight"] = self._matrix("output.weight", m.vocab_size, m.hidden_size)
        if isinstance(m, Llama):
            return tensors | self._llama(m)
        attention = self._mla if isinstance(m, Deepseek2) else self._normed_gqa
        for i in range(m.num_hidden_layers + m.num_nextn_predict_layers):
            tensors |= attention(m, f"blk.{i}.")
            tensors |= self._dense(m, f"blk.{i}.") if i < m.first_k_dense_replace else self._moe(m, f"blk.{i}.")
        for i in range(m.num_hidden_layers, m.num_hidden_layers + m.num_nextn_predict_layers):
            tensors |= self._nextn(m, f"blk.{i}.nextn.")
        return {self._own_name(m, name): values for name, values in tensors.items()}

    def _own_name(self, m: Model, name: str) -> str:
        match = re.fullmatch(r"(blk\.\d+\.)(.+)", name)
        return match[1] + _NAMES.get(type_name(m), {}).get(match[2], match[2]) if match else name

    def _residual_gain(self, m: Model) -> float:
        """Two branches a layer add up to about the embedding's own variance over all layers."""
        return 1.5 / np.sqrt(2 * m.num_hidden_layers)

    def _mla(self, m: Deepseek2, blk: str) -> dict[str, np.ndarray]:
        heads, nope, rope, v, rank = (
            m.num_attention_heads,
            m.qk_nope_head_dim,
            m.qk_rope_head_dim,
            m.v_head_dim,
            m.kv_lora_rank,
        )
        w, d = {}, m.hidden_size
        w["attn_norm.weight"] = self._norm(blk + "attn_norm", d)
        if m.q_lora_rank is None:
            w["attn_q.weight"] = self._matrix(blk + "attn_q", heads * (nope + rope), d, gain=1.5)
        else:
            w["attn_q_a.weight"] = self._matrix(blk + "attn_q_a", m.q_lora_rank, d, gain=0.7)
            w["attn_q_a_norm.weight"] = self._norm(blk + "attn_q_a_norm", m.q_lora_rank)
            w["attn_q_b.weight"] = self._matrix(blk + "attn_q_b", heads * (nope + rope), m.q_lora_rank, gain=1.5)
        if isinstance(m, Sparse) and m.has_indexer(int(blk.split(".")[1])):
            w |= self._indexer(m, blk)
        w["attn_kv_a_mqa.weight"] = self._matrix(blk + "attn_kv_a_mqa", rank + rope, d)
        w["attn_kv_a_norm.weight"] = self._norm(blk + "attn_kv_a_norm", rank)
        k_b = self._normal(blk + "attn_k_b", heads, rank, nope) / np.float32(np.sqrt(rank))
        v_b = self._matrix(blk + "attn_v_b", heads, v, rank)
        if m.split_kv_b:
            w["attn_k_b.weight"], w["attn_v_b.weight"] = k_b, v_b
        else:
            kv_b = np.concatenate([k_b.transpose(0, 2, 1), v_b], axis=1)
            w["attn_kv_b.weight"] = kv_b.reshape(heads * (nope + v), rank)
        w["attn_output.weight"] = self._writer(m, blk + "attn_output", d, heads * v)
        return {blk + name: values for name, values in w.items()}

    def _indexer(self, m: Sparse, blk: str) -> dict[str, np.ndarray]:
        return {
            "indexer.attn_q_b.weight": self._matrix(
                blk + "indexer.attn_q_b", m.index_n_heads * m.index_head_dim, m.q_lora_rank
            ),
            "indexer.attn_k.weight": self._matrix(blk + "indexer.attn_k", m.index_head_dim, m.hidden_size),
            "indexer.k_norm.weight": 1 + 0.3 * self._normal(blk + "indexer.k_norm", m.index_head_dim),
            "indexer.k_norm.bias": 0.3 * self._normal(blk + "indexer.k_norm_bias", m.index_head_dim),
            "indexer.proj.weight": self._matrix(blk + "indexer.proj", m.index_n_heads, m.hidden_size),
        }

    def _writer(self, m: Model, name: str, *shape: int, gain: float = 1.0) -> np.ndarray:
        """A matrix whose output is added to the residual stream: the routing tags are left as they are."""
        matrix = self._matrix(name, *shape, gain=gain * self._residual_gain(m))
        if not isinstance(m, Llama) and m.steady_routing:
            matrix[..., :N_TAGS, :] = 0
        return matrix

    def _mlp(self, m: Model, blk: str, suffix: str, width: int, *stack: int) -> dict[str, np.ndarray]:
        # silu(gate) * up has a standard deviation near 0.6 for unit gate and up: 1.6 brings the output back to 1.
        return {
            f"{blk}ffn_gate{suffix}.weight": self._matrix(f"{blk}ffn_gate{suffix}", *stack, width, m.hidden_size),
            f"{blk}ffn_up{suffix}.weight": self._matrix(f"{blk}ffn_up{suffix}", *stack, width, m.hidden_size),
            f"{blk}ffn_down{suffix}.weight": self._writer(
                m, f"{blk}ffn_down{suffix}", *stack, m.hidden_size, width, gain=1.6
            ),
        }

    def _dense(self, m: Model, blk: str) -> dict[str, np.ndarray]:
        norm = {blk + "ffn_norm.weight": self._norm(blk + "ffn_norm", m.hidden_size)}
        return norm | self._mlp(m, blk, "", m.intermediate_size)

    def _moe(self, m: Deepseek2 | Grouped, blk: str) -> dict[str, np.ndarray]:
        w = {
            blk + "ffn_norm.weight": self._norm(blk + "ffn_norm", m.hidden_size),
            blk + "ffn_gate_inp.weight": self._router(m, blk + "ffn_gate_inp"),
        }
        if isinstance(m, Grouped) and m.sliding_window:
            w |= self._expert_biases(m, blk)
        if m.e_score_correction_bias:
            w[blk + "exp_probs_b.bias"] = 0.2 * self._normal(blk + "exp_probs_b", m.n_routed_experts)
        n_drawn = N_DRAWN if m.steady_routing else m.n_routed_experts
        experts = self._mlp(m, blk, "_exps", m.moe_intermediate_size, n_drawn)
        w |= {name: turned(name, values, m.n_routed_experts) for name, values in experts.items()}
        if m.n_shared_experts:
            w |= self._mlp(m, blk, "_shexp", m.moe_intermediate_size * m.n_shared_experts)
        if (
            m.scoring_func == "softmax" and not m.norm_topk_prob
        ):  # unnormalised probabilities are near 1/experts: bring the sum back to 1
            total = m.num_experts_per_tok / m.n_routed_experts * (m.routed_scaling_factor or 1.0)
            w[blk + "ffn_down_exps.weight"] /= np.float32(total)
        if m.fused_gate_up:
            gate, up = w.pop(blk + "ffn_gate_exps.weight"), w.pop(blk + "ffn_up_exps.weight")
            w[blk + "ffn_gate_up_exps.weight"] = np.concatenate([gate, up], axis=1)
        return w

    def _expert_biases(self, m: Grouped, blk: str) -> dict[str, np.ndarray]:
        """Such that the activation's bounds, 7, are met by some."""
        n, width = m.n_routed_experts, m.moe_intermediate_size
        return {
            f"{blk}ffn_gate_inp.bias": 0.5 * self._normal(f"{blk}ffn_gate_inp.bias", n),
            f"{blk}ffn_gate_exps.bias": 4 * self._normal(f"{blk}ffn_gate_exps.bias", n, width),
            f"{blk}ffn_up_exps.bias": 4 * self._normal(f"{blk}ffn_up_exps.bias", n, width),
            f"{blk}ffn_down_exps.bias": self._small(m, f"{blk}ffn_down_exps.bias", n, m.hidden_size),
        }

    def _small(self, m: Grouped, name: str, *shape: int) -> np.ndarray:
        """Biases of what is added to the residual stream, whose tags stay as they are."""
        bias = np.float32(0.3 * self._residual_gain(m)) * self._normal(name, *shape)
        if m.steady_routing:
            bias[..., :N_TAGS] = 0
        return bias

    def _router(self, m: Deepseek2 | Grouped, name: str) -> np.ndarray:
        router = self._matrix(name, m.n_routed_experts, m.hidden_size, gain=2.0)
        if m.steady_routing:
            router[:, N_TAGS:] = 0
            router[:, :N_TAGS] *= np.float32(np.sqrt(m.hidden_size / N_TAGS) / 2)
        return router

    def _nextn(self, m: Deepseek2 | Grouped, blk: str) -> dict[str, np.ndarray]:
        d = m.hidden_size
        w = {"eh_proj.weight": self._matrix(blk + "eh_proj", d, 2 * d)}
        for norm in ("enorm", "hnorm", "shared_head_norm"):
            w[f"{norm}.weight"] = self._norm(blk + norm, d)
        for matrix in ("embed_tokens", "shared_head_head"):
            w[f"{matrix}.weight"] = self._matrix(blk + matrix, m.vocab_size, d)
        return {blk + name: values for name, values in w.items()}

    def _gqa(self, m: Llama | Grouped, blk: str) -> dict[str, np.ndarray]:
        d, q_width, kv_width = m.hidden_size, m.num_attention_heads * m.head_dim, m.num_key_value_heads * m.head_dim
        return {
            blk + "attn_norm.weight": self._norm(blk + "attn_norm", d),
            blk + "attn_q.weight": self._matrix(blk + "attn_q", q_width, d, gain=1.5),
            blk + "attn_k.weight": self._matrix(blk + "attn_k", kv_width, d),
            blk + "attn_v.weight": self._matrix(blk + "attn_v", kv_width, d),
            blk + "attn_output.weight": self._writer(m, blk + "attn_output", d, q_width),
        }

    def _normed_gqa(self, m: Grouped, blk: str) -> dict[str, np.ndarray]:
        w, heads = self._gqa(m, blk), {"q": m.num_attention_heads, "k": m.num_key_value_heads}
        if m.attention_bias:
            for part, n_heads in (heads | {"v": m.num_key_value_heads}).items():
                name = f"{blk}attn_{part}.bias"
                w[name] = 0.5 * self._normal(name, n_heads * m.head_dim)
        if m.sliding_window:
            w[blk + "attn_sinks.weight"] = 1 + self._normal(blk + "attn_sinks", m.num_attention_heads)
            w[blk + "attn_output.bias"] = self._small(m, blk + "attn_output.bias", m.hidden_size)
        # Far from 1, and queries' from keys': a norm that is left out, or the other's, shows.
        for part, gain in (("q", np.float32(1.5)), ("k", np.float32(1))) if m.qk_norm else ():
            name, width = f"{blk}attn_{part}_norm", m.head_dim * (heads[part] if m.qk_norm == "whole" else 1)
            w[name + ".weight"] = gain + 0.3 * self._normal(name, width)
        if m.joined_qkv:
            w[blk + "attn_qkv.weight"] = np.concatenate([w.pop(f"{blk}attn_{part}.weight") for part in "qkv"])
        return w

    def _llama(self, m: Llama) -> dict[str, np.ndarray]:
        w = {}
        for blk in (f"blk.{i}." for i in range(m.num_hidden_layers)):
            w |= self._gqa(m, blk) | self._dense(m, blk)
        if m.rope_freqs:  # llama 3.1's divisors: 1 for high frequencies, growing to 8 for low ones
            w["rope_freqs.weight"] = np.linspace(1, 8, m.head_dim // 2, dtype=np.float32)
        return w
