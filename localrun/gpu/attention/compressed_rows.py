"""Rows of attention over windows and pooled rows (DeepSeek-V4): normed, turned, written; pooled where complete.

A step's kernels write to where the table of a call's places says.

Letters: T tokens, H heads, W head_dim, R qk_rope_head_dim, m parts of a token (2 with ratio 4).
Source: network/compressed.py and network/compressor.py, which have the same in torch.
"""

import torch
import triton
import triton.language as tl

from localrun.gpu.attention.turns import Turns, turn_of
from localrun.gpu.caches.compressed import INDEX_OPEN, INDEX_POOLED, OPEN, POOLED, WINDOW, ring_rows
from localrun.gpu.caches.places import Places, block_of
from localrun.models.config import Config

_WINDOW = tl.constexpr(WINDOW)

_HEADS = 4  # a program turns
_COLUMNS = 1024  # of rows that a program writes
_SLOTS = 8  # tokens that are pooled at a time


@triton.jit
def heads_kernel(q, positions, fine, coarse, epsilon, out, N_HEADS: tl.constexpr, W: tl.constexpr, R: tl.constexpr,
                 BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, HEADS: tl.constexpr,
                 NORMED: tl.constexpr):  # fmt: skip
    """Program (token, heads): these normed if NORMED, without weights, their last R values turned."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    row, is_head, column = token * N_HEADS + head, head < N_HEADS, tl.arange(0, BLOCK_W)
    inside = is_head[:, None] & (column < W)[None, :]
    x = tl.load(q + row[:, None] * W + column[None, :], mask=inside, other=0.0)
    factor = 1 / tl.sqrt(tl.sum(x * x, 1) / W + epsilon) if NORMED else tl.full([HEADS], 1.0, tl.float32)
    tl.store(out + row[:, None] * W + column[None, :], x * factor[:, None], mask=inside & (column < W - R)[None, :])
    pair, position = tl.arange(0, BLOCK_PAIRS), tl.load(positions + token)
    cos, sin = turn_of(fine, coarse, position, pair, pair < R // 2, R // 2)
    inside = is_head[:, None] & (pair < R // 2)[None, :]
    at = row[:, None] * W + W - R + 2 * pair[None, :]
    even = tl.load(q + at, mask=inside, other=0.0) * factor[:, None]
    odd = tl.load(q + at + 1, mask=inside, other=0.0) * factor[:, None]
    tl.store(out + at, even * cos[None, :] - odd * sin[None, :], mask=inside)
    tl.store(out + at + 1, even * sin[None, :] + odd * cos[None, :], mask=inside)


@triton.jit
def _store_row(row, x, even, odd, norm, fine, coarse, position, epsilon, W: tl.constexpr, R: tl.constexpr,
               BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr):  # fmt: skip
    """x normed, its last R values, `even` and `odd` ones, turned."""
    column, pair = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
    factor = 1 / tl.sqrt(tl.sum(x * x, 0) / W + epsilon)
    weight = tl.load(norm + column, mask=column < W, other=0.0)
    tl.store(row + column, (x * factor * weight).to(KEY), mask=column < W - R)
    inside, last = pair < R // 2, W - R + 2 * pair
    cos, sin = turn_of(fine, coarse, position, pair, inside, R // 2)
    even = even * factor * tl.load(norm + last, mask=inside, other=0.0)
    odd = odd * factor * tl.load(norm + last + 1, mask=inside, other=0.0)
    tl.store(row + last, (even * cos - odd * sin).to(KEY), mask=inside)
    tl.store(row + last + 1, (even * sin + odd * cos).to(KEY), mask=inside)


@triton.jit
def row_kernel(kv, norm, positions, table, entry_stride, token_stride, fine, coarse, epsilon, W: tl.constexpr,
               R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr,
               N_ROWS: tl.constexpr):  # fmt: skip
    """Program (token): its row to the window's ring of N_ROWS."""
    token, column, pair = tl.program_id(0), tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
    position = tl.load(positions + token)
    kv += token.to(tl.int64) * W
    x = tl.load(kv + column, mask=column < W, other=0.0)
    inside, last = pair < R // 2, W - R + 2 * pair
    even, odd = tl.load(kv + last, mask=inside, other=0.0), tl.load(kv + last + 1, mask=inside, other=0.0)
    row = block_of(table, _WINDOW, token, entry_stride, token_stride, KEY, 4) + position % N_ROWS * W
    _store_row(row, x, even, odd, norm, fine, coarse, position, epsilon, W, R, BLOCK_W, BLOCK_PAIRS, KEY)


