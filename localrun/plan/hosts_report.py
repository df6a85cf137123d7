"""The answer to `localrun plan MODEL --hosts N` as one JSON document: how many hosts pay, and which sharing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from localrun.limits import PREFILL_CHUNK
from localrun.placement.memory_table import RAM, gib
from localrun.plan.hosts import (
    SHARINGS,
    WHOLE_EXPERTS,
    HostMemory,
    Parts,
    Spread,
    can_slice,
    decode_over,
    host_memory,
    messages,
    prefill_over,
    slices_of,
)
from localrun.plan.link import Link
from localrun.plan.machine import Machine
from localrun.plan.report import SHORT_CTX, memory_facts, model_facts
from localrun.plan.shapes import ModelShape
from localrun.plan.speed import decode_speed

LEAST_GAIN = 1.05  # a host more pays if a token comes this many times as fast


def hosts_refusal(model: ModelShape, machine: Machine, ctx: int, n_hosts: int) -> str:
    """What a host lacks; empty if the model fits. Raises LocalrunError as host_memory does."""
    memory = host_memory(model, machine, ctx, n_hosts)
    if memory.fits:
        return ""
    what = f"{model.name}, {model.type}, {ctx} tokens of context"
    if memory.first.fits:
        lacks = f"each host but the first needs {gib(memory.others)} of RAM ({gib(memory.available)} usable)"
    else:
        lacks = f"the first needs {memory.first.shortage()}"
    return f"{what}, does not fit {n_hosts} hosts, each {machine.title}: {lacks}"


def make_hosts_report(
    model: ModelShape, machine: Machine, link: Link, ctx: int, n_hosts: int, prompt: int = PREFILL_CHUNK
) -> dict[str, Any]:
    """Everything `localrun plan MODEL --hosts N` prints. Never raises for lack of room: see "refusal"."""
    refused = hosts_refusal(model, machine, ctx, n_hosts)
    memory = host_memory(model, machine, ctx, n_hosts)
    document = {
        "model": model_facts(model),
        "machine": {"name": machine.name, "title": machine.title, "sources": machine.sources, "file": machine.document},
        "ctx": ctx,
        "n_hosts": n_hosts,
        "link": {"name": link.name, "file": link.document()},
        "memory": memory_facts(memory.first) | {"others": memory.others, "fits": memory.fits},
        "messages": asdict(messages(model, n_hosts, memory.first.placement.experts)),
        "refusal": refused or None,
    }
    if refused:
        return document
    rows = [row for n in range(1, n_hosts + 1) for row in _rows(model, machine, link, ctx, n, prompt)]
    return document | {"rows": rows, "pays": _paying(rows), "prompt": min(prompt, ctx)}


def _rows(model: ModelShape, machine: Machine, link: Link, ctx: int, n_hosts: int, prompt: int) -> list[dict[str, Any]]:
    """A row for each way to share that there are blocks for; one for a single host."""
    placement, short = host_memory(model, machine, ctx, n_hosts).first.placement, min(SHORT_CTX, ctx)
    alone, rows = decode_speed(model, machine, placement, short), []
    for sharing in SHARINGS[:1] if n_hosts == 1 else SHARINGS if can_slice(model, n_hosts) else (WHOLE_EXPERTS,):
        if sharing == WHOLE_EXPERTS:
            parts = Parts(1 / n_hosts, 1 / n_hosts)
        else:
            parts = slices_of(alone, model, n_hosts, link, placement.experts, sharing)
        memory = host_memory(model, machine, ctx, n_hosts, parts)
        decoding = decode_over(model, machine, placement, short, n_hosts, link, sharing)
        reading = prefill_over(model, machine, placement, min(prompt, ctx), n_hosts, link, parts)
        rows.append(_row(n_hosts, sharing, memory, decoding, reading))
    return rows


def _row(n_hosts: int, sharing: str, memory: HostMemory, decoding: Spread, reading: Spread) -> dict[str, Any]:
    return {
        "n_hosts": n_hosts,
        "sharing": sharing if n_hosts > 1 else None,
        "ram_first": memory.first.needed[RAM],
        "ram_others": memory.others if n_hosts > 1 else 0,
        "fits": memory.fits,
        "decode": _facts(decoding),
        "prefill": _facts(reading),
    }


def _facts(spread: Spread) -> dict[str, float]:
    return {
        "tokens_per_s": round(spread.tokens_per_s, 3),
        "seconds": spread.speed.seconds,
        "messages_s": spread.messages_s,
        "messages_part": round(spread.messages_s / spread.speed.seconds, 4),
        "waiting_s": spread.waiting_s,
    }


def _paying(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The most hosts of which each more made a token at least LEAST_GAIN times as fast, of those that fit."""
    best: dict[str, Any] = {}
    for row in (row for row in rows if row["fits"]):
        gain = row["decode"]["tokens_per_s"] / best["decode"]["tokens_per_s"] if best else LEAST_GAIN
        more = row["n_hosts"] - best["n_hosts"] if best else 1
        if gain >= LEAST_GAIN**more if more else gain > 1:
            best = row
    return {"n_hosts": best["n_hosts"], "sharing": best["sharing"]}
