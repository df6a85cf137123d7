"""Where each tensor of a model lives, GPU or RAM, and what that takes in bytes. Pure: no torch, no files, no devices.

On the GPU go attention with the whole KV cache, norms, routers, shared experts, dense layers, embedding and head;
routed experts stay in RAM. What VRAM is left takes whole experts: the most used ones of all layers where counts are
known, else all experts of a layer, layer by layer. A tensor has one home, or two that share its experts: no weight lies
twice in RAM. Or what is left is a cache of as many experts of each layer, all of which stay in RAM then.

Where several ranks share the experts, VRAM takes whole layers alone, which are left out of the shares: no other rank
has anything of a layer that a card computes, and of the others each has its share in RAM.

Of several cards each has a run of layers with their cache, in order, as many as make all of them equally full; the
first one has the embedding, the last one the head. What is left of a card takes experts of its own layers.

The layer for multi-token prediction stays in RAM with all its tensors and runs there: it only makes drafts, which may
be slow or missing without changing a reply, and V3's would take 1.5 GB of VRAM from layers that every token needs.
Where it has no head of its own, it reads the model's, which is then needed in RAM as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from types import MappingProxyType
from typing import Any

from localrun.errors import LocalrunError
from localrun.models.config import Config
from localrun.models.names import layer_of
from localrun.placement.memory_table import DRAFTS_HEAD, EXPERTS, MARKS, MTP, RAM, Row, shortage, vram_of
from localrun.placement.parts import Card, MoeLayer, Parts, TensorLike
from localrun.placement.sizes import (
    RESERVE_BYTES,
    gpu_cache_bytes,
    gpu_work_bytes,
    mark_bytes,
    staging_bytes,
    work_bytes,
)
from localrun.placement.split import split, whole_runs

GPU, CPU, BOTH = "cuda", "cpu", "both"  # homes of a tensor; both: some of its experts here, the others there
CTX_STEP = 256  # contexts that are proposed are multiples of it
_N_BESIDES = 3  # rows of a card that are no weights
_LABELS = {"other": "routers and norms", "mtp": MTP}


@dataclass(frozen=True)
class DraftFile:
    """A file of layers alone that draft for the model: bytes of its tensors, and whether they need the model's head."""

    n_bytes: int
    needs_head: bool


