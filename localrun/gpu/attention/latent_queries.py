"""Queries of latent attention, turned, and the tokens' rows of the cache: one kernel for a dozen of torch's launches.

It takes any number of tokens, whose places (caches/places.py) are read from device memory.

Letters: T tokens, H heads, P qk_nope_head_dim, R qk_rope_head_dim, C kv_lora_rank.
"""

import torch
import triton
import triton.language as tl

from localrun.gpu.attention.turns import Turns, turn_of
from localrun.gpu.caches.context import row_constants
from localrun.gpu.caches.places import HasPlaces, block_of
from localrun.gpu.e4m3 import E4M3_MAX, e4m3_code
from localrun.models.config import Config

_HEADS = 8  # a program turns


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
        codes = e4m3_code(tl.minimum(tl.maximum(x / scale, -LARGEST), LARGEST))
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
