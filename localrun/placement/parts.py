"""A model's tensors by what belongs together: groups, layers of routed experts, a card's share of the layers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from localrun.models.config import Config
from localrun.models.names import EMBED_TOKENS, LM_HEAD, layer_of, mtp_shared
from localrun.models.summary import group_of
from localrun.placement.memory_table import EXPERTS


class TensorLike(Protocol):
    """What is asked of a tensor: a GGUFFile's and a planned one have it."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...


@dataclass(frozen=True)
class MoeLayer:
    """A layer's routed experts: its index, bytes of all of them, and of each."""

    index: int
    n_bytes: int
    expert_bytes: int


class Parts:
    """The tensors by group (bytes), the routed experts by layer, and what multi-token prediction reads.

    Attributes:
        group_of: each tensor's group, "mtp" of those for multi-token prediction.
        groups: bytes of each, without routed experts and multi-token prediction.
        of_layers: the same of each layer.
        moe: the layers with routed experts, ascending.
        mtp, mtp_experts, mtp_head: bytes of multi-token prediction, of its routed experts, and of the model's head or
            embedding where that reads it.
        is_tied: whether one tensor is embedding and head.
    """

    def __init__(self, tensors: Iterable[TensorLike], config: Config) -> None:
        self.group_of: dict[str, str] = {}
        self.groups: dict[str, int] = {}
        self.of_layers: dict[int, dict[str, int]] = {}
        self.mtp, self.mtp_experts, self.is_tied = 0, 0, False
        moe: dict[int, int] = {}
        sizes = {tensor.name: tensor.n_bytes for tensor in tensors}
        for name, n_bytes in sizes.items():
            layer = layer_of(name)
            group = "mtp" if layer is not None and layer >= config.num_hidden_layers else group_of(name)
            self.group_of[name] = group
            if group == "mtp":
                self.mtp += n_bytes
                self.mtp_experts += n_bytes if group_of(name) == EXPERTS else 0
            elif group == EXPERTS:
                moe[layer] = moe.get(layer, 0) + n_bytes
            else:
                self._add(group, layer, n_bytes)
        self.moe = [MoeLayer(i, size, size // config.n_routed_experts) for i, size in sorted(moe.items())]
        if EMBED_TOKENS in sizes and LM_HEAD not in sizes:  # one tensor is both
            self.groups["head"] = self.groups.pop("embedding")
            self.is_tied = True
        _, head = mtp_shared(sizes.__contains__, config)
        self.mtp_head = sizes.get(head, 0) if self.mtp and head in (LM_HEAD, EMBED_TOKENS) else 0

    def _add(self, group: str, layer: int | None, n_bytes: int) -> None:
        self.groups[group] = self.groups.get(group, 0) + n_bytes
        if layer is not None:
            of_layer = self.of_layers.setdefault(layer, {})
            of_layer[group] = of_layer.get(group, 0) + n_bytes


@dataclass(frozen=True)
class Card:
    """One of some cards, and its layers."""

    place: int
    n_cards: int
    layers: range

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.place == self.n_cards - 1

    def groups(self, parts: Parts) -> dict[str, int]:
        """As Parts.groups, of what the card has."""
        found = dict.fromkeys(parts.groups, 0)
        for group, n_bytes in parts.groups.items():
            elsewhere = sum(of_layer.get(group, 0) for of_layer in parts.of_layers.values())
            if self.place == (0 if group == "embedding" else self.n_cards - 1):
                found[group] += n_bytes - elsewhere
        for index in self.layers:
            for group, n_bytes in parts.of_layers.get(index, {}).items():
                found[group] += n_bytes
        if parts.is_tied and self.n_cards > 1 and self.place == 0:  # it is needed at both ends
            found["head"] += parts.groups["head"]
        return found
