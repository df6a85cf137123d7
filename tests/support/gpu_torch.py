"""Kernels of a device on the CPU in torch, in place of Triton's interpreter: a hundred times as fast.

For what goes on between kernels, with caches of 16 or 32 bits. Letters: T tokens, S cached tokens, G groups of heads.
"""

from __future__ import annotations

import ctypes
import functools
from contextlib import closing

import gpu_dense
import gpu_torch_compressed
import numpy as np
import pytest
import torch

from localrun.cpu import bridge
from localrun.gpu import weights
from localrun.gpu.attention import flash_decoding, grouped, indexer, latent
from localrun.gpu.caches.context import row_constants
from localrun.gpu.caches.places import ENTRIES
from localrun.gpu.experts import in_vram
from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.matrix import Matrix
from localrun.network.cache import row_widths
from localrun.network.moe import choose_experts, gated
from quant.formats import registry
from quant.matrix import ExpertMatrices, QuantMatrix
from quant.simd.gated import Activation
from quant.threads.pool import Pool


def turn_and_append(q_TQ, kv_TW, norm_C, turns, cache, layer, config):
    """As gpu.attention.latent_queries.turn_and_append."""
    c, n_tokens = config, q_TQ.shape[0]
    places = cache.places(n_tokens)
    at, rope = turns.at(places.positions), turns.rope
    q_nope, q_rope = q_TQ.view(n_tokens, c.num_attention_heads, -1).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    latent, key = kv_TW.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
    normed = torch.nn.functional.rms_norm(latent, (c.kv_lora_rank,), norm_C, c.rms_norm_eps)
    append(rope.rotate(key[:, None], at), normed, places, layer, c)
    return q_nope, rope.rotate(q_rope, at)


def append(k_TGd, v_TX, places, layer, config, window=0):
    """As gpu.attention.grouped.append; of latent attention too, whose values are latents."""
    for t, position in enumerate(places.positions.tolist()):
        for rows, new in zip(rows_at(places, layer, t, config), (v_TX[t], k_TGd[t].flatten()), strict=True):
            rows[position % len(rows) if window else position] = new


def rows_at(places, layer: int, token: int, config) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's blocks of values (or latents) and keys (or rotated parts) of a layer, (rows, width)."""
    known = row_constants(config, places.bits)
    *addresses, _, n_rows, _ = entries_of(places, layer, token)
    widths = [config.kv_lora_rank, config.qk_rope_head_dim] if config.attention == "mla" else row_widths(config)[::-1]
    found = []
    for part, address, width in zip(("VALUE", "KEY"), addresses, widths, strict=True):
        dtype = torch.float32 if places.is_exact else torch.float16
        found.append(block_at(address, n_rows, width, known[f"{part}_STRIDE"], dtype))
    return found[0], found[1]


def append_keys(keys_Td, places, layer):
    """As gpu.attention.indexer.append_keys."""
    for t, position in enumerate(places.positions.tolist()):
        indexer_keys(places, layer, t, keys_Td.shape[1])[position] = keys_Td[t]


def indexer_keys(places, layer: int, token: int, width: int) -> torch.Tensor:
    """A token's block of a layer's, (rows, d)."""
    *_, n_rows, address = entries_of(places, layer, token)
    return block_at(address, n_rows, width, width, torch.float32 if places.is_exact else torch.float16)


