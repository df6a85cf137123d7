"""Grouped-query attention on the device: flash_decoding.py's kernels over keys and values of their own.

A few tokens: a program takes the heads of one group. Many: keys and values go to torch's fused attention as they are,
some groups and CONTEXT tokens at a time. Where there is a window the kernel takes many tokens, too: each sees few rows.

Letters: T new tokens, S cached tokens, H heads, N heads handled at a time, G key-value heads, D hidden_size,
d head_dim, V v_head_dim.
"""

import functools

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from localrun.gpu.attention.flash_decoding import FEW_TOKENS, attend_over, dtype_of_products, heads_together, pieces_for
from localrun.gpu.attention.fused import CONTEXT, attend_by_pieces
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.context import row_constants
from localrun.gpu.caches.grouped import GroupedCache
from localrun.gpu.caches.places import HasPlaces, Places, block_of, n_rows_of
from localrun.limits import GPU_ATTENTION_WORK_BYTES
from localrun.models.config import Config
from localrun.network import attention
from localrun.network.cache import row_widths
from localrun.network.weight_source import WeightSource

_COLUMNS = 1024  # of rows that a program writes


@triton.jit
def append_kernel(keys, values, positions, table, entry_stride, token_stride, BLOCK: tl.constexpr, VALUE: tl.constexpr,
                  VALUE_STRIDE: tl.constexpr, VALUE_ALIGNED: tl.constexpr, KEY: tl.constexpr, KEY_STRIDE: tl.constexpr,
                  KEY_ALIGNED: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Program (token, columns): these of the token's keys and values to its rows of the cache."""
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(positions + token)
    if WINDOW > 0:
        row %= n_rows_of(table, token, entry_stride, token_stride)
    is_value, is_key = column < VALUE_STRIDE, column < KEY_STRIDE
    value = tl.load(values + token * VALUE_STRIDE + column, mask=is_value, other=0.0)
    key = tl.load(keys + token * KEY_STRIDE + column, mask=is_key, other=0.0)
    to_values = block_of(table, 0, token, entry_stride, token_stride, VALUE, VALUE_ALIGNED) + row * VALUE_STRIDE
    to_keys = block_of(table, 1, token, entry_stride, token_stride, KEY, KEY_ALIGNED) + row * KEY_STRIDE
    tl.store(to_values + column, value.to(VALUE), mask=is_value)
    tl.store(to_keys + column, key.to(KEY), mask=is_key)


def append(
    k_TGd: torch.Tensor, v_TX: torch.Tensor, places: Places, layer: int, config: Config, window: int = 0
) -> None:
    """Write rows of keys, float32 (T, G, d), and of values, (T, G * V), at the tokens' places.

    They go round where there is a window: none of these tokens may go over what another one sees.
    """
    widest = max(row_widths(config))
    append_kernel[len(k_TGd), triton.cdiv(widest, _COLUMNS)](
        k_TGd.contiguous(), v_TX.contiguous(), *places.of_layer(layer), _COLUMNS, **row_constants(config, places.bits),
        WINDOW=window, num_warps=4,
    )  # fmt: skip


def attend_grouped(
    q_THd: torch.Tensor,
    cache: HasPlaces,
    layer: int,
    config: Config,
    scale: float,
    n_pieces: int,
    dtype: torch.dtype,
    window: int = 0,
    sinks_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 (T, H, V): the values that each head and token attends to, mixed; else as attend_over()."""
    q_THd, places = q_THd.contiguous(), cache.places(len(q_THd))
    return attend_over((q_THd, q_THd), places, layer, config, scale, n_pieces, dtype, window, sinks_H)


class GroupedQueryAttention(attention.GroupedQueryAttention):
    """GQA on the device, over its cache; everything else of the interface is that of the CPU's."""

    def __init__(self, config: Config, weights: WeightSource, index: int, turns: Turns):
        """As LatentAttention."""
        super().__init__(config, weights, index, turns.rope)
        self.turns = turns
        device = turns.fine.device
        self.n_pieces = pieces_for(config, device)
        self.dtype = dtype_of_products(device)
        self.together = config.rows(index)[0].spare + 1  # tokens whose rows go over nothing that one of them sees

    def __call__(self, x_TD: torch.Tensor, cache: GroupedCache | Places) -> torch.Tensor:
        """As LatentAttention.__call__."""
        c, n_tokens = self.config, x_TD.shape[0]
        places = cache.places(n_tokens, x_TD.device)
        turns = self.turns.at(places.positions)
        q_THd = self._heads(self.q_proj(x_TD), self.q_norm, turns)
        k_TGd = self._heads(self.k_proj(x_TD), self.k_norm, turns)
        v_TX, dtype = self.v_proj(x_TD), torch.float32 if cache.is_exact else self.dtype
        step = self.together if self.window else n_tokens
        by_kernel = self.window or n_tokens <= FEW_TOKENS
        outs = []
        for first in range(0, n_tokens, step):
            here, some = places.part(first, first + step), slice(first, first + step)
            append(k_TGd[some], v_TX[some], here, self.cache_layer, c, self.window)
            if by_kernel:
                attended = self.scale, self.n_pieces, dtype, self.window, self.sinks
                outs.append(attend_grouped(q_THd[some], here, self.cache_layer, c, *attended))
        out_THV = torch.cat(outs) if by_kernel else self._many(q_THd.transpose(0, 1).to(dtype), cache)
        return self.o_proj(out_THV.flatten(1))

    def _many(self, q_HTd: torch.Tensor, cache: GroupedCache) -> torch.Tensor:
        """(T, H, V) of the tokens after cache.length, whose rows are there, some groups of heads at a time."""
        c, n_tokens = self.config, q_HTd.shape[1]
        width, together = -(-max(c.head_dim, c.v_head_dim) // 8) * 8, heads_together(c)
        out_THV = torch.empty(n_tokens, c.num_attention_heads, c.v_head_dim, device=q_HTd.device)
        bytes_per_head = q_HTd.element_size() * 2 * width * max(n_tokens, CONTEXT) + 3 * 4 * width * n_tokens
        for first, count in attention.in_groups(
            c.num_key_value_heads, together * bytes_per_head, GPU_ATTENTION_WORK_BYTES
        ):
            heads = slice(first * together, (first + count) * together)
            q_NTd = pad(q_HTd[heads], (0, width - c.head_dim))
            rows = functools.partial(self._rows, q_NTd, cache, slice(first, first + count))
            sinks = None if self.sinks is None else self.sinks[heads]
            out_NTV = attend_by_pieces(q_NTd, rows, cache.length, self.scale, sinks)[..., : c.v_head_dim]
            out_THV[:, heads] = out_NTV.transpose(0, 1)
        return out_THV

    def _rows(
        self, q_NTd: torch.Tensor, cache: GroupedCache, groups: slice, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (N, last - first, d) of cached tokens, a group's for each of its heads, zeros behind them."""
        both = []
        for rows in (cache.keys, cache.values):
            rows_SGd = rows[self.cache_layer][first:last].unflatten(-1, (self.config.num_key_value_heads, -1))
            rows_GSd = rows_SGd[:, groups].transpose(0, 1).to(q_NTd.dtype)
            rows_GSd = pad(rows_GSd, (0, q_NTd.shape[-1] - rows_GSd.shape[-1]))
            both.append(rows_GSd.repeat_interleave(heads_together(self.config), 0))
        return both[0], both[1]
