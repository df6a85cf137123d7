"""Whether hosts that read prompts (--prefill-hosts) pay, against one host and against sharing the experts among all.

A request is a prompt and a reply. One host, or several that share the experts, do one after the other, and a reply that
runs while another prompt is read gets a token a pause (serve --max-pause). Readers, each with the whole model on its
CPU, do it beside the first host's replies; the rows of the cache travel while the rest is computed, so that what is on
top is a chunk's question and logits, and the wire's time where that is longer than the computing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from localrun.errors import LocalrunError
from localrun.limits import PREFILL_CHUNK, READER_PAUSE_S
from localrun.placement.memory_table import RAM, gib
from localrun.plan.hosts import MOST_HOSTS, SLICES, WHOLE_EXPERTS, can_slice, decode_over, host_memory, prefill_over
from localrun.plan.link import Link
from localrun.plan.machine import Machine
from localrun.plan.memory import plan_memory, refusal
from localrun.plan.report import SHORT_CTX, model_facts
from localrun.plan.shapes import ModelShape
from localrun.plan.speed import decode_speed, prefill_speed

ONE, SHARED, READING = "one host", "experts shared", "prompts elsewhere"
_PAUSE_S = 1.0  # serve's --max-pause if it is not given


@dataclass(frozen=True)
class Way:
    """What to do with the hosts; of requests that come one after the other.

    Attributes:
        ram_others: bytes that each host but the first needs.
        first_token_s: reading the prompt, messages and rows included.
        tokens_per_s: of a reply.
        meanwhile_per_s: the same while a prompt is read.
        requests_per_hour: as many as can be done.
        on_top_s: of first_token_s, what rows on their way take.
    """

    name: str
    n_hosts: int
    ram_others: int
    fits: bool
    first_token_s: float
    tokens_per_s: float
    meanwhile_per_s: float
    requests_per_hour: float
    on_top_s: float = 0.0


def on_top_s(model: ModelShape, link: Link, n_tokens: int, computing_s: float) -> float:
    """Seconds that a prompt takes beyond its computing, where another host reads it.

    Of each chunk two messages of two parts, which either side finds half a pause late on average, and the logits. A
    layer's rows travel while its feed-forward part is computed.
    """
    c, n_chunks = model.config, ceil(n_tokens / PREFILL_CHUNK)
    n_bytes, logits = c.kv_bytes_per_token * n_tokens, 4 * c.vocab_size
    each = READER_PAUSE_S + 2 * link.round_trip_s + logits / link.bytes_per_s
    return n_chunks * each + max(0.0, n_bytes / link.bytes_per_s - computing_s)


def ways(
    model: ModelShape, machine: Machine, link: Link, ctx: int, n_readers: int, prompt: int, reply: int
) -> list[Way]:
    """One host, all of them sharing the experts if there are any to share, and readers. Raises LocalrunError."""
    if not 1 <= n_readers < MOST_HOSTS:
        raise LocalrunError(f"--prefill-hosts {n_readers}; expected 1 to {MOST_HOSTS - 1}")
    alone, short, n_hosts = plan_memory(model, machine, ctx), min(SHORT_CTX, ctx), n_readers + 1
    step_s = decode_speed(model, machine, alone.placement, short).seconds
    reading = prefill_speed(model, machine, alone.placement, prompt).seconds
    found = [_in_turn(ONE, 1, 0, alone.fits, reading, step_s, reply)]
    if model.is_moe:
        memory = host_memory(model, machine, ctx, n_hosts)
        reading = prefill_over(model, machine, memory.first.placement, prompt, n_hosts, link).speed.seconds
        sharing = SLICES if can_slice(model, n_hosts) else WHOLE_EXPERTS
        step = decode_over(model, machine, memory.first.placement, short, n_hosts, link, sharing).speed.seconds
        found.append(_in_turn(SHARED, n_hosts, memory.others, memory.fits, reading, step, reply))
    reader = replace(machine, gpu=None)
    there = plan_memory(model, reader, ctx)
    here_s = decode_speed(model, reader, there.placement, short).seconds  # the first host's card is left out, too
    computing_s = prefill_speed(model, reader, there.placement, prompt).seconds
    on_top = on_top_s(model, link, prompt, computing_s)
    reading_s = computing_s + on_top
    per_hour = 3600 / max(reading_s / n_readers, reply * here_s)
    rate = 1 / here_s
    found.append(Way(READING, n_hosts, there.needed[RAM], there.fits, reading_s, rate, rate, per_hour, on_top))
    return found


def _in_turn(name: str, n_hosts: int, others: int, fits: bool, reading_s: float, step_s: float, reply: int) -> Way:
    meanwhile = 1 / (min(_PAUSE_S, reading_s) + step_s)
    return Way(name, n_hosts, others, fits, reading_s, 1 / step_s, meanwhile, 3600 / (reading_s + reply * step_s))


def make_readers_report(
    model: ModelShape, machine: Machine, link: Link, ctx: int, n_readers: int, prompt: int, reply: int
) -> dict[str, Any]:
    """Everything `localrun plan MODEL --prefill-hosts N` prints; "refusal" is there if no way fits."""
    prompt = min(prompt, ctx)
    rows = ways(model, machine, link, ctx, n_readers, prompt, reply)
    fitting = [row for row in rows if row.fits]
    best = max(fitting, key=lambda row: row.requests_per_hour, default=None)
    n_bytes = model.config.kv_bytes_per_token * prompt
    return {
        "model": model_facts(model),
        "machine": {"title": machine.title, "sources": machine.sources, "file": machine.document},
        "link": {"name": link.name, "file": link.document()},
        "ctx": ctx,
        "prompt": prompt,
        "reply": reply,
        "row_bytes": n_bytes,
        "link_s": n_bytes / link.bytes_per_s,
        "on_top_s": rows[-1].on_top_s,
        "rows": [asdict(row) for row in rows],
        "pays": best.name if best else None,
        "refusal": None
        if best
        else refusal(model, machine, ctx) or f"a reader needs {gib(rows[-1].ram_others)} of RAM",
    }
