"""Where a model's bytes go, whether they fit, and the nearest setting that does.

The rules are placement.placement's: on the GPU goes all but the routed experts, of which whole layers follow while
there is room; where what must be there does not fit, layers are split among several cards, if there are any, else the
GPU is left out. Layers for multi-token prediction stay in
the file until they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from localrun.placement import placement
from localrun.placement.memory_table import EXPERTS, MARKS, RAM, Row, gib, shortage, vram_of
from localrun.placement.placement import CTX_STEP, Request
from localrun.plan.machine import Machine
from localrun.plan.shapes import ModelShape, n_bytes

# Of a cache with such a part of the experts, the part of the choices that are found in it: assumed, the means of
# scripts/simulate_expert_cache.py --counts on OLMoE's routing by kind of text, tokens drawn independently.
_HITS = (0, 1 / 8, 1 / 4, 1 / 2, 1), (0, 0.30, 0.48, 0.73, 1)
_BESIDES = ("KV cache", MARKS, "work memory", "reserve", "the runner itself")  # rows that are no weights


@dataclass(frozen=True)
class Placement:
    """What lives on the GPU: layers (attention, KV cache, all but routed experts), head and embedding, and of the
    routed experts which part; of a cache of them (slots a layer) the part of the choices that are found there. Of
    several cards, among which layers are split, how many.
    """

    layers: int
    head: bool
    experts: float
    slots: int = 0
    cards: int = 1


@dataclass(frozen=True)
class Memory:
    """A placement with its table; bytes needed and available by memory."""

    placement: Placement
    rows: tuple[Row, ...]
    needed: Mapping[str, int]
    available: Mapping[str, int]

    @property
    def fits(self) -> bool:
        """Whether no memory is too small."""
        return all(self.needed[where] <= self.available[where] for where in self.needed)

    def shortage(self) -> str:
        """ "386.0 GiB of RAM (60.0 GiB usable)", for each memory that is too small."""
        return shortage(self.needed, self.available)


def plan_memory(model: ModelShape, machine: Machine, ctx: int, share: float = 1.0) -> Memory:
    """The table for a context of ctx tokens. Never raises for lack of room: see Memory.fits.

    share: the part of routed experts in RAM that is here, the rest being other hosts'.
    """
    found = _place(model, machine, ctx, share=share)
    in_ram = machine.gpu is None or machine.gpu.unified
    rows = list(_gpu_rows(found, machine)) if found.device == placement.GPU else []
    if in_ram:
        rows = [Row(RAM, row.what, row.n_bytes) for row in rows]
    rows.append(Row(RAM, "weights, mapped from the file", _weights(found, RAM)))
    rows.append(Row(RAM, f"KV cache of {ctx} tokens", found.n_bytes(RAM, "KV cache")))
    rows += [row for row in found.rows if row.where == RAM and row.what in _BESIDES[1:]]
    available = {RAM: int(machine.ram_bytes - machine.reserved_bytes)}
    if machine.gpu is not None and machine.gpu.unified:  # nearly everything is the GPU's, which may not have it all
        available[RAM] = min(available[RAM], int(machine.gpu.vram_bytes))
    elif machine.gpu is not None:
        cards = range(max(1, len(found.cards)))
        available |= {vram_of(place): int(machine.gpu.vram_bytes) for place in cards}
    needed = {where: sum(row.n_bytes for row in rows if row.where == where) for where in available}
    rows.append(Row("disk", "the file, but for its vocabulary", n_bytes(model.tensors)))
    rows.append(Row("disk", "of which for multi-token prediction, not loaded", n_bytes(model.groups().get("mtp", []))))
    return Memory(_summary(found, model), tuple(row for row in rows if row.n_bytes), needed, available)


def cached_experts(model: ModelShape, machine: Machine, ctx: int) -> Placement | None:
    """With the VRAM that is left over as a cache of experts (--gpu-experts cache); None where there is none."""
    if machine.gpu is None or machine.gpu.unified:
        return None
    found = _place(model, machine, ctx, expert_cache=True)
    if found.short or not found.expert_slots:
        return None
    share = found.expert_slots / found.n_experts
    return replace(_summary(found, model), experts=float(np.interp(share, *_HITS)), slots=found.expert_slots)


def _place(
    model: ModelShape, machine: Machine, ctx: int, expert_cache: bool = False, share: float = 1.0
) -> placement.Placement:
    """Where everything goes: without the GPU if it has too little memory."""
    gpu = machine.gpu
    request = Request(
        model.tensors, model.config, ctx, int(machine.ram_bytes), runner_bytes=int(machine.cpu.process_bytes),
        share=share,
    )  # fmt: skip
    alone = placement.lay_out(request)
    if gpu is None or not (gpu.unified or placement.runs_on_gpu(model.config)):
        return alone
    vram = int(2 * n_bytes(model.tensors) + alone.needed[RAM] if gpu.unified else gpu.vram_bytes - gpu.reserved_bytes)
    for n_cards in range(1, 1 + (1 if expert_cache else machine.n_gpus)):
        some = replace(request, vram=vram, more_vram=(vram,) * (n_cards - 1), cards=tuple(range(n_cards)))
        found = placement.lay_out(replace(some, expert_cache=expert_cache))
        if not found.short_of_vram:
            return found
    return alone


def _gpu_rows(found: placement.Placement, machine: Machine) -> Iterator[Row]:
    """What is on each GPU, with the routed experts apart."""
    for place, layers in enumerate(found.layers):
        where, moe = vram_of(place), [index for index in found.experts if index in layers]
        experts, n_whole = found.n_bytes(where, EXPERTS), _n_whole(found, moe)
        which = f" (layers {layers.start} to {layers.stop - 1})" if len(found.layers) > 1 else ""
        yield Row(where, f"weights on the GPU{which}", _weights(found, where) - experts)
        yield Row(where, f"weights on the GPU: {EXPERTS}, {n_whole} of {len(moe)} layers", experts)
        yield Row(where, f"KV cache of {found.ctx} tokens on the GPU", found.n_bytes(where, "KV cache"))
        work = found.n_bytes(where, "work memory") + found.n_bytes(where, "reserve")
        yield Row(where, "work memory on the GPU", work)
        yield Row(where, "driver", int(machine.gpu.reserved_bytes) if machine.gpu else 0)


def _weights(found: placement.Placement, where: str) -> int:
    return sum(row.n_bytes for row in found.rows if row.where == where and row.what not in _BESIDES)


def _n_whole(found: placement.Placement, layers: Iterable[int]) -> int:
    """Those with all their routed experts in VRAM."""
    return sum(len(found.experts[index]) == found.n_experts for index in layers)


def _summary(found: placement.Placement, model: ModelShape) -> Placement:
    on_gpu = found.device == placement.GPU
    experts = n_bytes(model.groups().get(EXPERTS, []))
    cards = range(len(found.cards))
    in_vram = sum(found.n_bytes(vram_of(place), EXPERTS) for place in cards)
    part = in_vram / experts if experts else float(on_gpu)
    return Placement(model.config.num_hidden_layers * on_gpu, on_gpu, part, cards=max(1, len(cards)))


def refusal(model: ModelShape, machine: Machine, ctx: int) -> str:
    """What is needed, what there is, and the nearest setting that fits; empty if this one does."""
    memory = plan_memory(model, machine, ctx)
    if memory.fits:
        return ""
    what = f"{model.name}, {model.type}, {ctx} tokens of context"
    advice = nearest_that_fits(model, machine, ctx)
    return f"{what}, does not fit {machine.title}: needs {memory.shortage()}; {advice}"


def nearest_that_fits(model: ModelShape, machine: Machine, ctx: int) -> str:
    """A shorter context if that is enough, else the type with the most bits, else what the smallest would need."""
    if shorter := _longest_ctx(model, machine, ctx):
        return f"--ctx {shorter} would fit"
    smaller = _smaller_types(model)
    for other in smaller:
        if plan_memory(other, machine, ctx).fits:
            return f"--type {other.type} would fit"
    for other in smaller:
        if shorter := _longest_ctx(other, machine, ctx):
            return f"--type {other.type} --ctx {shorter} would fit"
    smallest = (smaller or [model])[-1]
    least = plan_memory(smallest, machine, CTX_STEP)
    need = " and ".join(f"{gib(size)} of {where}" for where, size in least.needed.items())
    return f"no type fits: the smallest, {smallest.type}, needs {need} with {CTX_STEP} tokens of context"


def _longest_ctx(model: ModelShape, machine: Machine, ctx: int) -> int:
    """The longest context below ctx that fits, in steps; 0 if none does."""
    if not plan_memory(model, machine, CTX_STEP).fits:
        return 0
    low, high = 0, (ctx - 1) // CTX_STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if plan_memory(model, machine, middle * CTX_STEP).fits else (low, middle - 1)
    return low * CTX_STEP


def _smaller_types(model: ModelShape) -> list[ModelShape]:
    """The model in every mix with fewer bytes, largest first."""
    size = n_bytes(model.tensors)
    return [other for other in model.in_mixes() if n_bytes(other.tensors) < size]
