"""DSpark: a few layers that draft a whole block of tokens in one pass (DeepSeek-V4).

They attend to a window of what they keep of each token that the model has evaluated, made of what the model's target
layers left of it, and to the block: the last token and noise, all of whose positions see each other. Where a token
stands, the logits of the next one come out; the Markov head adds to them what the token before says, from draft to
draft. The confidence head says how likely the model is to take a draft; the first that it rather won't ends the block.

Letters: T tokens, F values of all target layers, D hidden_size, H heads, d head_dim, S rows attended to.
Source: llama.cpp 0c1e57098, src/models/dflash.cpp (graph_dsv4) and src/models/deepseek4.cpp.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import rms_norm

from localrun.models import dspark, names
from localrun.models.dspark import DSpark
from localrun.network.cache import Cache
from localrun.network.compressed import CompressedAttention
from localrun.network.model import HyperLayer, hyper_head
from localrun.network.rope import Rope
from localrun.network.weight_source import WeightSource

LEAST_CONFIDENCE = 0.5  # a draft that is rather refused costs its verification


class BlockAttention(CompressedAttention):
    """Of a block's tokens to each other, and to a window of what is kept of tokens before."""

    def keep(self, x_TD: torch.Tensor, cache: Cache) -> None:
        """Rows of tokens that the model has evaluated, to the cache; check_room() must have been asked."""
        cache.extend(self.layer, 0, self._rows(x_TD, self.rope.turns(cache.length, x_TD.shape[0])))

    def __call__(self, x_TD: torch.Tensor, cache: Cache) -> torch.Tensor:
        """float32 (T, D) of the tokens after the cache's -> (T, D); the cache stays as it is."""
        c, n_tokens, epsilon = self.config, x_TD.shape[0], self.config.rms_norm_eps
        turns = self.rope.turns(cache.length, n_tokens)
        q_TQ = rms_norm(self.q_a_proj(x_TD), (c.q_lora_rank,), self.q_a_norm, epsilon)
        q_THd = self.q_b_proj(q_TQ).unflatten(1, (c.num_attention_heads, -1))
        q_THd = self.rope.rotate_last(rms_norm(q_THd, (c.head_dim,), None, epsilon), turns)
        before_Sd = cache.window(self.layer, 0)
        rows_Sd = torch.cat([before_Sd.float(), self._rows(x_TD, turns)])
        scores_THS = self.scale * (q_THd @ rows_Sd.mT)
        distances_TS = torch.arange(n_tokens)[:, None] + len(before_Sd) - torch.arange(len(rows_Sd))
        scores_THS = scores_THS.masked_fill((distances_TS >= c.sliding_window)[:, None], float("-inf"))
        sinks_TH1 = self.sinks[None, :, None].expand(n_tokens, -1, 1)
        mixed_THd = torch.cat([scores_THS, sinks_TH1], -1).softmax(-1)[..., :-1] @ rows_Sd
        mixed_THd = self.rope.rotate_last(mixed_THd, turns.conj())
        return self.o_b_proj(self.o_a_proj(mixed_THd.flatten(1).unflatten(1, (c.o_groups, -1))).flatten(1))

    def _rows(self, x_TD: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """float32 (T, d), key and value of all heads."""
        row_Td = rms_norm(self.kv_proj(x_TD), (self.config.head_dim,), self.kv_norm, self.config.rms_norm_eps)
        return self.rope.rotate_last(row_Td[:, None], turns)[:, 0]


class DSparkNetwork:
    """The blocks of one file, beside the model that they draft for."""

    def __init__(self, spark: DSpark, weights: WeightSource, of_model: WeightSource):
        """of_model: the model's weights, of which the blocks use embedding and head."""
        self.spark, config = spark, spark.config
        self.embed_tokens = of_model.embedding(names.EMBED_TOKENS)
        self.lm_head = of_model.linear(names.lm_head(of_model.has))
        self.fc, self.enc_norm = weights.linear(dspark.FC), weights.vector(dspark.ENC_NORM)
        rope, indices = Rope(config), range(config.num_hidden_layers)
        self.attention = [BlockAttention(config, weights, index, rope) for index in indices]
        self.layers = [HyperLayer(config, weights, index, self.attention[index]) for index in indices]
        self.hc_head, self.norm = hyper_head(config, weights), weights.vector(names.NORM)
        self.markov_w1, self.markov_w2 = weights.embedding(dspark.MARKOV_W1), weights.linear(dspark.MARKOV_W2)
        self.conf_proj = weights.linear(dspark.CONFIDENCE) if weights.has(dspark.CONFIDENCE) else None

    @torch.inference_mode()
    def keep(self, features_TF: np.ndarray, cache: Cache) -> None:
        """What the model's target layers left of the tokens after the cache's, float32; the cache holds them then."""
        cache.check_room(len(features_TF))
        x_TD = self._normed(self.fc(torch.from_numpy(features_TF)), self.enc_norm)
        for attention in self.attention:
            attention.keep(x_TD, cache)
        cache.advance(len(features_TF))

    @torch.inference_mode()
    def draft(self, last: int, n: int, cache: Cache) -> list[int]:
        """Up to n tokens, block_size at most, that may follow the cache's and the token `last`; fewer by confidence."""
        spark, drafts = self.spark, [last]
        ids_T = torch.tensor([last] + [spark.noise_token] * (spark.block_size - 1))
        x_TnD = self.embed_tokens(ids_T)[:, None].repeat(1, spark.config.hc_mult, 1)
        for layer in self.layers:
            x_TnD = layer(x_TnD, cache)
        read_TD = self.hc_head(x_TnD[:n])
        logits_TV = self.lm_head(self._normed(read_TD, self.norm))
        for read_D, logits_V in zip(read_TD, logits_TV, strict=True):
            before_1R = self.markov_w1(torch.tensor(drafts[-1:]))
            if self._confidence(read_D, before_1R) < LEAST_CONFIDENCE:
                break
            drafts.append(int((logits_V + self.markov_w2(before_1R)[0]).argmax()))
        return drafts[1:]

    def _confidence(self, read_D: torch.Tensor, before_1R: torch.Tensor) -> float:
        """That the model takes a draft, by what the head reads, not normed, and by the token before; 1 if unknown."""
        if self.conf_proj is None:
            return 1.0
        return float(self.conf_proj(torch.cat([read_D[None], before_1R], 1)).sigmoid())

    def _normed(self, x_TD: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TD, (self.spark.config.hidden_size,), weight, self.spark.config.rms_norm_eps)
