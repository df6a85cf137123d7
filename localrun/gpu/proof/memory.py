"""Memory: what the placement counts against what the driver says is used, with the cache that was asked for, full; and
what is free again afterwards.

Of the first layers, whose placement is counted by the same rules, with one context; then with a cache of a few experts,
too, if there is room for one. Not of several contexts at a time, nor of what streaming experts takes. Tolerances: the
allocator rounds each tensor up to 512 bytes, and takes blocks of 2 to 20 MiB from the driver, of which the last of each
kind is partly empty: that is part of the placement's reserve. What a process keeps until it ends (its context, kernels,
graphs' memory) may be as large as that reserve, too.
"""

from __future__ import annotations

import gc

from localrun.gpu.proof.subject import Subject, fill
from localrun.gpu.proof.task import Findings
from localrun.placement.memory_table import VRAM
from localrun.placement.sizes import RESERVE_BYTES

_SLACK = 32 << 20  # of the allocator, from one load to the next


def prove(subject: Subject, findings: Findings) -> None:
    """Twice: what the first load leaves may be the process's, what the second adds is lost; then with experts."""
    device = subject.device
    left = []
    at_first = _free(device)
    for turn in range(2):
        findings.doing(f"loading, {turn + 1} of 2")
        before = _free(device)
        used, counted = _use(subject, findings, before)
        if turn == 0:
            findings.figures |= {"counted_bytes": counted, "used_bytes": used, "ctx": subject.task.ctx}
            if used > counted:
                findings.fault(f"{_mib(used)} of VRAM in use, {_mib(counted)} counted")
        left.append(at_first - _free(device))
    if not findings.faults and (n_slots := subject.slots):
        findings.doing("loading, with a cache of experts")
        used, counted = _use(subject, findings, _free(device), n_slots)
        findings.figures |= {"cached_experts": n_slots, "counted_with_them": counted, "used_with_them": used}
        if used > counted:
            with_them = f"with {n_slots} cached experts a layer"
            findings.fault(f"{_mib(used)} of VRAM in use {with_them}, {_mib(counted)} counted")
    findings.figures["left_bytes"] = left
    if left[0] > RESERVE_BYTES:
        findings.fault(f"{_mib(left[0])} of VRAM are not free after the model was closed")
    elif left[1] > left[0] + _SLACK:
        findings.fault(f"each load leaves {_mib(left[1] - left[0])} of VRAM behind")


def _use(subject: Subject, findings: Findings, before: int, slots: int = 0) -> tuple[int, int]:
    """Load, evaluate, with a full cache in the end: bytes that are used at the most, and those that were counted."""
    ctx, prompt = subject.task.ctx, min(subject.effort.prompt, max(1, subject.task.ctx // 2))
    counted = subject.placement(slots=slots).needed[VRAM]
    with subject.hybrid(slots=slots) as model:
        cache = model.new_cache(ctx)
        findings.doing(f"a prompt of {prompt} tokens in a context of {ctx}, the last of which it fills")
        fill(cache, ctx - prompt - 1 if ctx > prompt else 0)
        ids = subject.ids(min(prompt, ctx))
        model.forward(ids, cache)
        if cache.length < ctx:
            model.forward(ids[:1], cache)
        used = before - subject.device.free_bytes()
    return used, counted


def _free(device) -> int:
    """After all that nobody uses any more was given back."""
    gc.collect()
    device.release()
    return device.free_bytes()


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"
