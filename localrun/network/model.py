"""The network: embedding, layers, norm, head, and the head for multi-token prediction. Once for every device: what runs
where is its weights' business (weight_source.py).

Letters: T tokens, D hidden_size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import rms_norm

from localrun.models import names
from localrun.models.config import Config
from localrun.network.attention import attention
from localrun.network.cache import Cache
from localrun.network.hyper import HyperConnection, HyperHead
from localrun.network.moe import MLP, MoE
from localrun.network.rope import Rope, compressed_rope
from localrun.network.weight_source import Finish, WeightSource

# float32 (T, D) of the tokens after cache.length -> (T, D); appends their rows to the cache.
Attention = Callable[[torch.Tensor, Cache], torch.Tensor]
MakeAttention = Callable[[Config, WeightSource, int, Rope], Attention]  # of the layer with this index


class Layer:
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: Config, weights: WeightSource, index: int, self_attn: Attention):
        self.config, self.self_attn = config, self_attn
        name = partial(names.layer, config.architecture, index)
        self.input_layernorm = weights.vector(name("input_layernorm"))
        self.post_attention_layernorm = weights.vector(name("post_attention_layernorm"))
        is_moe = weights.has(name("mlp.gate"))
        self.mlp = MoE(config, weights, index) if is_moe else MLP(config, weights, index, "mlp")

    def __call__(self, x_TD: torch.Tensor, cache: Cache, ids_T: torch.Tensor | None = None) -> torch.Tensor:
        """float32 (T, D) -> (T, D); appends to the cache. ids_T: the tokens, where experts may follow from them."""
        return self.begin(x_TD, cache, ids_T)()

    def begin(self, x_TD: torch.Tensor, cache: Cache, ids_T: torch.Tensor | None = None) -> Finish:
        """All but waiting for experts that compute elsewhere: the result's call does that and gives (T, D)."""
        c = self.config
        x_TD = x_TD + self.self_attn(rms_norm(x_TD, (c.hidden_size,), self.input_layernorm, c.rms_norm_eps), cache)
        finish = self.mlp.begin(rms_norm(x_TD, (c.hidden_size,), self.post_attention_layernorm, c.rms_norm_eps), ids_T)
        return lambda: x_TD + finish()


class HyperLayer(Layer):
    """The same between hyper-connections, for streams in place of x: float32 (T, n, D)."""

    def __init__(self, config: Config, weights: WeightSource, index: int, self_attn: Attention):
        super().__init__(config, weights, index, self_attn)
        name = partial(names.layer, config.architecture, index)
        self.attn_hc, self.ffn_hc = (
            HyperConnection(config, weights, lambda part, hc=hc: name(f"{hc}.{part}")) for hc in ("attn_hc", "ffn_hc")
        )

    def begin(self, x_TnD: torch.Tensor, cache: Cache, ids_T: torch.Tensor | None = None) -> Finish:
        """As Layer.begin."""
        x_TD, expand = self.attn_hc(x_TnD, self.input_layernorm)
        x_TnD = expand(self.self_attn(x_TD, cache))
        x_TD, expand = self.ffn_hc(x_TnD, self.post_attention_layernorm)
        finish = self.mlp.begin(x_TD, ids_T)
        return lambda: expand(finish())


def layer_kind(config: Config) -> type[Layer]:
    """What the model's layers are."""
    return HyperLayer if config.hc_mult else Layer


def hyper_head(config: Config, weights: WeightSource) -> HyperHead | None:
    """What makes one vector of streams, where there are any."""
    return HyperHead(config, weights, "output_hc_{}.weight".format) if config.hc_mult else None


