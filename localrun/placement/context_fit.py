"""What would fit where a placement does not: said to the user with the numbers. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from localrun.placement.memory_table import RAM
from localrun.placement.placement import CTX_STEP, Request, lay_out


def refusal(request: Request) -> str:
    """What is needed, what there is, and the settings that would fit; empty if these do."""
    placement = lay_out(request)
    if not placement.short:
        return ""
    need = f"a context of {request.ctx} tokens needs {placement.shortage()}"
    fitting = settings_that_fit(request)
    if fitting:
        return f"{need}; {' or '.join(fitting)} would fit"
    least = lay_out(replace(request, ctx=min(request.ctx, CTX_STEP), gpu_experts="auto", expert_cache=False))
    return f"{need}; with {least.ctx} tokens it is still {least.shortage() or 'too much'}"


def settings_that_fit(request: Request) -> list[str]:
    """Options, each of which alone would make it fit; those that change least come first."""
    options = [_fewer_experts(request), _more_vram(request), _auto_experts(request), _shorter(request)]
    if request.vram is not None:
        if request.cache_bits == 16 and request.config.attention == "mla" and _fits(replace(request, cache_bits=8)):
            options.append("--cache-bits 8")
        bits = 16 if request.config.why_not_8_bits else request.cache_bits
        if _fits(replace(request, vram=None, gpu_experts="auto", cache_bits=bits)):
            options.append("--device cpu")
    return [option for option in options if option]


def _fits(request: Request) -> bool:
    return not lay_out(request).short


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in low..high that fits, low if none does; whatever is below one that fits, fits."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _fewer_experts(request: Request) -> str:
    wanted = request.gpu_experts
    if request.vram is None or not isinstance(wanted, int) or not lay_out(request).short_of_vram:
        return ""
    most = _most(-1, wanted - 1, lambda n: n >= 0 and not lay_out(replace(request, gpu_experts=n)).short_of_vram)
    option = f"--gpu-experts {'cache:' * request.expert_cache}{most}"
    return option if most >= 0 and _fits(replace(request, gpu_experts=most)) else ""


def _auto_experts(request: Request) -> str:
    fixed = request.vram is not None and (request.gpu_experts != "auto" or request.expert_cache)
    fits = fixed and RAM in lay_out(request).short and _fits(replace(request, gpu_experts="auto", expert_cache=False))
    return "--gpu-experts auto" if fits else ""


def _more_vram(request: Request) -> str:
    """The least amount, in tenths of a GiB, if the card has as much."""
    if request.vram is None or request.vram_free is None or request.more_vram:
        return ""
    tenth = 2**30 / 10
    low, high = ceil(request.vram / tenth), int(request.vram_free / tenth)
    if high <= low or not _fits(replace(request, vram=int(high * tenth))):
        return ""
    least = high - _most(0, high - low, lambda less: _fits(replace(request, vram=int((high - less) * tenth))))
    return f"--vram {least / 10:.1f}"


def _shorter(request: Request) -> str:
    steps = _most(0, (request.ctx - 1) // CTX_STEP, lambda n: _fits(replace(request, ctx=max(1, n * CTX_STEP))))
    return f"-c {steps * CTX_STEP}" if steps else ""
