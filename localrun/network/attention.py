"""Attention of both kinds over the 16-bit cache: multi-head latent (MLA) and grouped-query (GQA).

Letters: T new tokens, S tokens in the cache (the new ones included), H heads, N heads handled at a time, D hidden_size,
C kv_lora_rank, R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim, G key-value heads.
Source: DeepSeek-V2 (arXiv 2405.04434, section 2.1 and appendix C), deepseek-ai/DeepSeek-V3 @9b4e978 inference/model.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import rms_norm

from localrun.limits import ATTENTION_WORK_BYTES
from localrun.models import names
from localrun.models.config import Config
from localrun.network.cache import Cache, exact_rows
from localrun.network.compressed import CompressedAttention
from localrun.network.indexer import Choice, Indexer
from localrun.network.rope import Rope, attention_scale
from localrun.network.weight_source import Seen, WeightSource, biased_linear


def in_groups(n: int, bytes_of_one: int, work_bytes: int) -> list[tuple[int, int]]:
    """(first, count) of the groups of n heads, or tokens, that fit the work memory together."""
    step = max(1, min(n, work_bytes // bytes_of_one))
    return [(first, min(step, n - first)) for first in range(0, n, step)]


def _module(config: Config, index: int, module: str) -> str:
    """The GGUF name of a module of a layer's attention."""
    return names.layer(config.architecture, index, f"self_attn.{module}")


