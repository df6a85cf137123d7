"""The indexer of sparse attention on the device: its keys in the cache, scores, and the rows that each token chooses.

As network/indexer.py has it, of tokens that have a cache each. Shapes depend on T and a bound on positions alone
(Places.most), so that a recorded launch serves all shorter contexts; rows behind a token's own are chosen last.

Letters: T tokens, D hidden_size, Q q_lora_rank, S cached tokens, I the indexer's heads, d index_head_dim, K index_topk.
"""

import torch
import triton
import triton.language as tl

from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.places import Places, block_of
from localrun.limits import GPU_ATTENTION_WORK_BYTES
from localrun.network.attention import in_groups
from localrun.network.indexer import Indexer

_BLOCK_S = 64  # cached tokens of a program
_SORT_BYTES = 32  # of a token's score while it is sorted: itself and its row, twice, and the scores of others


@triton.jit
def append_key_kernel(keys, positions, table, entry_stride, token_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                      KEY: tl.constexpr):  # fmt: skip
    """Program (token): its key to the cache."""
    token, column = tl.program_id(0), tl.arange(0, BLOCK)
    key = tl.load(keys + token * WIDTH + column, mask=column < WIDTH, other=0.0)
    rows = block_of(table, 4, token, entry_stride, token_stride, KEY, 4)
    tl.store(rows + tl.load(positions + token) * WIDTH + column, key.to(KEY), mask=column < WIDTH)


@triton.jit
def scores_kernel(queries, weights, positions, table, entry_stride, token_stride, scores, most, N_HEADS: tl.constexpr,
                  WIDTH: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
                  KEY: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
                  RATIO: tl.constexpr):  # fmt: skip
    """Program (block of rows, token): sum over heads of weight * relu(query . key); -inf behind the token's own row.

    most: rows. RATIO: tokens of a row; a token sees those that end with itself or before.
    Products of DTYPE, sums float32. Queries are divided by each head's largest value: float16 holds them.
    """
    token, row = tl.program_id(1), tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    n_seen = (tl.load(positions + token).to(tl.int32) + 1) // RATIO
    score = tl.full([BLOCK_S], float("-inf"), tl.float32)
    if tl.program_id(0) * BLOCK_S < n_seen:
        rows = block_of(table, 4, token, entry_stride, token_stride, KEY, ALIGNED)
        column, is_row = tl.arange(0, BLOCK_D), row < n_seen
        inside = is_row[:, None] & (column < WIDTH)[None, :]
        keys = tl.load(rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(DTYPE)
        total = tl.zeros([BLOCK_S], tl.float32)
        for first in tl.static_range(0, N_HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            inside = (head < N_HEADS)[:, None] & (column < WIDTH)[None, :]
            query = tl.load(
                queries + (token * N_HEADS + head)[:, None] * WIDTH + column[None, :], mask=inside, other=0.0
            )
            largest = tl.max(tl.abs(query), 1)
            largest = tl.where(largest > 0, largest, 1.0)
            weight = tl.load(weights + token * N_HEADS + head, mask=head < N_HEADS, other=0.0) * largest
            product = tl.dot((query / largest[:, None]).to(DTYPE), tl.trans(keys), input_precision="ieee")
            total += tl.sum(tl.maximum(product, 0.0) * weight[:, None], 0)
        score = tl.where(is_row, total, float("-inf"))
    tl.store(scores + token.to(tl.int64) * most + row, score, mask=row < most)


def append_keys(keys_Td: torch.Tensor, places: Places, layer: int) -> None:
    """Write keys, float32 (T, d), at the tokens' places."""
    width = keys_Td.shape[1]
    append_key_kernel[(len(keys_Td),)](
        keys_Td.contiguous(), *places.of_layer(layer), width, triton.next_power_of_2(width), _key_type(places)
    )


def scores_of(
    q_TId: torch.Tensor, weights_TI: torch.Tensor, places: Places, layer: int, dtype: torch.dtype, ratio: int = 1
) -> torch.Tensor:
    """float32 (T, places.most / ratio): each token's scores of rows up to its own; -inf behind.

    dtype: of products. ratio: tokens of a row.
    """
    n_tokens, n_heads, width = q_TId.shape
    most = places.most // ratio
    scores = torch.empty(n_tokens, most, device=q_TId.device)
    scores_kernel[triton.cdiv(most, _BLOCK_S), n_tokens](
        q_TId.contiguous(), weights_TI.contiguous(), *places.of_layer(layer), scores, most,
        **scores_constants(n_heads, width, places, dtype), RATIO=ratio, num_warps=4,
    )  # fmt: skip
    return scores


def scores_constants(n_heads: int, width: int, places: Places, dtype: torch.dtype) -> dict[str, object]:
    """What scores_kernel is compiled for."""
    row_bytes = (4 if places.is_exact else 2) * width
    return {
        "N_HEADS": n_heads, "WIDTH": width, "BLOCK_H": 16 if n_heads <= 16 else 32,
        "BLOCK_D": max(16, triton.next_power_of_2(width)), "BLOCK_S": _BLOCK_S, "KEY": _key_type(places),
        "DTYPE": tl.float16 if dtype == torch.float16 else tl.float32, "ALIGNED": 16 if row_bytes % 16 == 0 else 4,
    }  # fmt: skip


def _key_type(places: Places) -> tl.dtype:
    return tl.float32 if places.is_exact else tl.float16


def choose(
    indexer: Indexer,
    x_TD: torch.Tensor,
    q_TQ: torch.Tensor,
    places: Places,
    layer: int,
    turns: Turns,
    dtype: torch.dtype,
) -> torch.Tensor | None:
    """int32 (T, K): the rows that each token attends to, in rising order, its own among them; then any others.

    Writes the tokens' keys. None where no token sees more than K rows. q_TQ: latents of the queries, normed.
    """
    at, top_k = turns.at(places.positions), indexer.config.index_topk
    append_keys(indexer.keys(x_TD, at), places, layer)
    if places.most <= top_k:
        return None
    return choose_by(indexer.queries(q_TQ, at), indexer.weights_proj(x_TD), places, layer, top_k, dtype)


def choose_by(
    q_TId: torch.Tensor,
    weights_TI: torch.Tensor,
    places: Places,
    layer: int,
    top_k: int,
    dtype: torch.dtype,
    ratio: int = 1,
) -> torch.Tensor:
    """int32 (T, K): the rows, of `ratio` tokens each, that tokens choose by their keys in the cache; as best_rows."""
    outs = []
    for first, count in in_groups(len(q_TId), _SORT_BYTES * places.most // ratio, GPU_ATTENTION_WORK_BYTES):
        some, here = slice(first, first + count), places.part(first, first + count)
        scores = scores_of(q_TId[some], weights_TI[some], here, layer, dtype, ratio)
        outs.append(best_rows(scores, (here.positions + 1) // ratio - 1, top_k))
    return torch.cat(outs)


def best_rows(scores_TS: torch.Tensor, last_T: torch.Tensor, top_k: int) -> torch.Tensor:
    """int32 (T, K) in rising order: the rows with the largest scores, of equals the first. Rows unseen come last.

    last_T: int64, the last row that each token sees.
    """
    rows_TK = scores_TS.sort(descending=True, stable=True).indices[:, :top_k]
    unseen = rows_TK > last_T[:, None]
    return rows_TK.masked_fill(unseen, scores_TS.shape[1]).sort().values.int()