@triton.jit
def open_kernel(values, gates, bias, positions, table, entry_stride, token_stride, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr, ENTRY: tl.constexpr, RATIO: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """Program (token, columns): these of what rows will be pooled of to its ring, values and behind them weights."""
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position, inside = tl.load(positions + token), column < WIDTH
    row = block_of(table, ENTRY, token, entry_stride, token_stride, tl.float32, 4) + position % N_ROWS * 2 * WIDTH
    tl.store(row + column, tl.load(values + token * WIDTH + column, mask=inside, other=0.0), mask=inside)
    gate = tl.load(gates + token * WIDTH + column, mask=inside, other=0.0)
    gate += tl.load(bias + position % RATIO * WIDTH + column, mask=inside, other=0.0)
    tl.store(row + WIDTH + column, gate, mask=inside)


@triton.jit
def _pooled(rows, end, column, inside, W: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr, PARTS: tl.constexpr,
            SLOTS: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """Columns of the row that is pooled of the tokens before `end`: of their first parts in the window before, if any,
    and their last ones in this.
    """
    peak, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, PARTS * RATIO, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        position = end - PARTS * RATIO + slot
        at = rows + (position % N_ROWS * 2 * PARTS * W + slot // RATIO * W)[:, None] + column[None, :]
        is_token = (position >= 0) & (slot < PARTS * RATIO)
        here = is_token[:, None] & inside[None, :]
        value, gate = tl.load(at, mask=here, other=0.0), tl.load(at + PARTS * W, mask=here, other=0.0)
        gate = tl.where(is_token[:, None], gate, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(gate, 0))
        weight, shrink = tl.exp(gate - new_peak[None, :]), tl.exp(peak - new_peak)
        total = total * shrink + tl.sum(weight, 0)
        mixed = mixed * shrink + tl.sum(weight * value, 0)
        peak = new_peak
    return mixed / total


@triton.jit
def pool_kernel(norm, positions, table, entry_stride, token_stride, fine, coarse, epsilon, W: tl.constexpr,
                R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr,
                FROM: tl.constexpr, TO: tl.constexpr, RATIO: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr,
                N_ROWS: tl.constexpr):  # fmt: skip
    """Program (token): the row that is pooled where it is the last of RATIO tokens; their rows are in the ring."""
    token = tl.program_id(0)
    end = tl.load(positions + token) + 1
    if end % RATIO == 0:
        column, pair = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
        rows = block_of(table, FROM, token, entry_stride, token_stride, tl.float32, 4)
        inside, last = pair < R // 2, W - R + 2 * pair
        x = _pooled(rows, end, column, column < W, W, BLOCK_W, RATIO, PARTS, SLOTS, N_ROWS)
        even = _pooled(rows, end, last, inside, W, BLOCK_PAIRS, RATIO, PARTS, SLOTS, N_ROWS)
        odd = _pooled(rows, end, last + 1, inside, W, BLOCK_PAIRS, RATIO, PARTS, SLOTS, N_ROWS)
        row = block_of(table, TO, token, entry_stride, token_stride, KEY, 4) + (end // RATIO - 1) * W
        _store_row(row, x, even, odd, norm, fine, coarse, end - RATIO, epsilon, W, R, BLOCK_W, BLOCK_PAIRS, KEY)


def turned_heads(
    q_THW: torch.Tensor, positions_T: torch.Tensor, turns: Turns, rope_dim: int, epsilon: float | None
) -> torch.Tensor:
    """float32 (T, H, W), each head's last R values turned; first normed, without weights, if there is an epsilon."""
    n_tokens, n_heads, width = q_THW.shape
    out_THW = torch.empty(q_THW.shape, device=q_THW.device)
    heads_kernel[n_tokens, triton.cdiv(n_heads, _HEADS)](
        q_THW.contiguous(), positions_T, turns.fine, turns.coarse, 0.0 if epsilon is None else epsilon, out_THW,
        n_heads, **_widths(width, rope_dim), HEADS=_HEADS, NORMED=epsilon is not None, num_warps=4,
    )  # fmt: skip
    return out_THW


def append_rows(
    kv_TW: torch.Tensor, norm_W: torch.Tensor, turns: Turns, places: Places, layer: int, config: Config
) -> None:
    """Rows of the window, as they are projected, float32 (T, W): normed and turned to the tokens' places."""
    c = config
    row_kernel[(len(kv_TW),)](
        kv_TW.contiguous(), norm_W, *places.of_layer(layer), turns.fine, turns.coarse, c.rms_norm_eps,
        **_widths(c.head_dim, c.qk_rope_head_dim), KEY=key_type(places.is_exact),
        N_ROWS=ring_rows(c.rows(layer)[0]), num_warps=4,
    )  # fmt: skip


def append_pooled(
    values_TX: torch.Tensor,
    gates_TX: torch.Tensor,
    bias: torch.Tensor,
    norm_W: torch.Tensor,
    turns: Turns,
    places: Places,
    layer: int,
    config: Config,
    is_index: bool = False,
) -> None:
    """What rows are pooled of, as it is projected, float32 (T, m * W), and the rows that are complete by that.

    bias: of weights, (ratio, m * W). is_index: of the layer's indexer.
    """
    c, width, n_parts = config, len(norm_W), values_TX.shape[1] // len(norm_W)
    ratio, n_rows = c.compress_ratio(layer), ring_rows(c.rows(layer)[2])
    of_layer, source = places.of_layer(layer), INDEX_OPEN if is_index else OPEN
    open_kernel[len(values_TX), triton.cdiv(n_parts * width, _COLUMNS)](
        values_TX.contiguous(), gates_TX.contiguous(), bias, *of_layer, n_parts * width, _COLUMNS, source, ratio,
        n_rows, num_warps=4,
    )  # fmt: skip
    pool_kernel[(len(values_TX),)](
        norm_W, *of_layer, turns.fine, turns.coarse, c.rms_norm_eps, **_widths(width, c.qk_rope_head_dim),
        KEY=key_type(places.is_exact), FROM=source, TO=INDEX_POOLED if is_index else POOLED, RATIO=ratio,
        PARTS=n_parts, SLOTS=_SLOTS, N_ROWS=n_rows, num_warps=4,
    )  # fmt: skip


def _widths(width: int, rope_dim: int) -> dict[str, int]:
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(rope_dim // 2)
    return {"W": width, "R": rope_dim, "BLOCK_W": blocks[0], "BLOCK_PAIRS": blocks[1]}


def key_type(is_exact: bool) -> tl.dtype:
    """Of values of rows, in a cache of 32 bits or of 16."""
    return tl.float32 if is_exact else tl.float16
