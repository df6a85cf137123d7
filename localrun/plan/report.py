"""The answer to `localrun plan MODEL` as one JSON document: memory, speed, what bounds it, what would change it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from localrun.convert.mixes import needs_imatrix
from localrun.limits import PREFILL_CHUNK
from localrun.plan.fit import Fit
from localrun.plan.machine import Machine
from localrun.plan.memory import Memory, cached_experts, plan_memory, refusal
from localrun.plan.shapes import ModelShape, n_bytes
from localrun.plan.speed import Phase, Speed, decode_speed, mtp_speed, prefill_speed
from localrun.plan.tables import active_weights

SHORT_CTX = 64  # tokens in the cache for the headline figure: the middle of localrun bench's 128
ACCEPTANCE = 0.85  # of drafted tokens: 80-90% reported, arXiv 2505.09343 section 2.3.3


def model_facts(model: ModelShape) -> dict[str, Any]:
    """Sizes, and what a decoded token reads of each part."""
    c, groups = model.config, model.groups()
    per_token = {name: _per_token(model, name) for name in groups}
    parts = {
        name: {
            "weights": sum(t.n_weights for t in tensors),
            "bytes": n_bytes(tensors),
            "weights_per_token": round(sum(t.n_weights for t in tensors) * per_token[name]),
            "bytes_per_token": round(n_bytes(tensors) * per_token[name]),
        }
        for name, tensors in groups.items()
    }
    return {
        "name": model.name,
        "type": model.type,
        "source": model.source,
        "weights": model.n_weights,
        "active_weights": round(active_weights(model)),
        "tensor_bytes": n_bytes(model.tensors),
        "bits_per_weight": round(8 * n_bytes(model.tensors) / model.n_weights, 3),
        "kv_bytes_per_token": c.kv_bytes_per_token,
        "kv_bytes_per_token_in_8_bits": None if c.why_not_8_bits else c.kv_token_bytes(8),
        "kv_window_bytes": c.kv_window_bytes,
        "parts": parts,
    }


def _per_token(model: ModelShape, group: str) -> float:
    c = model.config
    if group == "routed experts":
        return c.num_experts_per_tok / c.n_routed_experts
    if group == "embedding" and "head" in model.groups():
        return 1 / c.vocab_size
    return 0.0 if group == "mtp" else 1.0


def make_report(
    model: ModelShape, machine: Machine, ctx: int, prompt: int = PREFILL_CHUNK, acceptance: float = ACCEPTANCE
) -> dict[str, Any]:
    """Everything `localrun plan MODEL` prints. Never raises for lack of room: see "refusal"."""
    refused = refusal(model, machine, ctx)
    document = _without_speed(model, machine, ctx, refused)
    return document if refused else document | _speeds(model, machine, ctx, prompt, acceptance)


def make_fit_report(
    fit: Fit, machine: Machine, ctx: int, prompt: int = PREFILL_CHUNK, acceptance: float = ACCEPTANCE
) -> dict[str, Any]:
    """The same for what fits, with "fit"; without speeds, but with "unpredicted", where rates of its types lack."""
    model = fit.chosen
    document = _without_speed(model, machine, ctx, "") | {"fit": _fit_facts(fit, machine, ctx)}
    if lacking := _without_rates(model, machine):
        return document | {"unpredicted": f"the machine description has no rates for {', '.join(lacking)}"}
    return document | _speeds(model, machine, ctx, prompt, acceptance)


def _fit_facts(fit: Fit, machine: Machine, ctx: int) -> dict[str, Any]:
    facts = {"type": fit.chosen.type, "bytes": n_bytes(fit.chosen.tensors), "imatrix": needs_imatrix(fit.chosen.type)}
    if fit.next is None:
        return facts | {"next": None}
    memory = plan_memory(fit.next, machine, ctx)
    larger = {"type": fit.next.type, "bytes": n_bytes(fit.next.tensors), "lacks": memory.shortage()}
    return facts | {"next": larger | {"needed": memory.needed, "available": memory.available}}


def _without_speed(model: ModelShape, machine: Machine, ctx: int, refused: str) -> dict[str, Any]:
    return {
        "model": model_facts(model),
        "machine": {"name": machine.name, "title": machine.title, "sources": machine.sources, "file": machine.document},
        "ctx": ctx,
        "memory": memory_facts(plan_memory(model, machine, ctx)),
        "refusal": refused or None,
    }


def _speeds(model: ModelShape, machine: Machine, ctx: int, prompt: int, acceptance: float) -> dict[str, Any]:
    placement = plan_memory(model, machine, ctx).placement
    short = min(SHORT_CTX, ctx)
    decoding = decode_speed(model, machine, placement, short)
    reading = prefill_speed(model, machine, placement, min(prompt, ctx))
    return {
        "decode": speed_facts(decoding) | {"ctx": short},
        "decode_full_context": speed_facts(decode_speed(model, machine, placement, ctx)) | {"ctx": ctx},
        "prefill": speed_facts(reading) | {"tokens": min(prompt, ctx)},
        "sensitivity": sensitivity(model, machine, ctx, min(prompt, ctx), acceptance),
    }


def memory_facts(memory: Memory) -> dict[str, Any]:
    """A memory table as JSON has it; bytes."""
    return {
        "fits": memory.fits,
        "rows": [asdict(row) for row in memory.rows],
        "needed": memory.needed,
        "available": memory.available,
        "placement": asdict(memory.placement),
    }


def speed_facts(speed: Speed) -> dict[str, Any]:
    """Tokens/s, where the time goes, and what bounds it."""
    longest = speed.bottleneck()
    return {
        "tokens_per_s": round(speed.tokens_per_s, 3),
        "seconds": speed.seconds,
        "split_s": speed.split(),
        "bottleneck": _bottleneck(longest),
        "phases": [asdict(phase) for phase in speed.phases],
        "hidden_s": speed.hidden_s,
    }


def _bottleneck(phase: Phase) -> str:
    """ "routed experts on the CPU: its kernels"."""
    waits = {"memory": "memory bandwidth", "kernel": "its kernels", "FLOPs": "arithmetic", "fixed": "fixed costs"}
    where = f" on the {phase.device}" if phase.device else ""
    return f"{phase.part}{where}: {waits[phase.bound]}"


def sensitivity(model: ModelShape, machine: Machine, ctx: int, prompt: int, acceptance: float) -> list[dict[str, Any]]:
    """What other settings would do to decoding and, where they touch it, to prompts: rates and ratios."""
    rows = [
        _changed(what, other, on, ctx, prompt)
        for what, other, on in [
            *_other_machines(model, machine),
            *_other_models(model, machine),
        ]
    ]
    base = _changed("as planned", model, machine, ctx, prompt)
    memory = plan_memory(model, machine, ctx)
    drafted = mtp_speed(model, machine, memory.placement, min(SHORT_CTX, ctx), acceptance)
    if drafted is not None:
        what = f"one drafted token, {acceptance:.0%} kept"
        rows.append({"change": what, "decode_tokens_per_s": drafted.tokens_per_s, "prefill_tokens_per_s": None})
    cached = cached_experts(model, machine, ctx)
    if cached is not None:
        what = f"VRAM as a cache of {cached.slots} experts a layer, {cached.experts:.0%} of the choices found in it"
        decoding = decode_speed(model, machine, cached, min(SHORT_CTX, ctx))
        rows.append({"change": what, "decode_tokens_per_s": decoding.tokens_per_s, "prefill_tokens_per_s": None})
    for row in rows:
        for key in ("decode", "prefill"):
            value, before = row[f"{key}_tokens_per_s"], base[f"{key}_tokens_per_s"]
            row[f"{key}_ratio"] = round(value / before, 3) if value and before else None
    return rows


def _changed(what: str, model: ModelShape, machine: Machine, ctx: int, prompt: int) -> dict[str, Any]:
    memory = plan_memory(model, machine, ctx)
    if not memory.fits:
        return {"change": f"{what} (does not fit)", "decode_tokens_per_s": None, "prefill_tokens_per_s": None}
    decoding = decode_speed(model, machine, memory.placement, min(SHORT_CTX, ctx))
    reading = prefill_speed(model, machine, memory.placement, prompt)
    return {
        "change": what,
        "decode_tokens_per_s": decoding.tokens_per_s,
        "prefill_tokens_per_s": reading.tokens_per_s,
    }


def _other_machines(model: ModelShape, machine: Machine) -> list[tuple[str, ModelShape, Machine]]:
    cpu = machine.cpu
    if cpu.channels:
        factor, what = (cpu.channels + 1) / cpu.channels, f"{cpu.channels + 1} memory channels, not {cpu.channels}"
    else:
        factor, what = 1.25, "memory 1.25 times as fast"
    kernels = tuple(replace(kernel, gemv=float("inf")) for kernel in cpu.kernels)
    at_the_roof = replace(machine, cpu=replace(cpu, kernels=kernels))
    more_cores = replace(machine, cpu=replace(cpu, cores=2 * cpu.cores))
    return [
        (what, model, machine.with_bandwidth(factor)),
        ("twice the cores", model, more_cores),
        ("decoding kernels that keep up with memory", model, at_the_roof),
    ]


def _other_models(model: ModelShape, machine: Machine) -> list[tuple[str, ModelShape, Machine]]:
    rows = []
    size = n_bytes(model.tensors)
    others = []
    if model.conversion is not None or model.file is not None:
        others = [other for other in model.in_mixes() if not _without_rates(other, machine)]
    smaller = max(
        (o for o in others if n_bytes(o.tensors) < 0.98 * size), key=lambda o: n_bytes(o.tensors), default=None
    )
    larger = min(
        (o for o in others if n_bytes(o.tensors) > 1.02 * size), key=lambda o: n_bytes(o.tensors), default=None
    )
    for other in (smaller, larger):
        if other is not None:
            rows.append((other.type, other, machine))
    used = model.config.num_experts_per_tok
    if used > 2:
        fewer = replace(model, config=replace(model.config, num_experts_per_tok=used - 2))
        rows.append((f"{used - 2} experts a token, not {used} (changes what the model says)", fewer, machine))
    return rows


def _without_rates(model: ModelShape, machine: Machine) -> list[str]:
    """A model's types that the machine description lacks; of this machine only those in use were measured."""
    known = {kernel.type for kernel in machine.cpu.kernels}
    return sorted({tensor.type for tensor in model.tensors if tensor.is_matrix} - known)
