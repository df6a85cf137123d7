"""Flash-decoding over windows and pooled rows (DeepSeek-V4), which compressed_rows.py has written.

A step's read where rows are from the table of a call's places; a prompt's take the rows of its window as they are: in
the ring they would go over each other. A program of attention takes some heads of one token and one piece of the rows
that it sees, pooled ones first; a second kernel sums the pieces and turns the result back by the token's position.

Letters: T tokens, H heads, W head_dim, R qk_rope_head_dim, m parts of a token (2 with ratio 4), K index_topk.
Source: network/compressed.py and network/compressor.py, which have the same in torch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.attention.compressed_rows import key_type
from localrun.gpu.attention.flash_decoding import (
    FEW_TOKENS,
    LOG2_E,
    MIN_PIECE,
    PEAK,
    TO_BASE_2,
    head_block,
    piece_length,
)
from localrun.gpu.attention.turns import Turns, turn_of
from localrun.gpu.caches.compressed import POOLED, WINDOW, ring_rows
from localrun.gpu.caches.places import Places, block_of
from localrun.limits import GPU_ATTENTION_WORK_BYTES
from localrun.models.config import Config
from localrun.network.attention import in_groups
from localrun.network.weight_source import Seen

_PIECES = 16  # that are summed at a time
_WINDOW, _POOLED = tl.constexpr(WINDOW), tl.constexpr(POOLED)


@triton.jit
def _n_pooled(n_tokens, RATIO: tl.constexpr, TOP_K: tl.constexpr):
    """Pooled rows that a token attends to, the last of n_tokens."""
    if RATIO == 0:
        return 0
    return tl.minimum(n_tokens // RATIO, TOP_K) if TOP_K > 0 else n_tokens // RATIO


@triton.jit
def _add_rows(q, rows, row, is_row, factor, peak, total, mixed, W: tl.constexpr, BLOCK_W: tl.constexpr,
              DTYPE: tl.constexpr):  # fmt: skip
    """The softmax so far, with some rows more."""
    column = tl.arange(0, BLOCK_W)
    inside = is_row[:, None] & (column < W)[None, :]
    tile = tl.load(rows + row.to(tl.int64)[:, None] * W + column[None, :], mask=inside, other=0.0).to(DTYPE)
    if q.shape[0] == 1:  # without tensor cores
        score = tl.sum(q.to(tl.float32) * tile.to(tl.float32), 1)[None, :] * factor
    else:
        score = tl.dot(q, tl.trans(tile), input_precision="ieee") * factor
    score = tl.where(is_row[None, :], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    weight, shrink = tl.exp2(score - new_peak[:, None] + PEAK), tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, 1)
    mixed *= shrink[:, None]
    if q.shape[0] == 1:
        mixed += tl.sum(tl.trans(weight) * tile.to(tl.float32), 0)[None, :]
    else:
        mixed = tl.dot(weight.to(DTYPE), tile, mixed, input_precision="ieee")
    return new_peak, total, mixed


@triton.jit
def attend_kernel(q, positions, table, entry_stride, token_stride, pooled, window, window_first, chosen, partials,
                  log_sums, score_scale, n_pieces, N_HEADS: tl.constexpr, W: tl.constexpr, BLOCK_W: tl.constexpr,
                  BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, SHORTEST: tl.constexpr, KEY: tl.constexpr,
                  ALIGNED: tl.constexpr, DTYPE: tl.constexpr, RATIO: tl.constexpr, TOP_K: tl.constexpr,
                  SEEN: tl.constexpr, N_ROWS: tl.constexpr):  # fmt: skip
    """Program (block of heads, piece, token): softmax(q k^T) k over the piece, and the logarithm (base 2) of its sum.

    RATIO: tokens of a pooled row, 0 without. TOP_K: of these that are `chosen`, (T, TOP_K), those that it sees first; 0
    where all are. SEEN: rows of the window. N_ROWS: of its ring, by the table; 0 where `pooled` and `window` are given,
    the latter from position window_first on. Products of DTYPE, sums and softmax float32.
    """
    piece, token = tl.program_id(1), tl.program_id(2)
    n_tokens = tl.load(positions + token).to(tl.int32) + 1
    n_pooled = _n_pooled(n_tokens, RATIO, TOP_K)
    n_seen = n_pooled + tl.minimum(n_tokens, SEEN)
    length = piece_length(n_seen, n_pieces, SHORTEST, BLOCK_S)
    first = piece * length
    if first >= n_seen:
        return
    last = tl.minimum(first + length, n_seen)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    query, column = token.to(tl.int64) * N_HEADS + head, tl.arange(0, BLOCK_W)
    inside = (head < N_HEADS)[:, None] & (column < W)[None, :]
    tile = tl.load(q + query[:, None] * W + column[None, :], mask=inside, other=0.0).to(DTYPE)
    peak = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total, mixed = tl.zeros([BLOCK_H], tl.float32), tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    if N_ROWS > 0:
        window = block_of(table, _WINDOW, token, entry_stride, token_stride, KEY, ALIGNED)
    if RATIO > 0:
        if N_ROWS > 0:
            pooled = block_of(table, _POOLED, token, entry_stride, token_stride, KEY, ALIGNED)
        end = tl.minimum(last, n_pooled)
        for block in range(first, end, BLOCK_S):
            row = block + tl.arange(0, BLOCK_S)
            is_row = row < end
            if TOP_K > 0:
                row = tl.load(chosen + token.to(tl.int64) * TOP_K + row, mask=is_row, other=0)
            peak, total, mixed = _add_rows(
                tile, pooled, row, is_row, score_scale, peak, total, mixed, W, BLOCK_W, DTYPE
            )
    before = n_tokens - n_seen  # of an index among the rows that are seen to its position
    for block in range(tl.maximum(first, n_pooled), last, BLOCK_S):
        row = before + block + tl.arange(0, BLOCK_S)
        is_row = row < before + last
        row = row % N_ROWS if N_ROWS > 0 else row - window_first
        peak, total, mixed = _add_rows(tile, window, row, is_row, score_scale, peak, total, mixed, W, BLOCK_W, DTYPE)
    place = query * n_pieces + piece
    tl.store(partials + place[:, None] * W + column[None, :], mixed / total[:, None], mask=inside)
    tl.store(log_sums + place, peak + tl.log2(total) - PEAK, mask=head < N_HEADS)


@triton.jit
def _summed(partials, log_sums, peak, place, count, column, inside, W: tl.constexpr, BLOCK: tl.constexpr,
            PIECES: tl.constexpr):  # fmt: skip
    """Columns of the pieces' results, weighed by their sums, relative to `peak`."""
    mixed = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        weight = tl.exp2(tl.load(log_sums + place + piece, mask=piece < count, other=float("-inf")) - peak)
        here = (piece < count)[:, None] & inside[None, :]
        part = tl.load(partials + (place + piece)[:, None] * W + column[None, :], mask=here, other=0.0)
        mixed += tl.sum(weight[:, None] * part, 0)
    return mixed


