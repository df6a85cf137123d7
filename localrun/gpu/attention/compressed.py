"""DeepSeek-V4's attention on the device: the network's for prompts, over blocks there; kernels for a step.

Letters: T tokens, H heads, d head_dim, D hidden_size, I the indexer's heads, i index_head_dim, K index_topk.
"""

from typing import Any

import torch
from torch.nn.functional import rms_norm

from localrun.gpu.attention import compressed_decoding, compressed_rows
from localrun.gpu.attention.compressed_decoding import Attending
from localrun.gpu.attention.compressed_rows import Opening
from localrun.gpu.attention.flash_decoding import dtype_of_products, pieces_for
from localrun.gpu.attention.indexer import choose_by
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.compressed import CompressedCache
from localrun.gpu.caches.places import Places
from localrun.gpu.matrices.linear import Joined
from localrun.models.config import Config
from localrun.network import compressed
from localrun.network.weight_source import Seen, WeightSource


class DeviceRope:
    """As network.rope.Rope for those that ask for turns of positions in a row; these come from the tables there."""

    def __init__(self, turns: Turns):
        self.tables = turns
        self.rotate_last = turns.rope.rotate_last

    def turns(self, start: int, n_tokens: int, step: int = 1) -> torch.Tensor:
        """As Rope.turns, on the device."""
        return self.tables.at(torch.arange(start, start + step * n_tokens, step, device=self.tables.fine.device))


class CompressedAttention(compressed.CompressedAttention):
    """One layer's, over a cache on the device."""

    def __init__(self, config: Config, weights: WeightSource, index: int, turns: Turns):
        """As gpu.attention.LatentAttention."""
        self.tables, device = turns, turns.fine.device
        self.dtype = dtype_of_products(device)
        super().__init__(config, weights, index, DeviceRope(turns))
        self.n_pieces = pieces_for(config, device)
        both = self.compressor, None if self.indexer is None else self.indexer.compressor
        self._compressors = [each for each in both if each is not None]
        readers = [self.q_a_proj, self.kv_proj]
        for each in self._compressors:
            readers += [each.kv_proj, each.gate_proj]
        self._first = Joined(readers if self.indexer is None else [*readers, self.indexer.weights_proj])

    def new_indexer(self, *arguments: Any) -> "Indexer":
        """Over keys on the device."""
        return Indexer(*arguments, self.layer, self.dtype)

    def __call__(self, x_TD: torch.Tensor, cache: CompressedCache | Places) -> torch.Tensor:
        """float32 (T, D) of the tokens after the cache's, or at places -> (T, D); writes their rows.

        There must be room (check_room). Places are for few tokens: no more than a ring has spare rows.
        """
        return self._step(x_TD, cache) if isinstance(cache, Places) else super().__call__(x_TD, cache)

    def attend(self, q_THd: torch.Tensor, seen: Seen, turns: torch.Tensor) -> torch.Tensor:
        """As the network's, of a prompt."""
        c, device = self.config, q_THd.device
        positions_T = torch.arange(seen.n_before, seen.n_before + len(q_THd), device=device)
        q_THd = compressed_rows.turned_heads(q_THd, positions_T, self.tables, c.qk_rope_head_dim, c.rms_norm_eps)
        is_exact = seen.window_SW.dtype == torch.float32
        return compressed_decoding.attend_seen(self._attending(is_exact), q_THd, positions_T, seen)

    def _step(self, x_TD: torch.Tensor, places: Places) -> torch.Tensor:
        c, layer, tables, chosen_TK = self.config, self.layer, self.tables, None
        q_TQ, kv_TW, *pooling = self._first(x_TD)
        q_TQ = rms_norm(q_TQ, (c.q_lora_rank,), self.q_a_norm, c.rms_norm_eps)
        q_THd = self.q_b_proj(q_TQ).unflatten(1, (c.num_attention_heads, -1))
        q_THd = compressed_rows.turned_heads(q_THd, places.positions, tables, c.qk_rope_head_dim, c.rms_norm_eps)
        openings = [
            Opening(values, gates, each.position_bias, each.kv_norm)
            for each, values, gates in zip(self._compressors, pooling[::2], pooling[1::2], strict=False)
        ]
        compressed_rows.append(kv_TW, self.kv_norm, openings, tables, places, layer, c)
        if self.indexer is not None:
            chosen_TK = self.indexer.choose(pooling[-1], q_TQ, places)
        mixed_THd = compressed_decoding.attend_at(self._attending(places.is_exact), q_THd, places, chosen_TK)
        return self.output(mixed_THd)

    def _attending(self, is_exact: bool) -> Attending:
        dtype = torch.float32 if is_exact else self.dtype
        return Attending(self.config, self.layer, self.tables, self.sinks, self.scale, self.n_pieces, dtype)


class Indexer(compressed.Indexer):
    """Which pooled rows each token attends to, by keys on the device."""

    def __init__(self, config: Config, weights: WeightSource, index: int, rope: DeviceRope, layer: int, dtype: Any):
        """layer: of the cache. dtype: of products over a cache that is not exact."""
        super().__init__(config, weights, index, rope)
        self.layer, self.dtype = layer, dtype

    def __call__(
        self, x_TD: torch.Tensor, q_TQ: torch.Tensor, cache: CompressedCache, turns: torch.Tensor
    ) -> torch.Tensor | None:
        """As the network's, of a prompt; rows that a token does not see come last."""
        self.compressor(x_TD, cache, compressed.KEYS)
        return self.choose(self.weights_proj(x_TD), q_TQ, cache.places(len(x_TD), x_TD.device))

    def choose(self, weights_TI: torch.Tensor, q_TQ: torch.Tensor, places: Places) -> torch.Tensor | None:
        """int32 (T, K) of tokens whose keys are in the cache; None if all attend to all that they see."""
        c, ratio = self.config, self.compressor.ratio
        if not 0 < c.index_topk < places.most // ratio:
            return None
        q_TIi = self.q_b_proj(q_TQ).unflatten(1, (c.index_n_heads, -1))
        q_TIi = compressed_rows.turned_heads(q_TIi, places.positions, self.rope.tables, c.qk_rope_head_dim, None)
        dtype = torch.float32 if places.is_exact else self.dtype
        return choose_by(q_TIi, weights_TI, places, self.layer, c.index_topk, dtype, ratio)
