"""How a model's layers are split among several cards, in order. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from localrun.models.config import Config

_PARTS = 256  # of a card's room, by which cards are made equally full


def whole_runs(config: Config) -> list[range]:
    """Layers that stay together, in order: those that attend to what the one before has chosen stay with it."""
    shares = config.indexer_types and config.index_topk
    layers = range(config.num_hidden_layers)
    starts = [index for index in layers if not (shares and index) or config.chooses_rows(index)]
    return [range(start, stop) for start, stop in pairwise([*starts, config.num_hidden_layers])]


def split(runs: Sequence[range], sizes: Sequence[int], rooms: Sequence[int]) -> tuple[range, ...]:
    """Each card's layers: what its room holds of them, and no card much fuller than another, if all fit.

    Args:
        runs: of layers that stay together.
        sizes: bytes of each.
        rooms: bytes of each card that they may take.
    """
    if len(rooms) == 1:
        return (range(runs[0].start, runs[-1].stop),)

    def filled(part: int) -> tuple[range, ...] | None:
        return _filled(runs, sizes, [room * part // _PARTS for room in rooms])

    least = bisect_left(range(_PARTS), True, 1, key=lambda part: filled(part) is not None)
    if found := filled(least):
        return found
    cuts = [len(runs) * place // len(rooms) for place in range(len(rooms))]
    starts = [*(runs[cut].start for cut in cuts), runs[-1].stop]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def _filled(runs: Sequence[range], sizes: Sequence[int], budgets: Sequence[int]) -> tuple[range, ...] | None:
    """Runs of layers in order, as many to each card as its budget holds, and at least one; None if some are left."""
    layers, first = [], 0
    for place, budget in enumerate(budgets):
        most, last = len(runs) - (len(budgets) - 1 - place), first
        while last < most and sum(sizes[first : last + 1]) <= budget:
            last += 1
        if last == first:
            return None
        layers.append(range(runs[first].start, runs[last - 1].stop))
        first = last
    return tuple(layers) if first == len(runs) else None
