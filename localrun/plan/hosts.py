"""Routed experts spread over hosts: memory of each, and time of a token and of a prompt with their messages.

The first rank has all but the routed experts, on its card if there is one, and every rank an equal share of these, for
its CPU to compute; but layers whose experts have room in the first one's VRAM are its own. A layer's messages are two
for each remote rank: hidden states with the router's choice go out, sums come back. Two ways to share:

slices: a rank has 1/N of every expert's inner columns, so that all have the same to do.
experts: a rank has 1/N of the experts, so that a token waits for the rank that it chose most experts of.

Hosts are alike, and each like the machine that the plan is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, comb

from localrun.errors import LocalrunError
from localrun.limits import PREFILL_CHUNK
from localrun.placement.memory_table import EXPERTS, RAM
from localrun.plan.link import Link
from localrun.plan.machine import Machine
from localrun.plan.memory import Memory, Placement, plan_memory
from localrun.plan.shapes import ModelShape, n_bytes
from localrun.plan.speed import MESSAGES, Phase, Speed, beside_s, decode_speed, prefill_speed
from quant.decode.message_sizes import back_bytes, message_bytes

SLICES, SHARED_EXPERTS = "slices", "experts"
SHARINGS = (SLICES, SHARED_EXPERTS)
MESSAGE = "bf16"  # how vectors travel unless --rank-messages says otherwise
DISK = "disk"
MOST_HOSTS = 64


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
    """A prediction; messages_s is the part of its seconds that a rank waits for messages."""

    speed: Speed
    messages_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of replies, all together."""
        return self.speed.tokens_per_s


def host_memory(model: ModelShape, machine: Machine, ctx: int, n_hosts: int) -> HostMemory:
    """Whether each host has room. Raises LocalrunError for a model without routed experts, or too many hosts."""
    if not model.is_moe:
        raise LocalrunError(f"{model.name} has no routed experts to spread over hosts")
    if not 1 <= n_hosts <= MOST_HOSTS:
        raise LocalrunError(f"--hosts {n_hosts}; expected 1 to {MOST_HOSTS}")
    first = plan_memory(model, _ranked(machine, n_hosts), ctx, 1 / n_hosts)
    share = ceil(n_bytes(model.groups()[EXPERTS]) * (1 - first.placement.experts) / n_hosts)
    rows = tuple(row for row in first.rows if row.where != DISK)  # every host has the whole file
    return HostMemory(replace(first, rows=rows), share + int(machine.cpu.process_bytes), first.available[RAM])


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
    c, part = model.config, 1 / n_hosts
    if sharing == SHARED_EXPERTS:
        part = busiest_share(c.n_routed_experts, c.num_experts_per_tok, n_hosts)
    alone = decode_speed(model, machine, placement, ctx)
    return spread(alone, model, n_hosts, link, part, placement.experts, beside_s)


def prefill_over(
    model: ModelShape, machine: Machine, placement: Placement, n_tokens: int, n_hosts: int, link: Link
) -> Spread:
    """A prompt; the same for both ways to share, since many tokens choose of all ranks alike."""
    alone = prefill_speed(model, machine, placement, n_tokens)
    return spread(alone, model, n_hosts, link, 1 / n_hosts, placement.experts)


def spread(
    alone: Speed, model: ModelShape, n_hosts: int, link: Link, part: float, in_vram: float = 0.0,
    beside: Callable[[Sequence[Phase]], float] = lambda phases: 0.0,
) -> Spread:  # fmt: skip
    """One machine's time with `part` of the CPU's routed experts and what messages add to it.

    While messages are under way the first rank computes the shared experts: on its CPU, or on a card, which has the
    time of the routed ones as well.

    Args:
        in_vram: the part of the routed experts that is not shared.
        beside: of phases, seconds in which a card computes beside the CPU; as with one host, of prompts none count.
    """
    if n_hosts == 1:
        return Spread(alone, 0.0)
    n_exchanges = model.n_moe_layers * (1 - in_vram) * ceil(alone.tokens / PREFILL_CHUNK)
    n_bytes = messages(model, n_hosts, in_vram).bytes_per_token * alone.tokens
    under_way = link.exchange_s(0, 0, n_hosts - 1) * n_exchanges + n_bytes / link.bytes_per_s
    before = sum(phase.seconds for phase in alone.phases if (phase.part, phase.device) == ("shared experts", "CPU"))
    shared = [
        replace(p, seconds=p.seconds * part) if (p.part, p.device) == (EXPERTS, "CPU") else p for p in alone.phases
    ]
    phases = [*shared, Phase(MESSAGES, "", max(0.0, under_way - before))]
    speed = Speed(alone.tokens, tuple(phases), beside(phases))
    return Spread(speed, speed.seconds - Speed(alone.tokens, tuple(shared), beside(shared)).seconds)
