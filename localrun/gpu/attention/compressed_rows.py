"""Rows of attention over windows and pooled rows (DeepSeek-V4): normed, turned, written; pooled where complete.

A step's kernels write to where the table of a call's places says.

Letters: T tokens, H heads, W head_dim, R qk_rope_head_dim, m parts of a token (2 with ratio 4).
Source: network/compressed.py and network/compressor.py, which have the same in torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from localrun.gpu.attention.turns import Turns, turn_of
from localrun.gpu.caches.compressed import INDEX_OPEN, INDEX_POOLED, OPEN, POOLED, WINDOW, ring_rows
from localrun.gpu.caches.places import Places, block_of
from localrun.models.config import Config

_WINDOW, _OPEN, _POOLED = tl.constexpr(WINDOW), tl.constexpr(OPEN), tl.constexpr(POOLED)
_INDEX_OPEN, _INDEX_POOLED = tl.constexpr(INDEX_OPEN), tl.constexpr(INDEX_POOLED)

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
def _write_row(kv, norm, table, entry_stride, token_stride, fine, coarse, position, token, epsilon, W: tl.constexpr,
               R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr,
               N_ROWS: tl.constexpr):  # fmt: skip
    """A token's row to the window's ring of N_ROWS."""
    column, pair = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
    kv += token.to(tl.int64) * W
    x = tl.load(kv + column, mask=column < W, other=0.0)
    inside, last = pair < R // 2, W - R + 2 * pair
    even, odd = tl.load(kv + last, mask=inside, other=0.0), tl.load(kv + last + 1, mask=inside, other=0.0)
    row = block_of(table, _WINDOW, token, entry_stride, token_stride, KEY, 4) + position % N_ROWS * W
    _store_row(row, x, even, odd, norm, fine, coarse, position, epsilon, W, R, BLOCK_W, BLOCK_PAIRS, KEY)


@triton.jit
def _open(values, gates, bias, table, entry_stride, token_stride, position, token, block, ENTRY: tl.constexpr,
          WIDTH: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """Columns of what rows will be pooled of to its ring: values, and behind them weights."""
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = block_of(table, ENTRY, token, entry_stride, token_stride, tl.float32, 4) + position % N_ROWS * 2 * WIDTH
    tl.store(row + column, tl.load(values + token * WIDTH + column, mask=inside, other=0.0), mask=inside)
    gate = tl.load(gates + token * WIDTH + column, mask=inside, other=0.0)
    gate += tl.load(bias + position % RATIO * WIDTH + column, mask=inside, other=0.0)
    tl.store(row + WIDTH + column, gate, mask=inside)


@triton.jit
def append_kernel(kv, norm, values, gates, bias, index_values, index_gates, index_bias, positions, table, entry_stride,
                  token_stride, fine, coarse, epsilon, W: tl.constexpr, R: tl.constexpr, BLOCK_W: tl.constexpr,
                  BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr, N_ROWS: tl.constexpr, OPEN_ROWS: tl.constexpr,
                  RATIO: tl.constexpr, WIDTH: tl.constexpr, INDEX_WIDTH: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Program (token, part): its row to the window's ring of N_ROWS; or columns of what rows are pooled of, WIDTH wide,
    to the ring of OPEN_ROWS; or of the indexer's. Widths are 0 where there is none.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    n_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    if part == 0:
        _write_row(kv, norm, table, entry_stride, token_stride, fine, coarse, position, token, epsilon, W, R, BLOCK_W,
                   BLOCK_PAIRS, KEY, N_ROWS)  # fmt: skip
    elif part <= n_blocks:
        if WIDTH > 0:
            _open(values, gates, bias, table, entry_stride, token_stride, position, token, part - 1, _OPEN, WIDTH,
                  BLOCK, RATIO, OPEN_ROWS)  # fmt: skip
    else:
        if INDEX_WIDTH > 0:
            _open(index_values, index_gates, index_bias, table, entry_stride, token_stride, position, token,
                  part - 1 - n_blocks, _INDEX_OPEN, INDEX_WIDTH, BLOCK, RATIO, OPEN_ROWS)  # fmt: skip


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
def _pool(norm, token, end, table, entry_stride, token_stride, fine, coarse, epsilon, W: tl.constexpr, R: tl.constexpr,
          BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
          RATIO: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """The row that is pooled of RATIO tokens before `end`, to its place."""
    column, pair = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
    rows = block_of(table, FROM, token, entry_stride, token_stride, tl.float32, 4)
    inside, last = pair < R // 2, W - R + 2 * pair
    x = _pooled(rows, end, column, column < W, W, BLOCK_W, RATIO, PARTS, SLOTS, N_ROWS)
    even = _pooled(rows, end, last, inside, W, BLOCK_PAIRS, RATIO, PARTS, SLOTS, N_ROWS)
    odd = _pooled(rows, end, last + 1, inside, W, BLOCK_PAIRS, RATIO, PARTS, SLOTS, N_ROWS)
    row = block_of(table, TO, token, entry_stride, token_stride, KEY, 4) + (end // RATIO - 1) * W
    _store_row(row, x, even, odd, norm, fine, coarse, end - RATIO, epsilon, W, R, BLOCK_W, BLOCK_PAIRS, KEY)


@triton.jit
def pool_kernel(norm, index_norm, positions, table, entry_stride, token_stride, fine, coarse, epsilon, W: tl.constexpr,
                INDEX_W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_INDEX_W: tl.constexpr, R: tl.constexpr,
                BLOCK_PAIRS: tl.constexpr, KEY: tl.constexpr, RATIO: tl.constexpr, PARTS: tl.constexpr,
                SLOTS: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """Program (token, 0 or 1): where it is the last of RATIO tokens the row that is pooled, or the indexer's, W wide
    each; what they are pooled of is in the rings.
    """
    token = tl.program_id(0)
    end = tl.load(positions + token) + 1
    if end % RATIO == 0:
        if tl.program_id(1) == 0:
            _pool(norm, token, end, table, entry_stride, token_stride, fine, coarse, epsilon, W, R, BLOCK_W,
                  BLOCK_PAIRS, KEY, _OPEN, _POOLED, RATIO, PARTS, SLOTS, N_ROWS)  # fmt: skip
        else:
            if INDEX_W > 0:
                _pool(index_norm, token, end, table, entry_stride, token_stride, fine, coarse, epsilon, INDEX_W, R,
                      BLOCK_INDEX_W, BLOCK_PAIRS, KEY, _INDEX_OPEN, _INDEX_POOLED, RATIO, PARTS, SLOTS,
                      N_ROWS)  # fmt: skip


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


@dataclass(frozen=True)
class Opening:
    """What a compressor's rows are pooled of, as it is projected.

    Attributes:
        values_TX, gates_TX: float32 (T, m * W).
        bias: of the gates, (ratio, m * W).
        norm_W: of the rows.
    """

    values_TX: torch.Tensor
    gates_TX: torch.Tensor
    bias: torch.Tensor
    norm_W: torch.Tensor


def append(
    kv_TW: torch.Tensor,
    norm_W: torch.Tensor,
    openings: Sequence[Opening],
    turns: Turns,
    places: Places,
    layer: int,
    config: Config,
) -> None:
    """All that tokens leave in a layer's cache: rows of the window, as they are projected, float32 (T, W), normed and
    turned; what rows are pooled of, and the rows that are complete by that. openings: the layer's, its indexer's.
    """
    c, n_tokens, is_exact, of_layer = config, len(kv_TW), places.is_exact, places.of_layer(layer)
    rows = c.rows(layer)
    widths = [opening.values_TX.shape[1] for opening in openings] + [0] * (2 - len(openings))
    inputs = [x.contiguous() for each in openings for x in (each.values_TX, each.gates_TX, each.bias)]
    inputs += [norm_W] * (6 - len(inputs))  # not read
    ratio, n_rows = (c.compress_ratio(layer), ring_rows(rows[2])) if openings else (1, 1)
    shared = {"KEY": key_type(is_exact), "RATIO": ratio, "num_warps": 4}
    append_kernel[n_tokens, 1 + sum(triton.cdiv(width, _COLUMNS) for width in widths)](
        kv_TW.contiguous(), norm_W, *inputs, *of_layer, turns.fine, turns.coarse, c.rms_norm_eps,
        **_widths(c.head_dim, c.qk_rope_head_dim), N_ROWS=ring_rows(rows[0]), OPEN_ROWS=n_rows, WIDTH=widths[0],
        INDEX_WIDTH=widths[1], BLOCK=_COLUMNS, **shared,
    )  # fmt: skip
    if openings:
        norms = [opening.norm_W for opening in openings] + [norm_W] * (2 - len(openings))
        index_width = len(norms[1]) if len(openings) > 1 else 0
        pool_kernel[n_tokens, len(openings)](
            *norms, *of_layer, turns.fine, turns.coarse, c.rms_norm_eps, **_widths(len(norms[0]), c.qk_rope_head_dim),
            INDEX_W=index_width, BLOCK_INDEX_W=triton.next_power_of_2(max(1, index_width)),
            PARTS=widths[0] // len(norms[0]), SLOTS=_SLOTS, N_ROWS=n_rows, **shared,
        )  # fmt: skip


def _widths(width: int, rope_dim: int) -> dict[str, int]:
    blocks = triton.next_power_of_2(width), triton.next_power_of_2(rope_dim // 2)
    return {"W": width, "R": rope_dim, "BLOCK_W": blocks[0], "BLOCK_PAIRS": blocks[1]}


def key_type(is_exact: bool) -> tl.dtype:
    """Of values of rows, in a cache of 32 bits or of 16."""
    return tl.float32 if is_exact else tl.float16
