"""On which device a model runs: what the user asks for, what there is, and what fits there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from localrun import hardware
from localrun.arguments import flag, number, path_text, refuse, whole
from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile
from localrun.models import names
from localrun.models.config import Config
from localrun.models.expert_counts import read_usage
from localrun.placement import available
from localrun.placement.context_fit import refusal
from localrun.placement.placement import DraftFile, Placement, Request, lay_out, why_not_on_gpu

Notice = Callable[[str], None]
# Why cards are not to be used, "" if they are; with False None where only trying would tell, with True they are tried.
Proof = Callable[[bool, tuple[int, ...]], str | None]

_ON_CPU = "interleaved rows run on the CPU only"
EXPECTED = "auto, cpu, cuda or cuda:N"
DEVICES = re.compile("auto|cpu|cuda(:[0-9]{1,3})?")
_ALIKE = 1 << 28  # bytes of free VRAM by which cards do not differ: those that are alike are always the same ones
_MOST_DIGITS = 20  # of a number of experts; Python reads 4,300
_OPTIONS = "--vram, --gpu-experts and --expert-usage"


@dataclass(frozen=True)
class DeviceRequest:
    """What the user asks for: the options of localrun.load. Raises LocalrunError on a wrong one.

    Attributes:
        device: auto, cpu, cuda, or cuda:N for one of several cards.
        vram: GiB of each card's memory that may be used; None for all that is free.
        expert_usage: an importance matrix, whose counts say which experts go to the GPU first.
        repack: whether experts are to be interleaved at load.
        unproven: whether a card is used that has not proven itself, or failed.
    """

    device: str = "auto"
    vram: float | None = None
    gpu_experts: int | str = "auto"
    cache_bits: int = 16
    expert_usage: str | os.PathLike[str] | None = None
    repack: bool = False
    unproven: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not DEVICES.fullmatch(self.device):
            refuse("device", self.device, EXPECTED)
        if self.vram is not None and number("vram", self.vram, "more than 0 GiB") <= 0:
            refuse("vram", self.vram, "more than 0 GiB")
        if self.n_experts != "auto":
            whole("gpu_experts", self.n_experts, "auto, cache, cache:N, or 0 or more experts of each layer", low=0)
        if whole("cache_bits", self.cache_bits, "16 or 8", low=8, high=16) not in (16, 8):
            refuse("cache_bits", self.cache_bits, "16 or 8")
        if self.expert_usage is not None:
            path_text("expert_usage", self.expert_usage)
        flag("repack", self.repack)
        if flag("unproven", self.unproven) and not self.wants_gpu:
            raise LocalrunError("--unproven uses a card that has not proven itself: it is for --device cuda")
        if self.wants_gpu and self.repack:
            raise LocalrunError(f"--repack with device '{self.device}': {_ON_CPU}")
        if self.device == "cpu" and self.asks_for_gpu:
            raise LocalrunError(f"{_OPTIONS} are the GPU's; leave them out with --device cpu")

    @property
    def wants_gpu(self) -> bool:
        """Whether nothing else will do."""
        return self.device.startswith("cuda")

    @property
    def cards(self) -> list[int]:
        """Numbers of those that may be used."""
        _, _, number = self.device.partition(":")
        return [int(number)] if number else list(range(max(1, available.count())))

    @property
    def n_experts(self) -> int | str:
        """Of each layer on the GPU: a number, or "auto" for as many as fit."""
        given = self.gpu_experts
        if self.caches_experts:
            given = given.removeprefix("cache").removeprefix(":") or "auto"
        return int(given) if isinstance(given, str) and given.isdecimal() and len(given) < _MOST_DIGITS else given

    @property
    def caches_experts(self) -> bool:
        """Whether they are a cache."""
        given = self.gpu_experts
        return isinstance(given, str) and (given == "cache" or given.startswith("cache:"))

    @property
    def asks_for_gpu(self) -> bool:
        """Whether there is an option that only a GPU heeds."""
        return (self.vram, self.gpu_experts, self.expert_usage) != (None, "auto", None)


def choose(
    where: DeviceRequest,
    file: GGUFFile,
    config: Config,
    ctx: int,
    drafts: bool,
    notice: Notice,
    proof: Proof | None = None,
    draft_file: DraftFile | None = None,
    share: float = 1.0,
) -> Placement:
    """Where the model's parts go: on a GPU and in RAM if there is one that takes them, or several; else all in RAM.

    Args:
        drafts: whether the model's layer for multi-token prediction, if it has one, will be used.
        notice: told why the GPU is left out, where the user may wonder.
        proof: of cards; asked only where there are some that could run the model, and tried only where they have room.
            None to use them unproven.
        draft_file: of layers that draft for the model, if there is one.
        share: as Request has it.

    Raises:
        LocalrunError: the GPU was asked for and cannot be used, or has too little memory; says what would fit. Or the
            file of the experts' usage is none for this model, whether it is needed or not.
    """
    proof = proof or (lambda may_try, cards: "")
    usage = None if where.expert_usage is None else _usage(where.expert_usage, file, config)
    drafts = draft_file is not None or (drafts and names.has_mtp(file, config))
    tensors = tuple(file.tensors.values())
    on_cpu = Request(
        tensors, config, ctx, hardware.free_ram(), mtp=drafts, draft_file=draft_file, cache_bits=where.cache_bits,
        share=share,
    )  # fmt: skip
    if where.device == "cpu":
        return lay_out(on_cpu)
    if file.is_interleaved or where.repack:
        reason, is_news = _ON_CPU, bool(available.card())
    else:
        base = replace(on_cpu, gpu_experts=where.n_experts, usage=usage, expert_cache=where.caches_experts)
        found = _on_cards(where, base, proof)
        if isinstance(found, Placement):
            return found
        reason, is_news = found
    if where.wants_gpu:
        raise LocalrunError(f"device '{where.device}': {reason}")
    if is_news:
        notice(f"{reason}; computing on the CPU")
    elif where.asks_for_gpu:
        notice(f"{reason}: {_OPTIONS} have no effect; computing on the CPU")
    return lay_out(on_cpu)


def _usage(path: str | os.PathLike[str], file: GGUFFile, config: Config) -> dict[int, list[int]]:
    name = partial(names.layer, config.architecture)
    layers = [i for i in range(config.num_hidden_layers) if name(i, "mlp.gate") in file.tensors]
    return read_usage(path, layers, config.n_routed_experts)


def _on_cards(where: DeviceRequest, base: Request, proof: Proof) -> Placement | tuple[str, bool]:
    """On the first card that has room, else on as few as have together; else why not, and whether that may surprise.

    What is known of a card comes before it is looked at closely, which takes the import of torch and some of its VRAM.
    """
    if reason := why_not_on_gpu(base.config):
        return reason, False
    if base.cache_bits == 8 and base.config.attention != "mla":
        return "a cache of 8 bits is for latent attention there", False
    cards: list[available.Gpu] = []
    missing: list[tuple[str, bool]] = []
    failures: list[str] = []
    largest = None
    for some in _candidates(where, base, proof, cards, missing):
        request = _over(where, base, some)
        placement = lay_out(request)
        if placement.short_of_vram:  # RAM may be short: mapped weights then come from the disk, on the CPU as well
            largest = request
            continue
        if not (reason := proof(True, request.cards)):
            return placement
        failures.append(reason)
        failed = some if len(some) == 1 else [card for card in some if proof(False, (card.index,))]
        if not failed:  # but together
            break
        cards[:] = [card for card in cards if card not in failed]
    if failures:
        return failures[-1], True
    if largest is None:
        return missing[0]
    only = "; a cache of experts is for one card" if base.expert_cache and len(cards) > 1 else ""
    return refusal(largest) + only, True


def _candidates(
    where: DeviceRequest, base: Request, proof: Proof, cards: list[available.Gpu], missing: list[tuple[str, bool]]
) -> Iterator[list[available.Gpu]]:
    """Each card that may be used, then two, three, ... of `cards`, which they are put into: those with most free VRAM.

    missing: gets why others may not, and whether that may surprise.
    """
    for index in where.cards:
        if available.card(index) and (reason := proof(False, (index,))):
            missing.append((reason, True))
            continue
        found = available.find(index)
        if isinstance(found, available.NoGpu):
            missing.append((found.reason, found.has_card))
        else:
            cards.append(found)
            yield [found]
    if not base.expert_cache:
        for n in range(2, len(cards) + 1):
            roomiest = sorted(cards, key=lambda card: -(card.free // _ALIKE))[:n]
            yield sorted(roomiest, key=lambda card: card.index)


def _over(where: DeviceRequest, base: Request, cards: Sequence[available.Gpu]) -> Request:
    """Over these cards."""
    most = None if where.vram is None else int(where.vram * 2**30)
    rooms = [card.free if most is None else min(card.free, most) for card in cards]
    return replace(
        base, vram=rooms[0], vram_free=cards[0].free, more_vram=tuple(rooms[1:]), cards=tuple(c.index for c in cards)
    )
