"""Kernels of a device on the CPU in torch, in place of Triton's interpreter: a hundred times as fast.

For what goes on between kernels, with caches of 16 or 32 bits. Letters: T tokens, S cached tokens, G groups of heads.
"""

from __future__ import annotations

import ctypes
from contextlib import closing

import gpu_dense
import pytest
import torch

from localrun.cpu import bridge
from localrun.gpu import attention, experts, grouped, weights
from localrun.gpu.cache import row_constants
from localrun.gpu.places import ENTRIES
from localrun.network.cache import row_widths
from localrun.network.moe import choose_experts
from quant.matrix import ExpertMatrices
from quant.threads.pool import Pool


def turn_and_append(q_TQ, kv_TW, norm_C, turns, cache, layer, config):
    """As gpu.routing.turn_and_append."""
    c, n_tokens = config, q_TQ.shape[0]
    places = cache.places(n_tokens)
    at, rope = turns.at(places.positions), turns.rope
    q_nope, q_rope = q_TQ.view(n_tokens, c.num_attention_heads, -1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, key = kv_TW.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    normed = torch.nn.functional.rms_norm(latent, (c.kv_lora_rank,), norm_C, c.rms_norm_eps)
    append(rope.rotate(key[:, None], at), normed, places, layer, c)
    return q_nope, rope.rotate(q_rope, at)


def append(k_TGd, v_TX, places, layer, config):
    """As gpu.grouped.append; of latent attention too, whose values are latents."""
    for t in range(len(v_TX)):
        for rows, new in zip(rows_at(places, layer, t, config), (v_TX[t], k_TGd[t].flatten()), strict=True):
            rows[-1] = new


def rows_at(places, layer: int, token: int, config) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's values (or latents) and keys (or rotated parts) of a layer, (S, width): its own are the last."""
    n_rows, known = int(places.positions[token]) + 1, row_constants(config, places.bits)
    column = places.table[:, token if places.table.shape[1] > 1 else 0]
    widths = [config.kv_lora_rank, config.qk_rope_head_dim] if config.attention == "mla" else row_widths(config)[::-1]
    found = []
    for entry, (part, width) in enumerate(zip(("VALUE", "KEY"), widths, strict=True)):
        stride, dtype = known[f"{part}_STRIDE"], torch.float32 if places.is_exact else torch.float16
        n_values = (n_rows - 1) * stride + width
        memory = (ctypes.c_char * (n_values * dtype.itemsize)).from_address(int(column[ENTRIES * layer + entry]))
        found.append(torch.frombuffer(memory, dtype=dtype).as_strided((n_rows, width), (stride, 1)))
    return found[0], found[1]


def attend_over(queries, places, layer, config, scale, n_pieces, dtype):
    """As gpu.attention.attend_over: of each token for itself."""
    c, n_tokens = config, len(places.positions)
    groups = 1 if c.attention == "mla" else c.num_key_value_heads
    outs = []
    for t in range(n_tokens):
        v_SGV, k_SGd = (rows.float().unflatten(1, (groups, -1)) for rows in rows_at(places, layer, t, c))
        latent, rope = (q[t].unflatten(0, (groups, -1)) for q in queries)
        scores = torch.einsum("gnd,sgd->gns", rope, k_SGd)
        if c.attention == "mla":
            scores = scores + torch.einsum("gnc,sgc->gns", latent, v_SGV)
        outs.append(torch.einsum("gns,sgv->gnv", (scale * scores).softmax(-1), v_SGV).flatten(0, 1))
    return torch.stack(outs)


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
    patch.setattr(grouped, "append", append)
    for module in (attention, grouped):
        patch.setattr(module, "attend_over", attend_over)
    patch.setattr(weights.DeviceWeights, "choose_experts", staticmethod(choose_experts))
    patch.setattr(experts, "Experts", TorchExperts)