@dataclass(frozen=True)
class Request:
    """What is to be placed, and where there is room.

    Attributes:
        ctx, batch: tokens of a context; contexts at a time.
        ram: bytes that may be used.
        vram: bytes that may be used, of the first card; None to leave the GPU out.
        vram_free: what the card has, if vram was set to less.
        more_vram: of the other cards among which layers are split.
        cards: CUDA's numbers of them all.
        gpu_experts: routed experts of each layer to keep in VRAM, or "auto" for as many as there is room for.
        expert_cache: whether they are a cache: all experts stay in RAM, and which of them VRAM holds too may change.
        cache_bits: of a cached value: 16 or 8.
        usage: how often each expert was chosen, by layer.
        mtp: whether the layer for multi-token prediction makes drafts; else it stays on the disk.
        draft_file: what makes them, where that has a file of its own.
        runner_bytes: RAM of the program itself that ram still includes.
        share: the part of routed experts in RAM that is here, where several ranks share them.
    """

    tensors: tuple[TensorLike, ...]
    config: Config
    ctx: int
    ram: int
    vram: int | None = None
    vram_free: int | None = None
    more_vram: tuple[int, ...] = ()
    cards: tuple[int, ...] = (0,)
    batch: int = 1
    gpu_experts: int | str = "auto"
    expert_cache: bool = False
    cache_bits: int = 16
    usage: Mapping[int, Sequence[int]] | None = None
    mtp: bool = False
    draft_file: DraftFile | None = None
    runner_bytes: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Placement:
    """Homes and bytes.

    Attributes:
        device: where the network runs: "cuda", with experts in RAM on the CPU, or "cpu".
        tensors: name -> "cuda", "cpu" or "both".
        experts: layer with routed experts -> ids of those in VRAM, ascending; of a cache those that are first in it.
        expert_slots: experts of each layer that VRAM caches, which all lie in RAM too; 0 where they stay in VRAM.
        n_experts: of a layer.
        rows: the memory table.
        available: bytes that may be used, by memory.
        cards: CUDA's numbers of those that are used, and the layers of each.
        request: what was to be placed.
    """

    request: Request
    device: str
    ctx: int
    batch: int
    cache_bits: int
    tensors: Mapping[str, str]
    experts: Mapping[int, tuple[int, ...]]
    expert_slots: int
    n_experts: int
    rows: tuple[Row, ...]
    available: Mapping[str, int]
    cards: tuple[int, ...] = ()
    layers: tuple[range, ...] = ()

    @property
    def needed(self) -> dict[str, int]:
        """Bytes by memory."""
        return {where: sum(row.n_bytes for row in self.rows if row.where == where) for where in self.available}

    @property
    def short(self) -> tuple[str, ...]:
        """The memories that are too small."""
        return tuple(where for where, n_bytes in self.needed.items() if n_bytes > self.available[where])

    @property
    def short_of_vram(self) -> bool:
        """Whether a card's memory is too small."""
        return any(where != RAM for where in self.short)

    def with_share(self, share: float) -> Placement:
        """The same with this part of the routed experts in RAM here: what is in VRAM does not depend on it."""
        return lay_out(replace(self.request, share=share))

    def spare(self, place: int) -> int:
        """Bytes that nothing has of the card at a place in `cards`."""
        return self.available[vram_of(place)] - self.needed[vram_of(place)]

    def n_bytes(self, where: str, what: str) -> int:
        """A row's bytes; 0 if there is none."""
        return sum(row.n_bytes for row in self.rows if (row.where, row.what) == (where, what))

    def shortage(self) -> str:
        """ "386.0 GiB of RAM (60.0 GiB usable)", for each memory that is too small."""
        return shortage(self.needed, self.available)

    def document(self) -> dict[str, Any]:
        """The same as JSON has it; all experts of a layer are "all", tensors of successive layers share a name."""
        homes = {home: _spans(n for n, at in self.tensors.items() if at == home) for home in (GPU, BOTH, CPU)}
        return {
            "device": self.device,
            "ctx": self.ctx,
            "batch": self.batch,
            "cache_bits": self.cache_bits,
            "rows": [{"where": row.where, "what": row.what, "bytes": row.n_bytes} for row in self.rows],
            "needed": self.needed,
            "available": dict(self.available),
            "fits": not self.short,
            "experts_in_vram": {
                str(layer): "all" if len(ids) == self.n_experts else list(ids)
                for layer, ids in self.experts.items()
                if ids
            },
            "expert_slots": self.expert_slots,
            "cards": [
                {"card": card, "layers": [here.start, here.stop - 1]}
                for card, here in zip(self.cards, self.layers, strict=True)
            ],
            "tensors": {home: names for home, names in homes.items() if names},
        }


def lay_out(request: Request) -> Placement:
    """The placement, whether it fits or not: see Placement.short. Raises LocalrunError on a setting without sense."""
    parts = Parts(request.tensors, request.config)
    _check(request, parts)
    experts, slots = {layer.index: () for layer in parts.moe}, 0
    rows, available, layers = [], {}, ()
    if request.vram is not None:
        rooms = request.vram, *request.more_vram
        layers = _split(request, parts, rooms)
        for place, (here, room) in enumerate(zip(layers, rooms, strict=True)):
            card = Card(place, len(rooms), here)
            gpu_rows = list(_gpu_rows(request, parts, card))
            left = room - sum(row.n_bytes for row in gpu_rows)
            moe = [layer for layer in parts.moe if layer.index in here]
            slots = _slots(request, moe, left)
            experts |= _choose(replace(request, gpu_experts=slots) if slots else request, moe, left)
            in_vram = Row(vram_of(place), EXPERTS, _expert_bytes(moe, experts))
            rows += [*gpu_rows[:-_N_BESIDES], in_vram, *gpu_rows[-_N_BESIDES:]]
            available[vram_of(place)] = room
    rows += _cpu_rows(request, parts, experts, slots)
    available[RAM] = request.ram
    return Placement(
        request=request,
        device=CPU if request.vram is None else GPU,
        ctx=request.ctx,
        batch=request.batch,
        cache_bits=request.cache_bits,
        tensors=MappingProxyType(_homes(request, parts, experts, slots)),
        experts=MappingProxyType(experts),
        expert_slots=slots,
        n_experts=request.config.n_routed_experts,
        rows=tuple(row for row in rows if row.n_bytes),
        available=MappingProxyType(available),
        cards=() if request.vram is None else request.cards,
        layers=layers,
    )


