"""Which routed experts VRAM should hold where it is a cache of them: least recently used, admitted by frequency.

A miss costs little: the CPU computes the expert, reading it once. A copy to VRAM costs the host's memory about three
times that: the file's pages are read, page-locked memory is written and then read by the card. So an expert is admitted
only if it was lately chosen so much more often than what it replaces that its copy will have paid for itself; the idea
is TinyLFU's (Einziger, Friedman and Manes, arXiv 1512.00727). Pure: no torch, no device.

Letters: L layers with a cache, E experts of a layer, N slots of a layer.
"""

from dataclasses import dataclass

import numpy as np

COPY_COST = 3.0  # of bringing an expert to VRAM, in the host's memory traffic of computing it once
WINDOW = 256  # tokens: how far back "lately" goes


@dataclass(frozen=True)
class Swap:
    """An expert that should come to a slot of its layer, in place of what is there. The layer: its place among L."""

    layer: int
    slot: int
    expert: int


class Policy:
    """What each slot holds or is to hold, and how often and how recently each expert was chosen.

    Attributes:
        window, margin: as given; they may be set anew before the first tokens.
    """

    def __init__(self, n_experts: int, held_LN: np.ndarray, window: int = WINDOW, margin: float = COPY_COST):
        """
        Args:
            held_LN: the expert in each slot, -1 in an empty one. Well chosen by what some text used; how often that was
                does not count: it would only be forgotten too slowly.
            margin: times that an expert must have been chosen more often, in a window, than what it replaces.
        """
        self._held_LN = held_LN.astype(np.int64)
        self._coming_LN = np.zeros(held_LN.shape, bool)
        self._count_LE, self._last_LE = np.zeros((2, held_LN.shape[0], n_experts))
        self.window, self.margin, self._time = window, margin, 0

    def table(self) -> np.ndarray:
        """int32 (L, E): the slot of each expert that is in VRAM, -1 of all others, those that are coming too."""
        table_LE = np.full(self._count_LE.shape, -1, np.int32)
        layers, slots = np.nonzero((self._held_LN >= 0) & ~self._coming_LN)
        table_LE[layers, self._held_LN[layers, slots]] = slots
        return table_LE

    def observe(self, chosen_LE: np.ndarray, n_tokens: int) -> None:
        """Note how often each expert was chosen by so many tokens."""
        kept = (1 - 1 / self.window) ** n_tokens
        self._count_LE *= kept
        self._count_LE += chosen_LE * ((1 - kept) * self.window / n_tokens)  # each token of a prompt weighs the same
        self._time += 1
        self._last_LE[chosen_LE > 0] = self._time

    def swaps(self, most: int) -> list[Swap]:
        """What should be copied now, at most one expert a layer, what gains most first. Its slots are empty then.

        Of each layer the expert of the last tokens that is chosen most, against the least recently used slot.
        """
        layers = np.arange(self._held_LN.shape[0])
        expert_L, count_L = self._candidates()
        slot_L = self._victims()
        gain_L = count_L - self._counts()[layers, slot_L]
        gain_L[self._coming_LN[layers, slot_L]] = -np.inf
        best = np.argsort(-gain_L, kind="stable")[: max(0, most)]
        found = [Swap(int(i), int(slot_L[i]), int(expert_L[i])) for i in best if gain_L[i] > self.margin]
        for swap in found:
            self._held_LN[swap.layer, swap.slot] = swap.expert
            self._coming_LN[swap.layer, swap.slot] = True
        return found

    def finish(self, swap: Swap, arrived: bool) -> None:
        """An expert has come, or will not."""
        self._coming_LN[swap.layer, swap.slot] = False
        if not arrived:
            self._held_LN[swap.layer, swap.slot] = -1

    def _candidates(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each layer the expert of the last tokens that is neither here nor coming, and its count; else -inf."""
        n_layers, n_experts = self._count_LE.shape
        elsewhere = np.ones((n_layers, n_experts + 1), bool)  # empty slots mark the last column
        elsewhere[np.arange(n_layers)[:, None], self._held_LN] = False
        is_candidate = (self._last_LE == self._time) & elsewhere[:, :-1]
        count_LE = np.where(is_candidate, self._count_LE, -np.inf)
        return count_LE.argmax(1), count_LE.max(1)

    def _victims(self) -> np.ndarray:
        """The slot of each layer that was used least recently, of several the one that was used least."""
        last_LN = np.take_along_axis(self._last_LE, np.maximum(self._held_LN, 0), 1)
        last_LN[self._held_LN < 0] = -1
        last_LN[self._coming_LN] = np.inf
        return (last_LN + self._counts() / (2 * self.window + 1)).argmin(1)  # a count never exceeds the window

    def _counts(self) -> np.ndarray:
        """(L, N): how often what is in each slot was chosen lately."""
        counts_LN = np.take_along_axis(self._count_LE, np.maximum(self._held_LN, 0), 1)
        counts_LN[self._held_LN < 0] = 0
        return counts_LN
