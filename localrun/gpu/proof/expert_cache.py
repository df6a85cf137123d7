"""VRAM as a cache of experts: which it holds changes from step to step, and nothing else does.

By a policy that has experts come and go at nearly every step. What the table on the device names is in its slot to the
byte, whether copies arrive between two steps or during one; captured steps give the bits of the same launches one by
one; layers are what the CPU's network gives, within layers.py's bounds. Copies that are held up hold up no step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof.layers import compare_layers
from localrun.gpu.proof.steps import Pair, replaced
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings

_WINDOW, _MARGIN = 8, 0.1  # of the policy: tokens, and by how much more often an expert must have been chosen


def prove(subject: Subject, findings: Findings) -> None:
    """All of it, with few slots; nothing where VRAM has no room for them."""
    n_slots = subject.slots
    findings.figures["slots"] = n_slots
    if not n_slots:
        return
    findings.doing("loading")
    with subject.hybrid(slots=n_slots) as model, torch.inference_mode(), subject.device.errors():
        cache = model.routed.cache
        cache.policy.window, cache.policy.margin = _WINDOW, _MARGIN
        for n_tokens in subject.effort.steps:
            _replays(subject, findings, model, n_tokens)
        findings.figures["experts_that_came"] = cache.n_arrived
        if cache.failure or not cache.n_arrived:
            findings.fault(cache.failure or "no expert has come to VRAM")
            return
        _held_up(subject, findings, model)
        with subject.native() as native:
            compare_layers(subject, findings, model, native, subject.moe_layers)


def _replays(subject: Subject, findings: Findings, model: HybridModel, n_tokens: int) -> None:
    """Between every second pair of steps all experts that are coming arrive."""
    cache, effort = model.routed.cache, subject.effort
    what = f"{effort.replays} replays of a step of {n_tokens} tokens beside a cache of experts"
    findings.doing(what)
    pair, room = Pair(model, 64), 64 // n_tokens
    for turn in range(effort.replays):
        if turn % room == 0:
            pair.forget(0)
        with replaced(model.routed, settle=lambda n_tokens: None):  # both read the same table
            is_same = pair.step(subject.ids(n_tokens, seed=turn))
        if not is_same:
            findings.fault(f"{what}: other bits than launched one by one, from replay {turn + 1} on")
            break
        cache.settle(n_tokens)
        if turn % 2:
            cache.wait()
        if not _placed(findings, model, what):
            break
        if turn % 16 == 15:
            findings.doing(what)
    cache.wait()


def _placed(findings: Findings, model: HybridModel, what: str) -> bool:
    """Whether the table names nothing that is not there."""
    wrong = model.routed.cache.misplaced()
    for layer, expert in wrong[:1]:
        findings.fault(f"{what}: expert {expert} of layer {layer} is not what its slot in VRAM holds")
    return not wrong


def _held_up(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """Steps go on while no copy does."""
    cache, device, let_go = model.routed.cache, model.device, threading.Event()
    aside, patience_s = device.aside, subject.effort.patience_s

    @contextmanager
    def held_up() -> Iterator[None]:
        let_go.wait(patience_s)
        with aside():
            yield

    what = "steps while copies of experts are held up"
    findings.doing(what)
    context = model.new_cache(8)
    with replaced(device, aside=held_up):
        for token in subject.ids(8, seed=8):
            model.forward([token], context)
            if not _placed(findings, model, what):
                break
        if not cache.n_coming and not cache.failure:
            findings.fault(f"{what}: one has waited for them")
        let_go.set()
        cache.wait()
    model.forward(subject.ids(1), model.new_cache(1))
    _placed(findings, model, "an expert that has come late")