@triton.jit
def combine_kernel(partials, log_sums, positions, sinks, fine, coarse, out, n_pieces, N_HEADS: tl.constexpr,
                   W: tl.constexpr, R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
                   BLOCK_S: tl.constexpr, SHORTEST: tl.constexpr, PIECES: tl.constexpr, RATIO: tl.constexpr,
                   TOP_K: tl.constexpr, SEEN: tl.constexpr):  # fmt: skip
    """Program (head, token): the pieces' sum with the head's sink, its last R values turned back."""
    head, token = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + token)
    n_tokens = position.to(tl.int32) + 1
    n_seen = _n_pooled(n_tokens, RATIO, TOP_K) + tl.minimum(n_tokens, SEEN)
    count = tl.cdiv(n_seen, piece_length(n_seen, n_pieces, SHORTEST, BLOCK_S))
    query = token.to(tl.int64) * N_HEADS + head
    place = query * n_pieces
    sink = tl.load(sinks + head) * TO_BASE_2
    peak = tl.zeros([1], tl.float32) + sink
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        log_sum = tl.load(log_sums + place + piece, mask=piece < count, other=float("-inf"))
        peak = tl.maximum(peak, tl.max(log_sum, 0))
    total = tl.exp2(sink - peak)
    for first in range(0, count, PIECES):
        piece = first + tl.arange(0, PIECES)
        log_sum = tl.load(log_sums + place + piece, mask=piece < count, other=float("-inf"))
        total += tl.sum(tl.exp2(log_sum - peak), 0)
    column, pair = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_PAIRS)
    is_left = column < W - R
    x = _summed(partials, log_sums, peak, place, count, column, is_left, W, BLOCK_W, PIECES) / total
    tl.store(out + query * W + column, x, mask=is_left)
    inside, last = pair < R // 2, W - R + 2 * pair
    cos, sin = turn_of(fine, coarse, position, pair, inside, R // 2)
    even = _summed(partials, log_sums, peak, place, count, last, inside, W, BLOCK_PAIRS, PIECES) / total
    odd = _summed(partials, log_sums, peak, place, count, last + 1, inside, W, BLOCK_PAIRS, PIECES) / total
    tl.store(out + query * W + last, even * cos + odd * sin, mask=inside)
    tl.store(out + query * W + last + 1, odd * cos - even * sin, mask=inside)


@dataclass(frozen=True)
class Attending:
    """How tokens of a layer attend, whatever to.

    Attributes:
        sinks_H: float32, a logit more of each head's softmax.
        dtype: of products, float16 or float32.
    """

    config: Config
    layer: int
    turns: Turns
    sinks_H: torch.Tensor
    scale: float
    n_pieces: int
    dtype: torch.dtype


def attend_at(
    how: Attending, q_THW: torch.Tensor, places: Places, chosen_TK: torch.Tensor | None = None
) -> torch.Tensor:
    """float32 (T, H, W): rows at the tokens' places, their own included, mixed and turned back. q_THW: turned.

    chosen_TK: as indexer.choose_by has it. Nothing waits for the host, and shapes depend on T alone.
    """
    nothing = places.positions
    rows = *places.of_layer(how.layer)[1:], nothing, nothing, 0
    n_rows = ring_rows(how.config.rows(how.layer)[0])
    return _attend(how, q_THW, places.positions, rows, chosen_TK, places.is_exact, n_rows)


def attend_seen(how: Attending, q_THW: torch.Tensor, positions_T: torch.Tensor, seen: Seen) -> torch.Tensor:
    """The same over rows that are given; as many tokens at a time as there is room for."""
    n_tokens, outs = len(q_THW), []
    pooled = seen.window_SW if seen.keys_SW is None else seen.keys_SW
    first_position = seen.n_before + n_tokens - len(seen.window_SW)
    rows = positions_T, 0, 0, pooled, seen.window_SW, first_position
    is_exact = seen.window_SW.dtype == torch.float32
    bytes_of_one = 4 * (_n_pieces(how, n_tokens) + 1) * how.config.num_attention_heads * how.config.head_dim
    for first, count in in_groups(n_tokens, bytes_of_one, GPU_ATTENTION_WORK_BYTES):
        some = slice(first, first + count)
        chosen = None if seen.chosen_TK is None else seen.chosen_TK[some]
        outs.append(_attend(how, q_THW[some], positions_T[some], rows, chosen, is_exact, 0))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _n_pieces(how: Attending, n_tokens: int) -> int:
    """Of what a token sees: fewer where more tokens share the device, and none too short."""
    c, ratio = how.config, how.config.compress_ratio(how.layer)
    n_pieces = max(1, min(how.n_pieces, how.n_pieces * FEW_TOKENS // n_tokens))
    most = c.sliding_window + (c.index_topk if c.chooses_rows(how.layer) else 0)
    return n_pieces if ratio and not c.chooses_rows(how.layer) else min(n_pieces, triton.cdiv(most, MIN_PIECE))


def _attend(
    how: Attending,
    q_THW: torch.Tensor,
    positions_T: torch.Tensor,
    rows: tuple[torch.Tensor | int, ...],
    chosen_TK: torch.Tensor | None,
    is_exact: bool,
    n_rows: int,
) -> torch.Tensor:
    """Both kernels. rows: what attend_kernel takes from `table` on to `window_first`."""
    (n_tokens, n_heads, width), device, c = q_THW.shape, q_THW.device, how.config
    n_pieces = _n_pieces(how, n_tokens)
    partials = torch.empty(n_tokens, n_heads, n_pieces, width, device=device)
    log_sums = torch.empty(n_tokens, n_heads, n_pieces, device=device)
    out_THW, q_THW = torch.empty(n_tokens, n_heads, width, device=device), q_THW.contiguous()
    known, sums = attend_constants(how, is_exact, n_rows), combine_constants(how, is_exact, n_rows)
    top_k = 0 if chosen_TK is None else chosen_TK.shape[1]
    chosen = positions_T if chosen_TK is None else chosen_TK
    attend_kernel[triton.cdiv(n_heads, known["BLOCK_H"]), n_pieces, n_tokens](
        q_THW, positions_T, *rows, chosen, partials, log_sums, how.scale * LOG2_E, n_pieces, **known, TOP_K=top_k,
        **attend_options(how, is_exact),
    )  # fmt: skip
    combine_kernel[n_heads, n_tokens](
        partials, log_sums, positions_T, how.sinks_H, how.turns.fine, how.turns.coarse, out_THW, n_pieces, **sums,
        TOP_K=top_k, R=c.qk_rope_head_dim, BLOCK_PAIRS=triton.next_power_of_2(c.qk_rope_head_dim // 2),
        PIECES=_PIECES, num_warps=4,
    )  # fmt: skip
    return out_THW


def attend_constants(how: Attending, is_exact: bool, n_rows: int) -> dict[str, object]:
    """What attend_kernel is compiled for."""
    c, key_bytes = how.config, 4 if is_exact else 2
    return {
        "N_HEADS": c.num_attention_heads, "W": c.head_dim, "BLOCK_W": max(16, triton.next_power_of_2(c.head_dim)),
        "BLOCK_H": _head_block(how), "BLOCK_S": 32 if _is_copied(how, is_exact) else 16,
        "SHORTEST": MIN_PIECE, "KEY": key_type(is_exact), "ALIGNED": 16 if c.head_dim * key_bytes % 16 == 0 else 4,
        "DTYPE": tl.float16 if how.dtype == torch.float16 else tl.float32, "RATIO": c.compress_ratio(how.layer),
        "SEEN": c.sliding_window, "N_ROWS": n_rows,
    }  # fmt: skip


def attend_options(how: Attending, is_exact: bool) -> dict[str, int]:
    """How attend_kernel is launched: without spills, and in a consumer card's shared memory."""
    return {"num_warps": 4 if _head_block(how) == 16 else 8, "num_stages": 2 if _is_copied(how, is_exact) else 1}


def combine_constants(how: Attending, is_exact: bool, n_rows: int) -> dict[str, object]:
    """What combine_kernel is compiled for."""
    names = "N_HEADS", "W", "BLOCK_W", "BLOCK_S", "SHORTEST", "RATIO", "SEEN"
    known = attend_constants(how, is_exact, n_rows)
    return {name: known[name] for name in names}


def _head_block(how: Attending) -> int:
    most = tiles.of(how.sinks_H.device).attention.heads
    return head_block(how.config.num_attention_heads, how.dtype, most)


def _is_copied(how: Attending, is_exact: bool) -> bool:
    return not is_exact and how.dtype == torch.float16 and _head_block(how) > 1
