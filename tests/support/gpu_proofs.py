"""Proofs of a card that is the stand-in, verdicts made up, and devices for child processes. No torch at the top."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tiny_models

from localrun.gguf.file import open_gguf
from localrun.gpu.proof import verdict
from localrun.gpu.proof.prove import Others, Proof
from localrun.gpu.proof.task import Effort, Task
from localrun.gpu.proof.verdict import Identity, Outcome, Verdict
from localrun.models.reader import read_config
from localrun.placement.available import Gpu
from localrun.placement.devices import DeviceRequest

if TYPE_CHECKING:
    import pytest

V3 = tiny_models.SMALLEST
CARD = "Acme 5000"
GPU = Gpu(CARD, (8, 9), 24 << 30, 20 << 30, "570.86", "12.8")
SMALL = Effort(
    few=(1, 5), many=(16,), rows=48, experts=2, contexts=(9, 40), steps=(1, 2), replays=6, delay_s=1e-3, patience_s=0.5,
    prompt=12, runs=2, copy_bytes=1 << 16, nodes=4,
)  # fmt: skip


def task(type_: str, make_device: str = "gpu_proofs:stand_in", shape: tiny_models.Variant = V3) -> Task:
    """A tiny model's, on the stand-in."""
    return Task(str(tiny_models.shared(shape, type=type_)), 1, 48, effort=SMALL, make_device=make_device)


def identity_of(type_: str, shape: tiny_models.Variant = V3) -> Identity:
    """A tiny model's."""
    with open_gguf(tiny_models.shared(shape, type=type_)) as file:
        return verdict.identity(CARD, read_config(file), file)


def proof(type_: str, where: DeviceRequest, say: Callable[[str], None], others: Others | None = None) -> Proof:
    """As the engine makes it."""
    with open_gguf(tiny_models.shared(V3, type=type_)) as file:
        made = Proof(file, read_config(file), task(type_), where, say, others)
        made(False)  # what the file is asked
        return made


def verdict_of(identity: Identity, fault: str = "", cuda: float | None = 2.0, cpu: float = 4.0) -> Verdict:
    """Two parts, the first with a fault if one is named."""
    times = {} if cuda is None else {"exchange_s": {"cuda": cuda, "cpu": cpu}}
    copies = {"up": 2e10, "down": 2e10, "within": 9e11}
    figures = times | {"step_s": {"cuda": 0.01, "cpu": 0.02}, "copies": copies}
    figures |= {"prompt_s": {"cuda": 0.5, "cpu": 1.0}, "prompt_tokens": 512}
    outcomes = (
        Outcome("kernels", "kernels", 1.0, (fault,) if fault else ()),
        Outcome("speed", "speed", 1.0, (), figures),
    )
    return Verdict(identity, "2026-01-01", True, {}, outcomes)


@contextmanager
def kernels_in_torch(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models on a device have them, on one thread: more of them would only wait for each other."""
    import gpu_device  # noqa: F401  before triton
    import gpu_torch
    import torch

    gpu_torch.use_torch(patch)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


# ---- devices ---------------------------------------------------------------------------------------------------------


def stand_in(card: int = 0) -> Any:
    """The stand-in."""
    from localrun.gpu.device import StandIn

    return StandIn(card)


def hangs(card: int = 0) -> Any:
    """It never comes."""
    time.sleep(3600)
