"""Which ranks have which experts, and which of them computes for a token, where whole experts are shared.

Letters: T tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.models.expert_counts import read_usage
from localrun.ranks.sharing import Sharing, expert_layers
from localrun.ranks.world import World
from quant.decode.router import MOST_RANKS


def owners_of(
    file: GGUFFile, config: Config, world: World, sharing: Sharing, sizes: Sequence[float], layers: Sequence[int]
) -> np.ndarray:
    """int64 (layers, E): bits of the ranks that have each expert, in the order in which messages count layers.

    sizes: of the ranks' shares.

    Raises LocalrunError: more ranks than experts or bits, or an importance matrix of another model.
    """
    n_experts = config.n_routed_experts
    if world.size > min(n_experts, MOST_RANKS):
        raise LocalrunError(f"{world.size} ranks for {n_experts} experts; at most {min(n_experts, MOST_RANKS)}")
    counts = dict.fromkeys(layers, [1] * n_experts)
    if sharing.usage is not None:
        counted = [index for index in expert_layers(file, config) if index < config.num_hidden_layers]
        counts |= read_usage(sharing.usage, counted, n_experts)
    return np.stack([divide(counts[index], sizes, sharing.copies) for index in layers])


def divide(counts: Sequence[int], sizes: Sequence[float], copies: int = 0) -> np.ndarray:
    """int64 (E,): bits of the ranks that have each expert.

    Ranks have as many experts as their sizes say. The most used go first, each to the rank with least to do that has
    room left; `copies` of those used most go to each of the others as well.
    """
    n_experts, ends = len(counts), np.round(np.cumsum(sizes) / np.sum(sizes) * len(counts)).astype(int)
    room = np.maximum(np.diff(ends, prepend=0), 1)
    busy, owners = np.zeros(len(sizes)), np.zeros(n_experts, np.int64)
    by_use = np.argsort(-np.asarray(counts), kind="stable")
    for expert in by_use:
        if not room.any():
            room += 1
        rank = min((rank for rank in range(len(sizes)) if room[rank]), key=lambda rank: (busy[rank], -room[rank]))
        owners[expert] = 1 << rank
        busy[rank] += counts[expert] / sizes[rank]
        room[rank] -= 1
    for rank in range(len(sizes)):
        others = [expert for expert in by_use if not owners[expert] >> rank & 1]
        owners[others[:copies]] |= 1 << rank
    return owners


def assign(ids_TK: np.ndarray, owners_E: np.ndarray) -> np.ndarray:
    """int64 (T, K): the rank that computes each pair of many tokens; -1 for a pair without an expert.

    An expert's tokens go to one rank, which reads its weights once: to the one with fewest tokens so far of those that
    have it, experts with most tokens first.
    """
    counts = np.bincount(ids_TK[ids_TK >= 0], minlength=owners_E.size)
    rank_of, busy = np.full(owners_E.size + 1, -1), np.zeros(MOST_RANKS, np.int64)
    for expert in np.argsort(-counts, kind="stable"):
        if counts[expert]:
            ranks = [rank for rank in range(MOST_RANKS) if owners_E[expert] >> rank & 1]
            rank = min(ranks, key=lambda rank: busy[rank])
            rank_of[expert] = rank
            busy[rank] += counts[expert]
    return rank_of[ids_TK]
