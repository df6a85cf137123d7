"""Tiny random files of DSpark's blocks for a tiny deepseek4, and what they draft in float64, token by token.

The file is as llama.cpp's converter has it (conversion/deepseek.py, DeepseekV4DSparkModel @0c1e57098); the arithmetic
is written from src/models/dflash.cpp and deepseek4.cpp there, one token and one head at a time.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import naive
import numpy as np
import tiny_deepseek4 as tiny

BLOCK, TARGET, NOISE, RANK = 5, (0, 2, 3), 7, 16  # layers whose outputs are read
Array = np.ndarray


def tensors(model: tiny.Deepseek4, n_layers: int = 2, seed: int = 3) -> dict[str, Array]:
    """float32 by GGUF name."""
    w = tiny.tensors(tiny.replace(model, compress_ratios=(0,) * n_layers, num_hash_layers=0), seed)
    w = {name: values for name, values in w.items() if name not in ("token_embd.weight", "output.weight")}
    d, vocab, generator = model.hidden_size, model.vocab_size, np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Array:
        return (generator.standard_normal((rows, columns)) * gain / columns**0.5).astype(np.float32)

    w["fc.weight"] = matrix(d, len(TARGET) * d)
    w["enc.output_norm.weight"] = (1 + 0.2 * generator.standard_normal(d)).astype(np.float32)
    w["markov_w1.weight"], w["markov_w2.weight"] = matrix(vocab, RANK, 4.0), matrix(vocab, RANK)
    w["conf_proj.weight"] = matrix(1, d + RANK)
    return w


def write(path: Path, model: tiny.Deepseek4, n_layers: int = 2, with_ends: bool = False, **keys: object) -> Path:
    """The file of blocks; keys, if given, in place of its own. with_ends: with the model's embedding and head."""
    writer = gguf.GGUFWriter(path, "dflash")
    layers = tiny.replace(model, compress_ratios=(0,) * n_layers, num_hash_layers=0)
    own = tiny.metadata(layers) | {"block_size": BLOCK, "target_layers": [layer + 1 for layer in TARGET]} | keys
    for key, value in own.items():
        tiny._add_key(writer, f"dflash.{key}", value)
    writer.add_string("tokenizer.ggml.model", "none")
    writer.add_uint32("tokenizer.ggml.mask_token_id", NOISE)
    ends = {name: tiny.tensors(model)[name] for name in ("token_embd.weight", "output.weight") if with_ends}
    for name, values in (tensors(model, n_layers) | ends).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Reference:
    """The blocks of tensors(), in float64."""

    def __init__(self, model: tiny.Deepseek4, n_layers: int = 2):
        self.m, self.n_layers = model, n_layers
        self.w = {name: values.astype(np.float64) for name, values in tensors(model, n_layers).items()}
        self.target = {name: values.astype(np.float64) for name, values in tiny.tensors(model).items()}
        half = model.qk_rope_head_dim // 2
        self.frequencies = model.rope_theta ** (-np.arange(half) / half)

    def biased_logits(self, features_TF: Array, last: int) -> Array:
        """(BLOCK, vocab), what drafts are the largest of: logits(), and the Markov head's part."""
        rows, previous = self.logits(features_TF, last), last
        for row in rows:
            row += self.w["markov_w2.weight"] @ self.w["markov_w1.weight"][previous]
            previous = int(np.argmax(row))
        return rows

    def confidences(self, features_TF: Array, last: int) -> Array:
        """(BLOCK,), of the drafts."""
        before = [last, *self.biased_logits(features_TF, last).argmax(1)[:-1]]
        inputs = np.concatenate([self._read(features_TF, last), self.w["markov_w1.weight"][before]], 1)
        return _sigmoid(inputs @ self.w["conf_proj.weight"][0])

    def logits(self, features_TF: Array, last: int) -> Array:
        """(BLOCK, vocab), without the Markov head: after the tokens that left these features, and the last one."""
        rows = [self._rms(x, self.w["output_norm.weight"]) for x in self._read(features_TF, last)]
        return np.stack(rows) @ self.target["output.weight"].T

    def _read(self, features_TF: Array, last: int) -> Array:
        """(BLOCK, D), what the head reads, before its norm."""
        ids = [last] + [NOISE] * (BLOCK - 1)
        kept = self._rms(features_TF @ self.w["fc.weight"].T, self.w["enc.output_norm.weight"])
        streams = np.repeat(self.target["token_embd.weight"][ids][:, None], 4, 1)
        for index in range(self.n_layers):
            w = {n.removeprefix(f"blk.{index}."): t for n, t in self.w.items() if n.startswith(f"blk.{index}.")}
            streams = self._sublayer(streams, w, "attn", lambda x, w=w: self._attention(x, kept, w))
            streams = self._sublayer(streams, w, "ffn", lambda x, w=w: self._experts(x, w))
        out = []
        for stream in streams:
            mixed = self.w["output_hc_fn.weight"] @ self._rms(stream.ravel()) * self.w["output_hc_scale.weight"]
            weights = _sigmoid(mixed + self.w["output_hc_base.weight"]) + self.m.hc_eps
            out.append(weights @ stream)
        return np.stack(out)

    def _rms(self, x: Array, weight: Array | float = 1.0) -> Array:
        return naive.rms_norm(x, weight, self.m.rms_norm_eps)

    def _sublayer(self, streams: Array, w: dict[str, Array], part: str, sublayer) -> Array:
        inputs, gates, mixes = [], [], []
        for stream in streams:
            values = w[f"hc_{part}_fn.weight"] @ self._rms(stream.ravel())
            scale, base = w[f"hc_{part}_scale.weight"], w[f"hc_{part}_base.weight"]
            inputs.append((_sigmoid(values[:4] * scale[0] + base[:4]) + self.m.hc_eps) @ stream)
            gates.append(2 * _sigmoid(values[4:8] * scale[1] + base[4:8]))
            mix = naive.softmax((values[8:] * scale[2] + base[8:]).reshape(4, 4)) + self.m.hc_eps
            mix /= mix.sum(0, keepdims=True) + self.m.hc_eps
            for _ in range(self.m.hc_sinkhorn_iters - 1):
                mix /= mix.sum(1, keepdims=True) + self.m.hc_eps
                mix /= mix.sum(0, keepdims=True) + self.m.hc_eps
            mixes.append(mix)
        y = sublayer(self._rms(np.stack(inputs), w[f"{part}_norm.weight"]))
        return np.stack(
            [g[:, None] * out + m.T @ stream for g, m, out, stream in zip(gates, mixes, y, streams, strict=True)]
        )

    def _turned(self, x: Array, position: int) -> Array:
        """The last values of a vector, rotated by a position."""
        rope = 2 * len(self.frequencies)
        return np.concatenate(
            [x[:-rope], naive.rotate_pairs(x[None, -rope:], np.array([position]), self.frequencies)[0]]
        )

    def _attention(self, x: Array, kept: Array, w: dict[str, Array]) -> Array:
        m, n_before = self.m, len(kept)

        def row(vector: Array, position: int) -> Array:
            return self._turned(self._rms(w["attn_kv.weight"] @ vector, w["attn_kv_a_norm.weight"]), position)

        rows = [row(vector, p) for p, vector in enumerate(kept)]
        rows += [row(vector, n_before + t) for t, vector in enumerate(x)]
        outs = []
        for t, vector in enumerate(x):
            position, heads = n_before + t, []
            latent = self._rms(w["attn_q_a.weight"] @ vector, w["attn_q_a_norm.weight"])
            for head, query in enumerate((w["attn_q_b.weight"] @ latent).reshape(m.num_attention_heads, -1)):
                query = self._turned(self._rms(query), position)
                seen = [r for p, r in enumerate(rows) if position - p < m.sliding_window]
                scores = [query @ r / m.head_dim**0.5 for r in seen] + [w["attn_sinks.weight"][head]]
                mixed = naive.softmax(np.array(scores))[:-1] @ np.stack(seen)
                heads.append(self._turned(mixed, -position))
            groups = np.concatenate(heads).reshape(m.o_groups, -1)
            low = [a @ g for a, g in zip(np.split(w["attn_output_a.weight"], m.o_groups), groups, strict=True)]
            outs.append(w["attn_output_b.weight"] @ np.concatenate(low))
        return np.stack(outs)

    def _experts(self, x: Array, w: dict[str, Array]) -> Array:
        m = self.m
        routing = naive.Routing("sqrtsoftplus", m.num_experts_per_tok, True, m.routed_scaling_factor)

        def expert(vector: Array, gate: Array, up: Array, down: Array) -> Array:
            g, u = np.minimum(gate @ vector, m.swiglu_limit), np.clip(up @ vector, -m.swiglu_limit, m.swiglu_limit)
            return down @ (g * _sigmoid(g) * u)

        outs = []
        for vector in x:
            ids, weights, _ = naive.route(w["ffn_gate_inp.weight"] @ vector, w["exp_probs_b.bias"], routing)
            out = expert(vector, *(w[f"ffn_{part}_shexp.weight"] for part in ("gate", "up", "down")))
            for id_, weight in zip(ids, weights, strict=True):
                out = out + weight * expert(
                    vector, *(w[f"ffn_{part}_exps.weight"][id_] for part in ("gate", "up", "down"))
                )
            outs.append(out)
        return np.stack(outs)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))
