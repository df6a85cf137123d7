"""Who has what of the routed experts: rank 0 decides, and tells the others before it compiles or copies anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.models.names import layer_of
from localrun.models.summary import group_of
from localrun.models.tensors import GGUFTensors
from localrun.placement.placement import Placement
from localrun.placement.slices import by_sizes, by_time
from localrun.ranks.owners import owners_of
from localrun.ranks.sharing import EXPERTS, Division, Ranks, Sharing, expert_layers, n_blocks, n_bytes, settled
from localrun.ranks.speed import Rates, be_measured, measure
from localrun.ranks.world import World
from quant.decode.message_sizes import back_bytes, message_bytes


def decide(file: GGUFFile, config: Config, ranks: Ranks, n_threads: int, placement: Placement) -> Division:
    """On rank 0. Raises LocalrunError: the model can't be shared so, or a rank is gone.

    Args:
        n_threads: of this rank.
        placement: of this rank; layers whose experts are all in VRAM are not shared.
    """
    world, in_vram = ranks.world, [index for index, ids in placement.experts.items() if ids]
    layers = [index for index in expert_layers(file, config) if index not in in_vram]
    if in_vram and not any(index < config.num_hidden_layers for index in layers):
        raise LocalrunError(
            "VRAM holds all routed experts: others have nothing to do; run without them, or with --device cpu"
        )
    if not layers:
        raise LocalrunError(f"{file.path}: has no routed experts that several ranks could share")
    sharing, rates = settled(ranks.sharing, file, config, world), None
    if sharing.by_speed:
        rates = measure(world, n_threads, *_sizes(sharing, config))
    if sharing.share == EXPERTS:
        sizes = rates.speeds if rates else sharing.sizes_of(world)
        table = owners_of(file, config, world, sharing, sizes, layers)
    else:
        table = _blocks(file, config, world, sharing, rates, layers, placement)
    for rank in range(1, world.size):
        for content in (np.array(layers, np.int64), table):
            world.send(rank, content.tobytes())
    return _division(sharing, layers, table)


def hear(file: GGUFFile, config: Config, world: World, sharing: Sharing, n_threads: int) -> Division:
    """The same on another rank. Raises RankError."""
    sharing = settled(sharing, file, config, world)
    if sharing.by_speed:
        be_measured(world, n_threads, *_sizes(sharing, config))
    layers, table = (np.frombuffer(world.receive(0), np.int64) for _ in range(2))
    return _division(sharing, layers.tolist(), table.reshape(len(layers), -1))


def _division(sharing: Sharing, layers: Sequence[int], table: np.ndarray) -> Division:
    is_whole = sharing.share == EXPERTS
    return Division(tuple(layers), None if is_whole else table, table if is_whole else None)


def _sizes(sharing: Sharing, config: Config) -> tuple[int, int]:
    """Bytes of a token's message there and back."""
    there = message_bytes(sharing.message, config.hidden_size, config.num_experts_per_tok, 1)
    return there, back_bytes(sharing.message, config.hidden_size, 1)


def _blocks(
    file: GGUFFile, config: Config, world: World, sharing: Sharing, rates: Rates | None, layers: Sequence[int],
    placement: Placement,
) -> np.ndarray:  # fmt: skip
    """int64 (layers, N): by sizes, or so that all ranks are done with a token's layer at once."""
    tensors, shared = GGUFTensors(file), dict.fromkeys(layers, 0)
    on_cards = {index for here in placement.layers for index in here}
    for tensor in file.tensors.values():
        index = layer_of(tensor.name)
        if index in shared and index not in on_cards and group_of(tensor.name) == "shared experts":
            shared[index] += tensor.n_bytes
    rows = []
    for index in layers:
        whole = tensors.expert_matrices(index)
        n = n_blocks(whole.gate.n_rows, whole.inner_unit, world.size)
        if rates is None:
            rows.append(by_sizes(n, sharing.sizes_of(world)))
            continue
        of_a_token = n_bytes(whole) * config.num_experts_per_tok / config.n_routed_experts
        before_s = [shared[index] / rates.speeds[0], *rates.exchange_s]
        rows.append(by_time(n, [of_a_token / n / speed for speed in rates.speeds], before_s))
    return np.array(rows, np.int64)
