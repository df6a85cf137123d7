"""Routed experts spread over hosts: memory of each, and time of a token and of a prompt with their messages.

The first rank has all but the routed experts, on its card if there is one, and every rank an equal share of these, for
its CPU to compute; but layers whose experts have room in the first one's VRAM are its own. A layer's messages are two
for each remote rank: hidden states with the router's choice go out, sums come back. Two ways to share:

slices: a rank has 1/N of every expert's inner columns, as nearly as whole blocks divide.
slices by time (--rank-sizes auto): blocks of them so that all are done at once, the first rank with the shared experts
as well, the others with their messages.
experts: a rank has 1/N of the experts, so that a token waits for the rank that it chose most experts of.

Hosts are alike, and each like the machine that the plan is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, comb, lcm

import numpy as np

from localrun.errors import LocalrunError
from localrun.limits import PREFILL_CHUNK
from localrun.models.names import layer_of
from localrun.models.summary import group_of
from localrun.placement.memory_table import EXPERTS, RAM
from localrun.placement.sizes import rank_work_bytes
from localrun.placement.slices import by_sizes, by_time
from localrun.plan.link import Link
from localrun.plan.machine import Machine
from localrun.plan.memory import Memory, Placement, plan_memory
from localrun.plan.shapes import ModelShape, Tensor, n_bytes
from localrun.plan.speed import MESSAGES, OTHERS, Phase, Speed, beside_s, decode_speed, prefill_speed
from quant.decode.message_sizes import back_bytes, message_bytes
from quant.formats import registry

SLICES, BY_TIME, WHOLE_EXPERTS = "slices", "slices by time", "experts"
SHARINGS = (SLICES, BY_TIME, WHOLE_EXPERTS)
MESSAGE = "bf16"  # how vectors travel unless --rank-messages says otherwise
DISK, SHARED = "disk", "shared experts"
MOST_HOSTS = 64


@dataclass(frozen=True)
class Parts:
    """Of the experts that are shared: the first rank's part, and the largest that another one has."""

    first: float
    others: float


@dataclass(frozen=True)
class HostMemory:
    """Bytes of RAM: of the first rank, with its table; of each other; what each may use."""

    first: Memory
    others: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether all hosts have room."""
        return self.first.fits and self.others <= self.available


@dataclass(frozen=True)
class Messages:
    """Of one token: bytes in one message out and in one back, messages a layer, bytes of all layers that are shared."""

    out_bytes: int
    back_bytes: int
    per_layer: int
    bytes_per_token: int


@dataclass(frozen=True)
class Spread:
    """A prediction, and which part of its seconds the first rank waits: for others, which have more to compute than it
    has, and on top of that because messages take time.
    """

    speed: Speed
    messages_s: float
    waiting_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of replies, all together."""
        return self.speed.tokens_per_s


def host_memory(model: ModelShape, machine: Machine, ctx: int, n_hosts: int, parts: Parts | None = None) -> HostMemory:
    """Whether each host has room, with these parts or equal ones.

    Raises LocalrunError for a model without routed experts, or too many hosts.
    """
    if not model.is_moe:
        raise LocalrunError(f"{model.name} has no routed experts to spread over hosts")
    if not 1 <= n_hosts <= MOST_HOSTS:
        raise LocalrunError(f"--hosts {n_hosts}; expected 1 to {MOST_HOSTS}")
    parts = parts or equal_parts(model, n_hosts)
    first = plan_memory(model, _ranked(machine, n_hosts), ctx, parts.first)
    groups = model.groups()
    drafting = [tensor for tensor in groups.get("mtp", []) if group_of(tensor.name) == EXPERTS]
    shared = n_bytes(groups[EXPERTS]) * (1 - first.placement.experts) + n_bytes(drafting)
    rows = tuple(row for row in first.rows if row.where != DISK)  # every host has the whole file
    work = rank_work_bytes(model.config, parts.others, MESSAGE)
    others = ceil(shared * parts.others) + work + int(machine.cpu.process_bytes)
    return HostMemory(replace(first, rows=rows), others, first.available[RAM])


