"""Latent attention (MLA) on the device: the module, over its cache.

A few tokens: absorbed. k_b moves queries into latent space, flash_decoding attends there, v_b moves the results out.
Many tokens: decompressed. Keys and values of some heads and CONTEXT tokens are rebuilt at a time and go through torch's
fused attention (fused.py). Work memory does not grow with the context.

Letters: T new tokens, S cached tokens, H heads, N heads handled at a time, D hidden_size, C kv_lora_rank,
R qk_rope_head_dim, P qk_nope_head_dim, V v_head_dim, d the width of keys and values in torch's kernels.
Source: DeepSeek-V2 (arXiv 2405.04434).
"""

import functools

import torch
from torch.nn.functional import pad

from localrun.gpu.attention import fused
from localrun.gpu.attention.flash_decoding import attend, dtype_of_products, pieces_for
from localrun.gpu.attention.indexer import choose
from localrun.gpu.attention.latent_queries import turn_and_append
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.caches.places import Places
from localrun.limits import GPU_ATTENTION_WORK_BYTES
from localrun.models.config import Config
from localrun.network import attention
from localrun.network.weight_source import WeightSource


class LatentAttention(attention.LatentAttention):
    """MLA on the device, over its cache; everything else of the interface is that of the CPU's."""

    def __init__(self, config: Config, weights: WeightSource, index: int, turns: Turns):
        """weights: modules over device tensors; turns: one for all layers."""
        super().__init__(config, weights, index, turns.rope)
        self.turns = turns
        device = turns.fine.device
        self.n_pieces = pieces_for(config, device)
        self.dtype = dtype_of_products(device)

    def __call__(self, x_TD: torch.Tensor, cache: LatentCache | Places) -> torch.Tensor:
        """float32 (T, D) of the tokens after the cache's, or at places -> (T, D); writes their rows.

        There must be room (check_room). Places are for few tokens.
        """
        c, n_tokens = self.config, x_TD.shape[0]
        queries_of, kv_TW = self._queries_of(x_TD), self.kv_a_proj_with_mqa(x_TD)
        q_TQ = self.q_proj(queries_of) if c.q_lora_rank is None else self.q_b_proj(queries_of)
        places = cache.places(n_tokens, x_TD.device)
        q_nope_THP, q_rope_THR = turn_and_append(
            q_TQ, kv_TW, self.kv_a_layernorm, self.turns, places, self.cache_layer, c
        )
        dtype = torch.float32 if cache.is_exact else self.dtype
        if self.indexer is not None:
            self.choice.rows_TK = choose(self.indexer, x_TD, queries_of, places, self.cache_layer, self.turns, dtype)
        if self.choice.rows_TK is not None or self._absorbing_is_cheaper(n_tokens):
            out_THV = self._few(q_nope_THP, q_rope_THR, places, dtype)
        else:
            out_THV = self._many(torch.cat([q_nope_THP, q_rope_THR], -1).transpose(0, 1).to(dtype), cache)
        return self.o_proj(out_THV.flatten(1))

    def _few(
        self, q_nope_THP: torch.Tensor, q_rope_THR: torch.Tensor, places: Places, dtype: torch.dtype
    ) -> torch.Tensor:
        """(T, H, V) by attending in latent space, as many tokens at a time as there is room for."""
        c, chosen_TK, outs = self.config, self.choice.rows_TK, []
        bytes_per_token = 3 * 4 * c.num_attention_heads * c.kv_lora_rank  # queries, sums, results
        for first, count in attention.in_groups(len(q_rope_THR), bytes_per_token, GPU_ATTENTION_WORK_BYTES):
            some, here = slice(first, first + count), places.part(first, first + count)
            q_nope, q_rope = q_nope_THP[some], q_rope_THR[some]
            q_latent_THC = self.k_b_proj(q_nope) if self.is_split else self.k_b_proj.transposed(q_nope)
            chosen = None if chosen_TK is None else chosen_TK[some]
            mixed_THC = attend(
                q_latent_THC, q_rope, here, self.cache_layer, c, self.scale, self.n_pieces, dtype, chosen
            )
            outs.append(self.v_b_proj(mixed_THC))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _many(self, q_HTd: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """(T, H, V) by rebuilding keys and values; q_HTd's dtype is that of all products."""
        c, n_tokens = self.config, q_HTd.shape[1]
        width = -(-max(q_HTd.shape[-1], c.v_head_dim) // 8) * 8  # torch's kernels: one for both, a multiple of 8
        out_THV = torch.empty(n_tokens, c.num_attention_heads, c.v_head_dim, device=q_HTd.device)
        # A token's keys, values and the product that is copied into them; an output of the new tokens and its sum.
        bytes_per_head = q_HTd.element_size() * 3 * width * max(n_tokens, fused.CONTEXT) + 3 * 4 * width * n_tokens
        for first, count in attention.in_groups(c.num_attention_heads, bytes_per_head, GPU_ATTENTION_WORK_BYTES):
            q_NTd = pad(q_HTd[first : first + count], (0, width - q_HTd.shape[-1]))
            matrices = tuple(b.dense(first, count).to(q_HTd.dtype) for b in (self.k_b_proj, self.v_b_proj))
            rebuilt = functools.partial(self._rebuilt, q_NTd, matrices, cache)
            out_NTV = fused.attend_by_pieces(q_NTd, rebuilt, cache.length, self.scale)[..., : c.v_head_dim]
            out_THV[:, first : first + count] = out_NTV.transpose(0, 1)
        return out_THV

    def _rebuilt(
        self,
        q_NTd: torch.Tensor,
        matrices: tuple[torch.Tensor, torch.Tensor],
        cache: LatentCache,
        first: int,
        last: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (N, last - first, d) of cached tokens, zeros behind their own widths."""
        c, (k_b, v_b) = self.config, matrices
        latent_SC, k_rope_SR = cache.rows(self.cache_layer, first, last, q_NTd.dtype)
        k_NSd = q_NTd.new_zeros(q_NTd.shape[0], last - first, q_NTd.shape[-1])
        v_NSd = torch.zeros_like(k_NSd)
        k_NSd[..., : c.qk_nope_head_dim] = latent_SC @ (k_b if self.is_split else k_b.mT)
        k_NSd[..., c.qk_nope_head_dim :][..., : c.qk_rope_head_dim] = k_rope_SR
        v_NSd[..., : c.v_head_dim] = latent_SC @ v_b.mT
        return k_NSd, v_NSd
