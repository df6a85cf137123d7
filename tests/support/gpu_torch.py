"""Kernels of a device on the CPU in torch, in place of Triton's interpreter: a hundred times as fast.

For what goes on between kernels, of models with latent attention and caches of 16 or 32 bits. Letters: T tokens, S
cached tokens, H heads, E experts, K experts per token.
"""

from __future__ import annotations

from contextlib import closing

import gpu_dense
import pytest
import torch

from localrun.cpu import bridge
from localrun.gpu import attention, experts, weights
from localrun.network.moe import choose_experts
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool


def turn_and_append(q_TQ, kv_TW, norm_C, turns, cache, layer, config):
    """As gpu.routing.turn_and_append."""
    c, n_tokens = config, q_TQ.shape[0]
    positions = cache.position.long() + torch.arange(n_tokens)
    at, rope = turns.at(positions), turns.rope
    q_nope, q_rope = q_TQ.view(n_tokens, c.num_attention_heads, -1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, key = kv_TW.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    normed = torch.nn.functional.rms_norm(latent, (c.kv_lora_rank,), norm_C, c.rms_norm_eps)
    cache.latents[layer].index_copy_(0, positions, normed.to(cache.latents.dtype))
    cache.rope_keys[layer].index_copy_(0, positions, rope.rotate(key[:, None], at)[:, 0].to(cache.rope_keys.dtype))
    return q_nope, rope.rotate(q_rope, at)


def attend_over(queries, rows, scales, position, config, scale, n_pieces, bits, dtype):
    """As gpu.attention.attend_over."""
    n_tokens = queries[0].shape[0]
    n_seen = int(position) + n_tokens
    latents, keys = (part[:n_seen].float() for part in rows)
    scores = scale * (torch.einsum("thc,sc->ths", queries[0], latents) + torch.einsum("thr,sr->ths", queries[1], keys))
    hidden = torch.arange(n_seen)[None] > int(position) + torch.arange(n_tokens)[:, None]
    return torch.einsum("ths,sc->thc", scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1), latents)


class TorchExperts:
    """As gpu.experts.Experts."""

    def __init__(self, matrices: ExpertMatrices, device: torch.device, here=None):
        here = range(matrices.gate.n_groups) if here is None else here
        with closing(Pool(1)) as pool:
            self.w = {
                expert: [
                    bridge.HeadLinear(pool, w).dense(expert, 1)[0] for w in (matrices.gate, matrices.up, matrices.down)
                ]
                for expert in here
            }
        self.slot_of = torch.full((matrices.gate.n_groups,), -1, dtype=torch.int32)
        self.slot_of[list(here)] = torch.arange(len(here), dtype=torch.int32)

    def begin(self, x, ids, weights):
        """As gpu.experts.Experts.begin."""
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in self.w.items():
            share = (weights * (ids == expert)).sum(-1, keepdim=True)
            out += share * ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        return lambda: out


def use_torch(patch: pytest.MonkeyPatch) -> None:
    """Models on a device that are loaded from now on have these."""
    gpu_dense.use_dense(patch)
    patch.setattr(attention, "turn_and_append", turn_and_append)
    patch.setattr(attention, "attend_over", attend_over)
    patch.setattr(weights.DeviceWeights, "choose_experts", staticmethod(choose_experts))
    patch.setattr(experts, "Experts", TorchExperts)
