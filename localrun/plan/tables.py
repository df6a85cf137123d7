"""What a token costs: bytes of KV cache, and FLOPs in training and in decoding.

Conventions of DeepSeek's tables (arXiv 2505.09343): a multiplication and an addition are two FLOPs; training takes
three times the forward pass; attention is causal; the input embedding, being a look-up, and layers for multi-token
prediction do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun.models.config import Config
from localrun.models.rows import KV_BYTES
from localrun.plan.known import load_data
from localrun.plan.shapes import ModelShape, from_config, known_config, load_model
from localrun.plan.speed import attention_flops

TRAINING_TOKENS = 4096  # the sequence length of the published table


@dataclass(frozen=True)
class Heads:
    """Attention's sizes: heads, those with keys of their own, values a key and a value head have."""

    n_heads: int
    n_kv_heads: int
    key_dim: int
    value_dim: int


def heads_of(c: Config) -> Heads:
    """Of a latent model: those of the attention that the latent stands for."""
    if c.attention == "mla":
        key_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        return Heads(c.num_attention_heads, c.num_attention_heads, key_dim, c.v_head_dim)
    return Heads(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.v_head_dim)


def kv_row(name: str) -> dict[str, Any]:
    """KV cache bytes a token in 16 bits: as it is, and as it would be with all heads (MHA), 8 (GQA), one (MQA)."""
    config = known_config(name)
    heads, n_layers = heads_of(config), config.num_hidden_layers
    one = n_layers * (heads.key_dim + heads.value_dim) * KV_BYTES
    return {
        "model": name,
        "attention": "MLA" if config.attention == "mla" else "GQA" if heads.n_kv_heads < heads.n_heads else "MHA",
        "bytes_per_token": config.kv_bytes_per_token,
        "mha": heads.n_heads * one,
        "gqa8": 8 * one,
        "mqa": one,
        **_published(name, "kv_bytes_per_token", config.kv_bytes_per_token),
    }


def active_weights(model: ModelShape) -> float:
    """Weights that multiply a token: all but the embedding, of the routed experts those that are chosen."""
    groups, c = model.groups(), model.config
    total = 0.0
    for group, tensors in groups.items():
        weights = sum(tensor.n_weights for tensor in tensors)
        if group == "routed experts":
            total += weights * c.num_experts_per_tok / c.n_routed_experts
        elif group == "embedding" and "head" in groups:
            continue
        elif group != "mtp":
            total += weights
    return total


def training_flops(model: ModelShape, n_tokens: int = TRAINING_TOKENS) -> float:
    """FLOPs a token of forward and backward pass over sequences of n_tokens."""
    heads = heads_of(model.config)
    # a token attends to half the sequence on average; 2 FLOPs, twice (scores, values), times 3
    attention = 3 * n_tokens * model.config.num_hidden_layers * heads.n_heads * (heads.key_dim + heads.value_dim)
    return 6 * active_weights(model) + attention


def decoding_flops(model: ModelShape, ctx: int = TRAINING_TOKENS) -> float:
    """FLOPs of one decoding step with ctx tokens in the cache."""
    return 2 * active_weights(model) + attention_flops(model, ctx, 1)


def compute_row(name: str) -> dict[str, Any]:
    """Parameters and GFLOP a token, beside what is published."""
    model = load_model(name)
    training = training_flops(model) / 1e9
    return {
        "model": name,
        "parameters": sum(t.n_weights for group, ts in model.groups().items() if group != "mtp" for t in ts),
        "active": round(active_weights(model)),
        "training_gflop_per_token": round(training, 2),
        "decoding_gflop_per_token": round(decoding_flops(model) / 1e9, 2),
        **_published(name, "training_gflop_per_token", training),
        "with_published_shape": _as_published(name),
    }


def _as_published(name: str) -> float | None:
    """Training GFLOP a token of the shape that a published figure seems to mean, where it is not the model's."""
    entry = load_data("models")[name]
    other = entry["published"].get("training_gflop_per_token", {}).get("with")
    if other is None:
        return None
    model = from_config(entry["config"] | other, Path(name), name=entry["title"])
    return round(training_flops(model) / 1e9, 2)


def _published(name: str, key: str, value: float) -> dict[str, Any]:
    entry = load_data("models")[name]["published"].get(key)
    if entry is None:
        return {"published": None, "difference_percent": None, "note": None}
    difference = round(100 * (value / entry["value"] - 1), 2)
    return {"published": entry["value"], "difference_percent": difference, "note": entry.get("note")}