def _ranked(machine: Machine, n_hosts: int) -> Machine:
    """The machine as the first of several hosts: a GPU whose memory is the RAM has no use for others' CPUs."""
    is_left_out = n_hosts > 1 and machine.gpu is not None and machine.gpu.unified
    return replace(machine, gpu=None) if is_left_out else machine


def messages(model: ModelShape, n_hosts: int, in_vram: float = 0.0) -> Messages:
    """What a token sends and gets back. in_vram: the part of the routed experts that is not shared."""
    c = model.config
    out = message_bytes(MESSAGE, c.hidden_size, c.num_experts_per_tok, n_tokens=1)
    back, n_remote = back_bytes(MESSAGE, c.hidden_size, n_tokens=1), n_hosts - 1
    n_bytes = (out + back) * n_remote * model.n_moe_layers * (1 - in_vram)
    return Messages(out, back, 2 * n_remote, round(n_bytes))


def busiest_share(n_experts: int, per_token: int, n_ranks: int) -> float:
    """Of a token's experts, the part on the rank with most of them, on average over all choices alike.

    P(no rank has more than m) is the number of ways to take at most m of each rank's experts over the number of all.
    """
    counts = [n_experts // n_ranks + (rank < n_experts % n_ranks) for rank in range(n_ranks)]
    at_most = [_ways(counts, per_token, most) / comb(n_experts, per_token) for most in range(per_token)]
    return sum(1 - p for p in at_most) / per_token


def _ways(counts: list[int], total: int, most: int) -> int:
    """Ways to take `total` experts, at most `most` of each rank's counts."""
    ways = [1] + [0] * total
    for count in counts:
        ways = [sum(ways[n - j] * comb(count, j) for j in range(min(n, most) + 1)) for n in range(total + 1)]
    return ways[total]


def decode_over(
    model: ModelShape, machine: Machine, placement: Placement, ctx: float, n_hosts: int, link: Link, sharing: str
) -> Spread:
    """One token with ctx others in the cache; placement is the first host's."""
    c, alone = model.config, decode_speed(model, machine, placement, ctx)
    if sharing == WHOLE_EXPERTS:
        busiest = busiest_share(c.n_routed_experts, c.num_experts_per_tok, n_hosts)
        parts = Parts(busiest, busiest)
    else:
        parts = slices_of(alone, model, n_hosts, link, placement.experts, sharing)
    return spread(alone, model, n_hosts, link, parts, placement.experts, beside_s)


def prefill_over(
    model: ModelShape, machine: Machine, placement: Placement, n_tokens: int, n_hosts: int, link: Link,
    parts: Parts | None = None,
) -> Spread:  # fmt: skip
    """A prompt, with these slices or equal ones; whole experts are like these, as many tokens choose of all alike."""
    alone, parts = prefill_speed(model, machine, placement, n_tokens), parts or equal_parts(model, n_hosts)
    return spread(alone, model, n_hosts, link, parts, placement.experts)


def slices_of(alone: Speed, model: ModelShape, n_hosts: int, link: Link, in_vram: float, sharing: str) -> Parts:
    """Those of SLICES, or BY_TIME as ranks choose them (localrun.ranks.division); alone: one token's time."""
    if sharing == SLICES or n_hosts == 1 or in_vram == 1:
        return equal_parts(model, n_hosts)
    sent, per_layer_s = messages(model, n_hosts), {}
    for part in (EXPERTS, SHARED):
        seconds = sum(phase.seconds for phase in alone.phases if (phase.part, phase.device) == (part, "CPU"))
        per_layer_s[part] = seconds / model.n_moe_layers
    exchange_s = link.exchange_s(sent.out_bytes, sent.back_bytes, n_hosts - 1)
    before_s = [per_layer_s[SHARED], *[exchange_s] * (n_hosts - 1)]
    layers, blocks = layers_of(model), []
    per_byte_s = per_layer_s[EXPERTS] / (1 - in_vram) * len(layers) / sum(layer.n_bytes for layer in layers)
    for layer in layers:
        block_s = per_byte_s * layer.n_bytes / layer.n_blocks
        blocks.append(by_time(layer.n_blocks, [block_s] * n_hosts, before_s))
    return _parts(layers, blocks)


def equal_parts(model: ModelShape, n_hosts: int) -> Parts:
    """Those of equal slices, of which each rank has whole blocks; of whole experts where there are too few blocks."""
    if n_hosts == 1 or not can_slice(model, n_hosts):
        return Parts(1 / n_hosts, 1 / n_hosts)
    layers = layers_of(model)
    return _parts(layers, [by_sizes(layer.n_blocks, (1,) * n_hosts) for layer in layers])


def can_slice(model: ModelShape, n_hosts: int) -> bool:
    """Whether there is a block of each expert for each rank."""
    return all(layer.n_blocks >= n_hosts for layer in layers_of(model))


def _parts(layers: Sequence[_Layer], blocks: Sequence[Sequence[int]]) -> Parts:
    """blocks: of each layer, those of each rank."""
    of_layers = np.array(blocks) / np.array([[layer.n_blocks] for layer in layers])
    first, *others = np.average(of_layers, 0, [layer.n_bytes for layer in layers]).tolist()
    return Parts(first, max(others))


@dataclass(frozen=True)
class _Layer:
    """Routed experts of a layer: blocks of inner columns, which slices are cut by, and bytes."""

    n_blocks: int
    n_bytes: int


def layers_of(model: ModelShape) -> list[_Layer]:
    """Those with routed experts, in order."""
    tensors: dict[int, list[Tensor]] = {}
    for tensor in model.groups()[EXPERTS]:
        if tensor.is_matrix and len(tensor.shape) == 3:
            tensors.setdefault(layer_of(tensor.name), []).append(tensor)
    found = []
    for _, of_layer in sorted(tensors.items()):
        formats = [(tensor, registry.get(tensor.type)) for tensor in of_layer]
        down, format_ = next((tensor, format_) for tensor, format_ in formats if "_down_" in tensor.name)
        unit = lcm(32, format_.block, *(other.rows for tensor, other in formats if tensor is not down))
        found.append(_Layer(down.shape[-1] // unit, n_bytes(of_layer)))
    return found


def spread(
    alone: Speed, model: ModelShape, n_hosts: int, link: Link, parts: Parts, in_vram: float = 0.0,
    beside: Callable[[Sequence[Phase]], float] = lambda phases: 0.0,
) -> Spread:  # fmt: skip
    """One machine's time with its part of the CPU's routed experts, and what waiting for others adds to it.

    While messages are under way, and others compute, the first rank computes the shared experts as well: on its CPU, or
    on a card, which has the time of the routed ones and of waiting.

    Args:
        in_vram: the part of the routed experts that is not shared.
        beside: of phases, seconds in which a card computes beside the CPU; as with one host, of prompts none count.
    """
    if n_hosts == 1:
        return Spread(alone, 0.0, 0.0)
    n_exchanges = model.n_moe_layers * (1 - in_vram) * ceil(alone.tokens / PREFILL_CHUNK)
    n_bytes = messages(model, n_hosts, in_vram).bytes_per_token * alone.tokens
    under_way = link.exchange_s(0, 0, n_hosts - 1) * n_exchanges + n_bytes / link.bytes_per_s
    routed, before = (
        sum(phase.seconds for phase in alone.phases if (phase.part, phase.device) == (part, "CPU"))
        for part in (EXPERTS, SHARED)
    )
    shared = [
        replace(p, seconds=p.seconds * parts.first) if (p.part, p.device) == (EXPERTS, "CPU") else p
        for p in alone.phases
    ]
    busier = (parts.others - parts.first) * routed - before
    waiting = Phase(OTHERS, "", max(0.0, busier))
    more = Phase(MESSAGES, "", max(0.0, under_way + busier) - waiting.seconds)
    computing, at_once, speed = (
        Speed(alone.tokens, tuple(phases), beside(phases))
        for phases in (shared, [*shared, waiting], [*shared, waiting, more])
    )
    return Spread(speed, speed.seconds - at_once.seconds, at_once.seconds - computing.seconds)
