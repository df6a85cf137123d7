"""Pooled rows: one for 4 or 128 tokens, of their values weighed dimension by dimension (DeepSeek-V4).

A token's values and weights are a and g, m parts each. With m = 1 a row is pooled of its own window's tokens. With
m = 2 (ratio 4) windows overlap: a row is pooled of the first parts of the window before and the second ones of its own.
The cache keeps a and g of the tokens that rows to come need, so that a text may go on, or back, in the middle of a
window; a row is there as soon as its last token is, for that token's own query already.

Letters: T new tokens, P pooled rows, D hidden_size, r ratio, d values of a row.
Source: DeepSeek-V4's report, section 2.3; transformers 5.24, models/deepseek_v4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import rms_norm

from localrun.models.config import Config
from localrun.network.cache import Cache
from localrun.network.rope import Rope
from localrun.network.weight_source import WeightSource


class Compressor:
    """What one layer pools, for its attention or for its indexer."""

    def __init__(self, config: Config, weights: WeightSource, name: Callable[[str], str], index: int, rope: Rope):
        """name: the GGUF name of a part; index: of the layer."""
        self.config, self.rope, self.layer, self.ratio = config, rope, index, config.compress_ratio(index)
        self.kv_proj, self.gate_proj = weights.linear(name("kv_proj")), weights.linear(name("gate_proj"))
        self.position_bias = weights.vector(name("position_bias"))
        self.kv_norm = weights.vector(name("kv_norm"))

    def __call__(self, x_TD: torch.Tensor, cache: Cache, part: int) -> torch.Tensor:
        """All pooled rows after float32 (T, D) of the tokens after cache.length, (P, d), in the cache's type.

        part: of the cache's layer, for pooled rows; what they are pooled of is the next one.
        """
        start, ratio, n_tokens = cache.length, self.ratio, x_TD.shape[0]
        bias = self.position_bias[torch.arange(start, start + n_tokens, device=x_TD.device) % ratio]
        rows = torch.cat([self.kv_proj(x_TD), self.gate_proj(x_TD) + bias], -1)
        seen = cache.extend(self.layer, part + 1, rows)
        first, last = start // ratio, (start + n_tokens) // ratio  # rows that are new
        if first == last:
            return cache.extend(self.layer, part, seen.new_empty(0, self.kv_norm.shape[0]))
        values, weights = self._windows(seen, first, last - first).chunk(2, -1)
        pooled_Pd = (values * weights.softmax(1)).sum(1)
        pooled_Pd = rms_norm(pooled_Pd, pooled_Pd.shape[1:], self.kv_norm, self.config.rms_norm_eps)
        turns = self.rope.turns(first * ratio, last - first, ratio)
        return cache.extend(self.layer, part, self.rope.rotate_last(pooled_Pd[:, None], turns)[:, 0])

    def _windows(self, seen: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """a and g, (count, tokens of a row, 2 d), of rows from `first` on; seen: rows of the cache (tokens, 2 m d)."""
        width, ratio = self.kv_norm.shape[0], self.ratio
        if seen.shape[1] == 2 * width:
            return seen[: count * ratio].unflatten(0, (count, ratio))
        if first == 0:  # nothing before the first window, with no weight
            nothing = seen.new_zeros(ratio, 4 * width)
            nothing[:, 2 * width :] = float("-inf")
            seen = torch.cat([nothing, seen])
        parts = seen[: (count + 1) * ratio].unflatten(0, (count + 1, ratio)).unflatten(-1, (2, 2, width))
        return torch.cat([parts[:-1, :, :, 0], parts[1:, :, :, 1]], 1).flatten(-2)
