"""The small kernels of a decode step: rotation with the write into the cache, and the router's choice.

Each replaces a dozen of torch's launches. Both take any number of tokens, whose places (places.py) are read from device
memory.

Letters: T tokens, H heads, P qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank, E experts, K experts per token,
g expert groups, M experts of a group.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from localrun.cpu.decode import SCORING
from localrun.gpu.cache import E4M3_MAX, row_constants
from localrun.gpu.places import HasPlaces, block_of
from localrun.models.config import Config
from localrun.network.rope import Rope
from quant.decode.router import SMALLEST_SUM

_FINE = tl.constexpr(1024)  # positions of the fine table; the coarse one has every 1024th
_COARSE = 4096  # 4 million positions: more than any model is made for
_HEADS = 8  # a program turns


class Turns:
    """Rotations of all positions, from two tables: turn(1024 a + b) = coarse[a] * fine[b].

    A table of all positions would take 42 MB for 163840 of them, this one 1.3 MB (R = 64). Angles are computed in
    float64; the float32 product of two entries is within 2^-22 of the exact turn.

    Attributes:
        fine, coarse: float32 (_FINE or _COARSE, R/2, 2), cosine and sine; the magnitude is in coarse.
    """

    def __init__(self, rope: Rope, device: torch.device):
        self.rope = rope
        self.fine = self._table(np.arange(_FINE.value), 1.0).to(device)
        self.coarse = self._table(_FINE.value * np.arange(_COARSE), rope.magnitude).to(device)

    def at(self, positions: torch.Tensor) -> torch.Tensor:
        """As Rope.turns, complex64 (T, 1, R/2), of positions int64 (T,) on the device. Nothing waits for the host."""
        coarse, fine = self.coarse[positions // _FINE.value], self.fine[positions % _FINE.value]
        return (torch.view_as_complex(coarse) * torch.view_as_complex(fine))[:, None]

    def _table(self, positions: np.ndarray, magnitude: float) -> torch.Tensor:
        angles = np.outer(positions, self.rope.frequencies)
        turns = magnitude * np.stack([np.cos(angles), np.sin(angles)], -1)
        return torch.from_numpy(turns.astype(np.float32))


@triton.jit
def turn_of(fine, coarse, position, pair, inside, HALF: tl.constexpr):
    """Cosines and sines of one position's pairs."""
    near = fine + (position % _FINE) * 2 * HALF + 2 * pair
    far = coarse + (position // _FINE) * 2 * HALF + 2 * pair
    cos_near, sin_near = tl.load(near, mask=inside, other=0.0), tl.load(near + 1, mask=inside, other=0.0)
    cos_far, sin_far = tl.load(far, mask=inside, other=0.0), tl.load(far + 1, mask=inside, other=0.0)
    return cos_near * cos_far - sin_near * sin_far, cos_near * sin_far + sin_near * cos_far


@triton.jit
def _e4m3(x):
    """The code, uint8, of float32 x, |x| <= 448, rounded to nearest even: integer arithmetic, as sm_80 has no E4M3."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 steps are 2^-9, those of float32 next to 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def _turn_heads(q, q_nope, q_rope, fine, coarse, position, token, block, N_HEADS: tl.constexpr, P: tl.constexpr,
                R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PAIRS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Some heads of one token: the part without position moved together, the other turned."""
    head = block * HEADS + tl.arange(0, HEADS)
    row = token.to(tl.int64) * N_HEADS + head
    column = tl.arange(0, BLOCK_P)
    inside = (head < N_HEADS)[:, None] & (column < P)[None, :]
    nope = tl.load(q + row[:, None] * (P + R) + column[None, :], mask=inside, other=0.0)
    tl.store(q_nope + row[:, None] * P + column[None, :], nope, mask=inside)
    pair = tl.arange(0, BLOCK_PAIRS)
    cos, sin = turn_of(fine, coarse, position, pair, pair < R // 2, R // 2)
    inside = (head < N_HEADS)[:, None] & (pair < R // 2)[None, :]
    source = q + row[:, None] * (P + R) + P + 2 * pair[None, :]
    even, odd = tl.load(source, mask=inside, other=0.0), tl.load(source + 1, mask=inside, other=0.0)
    target = q_rope + row[:, None] * R + 2 * pair[None, :]
    tl.store(target, even * cos[None, :] - odd * sin[None, :], mask=inside)
    tl.store(target + 1, even * sin[None, :] + odd * cos[None, :], mask=inside)


@triton.jit
def _write_row(kv, norm, table, entry_stride, token_stride, fine, coarse, position, token, epsilon, C: tl.constexpr,
               R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BITS: tl.constexpr,
               LARGEST: tl.constexpr, VALUE: tl.constexpr, VALUE_STRIDE: tl.constexpr, VALUE_ALIGNED: tl.constexpr,
               KEY: tl.constexpr, KEY_STRIDE: tl.constexpr, KEY_ALIGNED: tl.constexpr):  # fmt: skip
    """One token's row of the cache: latents normed, key turned."""
    latents = block_of(table, 0, token, entry_stride, token_stride, VALUE, VALUE_ALIGNED)
    rope_keys = block_of(table, 1, token, entry_stride, token_stride, KEY, KEY_ALIGNED)
    kv += token.to(tl.int64) * (C + R)
    column = tl.arange(0, BLOCK_C)
    x = tl.load(kv + column, mask=column < C, other=0.0)
    x = x * (1 / tl.sqrt(tl.sum(x * x, 0) / C + epsilon)) * tl.load(norm + column, mask=column < C, other=0.0)
    place = position
    if BITS == 8:
        scales = block_of(table, 2, token, entry_stride, token_stride, tl.float32, 4)
        largest = tl.max(tl.abs(x), 0)
        scale = tl.where(largest == 0, 1.0, largest / LARGEST)
        tl.store(scales + place, scale)
        codes = _e4m3(tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST))
        tl.store(latents + place * VALUE_STRIDE + column, codes, mask=column < C)
    else:
        tl.store(latents + place * VALUE_STRIDE + column, x.to(VALUE), mask=column < C)
    pair = tl.arange(0, BLOCK_PAIRS)
    inside = pair < R // 2
    cos, sin = turn_of(fine, coarse, position, pair, inside, R // 2)
    even = tl.load(kv + C + 2 * pair, mask=inside, other=0.0)
    odd = tl.load(kv + C + 2 * pair + 1, mask=inside, other=0.0)
    target = rope_keys + place * KEY_STRIDE + 2 * pair
    tl.store(target, (even * cos - odd * sin).to(KEY), mask=inside)
    tl.store(target + 1, (even * sin + odd * cos).to(KEY), mask=inside)


@triton.jit
def queries_kernel(q, kv, norm, q_nope, q_rope, positions, table, entry_stride, token_stride, fine, coarse, epsilon,
                   N_HEADS: tl.constexpr, P: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
                   BLOCK_P: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_C: tl.constexpr, HEADS: tl.constexpr,
                   BITS: tl.constexpr, LARGEST: tl.constexpr, VALUE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
                   VALUE_ALIGNED: tl.constexpr, KEY: tl.constexpr, KEY_STRIDE: tl.constexpr,
                   KEY_ALIGNED: tl.constexpr):  # fmt: skip
    """Program (token, block): a block of heads' queries, or behind the last block the token's row of the cache."""
    token, block = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    if block * HEADS < N_HEADS:
        _turn_heads(q, q_nope, q_rope, fine, coarse, position, token, block, N_HEADS, P, R, BLOCK_P, BLOCK_PAIRS, HEADS)
    else:
        _write_row(
            kv, norm, table, entry_stride, token_stride, fine, coarse, position, token, epsilon, C, R, BLOCK_C,
            BLOCK_PAIRS, BITS, LARGEST, VALUE, VALUE_STRIDE, VALUE_ALIGNED, KEY, KEY_STRIDE, KEY_ALIGNED,
        )  # fmt: skip


def turn_and_append(
    q_TQ: torch.Tensor,
    kv_TW: torch.Tensor,
    norm_C: torch.Tensor,
    turns: Turns,
    cache: HasPlaces,
    layer: int,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries of the tokens after the cache's; writes their rows into the cache, which has room for them.

    Args:
        q_TQ: float32 (T, H * (P + R)), as projected.
        kv_TW: float32 (T, C + R), latents before their norm and the key before its rotation.
        norm_C: float32 (C,), weights of the latents' norm.

    Returns:
        float32 (T, H, P) without position, and (T, H, R) turned.
    """
    c, n_tokens = config, q_TQ.shape[0]
    q_nope_THP = torch.empty(n_tokens, c.num_attention_heads, c.qk_nope_head_dim, device=q_TQ.device)
    q_rope_THR = torch.empty(n_tokens, c.num_attention_heads, c.qk_rope_head_dim, device=q_TQ.device)
    places = cache.places(n_tokens)
    queries_kernel[n_tokens, triton.cdiv(c.num_attention_heads, _HEADS) + 1](
        q_TQ.contiguous(), kv_TW.contiguous(), norm_C, q_nope_THP, q_rope_THR, *places.of_layer(layer), turns.fine,
        turns.coarse, c.rms_norm_eps, **queries_constants(c, places.bits), num_warps=4,
    )  # fmt: skip
    return q_nope_THP, q_rope_THR


def queries_constants(config: Config, bits: int) -> dict[str, object]:
    """What queries_kernel is compiled for."""
    c = config
    return {
        "N_HEADS": c.num_attention_heads, "P": c.qk_nope_head_dim, "R": c.qk_rope_head_dim, "C": c.kv_lora_rank,
        "BLOCK_P": triton.next_power_of_2(c.qk_nope_head_dim), "BLOCK_C": triton.next_power_of_2(c.kv_lora_rank),
        "BLOCK_PAIRS": triton.next_power_of_2(c.qk_rope_head_dim // 2), "HEADS": _HEADS, "BITS": bits,
        "LARGEST": E4M3_MAX, **row_constants(c, bits),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the router


@triton.jit
def _softplus(x):
    """log(1 + e^x): of small e^x that is e^x, of which 1 + e^x has few bits left."""
    exponential = tl.exp(-tl.abs(x))
    rounded = 1 + exponential
    known = tl.where(rounded == 1, 1.0, rounded - 1)  # of e^x, beside 1
    return tl.maximum(x, 0.0) + tl.where(rounded == 1, exponential, tl.log(rounded) * (exponential / known))


@triton.jit
def _first_best(score, is_open, index, N: tl.constexpr):
    """The lowest index with the best score among the open ones; scores are not NaN, some are open."""
    best = tl.max(tl.where(is_open, score, float("-inf")), 0)
    return tl.min(tl.where(is_open & (score == best), index, N), 0)


@triton.jit
def _kept_groups(choice, expert, group, inside, N_GROUPS: tl.constexpr, MEMBERS: tl.constexpr, KEPT: tl.constexpr,
                 BY_BEST: tl.constexpr, BLOCK_G: tl.constexpr):  # fmt: skip
    """Which experts (BLOCK_E,) are in the best groups: by their best expert, or by the sum of their two best."""
    groups = tl.arange(0, BLOCK_G)
    mine = (group[None, :] == groups[:, None]) & inside[None, :]
    score = tl.max(tl.where(mine, choice[None, :], float("-inf")), 1)
    if not BY_BEST and MEMBERS > 1:
        is_best = mine & (choice[None, :] == score[:, None])
        best = tl.min(tl.where(is_best, expert[None, :], N_GROUPS * MEMBERS), 1)
        others = mine & (expert[None, :] != best[:, None])
        score += tl.max(tl.where(others, choice[None, :], float("-inf")), 1)
    is_open = groups < N_GROUPS
    kept = group < 0
    for _n_kept in tl.static_range(KEPT):
        chosen = _first_best(score, is_open, groups, N_GROUPS)
        is_open &= groups != chosen
        kept |= group == chosen
    return kept


@triton.jit
def router_kernel(logits, bias, given, ids, weights, scaling, smallest_sum, N_EXPERTS: tl.constexpr, K: tl.constexpr,
                  N_GROUPS: tl.constexpr, KEPT: tl.constexpr, SCORING: tl.constexpr, HAS_BIAS: tl.constexpr,
                  NORMALISE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr,
                  BLOCK_K: tl.constexpr, IS_GIVEN: tl.constexpr):  # fmt: skip
    """Program (token): its experts, best first, or those that are given.

    SCORING: 0 softmax, 1 sigmoid, 2 softmax of the chosen, 3 root of softplus.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)
    inside = expert < N_EXPERTS
    logit = tl.load(logits + token * N_EXPERTS + expert, mask=inside, other=float("-inf"))
    if SCORING == 0:
        exponential = tl.exp(logit - tl.max(logit, 0))
        affinity = exponential / tl.sum(exponential, 0)
    elif SCORING == 1:
        affinity = 1 / (1 + tl.exp(-logit))
    elif SCORING == 3:
        affinity = tl.sqrt(_softplus(logit))
    else:
        affinity = logit
    choice = affinity
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=inside, other=0.0)
    choice = tl.where(choice == choice, choice, float("-inf"))  # NaN: ids stay within the table, weights are NaN
    is_open = inside
    if N_GROUPS > 1:
        members: tl.constexpr = N_EXPERTS // N_GROUPS
        is_open &= _kept_groups(
            choice, expert, expert // members, inside, N_GROUPS, members, KEPT, SCORING == 0, BLOCK_G
        )
    rank = tl.arange(0, BLOCK_K)
    chosen_ids = tl.zeros([BLOCK_K], tl.int32)
    chosen = tl.full([BLOCK_K], float("-inf") if SCORING == 2 else 0.0, tl.float32)
    for k in tl.static_range(K):
        if IS_GIVEN:
            best = tl.load(given + token * K + k).to(tl.int32)
        else:
            best = _first_best(choice, is_open, expert, N_EXPERTS)
            is_open &= expert != best
        chosen_ids = tl.where(rank == k, best, chosen_ids)
        chosen = tl.where(rank == k, tl.sum(tl.where(expert == best, affinity, 0.0), 0), chosen)
    if SCORING == 2:
        chosen = tl.exp(chosen - tl.max(chosen, 0))
        chosen = chosen / tl.sum(chosen, 0)
    if NORMALISE:
        total = tl.sum(chosen, 0)
        chosen = chosen / tl.where(total < smallest_sum, smallest_sum, total)
    tl.store(ids + token * K + rank, chosen_ids.to(tl.int64), mask=rank < K)
    tl.store(weights + token * K + rank, chosen * scaling, mask=rank < K)


def choose_experts(
    logits_TE: torch.Tensor, bias_E: torch.Tensor | None, config: Config, ids_TK: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As network.moe.choose_experts, in one launch; of equal scores the lower id (torch.topk promises no order)."""
    logits_TE = logits_TE.contiguous()
    n_tokens, given_TK = logits_TE.shape[0], ids_TK
    ids_TK = torch.empty(n_tokens, config.num_experts_per_tok, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(ids_TK.shape, device=logits_TE.device)
    router_kernel[(n_tokens,)](
        logits_TE, logits_TE if bias_E is None else bias_E, ids_TK if given_TK is None else given_TK.contiguous(),
        ids_TK, weights_TK, config.routed_scaling_factor, SMALLEST_SUM, **router_constants(config, bias_E is not None),
        IS_GIVEN=given_TK is not None, num_warps=4,
    )  # fmt: skip
    return ids_TK, weights_TK


def router_constants(config: Config, has_bias: bool) -> dict[str, int | bool]:
    """What router_kernel is compiled for."""
    c = config
    return {
        "N_EXPERTS": c.n_routed_experts, "K": c.num_experts_per_tok, "N_GROUPS": c.n_group, "KEPT": c.topk_group,
        "SCORING": SCORING[c.scoring_func], "HAS_BIAS": has_bias, "NORMALISE": c.norm_topk_prob,
        "BLOCK_E": triton.next_power_of_2(c.n_routed_experts), "BLOCK_G": triton.next_power_of_2(c.n_group),
        "BLOCK_K": triton.next_power_of_2(c.num_experts_per_tok),
    }  # fmt: skip
