"""Routed experts spread over hosts: memory of each, and time of a token and of a prompt with their messages.

Ranks compute on CPUs. The first has all but the routed experts, every rank an equal share of these. A layer's messages
are two for each remote rank: hidden states with the router's choice go out, sums come back. Two ways to share:

slices: a rank has 1/N of every expert's inner columns, so that all have the same to do.
experts: a rank has 1/N of the experts, so that a token waits for the rank that it chose most experts of.

Hosts are alike, and each like the machine that the plan is for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, comb

from localrun.errors import LocalrunError
from localrun.limits import PREFILL_CHUNK
from localrun.placement.memory_table import EXPERTS, RAM
from localrun.plan.link import Link
from localrun.plan.machine import Machine
from localrun.plan.memory import Memory, Placement, plan_memory
from localrun.plan.shapes import ModelShape, n_bytes
from localrun.plan.speed import Phase, Speed, decode_speed, prefill_speed
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
    """Of one token: bytes in one message out and in one back, messages a layer, bytes of all layers."""

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
    share = -(-n_bytes(model.groups()[EXPERTS]) // n_hosts)
    first = plan_memory(_with_experts_of(model, n_hosts), ranked(machine, n_hosts), ctx)
    rows = tuple(row for row in first.rows if row.where != DISK)  # every host has the whole file
    return HostMemory(replace(first, rows=rows), share + int(machine.cpu.process_bytes), first.available[RAM])


def ranked(machine: Machine, n_hosts: int) -> Machine:
    """The machine as one of several hosts: ranks compute on CPUs."""
    return replace(machine, gpu=None) if n_hosts > 1 else machine


def _with_experts_of(model: ModelShape, n_hosts: int) -> ModelShape:
    """The same with the bytes of a share of the routed experts."""
    routed = {id(tensor) for tensor in model.groups()[EXPERTS]}
    tensors = (replace(t, n_bytes=-(-t.n_bytes // n_hosts)) if id(t) in routed else t for t in model.tensors)
    return replace(model, tensors=tuple(tensors))


def messages(model: ModelShape, n_hosts: int) -> Messages:
    """What a token sends and gets back."""
    c = model.config
    out = message_bytes(MESSAGE, c.hidden_size, c.num_experts_per_tok, n_tokens=1)
    back, n_remote = back_bytes(MESSAGE, c.hidden_size, n_tokens=1), n_hosts - 1
    return Messages(out, back, 2 * n_remote, (out + back) * n_remote * model.n_moe_layers)


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
    c = model.config
    alone = decode_speed(model, machine, placement, ctx)
    if sharing == SHARED_EXPERTS:
        return spread(alone, model, n_hosts, link, busiest_share(c.n_routed_experts, c.num_experts_per_tok, n_hosts))
    return spread(alone, model, n_hosts, link, 1 / n_hosts)


def prefill_over(
    model: ModelShape, machine: Machine, placement: Placement, n_tokens: int, n_hosts: int, link: Link
) -> Spread:
    """A prompt; the same for both ways to share, since many tokens choose of all ranks alike."""
    return spread(prefill_speed(model, machine, placement, n_tokens), model, n_hosts, link, 1 / n_hosts)


def spread(alone: Speed, model: ModelShape, n_hosts: int, link: Link, part: float) -> Spread:
    """One machine's time with `part` of the routed experts' and what messages add to it.

    While messages are under way the first rank computes the shared experts.
    """
    if n_hosts == 1:
        return Spread(alone, 0.0)
    n_exchanges = model.n_moe_layers * ceil(alone.tokens / PREFILL_CHUNK)
    n_bytes = messages(model, n_hosts).bytes_per_token * alone.tokens
    under_way = link.exchange_s(0, 0, n_hosts - 1) * n_exchanges + n_bytes / link.bytes_per_s
    beside = sum(phase.seconds for phase in alone.phases if phase.part == "shared experts")
    waiting = max(0.0, under_way - beside)
    phases = [replace(p, seconds=p.seconds * part) if p.part == EXPERTS else p for p in alone.phases]
    return Spread(Speed(alone.tokens, (*phases, Phase("messages", "", waiting))), waiting)