class Network:
    """A model of a declared architecture over the tensors of a file.

    Attributes:
        watched: layers of streams whose means are `hidden`, if any.
    """

    watched: tuple[int, ...] = ()

    def __init__(self, config: Config, weights: WeightSource, make_attention: MakeAttention = attention):
        """make_attention: a device's own; it gets the same `rope` for all layers."""
        self.config, self.weights = config, weights
        factors = weights.array(names.ROPE_FREQS) if weights.has(names.ROPE_FREQS) else None
        self.rope = Rope(config if not config.compress_ratios else replace(config, rope_scaling=None), factors)
        pooled = compressed_rope(config) if config.compress_ratios else self.rope
        self.embed_tokens = weights.embedding(names.EMBED_TOKENS)
        ropes = [pooled if config.compress_ratio(i) else self.rope for i in range(config.num_hidden_layers)]
        self.layers = [
            layer_kind(config)(config, weights, index, make_attention(config, weights, index, rope))
            for index, rope in enumerate(ropes)
        ]
        self.hc_head = hyper_head(config, weights)
        self._share_choices()
        self.norm = weights.vector(names.NORM)
        self.lm_head = weights.linear(names.lm_head(weights.has))

    def _share_choices(self) -> None:
        """Layers without an indexer attend to what the last one with one has chosen."""
        layers = self.layers if self.config.indexer_types and self.config.index_topk else []
        for index, (before, layer) in enumerate(pairwise(layers), 1):
            if not self.config.chooses_rows(index):
                layer.self_attn.choice = before.self_attn.choice

    @torch.inference_mode()
    def forward(
        self, ids: Sequence[int], cache: Cache, all_logits: bool = False, all_hidden: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate ids after the cache's tokens; the cache then holds them too.

        Returns:
            What the head reads of each token with all_logits or all_hidden, else of the last, float32 (T, D) or (1, D);
            of streams what they are before, (T, n * D), or their means behind watched layers.
            Logits, float32 (T, vocab) with all_logits, else (1, vocab), those of the last token.

        Raises:
            ContextFullError: the cache has no room for them.
        """
        ids_T = torch.tensor(ids, dtype=torch.int64)
        x_TD = self.first(ids_T)
        kept, means = slice(None if all_logits or all_hidden else -1, None), []
        for index, layer in enumerate(self.layers):
            x_TD = layer(x_TD, cache, ids_T)
            means += [x_TD[kept].mean(1)] if index in self.watched else []
        cache.advance(len(ids))
        hidden, x_TD = self.last(x_TD[kept])
        hidden = torch.cat(means, -1) if means else hidden
        return hidden.cpu().numpy(), self.lm_head(x_TD if all_logits else x_TD[-1:]).cpu().numpy()

    def first(self, ids_T: torch.Tensor) -> torch.Tensor:
        """What the first layer takes of int64 (T,): float32 (T, D), or streams (T, n, D)."""
        x_TD = self.embed_tokens(ids_T)
        return x_TD if self.hc_head is None else x_TD[:, None].repeat(1, self.config.hc_mult, 1)

    def last(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what the last layer gives: `hidden` as forward() has it, and what the head reads, float32 (T, D)."""
        read_TD = x_TD if self.hc_head is None else self.hc_head(x_TD)
        read_TD = rms_norm(read_TD, (self.config.hidden_size,), self.norm, self.config.rms_norm_eps)
        return read_TD if self.hc_head is None else x_TD.flatten(1), read_TD


class MTPBlock:
    """The head for multi-token prediction, as cpu/mtp.py has it: many tokens at once."""

    def __init__(self, config: Config, weights: WeightSource, rope: Rope):
        """The model's file must have it (names.has_mtp)."""
        self.config, index = config, config.num_hidden_layers
        name = partial(names.layer, config.architecture, index)
        embed_tokens, lm_head = names.mtp_shared(weights.has, config)
        self.embed_tokens = weights.embedding(embed_tokens)
        self.enorm, self.hnorm, self.shared_head_norm = (
            weights.vector(name(norm)) for norm in ("enorm", "hnorm", "shared_head.norm")
        )
        self.eh_proj = weights.linear(name("eh_proj"))
        # The only layer of a cache of its own.
        self.layer = layer_kind(config)(config, weights, index, attention(config, weights, index, rope, cache_layer=0))
        self.hc_head = hyper_head(config, weights)
        self.lm_head = weights.linear(lm_head)

    @torch.inference_mode()
    def forward(self, next_ids: Sequence[int], hidden_TD: np.ndarray, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """As mtp.MTP.forward. Streams are taken one by one, and given on as they come out of the layer."""
        embedded_TD = self._norm(self.embed_tokens(torch.tensor(next_ids, dtype=torch.int64)), self.enorm)
        hidden = self._norm(torch.from_numpy(hidden_TD).unflatten(1, (-1, self.config.hidden_size)), self.hnorm)
        both = torch.cat([embedded_TD[:, None].expand_as(hidden), hidden], -1)
        x = self.eh_proj(both.flatten(0, 1)).view_as(hidden)
        x = self.layer(x[:, 0] if self.hc_head is None else x, cache)
        cache.advance(len(next_ids))
        last = x[-1:]
        last_1D = self._norm(last if self.hc_head is None else self.hc_head(last), self.shared_head_norm)
        logits = self.lm_head(last_1D)
        return logits.numpy(), (last_1D if self.hc_head is None else last.flatten(1)).numpy()

    def _norm(self, x_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, (self.config.hidden_size,), weight, self.config.rms_norm_eps)
