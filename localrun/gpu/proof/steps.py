"""The captured step: replayed with changing inputs it gives the bits that the same launches give one by one.

Also beside a second context, after tokens were forgotten, with either side late, and after Ctrl-C. A stale graph, a
buffer that is used too early, a race between the card and the workers: each shows in bits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np

from localrun.gpu.caches.grouped import GroupedCache
from localrun.gpu.caches.latent import LatentCache
from localrun.gpu.hybrid import HybridModel
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings

_INTERRUPT_S, _PATIENCE_S = 0.05, 10.0
Cache = LatentCache | GroupedCache


class Pair:
    """The same tokens through a captured step, and launch by launch."""

    def __init__(self, model: HybridModel, capacity: int):
        self.model, self.caches = model, [model.new_cache(capacity) for _ in range(2)]

    def step(self, ids: list[int]) -> bool:
        """Whether both give the same logits."""
        captured, eager = self.caches
        found = self.model.forward(ids, captured, all_logits=True)
        with launched_one_by_one(self.model):
            right = self.model.forward(ids, eager, all_logits=True)
        return np.array_equal(found.view(np.int32), right.view(np.int32)) and bool(np.isfinite(right).all())

    def forget(self, n_tokens: int) -> None:
        """Keep so many."""
        for cache in self.caches:
            cache.truncate(n_tokens)


@contextmanager
def recorded_anew(model: HybridModel) -> Iterator[None]:
    """Within, steps are recorded as if none had been."""
    before, model.step.recorded = model.step.recorded, {}
    try:
        yield
    finally:
        model.step.recorded = before


@contextmanager
def launched_one_by_one(model: HybridModel) -> Iterator[None]:
    """Within, nothing is captured: steps are what they queue."""
    with recorded_anew(model), ExitStack() as stack:
        for device in model.devices:
            stack.enter_context(replaced(device, capture=lambda step: step))
        yield


@contextmanager
def replaced(device: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Within, the device has these methods instead."""
    for name, method in methods.items():
        setattr(device, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(device, name)


def prove(subject: Subject, findings: Findings) -> None:
    """All of it."""
    findings.doing("loading")
    with subject.hybrid() as model:
        same_bits(subject, findings, model)
        _delays(subject, findings, model)
        _interrupts(subject, findings, model)


def same_bits(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """Captured or not, whatever contexts there are, and after tokens were forgotten."""
    _replays(subject, findings, model)
    _second_context(subject, findings, model)
    _together(subject, findings, model)
    _forgetting(subject, findings, model)


def _replays(subject: Subject, findings: Findings, model: HybridModel) -> None:
    effort = subject.effort
    for n_tokens in effort.steps:
        what = f"{effort.replays} replays of a step of {n_tokens} tokens"
        findings.doing(what)
        pair, room = Pair(model, 64), 64 // n_tokens
        for turn in range(effort.replays):
            if turn % room == 0:
                pair.forget(0)
            if not pair.step(subject.ids(n_tokens, seed=turn)):
                findings.fault(f"{what}: other bits than launched one by one, from replay {turn + 1} on")
                break
            if turn % 32 == 31:
                findings.doing(what)


def _second_context(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """Two contexts in turn give what each gives alone."""
    what = "two contexts in turn"
    findings.doing(what)
    texts = [subject.ids(6, seed) for seed in (1, 2)]
    alone = [_by_steps(model, ids, model.new_cache(16)) for ids in texts]
    caches = [model.new_cache(16) for _ in texts]
    rows: list[list[np.ndarray]] = [[], []]
    for position in range(6):
        for i, cache in enumerate(caches):
            rows[i].append(model.forward(texts[i][position : position + 1], cache))
    findings.same(what, all(np.array_equal(np.concatenate(rows[i]), alone[i]) for i in range(2)))


def _together(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """Contexts of different lengths that share steps give what each gives alone; so do those that are left."""
    n_contexts = max(subject.effort.steps) + 1
    what = f"steps of {n_contexts} contexts"
    findings.doing(what)
    texts = [subject.ids(4 + i, seed=7 + i) for i in range(n_contexts)]
    alone = [_by_steps(model, ids, model.new_cache(16)) for ids in texts]
    caches = [model.new_cache(16) for _ in texts]
    for ids, cache in zip(texts, caches, strict=True):
        _by_steps(model, ids[:-3], cache)
    for step in (-3, -2, -1):
        here = range(n_contexts - (step == -1))
        found = model.forward_each([texts[i][step] for i in here], [caches[i] for i in here])
        if not all(np.array_equal(row, alone[i][step]) for row, i in zip(found, here, strict=True)):
            findings.fault(f"{what}: other bits than each alone")
            return


def _by_steps(model: HybridModel, ids: list[int], cache: Cache) -> np.ndarray:
    return np.concatenate([model.forward([token], cache) for token in ids])


def _forgetting(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """What was forgotten leaves no trace."""
    what = "forgetting tokens"
    findings.doing(what)
    cache, ids = model.new_cache(32), subject.ids(12, seed=3)
    first = _by_steps(model, ids, cache)
    cache.truncate(5)
    model.forward(subject.ids(4, seed=4), cache)
    cache.truncate(5)
    findings.same(what, np.array_equal(_by_steps(model, ids[5:], cache), first[5:]))


def _delays(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """Whoever is late, the other one waits."""
    device, delay_s, ids = model.device, subject.effort.delay_s, subject.ids(4, seed=5)
    right = _by_steps(model, ids, model.new_cache(8))
    before = device.side, device.join

    @contextmanager
    def late_copies() -> Iterator[Any]:
        with before[0]() as branch:
            device.spin(delay_s)
            yield branch

    def late_device(branch: Any) -> None:
        device.spin(delay_s)
        before[1](branch)

    def late_workers(function: int, argument: int, call: Callable[[int, int], None] = device.call) -> None:
        device.sleep(delay_s)
        call(function, argument)

    for what, methods in (
        ("the workers are late", {"call": late_workers}),
        ("copies to them are late", {"side": late_copies}),
        ("the card is late", {"join": late_device}),
    ):
        findings.doing(what)
        with recorded_anew(model), replaced(device, **methods):
            found = _by_steps(model, ids, model.new_cache(8))
        findings.same(what, np.array_equal(found, right))


def _interrupts(subject: Subject, findings: Findings, model: HybridModel) -> None:
    """After Ctrl-C, in a recording or in a step, the next step is right."""
    ids = subject.ids(5, seed=6)
    right = _by_steps(model, ids, model.new_cache(8))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    what = "Ctrl-C while a step is recorded"
    findings.doing(what)
    cache = model.new_cache(8)
    with recorded_anew(model):
        try:
            with replaced(model.device, join=interrupted):
                model.forward(ids[:1], cache)
            findings.fault(f"{what}: went unnoticed")
        except KeyboardInterrupt:
            findings.same(what, cache.length == 0 and np.array_equal(_by_steps(model, ids, cache), right))
    if threading.current_thread() is threading.main_thread():
        _interrupt_steps(findings, model, ids, right)


def _interrupt_steps(findings: Findings, model: HybridModel, ids: list[int], right: np.ndarray) -> None:
    """A signal in the midst of steps."""
    what = "Ctrl-C in a step"
    findings.doing(what)
    cache, over = model.new_cache(8), threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(_PATIENCE_S, over.set).start()
    timer = threading.Timer(_INTERRUPT_S, partial(signal.raise_signal, signal.SIGINT))
    try:
        timer.start()
        while not over.is_set():
            cache.truncate(0)
            model.forward(ids[:1], cache)
        findings.fault(f"{what}: went unnoticed")
    except KeyboardInterrupt:
        cache.truncate(0)
        findings.same(what, np.array_equal(_by_steps(model, ids, cache), right))
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