def scores_of(q_TId, weights_TI, places, layer, dtype, ratio=1):
    """As gpu.attention.indexer.scores_of."""
    scores, width = torch.full((len(q_TId), places.most // ratio), -torch.inf), q_TId.shape[2]
    for t, position in enumerate(places.positions.tolist()):
        if seen := (position + 1) // ratio:
            address, dtype = entries_of(places, layer, t)[-1], torch.float32 if places.is_exact else torch.float16
            keys_Sd = block_at(address, seen, width, width, dtype).float()
            scores[t, :seen] = weights_TI[t] @ (q_TId[t] @ keys_Sd.T).relu()
    return scores


def entries_of(places, layer: int, token: int) -> list[int]:
    column = places.table[:, token if places.table.shape[1] > 1 else 0].tolist()
    return column[ENTRIES * layer :][:ENTRIES]


def block_at(address: int, n_rows: int, width: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    memory = (ctypes.c_char * (((n_rows - 1) * stride + width) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((n_rows, width), (stride, 1))


def attend_over(queries, places, layer, config, scale, n_pieces, dtype, window=0, sinks_H=None, chosen_TK=None):
    """As gpu.attention.flash_decoding.attend_over: of each token for itself."""
    c, outs = config, []
    groups = 1 if c.attention == "mla" else c.num_key_value_heads
    for t, position in enumerate(places.positions.tolist()):
        blocks = rows_at(places, layer, t, c)
        seen = torch.arange(max(0, position + 1 - window) if window else 0, position + 1)
        if chosen_TK is not None:
            seen = chosen_TK[t, : position + 1].long()
        v_SGV, k_SGd = (rows[seen % len(rows)].float().unflatten(1, (groups, -1)) for rows in blocks)
        latent, rope = (q[t].unflatten(0, (groups, -1)) for q in queries)
        scores = torch.einsum("gnd,sgd->gns", rope, k_SGd)
        if c.attention == "mla":
            scores = scores + torch.einsum("gnc,sgc->gns", latent, v_SGV)
        scores *= scale
        if sinks_H is not None:
            scores = torch.cat([scores, sinks_H.view(groups, -1, 1)], -1)
        outs.append(torch.einsum("gns,sgv->gnv", scores.softmax(-1)[..., : len(seen)], v_SGV).flatten(0, 1))
    return torch.stack(outs)


def choose_of_each(logits_TE, bias_E, config, ids_TK=None):
    """As gpu.experts.router.choose_experts: each token has the bits that it has alone."""
    given = [None] * len(logits_TE) if ids_TK is None else ids_TK.split(1)
    each = [choose_experts(x, bias_E, config, ids) for x, ids in zip(logits_TE.split(1), given, strict=True)]
    return tuple(map(torch.cat, zip(*each, strict=True)))


class TorchExperts:
    """As gpu.experts.in_vram.Experts."""

    def __init__(self, matrices: ExpertMatrices, device: torch.device, here=None):
        here = range(matrices.gate.n_groups) if here is None else here
        stacks, self.activation = (matrices.gate, matrices.up, matrices.down), matrices.activation
        biases = matrices.biases or [np.zeros((w.n_groups, w.n_rows), np.float32) for w in stacks]
        with closing(Pool(1)) as pool:
            self.w = {expert: [bridge.HeadLinear(pool, w).dense(expert, 1)[0] for w in stacks] for expert in here}
        self.biases = {expert: [torch.from_numpy(bias[expert]) for bias in biases] for expert in here}
        self.slot_of = torch.full((matrices.gate.n_groups,), -1, dtype=torch.int32)
        self.slot_of[list(here)] = torch.arange(len(here), dtype=torch.int32)

    def begin(self, x, ids, weights):
        """As gpu.experts.in_vram.Experts.begin."""
        out = torch.zeros_like(x)
        for expert, (gate, up, down) in self.w.items():
            share, (for_gate, for_up, for_down) = (weights * (ids == expert)).sum(-1, keepdim=True), self.biases[expert]
            inner = gated(self.activation, x @ gate.T + for_gate, x @ up.T + for_up)
            out += share * (inner @ down.T + for_down)
        return lambda: out


def begin_from_slots(here: in_vram.Experts, x, ids, weights):
    """As gpu.experts.in_vram.Experts.begin: by the blocks in the slots, which may change; each token as it is alone."""
    out, dense = torch.zeros_like(x), functools.cache(functools.partial(_expanded_slot, here))
    between, activation = here.between, Activation(*here.between.activation)
    for t, k in (ids >= 0).nonzero().tolist():
        expert = int(ids[t, k])
        slot = int(here.slot_of[expert])
        if slot >= 0:
            gate, up, down = dense(slot)
            biases = (between.gate, between.up, between.down)
            of_gate, of_up, of_down = (bias[expert] if between.is_biased else 0.0 for bias in biases)
            inner = gated(activation, gate @ x[t] + of_gate, up @ x[t] + of_up)
            out[t] += weights[t, k] * (down @ inner + of_down)
    return lambda: out


def _expanded_slot(here: in_vram.Experts, slot: int) -> list[torch.Tensor]:
    """float32 matrices of the expert in a slot."""
    return [_expanded(matrix, slot) for matrix in (here.gate, here.up, here.down)]


def _expanded(matrix: Matrix, group: int) -> torch.Tensor:
    address, shape = matrix.data.data_ptr() + group * matrix.group_bytes, (1, matrix.n_rows, matrix.n_cols)
    weight = QuantMatrix(registry.get(matrix.layout.name), address, *shape, matrix.group_bytes)
    with closing(Pool(1)) as pool:
        return bridge.HeadLinear(pool, weight).dense(0, 1)[0]


def multiply(matrix: Matrix, x: torch.Tensor) -> torch.Tensor:
    """As gpu.matrices.gemv.multiply and gpu.matrices.gemm.multiply."""
    w_Goi = torch.stack([_expanded(matrix, group) for group in range(matrix.n_groups)])
    return torch.einsum("tgi,goi->tgo", x, w_Goi)


def use_torch(patch: pytest.MonkeyPatch) -> None:
    """Models on a device that are loaded from now on have these."""
    gpu_dense.use_dense(patch)
    patch.setattr(latent, "turn_and_append", turn_and_append)
    patch.setattr(grouped, "append", append)
    for module in (gemv, gemm):
        patch.setattr(module, "multiply", multiply)
    patch.setattr(indexer, "append_keys", append_keys)
    patch.setattr(indexer, "scores_of", scores_of)
    for module in (flash_decoding, grouped):
        patch.setattr(module, "attend_over", attend_over)
    gpu_torch_compressed.use_torch(patch)
    patch.setattr(weights.DeviceWeights, "choose_experts", staticmethod(choose_of_each))
    patch.setattr(in_vram.Experts, "begin", begin_from_slots)
    patch.setattr(in_vram, "Experts", TorchExperts)