def why_not_on_gpu(config: Config) -> str:
    """Why the GPU half does not run the model; empty if it does."""
    return "" if config.n_routed_experts else "the GPU is for models with experts, and this one has none"


def runs_on_gpu(config: Config) -> bool:
    """Whether the GPU half runs the model."""
    return not why_not_on_gpu(config)


def _check(request: Request, parts: Parts) -> None:
    wanted, n_experts = request.gpu_experts, request.config.n_routed_experts if parts.moe else 0
    if wanted != "auto" and not (isinstance(wanted, int) and 0 <= wanted <= n_experts):
        raise LocalrunError(f"{wanted} experts of each layer on the GPU; expected auto, or 0 to {n_experts}")
    if request.expert_cache and request.more_vram:
        raise LocalrunError("a cache of experts is for one card, and the model needs several; leave out --gpu-experts")
    if request.cache_bits not in (8, 16):
        raise LocalrunError(f"a cache of {request.cache_bits} bits; expected 16 or 8")
    if request.cache_bits == 8 and request.vram is not None and request.config.attention != "mla":
        raise LocalrunError("a cache of 8 bits on a GPU is for latent attention; keys and values of others have 16")
    if request.cache_bits == 8 and request.vram is None and (reason := request.config.why_not_8_bits):
        raise LocalrunError(f"--cache-bits 8: {reason}; leave it out")
    if request.ctx < 1 or request.batch < 1:
        raise LocalrunError(f"{request.batch} contexts of {request.ctx} tokens; expected 1 or more of each")
    for layer, counts in (request.usage or {}).items():
        if layer not in [each.index for each in parts.moe] or len(counts) != n_experts or min(counts) < 0:
            raise LocalrunError(f"the experts' usage does not fit the model: {len(counts)} counts for layer {layer}")


# --- who goes where