class LatentAttention:
    """MLA: a token leaves one row of C + R values, shared by all heads.

    Two ways to the same scores. Absorbed: k_b moves the query into latent space and v_b moves the result out of it;
    cheap for few tokens. Decompressed: keys and values of every head are rebuilt from the cache; cheaper for many.
    Sparse attention, over the rows that an indexer has chosen for each token, is absorbed.

    Attributes:
        choice: of the layer's own indexer, or of that of a layer before; of one without rows attention is dense.
    """

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: Rope, cache_layer: int | None = None):
        """cache_layer: of the cache, where that is not `index`."""

        name = partial(_module, config, index)
        self.config, self.weights, self.rope = config, weights, rope
        self.cache_layer = index if cache_layer is None else cache_layer
        self.scale = attention_scale(config)
        if config.q_lora_rank is None:
            self.q_proj = weights.linear(name("q_proj"))
        else:
            self.q_a_proj = weights.linear(name("q_a_proj"))
            self.q_a_layernorm = weights.vector(name("q_a_layernorm"))
            self.q_b_proj = weights.linear(name("q_b_proj"))
        self.kv_a_proj_with_mqa = weights.linear(name("kv_a_proj_with_mqa"))
        self.kv_a_layernorm = weights.vector(name("kv_a_layernorm"))
        self.is_split = weights.has(name("k_b_proj"))
        if self.is_split:  # k_b (H, C, P), stored transposed; v_b (H, V, C)
            self.k_b_proj, self.v_b_proj = weights.heads(name("k_b_proj")), weights.heads(name("v_b_proj"))
        else:  # kv_b: (P + V, C) a head
            rows = (config.qk_nope_head_dim, config.v_head_dim)
            self.k_b_proj, self.v_b_proj = weights.split_heads(name("kv_b_proj"), config.num_attention_heads, rows)
        self.o_proj = weights.linear(name("o_proj"))
        self.indexer = Indexer(config, weights, index, rope) if config.chooses_rows(index) else None
        self.choice = Choice()

    def __call__(self, x_TD: torch.Tensor, cache: Cache) -> torch.Tensor:
        """float32 (T, D) of the tokens after cache.length -> (T, D); appends their rows to the cache."""
        turns = self.rope.turns(cache.length, x_TD.shape[0])
        queries_of = self._queries_of(x_TD)
        q_nope_THP, q_rope_THR = self._queries(queries_of, turns)
        rows = [torch.cat(self._latents(x_TD, turns), -1)]
        if self.indexer is None:
            (rows_SW,) = cache.append(self.cache_layer, *rows)
        else:
            rows_SW, keys_Sd = cache.append(self.cache_layer, *rows, self.indexer.keys(x_TD, turns))
            self.choice.rows_TK = self.indexer.choose(x_TD, queries_of, keys_Sd, turns)
        rows_SW = exact_rows(rows_SW, cache)
        if self.choice.rows_TK is not None:
            return self.o_proj(self._over_chosen(q_nope_THP, q_rope_THR, rows_SW).flatten(1))
        absorb = not self.k_b_proj.may_expand or self._absorbing_is_cheaper(x_TD.shape[0])
        attend = self._absorbed if absorb else self._decompressed
        return self.o_proj(attend(q_nope_THP, q_rope_THR, rows_SW).flatten(1))

    def _queries_of(self, x_TD: torch.Tensor) -> torch.Tensor:
        """What queries are projected from: x, or their own latents."""
        c = self.config
        if c.q_lora_rank is None:
            return x_TD
        return rms_norm(self.q_a_proj(x_TD), (c.q_lora_rank,), self.q_a_layernorm, c.rms_norm_eps)

    def _queries(self, queries_of: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        q = self.q_proj(queries_of) if c.q_lora_rank is None else self.q_b_proj(queries_of)
        q_nope, q_rope = q.unflatten(1, (c.num_attention_heads, -1)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        return q_nope, self.rope.rotate(q_rope, turns)

    def _latents(self, x_TD: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        c = self.config
        latent, k_rope = self.kv_a_proj_with_mqa(x_TD).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = rms_norm(latent, (c.kv_lora_rank,), self.kv_a_layernorm, c.rms_norm_eps)
        return latent, self.rope.rotate(k_rope[:, None], turns)[:, 0]

    def _absorbing_is_cheaper(self, n_tokens: int) -> bool:
        """Multiplications a cached token and head: T*(2C + R) against (P + V)*C + T*(P + V + R)."""
        c = self.config
        decompressed = c.qk_nope_head_dim + c.v_head_dim
        return n_tokens * (2 * c.kv_lora_rank - decompressed) < decompressed * c.kv_lora_rank

    def _absorbed(self, q_nope_THP, q_rope_THR, rows_SW) -> torch.Tensor:
        """(T, H, V) by attending in latent space."""
        q_latent_THC, rows_S1W = self._into_latent(q_nope_THP), rows_SW[:, None]
        mixed_THC = torch.empty_like(q_latent_THC)
        queries_THW = torch.cat([q_latent_THC, q_rope_THR], -1)
        self.weights.attend([(queries_THW, rows_S1W)], self._parts(rows_S1W)[0], self.scale, mixed_THC)
        return self.v_b_proj(mixed_THC)

    def _into_latent(self, q_nope_THP: torch.Tensor) -> torch.Tensor:
        return self.k_b_proj(q_nope_THP) if self.is_split else self.k_b_proj.transposed(q_nope_THP)

    def _over_chosen(self, q_nope_THP, q_rope_THR, rows_SW) -> torch.Tensor:
        """(T, H, V) by attending in latent space, each token to the rows of its choice; some tokens at a time."""
        c, rows_TK, n_tokens = self.config, self.choice.rows_TK, q_nope_THP.shape[0]
        bytes_per_token = 2 * 4 * c.num_attention_heads * c.kv_lora_rank
        results = []
        for first, count in in_groups(n_tokens, bytes_per_token, ATTENTION_WORK_BYTES):
            some = slice(first, first + count)
            q_latent_THC = self._into_latent(q_nope_THP[some])
            mixed_THC, n_before = torch.empty_like(q_latent_THC), rows_SW.shape[0] - n_tokens + first
            parts = [q_latent_THC, q_rope_THR[some]]
            seen = Seen(n_before, rows_SW, chosen_TK=rows_TK[some])
            self.weights.attend_chosen(parts, seen, self.scale, mixed_THC)
            results.append(self.v_b_proj(mixed_THC))
        return torch.cat(results)

    def _decompressed(self, q_nope_THP, q_rope_THR, rows_SW) -> torch.Tensor:
        """(T, H, V) by rebuilding each head's keys and values."""
        c, n_tokens, n_cached = self.config, q_nope_THP.shape[0], rows_SW.shape[0]
        out_THV = q_nope_THP.new_empty(n_tokens, c.num_attention_heads, c.v_head_dim)
        if rows_SW.dtype == torch.float16 and self.weights.attend_rebuilt is not None:
            matrices = self.k_b_proj, self.v_b_proj, self.is_split
            self.weights.attend_rebuilt([q_nope_THP, q_rope_THR], rows_SW, *matrices, self.scale, out_THV)
            return out_THV
        latent_SC, k_rope_SR = self._parts(rows_SW.float())
        bytes_per_head = 4 * n_cached * (c.qk_nope_head_dim + c.v_head_dim)
        for first, count in in_groups(c.num_attention_heads, bytes_per_head, ATTENTION_WORK_BYTES):
            heads = slice(first, first + count)
            k_b, v_b = self.k_b_proj.dense(first, count), self.v_b_proj.dense(first, count)
            k_NSP, v_NSV = latent_SC @ (k_b if self.is_split else k_b.mT), latent_SC @ v_b.mT
            parts = [(q_nope_THP[:, heads], k_NSP.transpose(0, 1)), (q_rope_THR[:, heads], k_rope_SR[:, None])]
            self.weights.attend(parts, v_NSV.transpose(0, 1), self.scale, out_THV[:, heads])
        return out_THV

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents and rotated keys of cache rows (..., C + R)."""
        return rows.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)


class GroupedQueryAttention:
    """GQA: G heads of keys and values, each shared by H / G query heads."""

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: Rope, cache_layer: int | None = None):
        """As LatentAttention."""
        self.config, self.weights, self.rope = config, weights, rope
        self.cache_layer = index if cache_layer is None else cache_layer
        self.scale = attention_scale(config)
        name = partial(_module, config, index)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            biased_linear(weights, name(f"{part}_proj")) for part in "qkvo"
        )
        self.q_norm, self.k_norm = (weights.vector(name(f"{part}_norm")) if config.qk_norm else None for part in "qk")
        self.window, sinks = config.window(index), name("sinks")
        self.sinks = weights.vector(sinks) if weights.has(sinks) else None

    def __call__(self, x_TD: torch.Tensor, cache: Cache) -> torch.Tensor:
        """float32 (T, D) of the tokens after cache.length -> (T, D); appends their keys and values to the cache."""
        c, n_tokens = self.config, x_TD.shape[0]
        turns = self.rope.turns(cache.length, n_tokens)
        q_THd = self._heads(self.q_proj(x_TD), self.q_norm, turns)
        k_TGd = self._heads(self.k_proj(x_TD), self.k_norm, turns)
        keys, values = cache.append(self.cache_layer, k_TGd.flatten(1), self.v_proj(x_TD))
        k_SGd = exact_rows(keys, cache).unflatten(1, (-1, c.head_dim))
        v_SGV = exact_rows(values, cache).unflatten(1, (-1, c.v_head_dim))
        out_THV = x_TD.new_empty(n_tokens, c.num_attention_heads, c.v_head_dim)
        self.weights.attend([(q_THd, k_SGd)], v_SGV, self.scale, out_THV, self.window, self.sinks)
        return self.o_proj(out_THV.flatten(1))

    def _heads(self, x: torch.Tensor, norm: torch.Tensor | None, turns: torch.Tensor) -> torch.Tensor:
        """float32 (T, H * d) -> (T, H, d), normed if the model does so, the first R values of each head rotated."""
        c = self.config
        x_THd, rope_dim = x.unflatten(1, (-1, c.head_dim)), c.qk_rope_head_dim
        if norm is not None and c.qk_norm_whole:
            x_THd = rms_norm(x, x.shape[1:], norm, c.rms_norm_eps).view_as(x_THd)
        elif norm is not None:
            x_THd = rms_norm(x_THd, (c.head_dim,), norm, c.rms_norm_eps)
        rotated = self.rope.rotate(x_THd[..., :rope_dim], turns)
        return rotated if rope_dim == x_THd.shape[-1] else torch.cat([rotated, x_THd[..., rope_dim:]], -1)


def attention(
    config: Config, weights: WeightSource, index: int, rope: Rope, cache_layer: int | None = None
) -> LatentAttention | GroupedQueryAttention | CompressedAttention:
    """The attention of layer `index`, of the model's kind."""
    if config.attention == "compressed":
        return CompressedAttention(config, weights, index, rope, cache_layer)
    kind = LatentAttention if config.attention == "mla" else GroupedQueryAttention
    return kind(config, weights, index, rope, cache_layer)
