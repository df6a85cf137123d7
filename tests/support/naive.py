"""A slow, obvious forward pass in float64 NumPy: the third opinion after llama.cpp and HF.

deepseek2, deepseek32, glm-dsa, llama, and architectures of grouped-query attention with experts that rotate by halves.


Attention decompresses every head's keys and values and loops over heads; experts loop over tokens. Written from the
papers and the references: DeepSeek-V2 (arXiv 2405.04434, eqs. 9-19 for MLA), DeepSeek-V3 (arXiv 2412.19437, eqs. 12-16
for the router), YaRN (arXiv 2309.00071), and llama.cpp src/models/deepseek2.cpp @3f545becc for what a GGUF file means.

Shapes: T tokens, D hidden_size, C kv_lora_rank, E experts.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_models
import tiny_weights

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / rms(x) * weight over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def bounded_swiglu(gate: Array, up: Array) -> Array:
    """gpt-oss's activation."""
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


def swiglu(x: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate x) * up x) for one token (D,) or many (T, D); matrices are (out, in)."""
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def softmax(x: Array) -> Array:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def yarn_frequencies(n_dims: int, base: float, factor: float, original_context: int, whole: bool = True) -> Array:
    """(n_dims / 2,) radians per position; beta_fast 32 and beta_slow 1. whole: the blend's ends are pairs."""
    extrapolated = base ** (-2.0 * np.arange(n_dims // 2) / n_dims)

    def dim_of(rotations: float) -> float:
        return n_dims * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(32), dim_of(1)
    if whole:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0, low), min(n_dims - 1, high)
    ramp = np.clip((np.arange(n_dims // 2) - low) / max(0.001, high - low), 0, 1)
    return extrapolated / factor * ramp + extrapolated * (1 - ramp)


def rotate_pairs(x: Array, positions: Array, frequencies: Array, magnitude: float = 1.0) -> Array:
    """RoPE on consecutive pairs (x[2i], x[2i+1]) of the last axis; x is (T, ...), positions (T,)."""
    angles = positions.reshape(-1, *[1] * (x.ndim - 1)) * frequencies
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def rotate_halves(x: Array, positions: Array, frequencies: Array, magnitude: float = 1.0) -> Array:
    """RoPE on (x[i], x[i + n/2]) of the last axis, n values long; else as rotate_pairs."""
    angles = positions.reshape(-1, *[1] * (x.ndim - 1)) * frequencies
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / deviation * weight + bias over the last axis."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight + bias


def attend(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int = 0,
    sink: float = -np.inf,
    chosen: Array | None = None,
) -> Array:
    """Causal attention of one head: q (T, d), k (T, d), v (T, dv) -> (T, dv).

    sink: one more score, without a value. chosen: bool (T, T), who sees whom.
    """
    seen = np.tri(len(q), dtype=bool) if chosen is None else chosen
    if window:
        seen &= ~np.tri(len(q), k=-window, dtype=bool)
    scores = np.where(seen, q @ k.T * scale, -np.inf)
    return softmax(np.concatenate([scores, np.full((len(q), 1), sink)], axis=1))[:, :-1] @ v


@dataclass(frozen=True)
class Routing:
    """How scores become experts. group_score is "best" (V2) or "best two" (V3, and llama.cpp for every model)."""

    scoring_func: str
    num_experts_per_tok: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "best two"


def route(logits: Array, bias: Array | None, routing: Routing) -> tuple[Array, Array, float]:
    """(experts, weights, margin) of one token from its router logits (E,).

    margin: the smallest lead of a chosen group or expert over a rejected one; near 0 means that rounding decides.
    """
    if routing.scoring_func == "softmax_after_topk":
        experts, margin = _top(logits, routing.num_experts_per_tok)
        return experts, softmax(logits[experts]), margin
    if routing.scoring_func == "sqrtsoftplus":
        probs = np.sqrt(np.logaddexp(logits, 0))
    else:
        probs = softmax(logits) if routing.scoring_func == "softmax" else 1 / (1 + np.exp(-logits))
    selection = probs if bias is None else probs + bias
    margin = np.inf
    if routing.n_group > 1:
        groups = np.sort(selection.reshape(routing.n_group, -1), axis=1)
        group_scores = groups[:, -1] if routing.group_score == "best" else groups[:, -1] + groups[:, -2]
        kept, margin = _top(group_scores, routing.topk_group)
        allowed = np.isin(np.arange(len(selection)) // groups.shape[1], kept)
        selection = np.where(allowed, selection, -np.inf)
    experts, expert_margin = _top(selection, routing.num_experts_per_tok)
    weights = probs[experts]
    if routing.norm_topk_prob:
        weights = weights / weights.sum()
    return experts, weights * routing.routed_scaling_factor, min(margin, expert_margin)


def _top(scores: Array, k: int) -> tuple[Array, float]:
    order = np.argsort(-scores, kind="stable")
    margin = scores[order[k - 1]] - scores[order[k]] if k < len(scores) else np.inf
    return order[:k], float(margin)


_ALWAYS_NORMALISED = "llama", "qwen3moe", "minimax-m2"  # by llama.cpp, without a key


class Naive:
    """A model read from a GGUF file by gguf-py.

    margins: (T,) smallest routing margin of each position over all layers, of the last logits() call. An indexer's
        counts as a CHOICE_SHARE of its scores' deviation: 16 bits of its keys move a score by more than a router's.
    chosen: bool (T, T) by layer with an indexer, of the last logits() call.
    """

    CHOICE_SHARE = 1 / 20

    def __init__(self, path: Path | str, *, group_score: str | None = None, whole_borders: bool = False) -> None:
        """whole_borders: gpt-oss's yarn as llama.cpp has it, not as the model was trained."""
        metadata, tensors = tiny_models.read(path)
        self.architecture = metadata["general.architecture"]
        self.tensors = {name: values.astype(np.float64) for name, values in tensors.items()}
        prefix = f"{self.architecture}."
        self.meta = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        self.eps = self.meta["attention.layer_norm_rms_epsilon"]
        self.n_heads = self.meta["attention.head_count"]
        self.n_layers = self.meta["block_count"] - self.meta.get("nextn_predict_layers", 0)
        self.group_score = group_score
        self.whole_borders = whole_borders or self.architecture != "gpt-oss"
        self.margins = np.empty(0)
        self.chosen: list[Array] = []
        self._layer = 0

    def logits(self, ids: list[int]) -> Array:
        """float64 (T, vocab)."""
        self.margins, self.chosen = np.full(len(ids), np.inf), []
        x = self.tensors["token_embd.weight"][ids]
        attention = self._mla if "attention.kv_lora_rank" in self.meta else self._gqa
        for i in range(self.n_layers):
            self._layer = i
            w = {n.removeprefix(f"blk.{i}."): t for n, t in self.tensors.items() if n.startswith(f"blk.{i}.")}
            w = {tiny_weights.common_name(self.architecture, name): tensor for name, tensor in w.items()}
            self.window = self.meta.get("attention.sliding_window", 0) * (i % 2 == 0)
            x = x + attention(rms_norm(x, w["attn_norm.weight"], self.eps), w)
            h = rms_norm(x, w["ffn_norm.weight"], self.eps)
            x = x + (self._moe(h, w) if "ffn_gate_inp.weight" in w else self._mlp(h, w, ""))
        x = rms_norm(x, self.tensors["output_norm.weight"], self.eps)
        return x @ self.tensors.get("output.weight", self.tensors["token_embd.weight"]).T

    def _mlp(self, h: Array, w: dict[str, Array], suffix: str) -> Array:
        return swiglu(h, *(w[f"ffn_{part}{suffix}.weight"] for part in ("gate", "up", "down")))

    def _rope(self) -> tuple[Array, float, float]:
        """(frequencies, magnitude of cos and sin, factor on the attention scale)."""
        n_dims, base = self.meta.get("rope.dimension_count"), self.meta["rope.freq_base"]
        n_dims = n_dims or self.meta["attention.key_length"]
        kind, factor = self.meta.get("rope.scaling.type"), self.meta.get("rope.scaling.factor", 1.0)
        plain = base ** (-2.0 * np.arange(n_dims // 2) / n_dims)
        if kind == "linear":
            return plain / factor, 1.0, 1.0
        if kind is None:
            return plain / self.tensors.get("rope_freqs.weight", 1.0), 1.0, 1.0
        original = self.meta["rope.scaling.original_context_length"]
        frequencies = yarn_frequencies(n_dims, base, factor, original, self.whole_borders)
        if "attention.kv_lora_rank" not in self.meta:
            return frequencies, 1 + 0.1 * math.log(factor), 1.0
        multiplier = self.meta.get("rope.scaling.yarn_log_multiplier")
        if multiplier is None:  # llama.cpp: both the rotated parts and the scale grow (no published config does this)
            mscale = 1 + 0.1 * math.log(factor)
            return frequencies, mscale, mscale**2
        return frequencies, 1.0, (1 + multiplier * math.log(factor)) ** 2

    def _mla(self, h: Array, w: dict[str, Array]) -> Array:
        rank, n_rope = self.meta["attention.kv_lora_rank"], self.meta["rope.dimension_count"]
        k_b, v_b = self._kv_b(w)
        n_nope = k_b.shape[1]
        if "attn_q.weight" in w:
            q = h @ w["attn_q.weight"].T
        else:
            q_latent = rms_norm(h @ w["attn_q_a.weight"].T, w["attn_q_a_norm.weight"], self.eps)
            q = q_latent @ w["attn_q_b.weight"].T
            if self._has_indexer():
                self.chosen.append(self._choose(h, q_latent, w))
        chosen = self.chosen[-1] if self.chosen else None
        q = q.reshape(len(h), self.n_heads, n_nope + n_rope)
        latent, k_rope = np.split(h @ w["attn_kv_a_mqa.weight"].T, [rank], axis=1)
        latent = rms_norm(latent, w["attn_kv_a_norm.weight"], self.eps)
        frequencies, magnitude, scale = self._rope()
        positions = np.arange(len(h))
        k_rope = rotate_pairs(k_rope, positions, frequencies, magnitude)
        q_rope = rotate_pairs(q[..., n_nope:], positions, frequencies, magnitude)
        scale /= math.sqrt(n_nope + n_rope)
        heads = []
        for head in range(self.n_heads):
            query = np.concatenate([q[:, head, :n_nope], q_rope[:, head]], axis=1)
            key = np.concatenate([latent @ k_b[head].T, k_rope], axis=1)
            heads.append(attend(query, key, latent @ v_b[head].T, scale, chosen=chosen))
        return np.concatenate(heads, axis=1) @ w["attn_output.weight"].T

    def _has_indexer(self) -> bool:
        """Whether this layer chooses; a shared layer's indexer counts for nothing."""
        types = self.meta.get("attention.indexer.types")
        if types is None and self.meta.get("context_length") >= 1 << 20:
            types = [i < 3 or (i - 2) % 4 == 0 for i in range(self.n_layers)]
        return "attention.indexer.top_k" in self.meta and (types is None or bool(types[self._layer]))

    def _choose(self, h: Array, q_latent: Array, w: dict[str, Array]) -> Array:
        """bool (T, T): the positions that each query attends to."""
        n_heads, top_k = self.meta["attention.indexer.head_count"], self.meta["attention.indexer.top_k"]
        n_rope, positions, (frequencies, _, _) = self.meta["rope.dimension_count"], np.arange(len(h)), self._rope()
        rotate = rotate_halves if self.architecture == "deepseek32" else rotate_pairs

        def rotated(x: Array) -> Array:
            return np.concatenate([rotate(x[..., :n_rope], positions, frequencies), x[..., n_rope:]], axis=-1)

        q = rotated((q_latent @ w["indexer.attn_q_b.weight"].T).reshape(len(h), n_heads, -1))
        k = h @ w["indexer.attn_k.weight"].T
        k = rotated(layer_norm(k, w["indexer.k_norm.weight"], w["indexer.k_norm.bias"], 1e-6))
        weights = h @ w["indexer.proj.weight"].T
        chosen = np.zeros((len(h), len(h)), bool)
        for t in range(len(h)):
            scores = weights[t] @ np.maximum(q[t] @ k[: t + 1].T, 0)
            best, margin = _top(scores, top_k)
            chosen[t, best] = True
            if t >= top_k:
                self.margins[t] = min(self.margins[t], margin / scores.std() * self.CHOICE_SHARE)
        return chosen

    def _kv_b(self, w: dict[str, Array]) -> tuple[Array, Array]:
        """(k_b (H, nope, C), v_b (H, v, C)) of the split or of the legacy form."""
        if "attn_k_b.weight" in w:
            return w["attn_k_b.weight"].transpose(0, 2, 1), w["attn_v_b.weight"]
        kv_b = w["attn_kv_b.weight"].reshape(self.n_heads, -1, self.meta["attention.kv_lora_rank"])
        n_nope = self.meta["attention.key_length"] - self.meta["rope.dimension_count"]
        return kv_b[:, :n_nope], kv_b[:, n_nope:]

    def _moe(self, h: Array, w: dict[str, Array]) -> Array:
        routing = self._routing()
        if "ffn_gate_up_exps.weight" in w:
            gates, ups = np.split(w["ffn_gate_up_exps.weight"], 2, axis=1)
        else:
            gates, ups = w["ffn_gate_exps.weight"], w["ffn_up_exps.weight"]
        out = self._mlp(h, w, "_shexp") if "ffn_gate_shexp.weight" in w else np.zeros_like(h)
        for t, logits in enumerate(h @ w["ffn_gate_inp.weight"].T + w.get("ffn_gate_inp.bias", 0.0)):
            experts, weights, margin = route(logits, w.get("exp_probs_b.bias"), routing)
            self.margins[t] = min(self.margins[t], margin)
            for expert, weight in zip(experts, weights, strict=True):
                down = w["ffn_down_exps.weight"][expert]
                if "ffn_gate_exps.bias" in w:
                    gate_bias, up_bias, down_bias = (w[f"ffn_{part}_exps.bias"] for part in ("gate", "up", "down"))
                    gate, up = gates[expert] @ h[t] + gate_bias[expert], ups[expert] @ h[t] + up_bias[expert]
                    out[t] += weight * (down @ bounded_swiglu(gate, up) + down_bias[expert])
                else:
                    out[t] += weight * swiglu(h[t], gates[expert], ups[expert], down)
        return out

    def _routing(self) -> Routing:
        softmax_gate = self.meta.get("expert_gating_func", 1) == 1
        scoring = "softmax" if softmax_gate else "sigmoid"
        if self.architecture == "gpt-oss":
            scoring = "softmax_after_topk"
        return Routing(
            scoring_func=scoring,
            num_experts_per_tok=self.meta["expert_used_count"],
            norm_topk_prob=self.meta.get(
                "expert_weights_norm", self.architecture in ("llama", "qwen3moe", "minimax-m2")
            ),
            routed_scaling_factor=self.meta.get("expert_weights_scale", 1.0),
            n_group=self.meta.get("expert_group_count", 1),
            topk_group=self.meta.get("expert_group_used_count", 1),
            group_score=self.group_score or ("best" if softmax_gate else "best two"),
        )

    def _gqa(self, h: Array, w: dict[str, Array]) -> Array:
        n_kv = self.meta["attention.head_count_kv"]
        if "attn_qkv.weight" in w:
            n_rows = self.meta["attention.key_length"] * np.array([self.n_heads, n_kv])
            q, k, v = np.split(h @ w["attn_qkv.weight"].T, np.cumsum(n_rows), axis=1)
        else:
            q, k, v = (h @ w[f"attn_{part}.weight"].T + w.get(f"attn_{part}.bias", 0.0) for part in "qkv")
        q_norm, k_norm = (w.get(f"attn_{part}_norm.weight", np.empty(0)) for part in "qk")
        if len(q_norm) == q.shape[1]:
            q, k = rms_norm(q, q_norm, self.eps), rms_norm(k, k_norm, self.eps)
        q, k, v = (x.reshape(len(h), n, -1) for x, n in ((q, self.n_heads), (k, n_kv), (v, n_kv)))
        if len(q_norm) == q.shape[2]:
            q, k = rms_norm(q, q_norm, self.eps), rms_norm(k, k_norm, self.eps)
        frequencies, magnitude, _ = self._rope()
        positions, n_rope = np.arange(len(h)), 2 * len(frequencies)
        rotate = rotate_pairs if self.architecture == "llama" else rotate_halves
        q, k = (
            np.concatenate([rotate(x[..., :n_rope], positions, frequencies, magnitude), x[..., n_rope:]], axis=-1)
            for x in (q, k)
        )
        scale = 1 / math.sqrt(q.shape[-1])
        shared_by = self.n_heads // n_kv
        sinks = w.get("attn_sinks.weight", np.full(self.n_heads, -np.inf))
        heads = [
            attend(q[:, i], k[:, i // shared_by], v[:, i // shared_by], scale, self.window, sinks[i])
            for i in range(self.n_heads)
        ]
        return np.concatenate(heads, axis=1) @ w["attn_output.weight"].T + w.get("attn_output.bias", 0.0)


_STEADY_MARGIN = 0.01


@functools.cache
def steady_prompt(path: Path, n: int, like: Path | None = None) -> list[int]:
    """n random tokens whose experts stay the same when activations move by a percent.

    One token that changes its experts costs as much as the rounding of a hundred that do not, and whether it does is
    luck. The variants used here choose experts by the token (Deepseek2.steady_routing) and hardly by its context, so
    tokens that are sure in one context are likely to be so in another.

    like: another file of the same variant, whose prompt is taken if it is steady here as well; that saves the search.
    """
    model = Naive(path)
    if like is not None:
        ids = steady_prompt(like, n)
        model.logits(ids)
        if model.margins.min() > _STEADY_MARGIN:
            return ids
    model.logits(list(range(200)))
    likely = np.flatnonzero(model.margins > 0.03)
    for seed in range(50):
        ids = np.random.default_rng(seed).choice(likely, n).tolist()
        model.logits(ids)
        if model.margins.min() > _STEADY_MARGIN:
            return ids
    raise AssertionError(f"no steady prompt among 50 for {path}")