def _slots(request: Request, moe: Sequence[MoeLayer], left: int) -> int:
    """Of each layer, of a cache of experts; 0 for none, as where all of them have room in VRAM."""
    n_experts = request.config.n_routed_experts
    if not request.expert_cache or not moe:
        return 0
    n = request.gpu_experts
    if not isinstance(n, int):
        n = min(n_experts, max(0, left) // sum(layer.expert_bytes for layer in moe))
    return n if n < n_experts else 0


def _choose(request: Request, moe: Sequence[MoeLayer], left: int) -> dict[int, tuple[int, ...]]:
    """Ids of the experts in VRAM by layer."""
    usage, everyone = request.usage or {}, range(request.config.n_routed_experts)
    if isinstance(request.gpu_experts, int):
        n = request.gpu_experts
        ranked = {layer.index: sorted(everyone, key=lambda e, at=layer.index: -_count(usage, at, e)) for layer in moe}
        return {index: tuple(sorted(ids[:n])) for index, ids in ranked.items()}
    if not usage:
        candidates = [(layer.index, tuple(everyone), layer.n_bytes) for layer in moe]
    else:  # a byte in VRAM saves as many bytes read from RAM as its expert is used
        ones = [(layer.index, (e,), layer.expert_bytes) for layer in moe for e in everyone]
        candidates = sorted(ones, key=lambda one: -_count(usage, one[0], one[1][0]))
    chosen: dict[int, list[int]] = {layer.index: [] for layer in moe}
    for index, ids, n_bytes in candidates:
        if n_bytes <= left:
            chosen[index].extend(ids)
            left -= n_bytes
    return {index: tuple(sorted(ids)) for index, ids in chosen.items()}


def _count(usage: Mapping[int, Sequence[int]], layer: int, expert: int) -> int:
    return usage[layer][expert] if layer in usage else 0


def _expert_bytes(moe: Sequence[MoeLayer], experts: Mapping[int, Sequence[int]]) -> int:
    """Bytes of the experts that are named."""
    return sum(len(experts[layer.index]) * layer.expert_bytes for layer in moe)


def _gpu_rows(request: Request, parts: Parts, card: Card) -> Iterator[Row]:
    """What is in a card's VRAM whatever the experts; the last _N_BESIDES are no weights."""
    where, c = vram_of(card.place), request.config
    for group, n_bytes in card.groups(parts).items():
        yield Row(where, _LABELS.get(group, group), n_bytes)
    cache = gpu_cache_bytes(c, request.cache_bits, request.ctx, card.layers)
    yield Row(where, "KV cache", request.batch * cache)
    yield Row(where, "work memory", gpu_work_bytes(c, card.is_last))
    yield Row(where, "reserve", RESERVE_BYTES)


def _split(request: Request, parts: Parts, rooms: Sequence[int]) -> tuple[range, ...]:
    """Each card's layers."""
    n_cards = len(rooms)

    def n_bytes(place: int, here: range) -> int:
        return sum(row.n_bytes for row in _gpu_rows(request, parts, Card(place, n_cards, here)))

    bare = [n_bytes(place, range(0)) for place in range(n_cards)]
    runs = whole_runs(request.config)
    sizes = [n_bytes(0, run) - bare[0] for run in runs]
    return split(runs, sizes, [room - own for room, own in zip(rooms, bare, strict=True)])


def _cpu_rows(request: Request, parts: Parts, experts: Mapping[int, Sequence[int]], slots: int) -> Iterator[Row]:
    c, on_gpu = request.config, request.vram is not None
    if not on_gpu:
        for group, n_bytes in parts.groups.items():
            yield Row(RAM, _LABELS.get(group, group), n_bytes)
    in_vram = 0 if slots else _expert_bytes(parts.moe, experts)
    yield Row(RAM, EXPERTS, ceil(request.share * (sum(layer.n_bytes for layer in parts.moe) - in_vram)))
    if request.mtp:
        n_bytes, head = parts.mtp - int((1 - request.share) * parts.mtp_experts), parts.mtp_head
        if request.draft_file:
            n_bytes, head = request.draft_file.n_bytes, request.draft_file.needs_head * parts.groups.get("head", 0)
        yield Row(RAM, MTP, n_bytes)
        yield Row(RAM, DRAFTS_HEAD, head if on_gpu else 0)
    if not on_gpu:
        yield Row(RAM, "KV cache", request.batch * c.kv_bytes(request.ctx, request.cache_bits))
    if not on_gpu or c.attention == "compressed":  # of other caches on a device there are none
        yield Row(RAM, MARKS, request.batch * mark_bytes(c, request.ctx))
    yield Row(RAM, "work memory", work_bytes(c, on_gpu, request.ctx) + (staging_bytes(c) if on_gpu else 0))
    yield Row(RAM, "the runner itself", request.runner_bytes)


def _homes(request: Request, parts: Parts, experts: Mapping[int, Sequence[int]], slots: int) -> dict[str, str]:
    """Each tensor's device."""
    if request.vram is None:
        return dict.fromkeys(parts.group_of, CPU)
    homes = {}
    for name, group in parts.group_of.items():
        homes[name] = CPU if group == "mtp" else GPU
        if group == EXPERTS:
            n_here = 0 if slots else len(experts[layer_of(name)])
            homes[name] = CPU if n_here == 0 else GPU if n_here == request.config.n_routed_experts else BOTH
    return homes


def _spans(names: Iterable[str]) -> list[str]:
    """Names with layers that follow each other put together: "blk.3-60.attn_norm.weight"."""
    layers: dict[str, list[int]] = {}
    spans = []
    for name in names:
        layer = layer_of(name)
        if layer is None:
            spans.append(name)
        else:
            layers.setdefault(name.split(".", 2)[2], []).append(layer)
    for rest, indices in layers.items():
        for _, run in groupby(enumerate(sorted(indices)), key=lambda pair: pair[1] - pair[0]):
            run = [index for _, index in run]
            which = f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])
            spans.append(f"blk.{which}.{rest}")
    return sorted(spans)
