"""On which device a model runs: what the user asks for, what there is, and what fits there."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from localrun.placement.placement import VRAM, DraftFile, Placement, Request, lay_out, why_not_on_gpu

Notice = Callable[[str], None]
# Why the card is not to be used, "" if it is; with False None where only trying it would tell, with True it is tried.
Proof = Callable[[bool], str | None]

_ON_CPU = "interleaved rows run on the CPU only"
_MOST_DIGITS = 20  # of a number of experts; Python reads 4,300
_OPTIONS = "--vram, --gpu-experts, --expert-usage and --cache-bits"


@dataclass(frozen=True)
class DeviceRequest:
    """What the user asks for: the options of localrun.load. Raises LocalrunError on a wrong one.

    Attributes:
        vram: GiB of the card's memory that may be used; None for all that is free.
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
        if not isinstance(self.device, str) or self.device not in ("auto", "cpu", "cuda"):
            refuse("device", self.device, "auto, cpu or cuda")
        if self.vram is not None and number("vram", self.vram, "more than 0 GiB") <= 0:
            refuse("vram", self.vram, "more than 0 GiB")
        if self.n_experts != "auto":
            whole("gpu_experts", self.n_experts, "auto, cache, cache:N, or 0 or more experts of each layer", low=0)
        if whole("cache_bits", self.cache_bits, "16 or 8", low=8, high=16) not in (16, 8):
            refuse("cache_bits", self.cache_bits, "16 or 8")
        if self.expert_usage is not None:
            path_text("expert_usage", self.expert_usage)
        flag("repack", self.repack)
        if flag("unproven", self.unproven) and self.device != "cuda":
            raise LocalrunError("--unproven uses a card that has not proven itself: it is for --device cuda")
        if self.device == "cuda" and self.repack:
            raise LocalrunError(f"--repack with device 'cuda': {_ON_CPU}")
        if self.device == "cpu" and self.asks_for_gpu:
            raise LocalrunError(f"{_OPTIONS} are the GPU's; leave them out with --device cpu")

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
        return (self.vram, self.gpu_experts, self.cache_bits, self.expert_usage) != (None, "auto", 16, None)


def choose(
    where: DeviceRequest,
    file: GGUFFile,
    config: Config,
    ctx: int,
    drafts: bool,
    notice: Notice,
    proof: Proof | None = None,
    draft_file: DraftFile | None = None,
) -> Placement:
    """Where the model's parts go: on the GPU and in RAM if there is one that takes them, else all in RAM.

    Args:
        drafts: whether the model's layer for multi-token prediction, if it has one, will be used.
        notice: told why the GPU is left out, where the user may wonder.
        proof: of the card; asked only where there is one that could run the model, and tried only where it has room.
            None to use it unproven.
        draft_file: of layers that draft for the model, if there is one.

    Raises:
        LocalrunError: the GPU was asked for and cannot be used, or has too little memory; says what would fit. Or the
            file of the experts' usage is none for this model, whether it is needed or not.
    """
    proof = proof or (lambda may_try: "")
    usage = None if where.expert_usage is None else _usage(where.expert_usage, file, config)
    drafts = draft_file is not None or (drafts and names.has_mtp(file, config))
    tensors = tuple(file.tensors.values())
    on_cpu = Request(tensors, config, ctx, hardware.free_ram(), mtp=drafts, draft_file=draft_file)
    if where.device == "cpu":
        return lay_out(on_cpu)
    if file.is_interleaved or where.repack:
        free, reason, is_news = 0, _ON_CPU, bool(available.card())
    else:
        free, reason, is_news = _free_vram(config, proof)
    if not reason:
        request = replace(on_cpu, vram=free, vram_free=free, gpu_experts=where.n_experts, cache_bits=where.cache_bits)
        request = replace(request, usage=usage, expert_cache=where.caches_experts)
        if where.vram is not None:
            request = replace(request, vram=min(free, int(where.vram * 2**30)))
        placement = lay_out(request)
        # RAM may be short: mapped weights then come from the disk, on the CPU as well.
        reason, is_news = refusal(request) if VRAM in placement.short else proof(True) or "", True
        if not reason:
            return placement
    if where.device == "cuda":
        raise LocalrunError(f"device 'cuda': {reason}")
    if is_news:
        notice(f"{reason}; computing on the CPU")
    elif where.asks_for_gpu:
        notice(f"{reason}: {_OPTIONS} have no effect; computing on the CPU")
    return lay_out(on_cpu)


def _usage(path: str | os.PathLike[str], file: GGUFFile, config: Config) -> dict[int, list[int]]:
    name = partial(names.layer, config.architecture)
    layers = [i for i in range(config.num_hidden_layers) if name(i, "mlp.gate") in file.tensors]
    return read_usage(path, layers, config.n_routed_experts)


def _free_vram(config: Config, proof: Proof) -> tuple[int, str, bool]:
    """Bytes of VRAM that are free; else why the GPU is not used, and whether that may surprise.

    What is known of a card comes before it is looked at closely, which takes the import of torch.
    """
    if reason := why_not_on_gpu(config):
        return 0, reason, False
    if available.card() and (reason := proof(False)):
        return 0, reason, True
    found = available.find()
    if isinstance(found, available.NoGpu):
        return 0, found.reason, found.has_card
    return found.free, "", False
