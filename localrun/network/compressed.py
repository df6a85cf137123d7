"""Attention over a window and over pooled rows (DeepSeek-V4).

A token leaves one row, which is key and value of all heads. The last R values of queries and rows are rotated; those of
the output are turned back by the query's position, so that values depend on distances alone. Each head has a sink, a
logit more of its softmax without a value. Heads' outputs are projected in groups, and then together.

Letters: T new tokens, H heads, d head_dim, R qk_rope_head_dim, D hidden_size, Q q_lora_rank, P pooled rows, I the
indexer's heads, i index_head_dim, K index_topk, S rows that are attended to.
Source: DeepSeek-V4's report, section 2.3; transformers 5.24, models/deepseek_v4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import rms_norm

from localrun.models import names
from localrun.models.config import Config
from localrun.network.cache import Cache, exact_rows
from localrun.network.compressor import Compressor
from localrun.network.rope import Rope, attention_scale
from localrun.network.weight_source import Seen, Turned, WeightSource

_ROW, _POOLED, KEYS = 0, 1, 3  # parts of a layer of the cache: Config.rows


class CompressedAttention:
    """One layer's, with pooled rows or without."""

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: Rope, cache_layer: int | None = None):
        """cache_layer: of the cache, where that is not `index`."""

        def name(module: str) -> str:
            return names.layer(config.architecture, index, f"self_attn.{module}")

        self.config, self.weights, self.rope = config, weights, rope
        self.layer = index if cache_layer is None else cache_layer
        self.scale, self.ratio = attention_scale(config), config.compress_ratio(index)
        self.q_a_proj, self.q_b_proj, self.kv_proj, self.o_b_proj = (
            weights.linear(name(module)) for module in ("q_a_proj", "q_b_proj", "kv_proj", "o_b_proj")
        )
        self.q_a_norm, self.kv_norm, self.sinks = (weights.vector(name(m)) for m in ("q_a_norm", "kv_norm", "sinks"))
        self.o_a_proj = weights.heads(name("o_a_proj"), config.o_groups)
        self.compressor = self.indexer = None
        if self.ratio:
            self.compressor = Compressor(config, weights, lambda part: name(f"compressor.{part}"), index, rope)
        if config.has_indexer(index):
            self.indexer = self.new_indexer(config, weights, index, rope)

    def new_indexer(self, *arguments: Any) -> Indexer:
        """As Indexer is made."""
        return Indexer(*arguments)

    def __call__(self, x_TD: torch.Tensor, cache: Cache) -> torch.Tensor:
        """float32 (T, D) of the tokens after cache.length -> (T, D); appends their rows to the cache."""
        c, n_tokens, start = self.config, x_TD.shape[0], cache.length
        turns = self.rope.turns(start, n_tokens)
        q_TQ, q_THd = self.queries(x_TD)
        row_Td = rms_norm(self.kv_proj(x_TD), (c.head_dim,), self.kv_norm, c.rms_norm_eps)
        cache.check_room(n_tokens)
        window_Sd = cache.extend(self.layer, _ROW, self.rope.rotate_last(row_Td[:, None], turns)[:, 0])
        window_Sd = exact_rows(window_Sd, cache)
        pooled_Pd = chosen_TK = None
        if self.compressor is not None:
            pooled_Pd = exact_rows(self.compressor(x_TD, cache, _POOLED), cache)
        if self.indexer is not None:
            chosen_TK = self.indexer(x_TD, q_TQ, cache, turns)
        seen = Seen(start, pooled_Pd, self.ratio, chosen_TK, window_Sd, c.sliding_window)
        return self.output(self.attend(q_THd, seen, turns))

    def queries(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries are projected from, normed, (T, Q), and these, (T, H, d), neither normed nor turned."""
        c = self.config
        q_TQ = rms_norm(self.q_a_proj(x_TD), (c.q_lora_rank,), self.q_a_norm, c.rms_norm_eps)
        return q_TQ, self.q_b_proj(q_TQ).unflatten(1, (c.num_attention_heads, -1))

    def attend(self, q_THd: torch.Tensor, seen: Seen, turns: torch.Tensor) -> torch.Tensor:
        """(T, H, d) of queries as they are projected, whose memory it takes."""
        turned = Turned(turns, self.config.rms_norm_eps)
        self.weights.attend_chosen([q_THd], seen, self.scale, q_THd, self.sinks, turned)
        return q_THd

    def output(self, mixed_THd: torch.Tensor) -> torch.Tensor:
        """(T, D): projected in groups, and then together."""
        return self.o_b_proj(self.o_a_proj(mixed_THd.flatten(1).unflatten(1, (self.config.o_groups, -1))).flatten(1))


class Indexer:
    """Which pooled rows each query attends to: the index_topk with the largest scores, of equals the first."""

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: Rope):
        def name(module: str) -> str:
            return names.layer(config.architecture, index, f"self_attn.compressor.indexer.{module}")

        self.config, self.weights, self.rope = config, weights, rope
        self.q_b_proj, self.weights_proj = weights.linear(name("q_b_proj")), weights.linear(name("weights_proj"))
        self.compressor = Compressor(config, weights, name, index, rope)

    def __call__(self, x_TD, q_TQ, cache: Cache, turns: torch.Tensor) -> torch.Tensor | None:
        """int32 (T, K), rows that each token attends to, -1 behind them; None if all attend to all that they see."""
        c, start = self.config, cache.length
        keys_Pi = self.compressor(x_TD, cache, KEYS)
        if not 0 < c.index_topk < keys_Pi.shape[0]:
            return None
        q_TIi = self.rope.rotate_last(self.q_b_proj(q_TQ).unflatten(1, (c.index_n_heads, -1)), turns)
        weights_TI, chosen_TK = self.weights_proj(x_TD), torch.empty(x_TD.shape[0], c.index_topk, dtype=torch.int32)
        ratio = self.compressor.ratio
        for first in range(min(ratio, x_TD.shape[0])):  # of every ratio-th token each sees one row more
            some = slice(first, None, ratio)
            chosen_TK[some] = self._choose(q_TIi[some], weights_TI[some], keys_Pi, (start + first + 1) // ratio)
        return chosen_TK

    def _choose(self, q_TIi, weights_TI, keys_Pi, seen: int) -> torch.Tensor:
        """Of tokens that see `seen` rows, and each one more than the one before."""
        top_k, n_tokens = self.config.index_topk, q_TIi.shape[0]
        chosen_TK = torch.arange(top_k, dtype=torch.int32).repeat(n_tokens, 1)
        n_seen = seen + torch.arange(n_tokens)
        chosen_TK[chosen_TK >= n_seen[:, None]] = -1
        many = max(0, top_k + 1 - seen)  # the first that has a choice
        if many < n_tokens:
            keys = keys_Pi[: seen + n_tokens - 1]
            chosen_TK[many:] = self.weights.choose_rows(q_TIi[many:], weights_TI[many:], keys, top_k)
        return chosen_TK
