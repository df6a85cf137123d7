"""A fault is put in, and the proof goes over it: the verdict.

Most are put into the kernels' stand-ins or the device of this process; a few need a process that can end. torch is
imported when a fault is put in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gpu_proofs

from gpu_faults.fault import Fault
from localrun.gpu.proof import child, prove
from localrun.gpu.proof.parts import PARTS, Part
from localrun.gpu.proof.task import Task
from localrun.gpu.proof.verdict import Verdict

if TYPE_CHECKING:
    import pytest

_SILENCE_S = 3.0  # of a child that hangs: it would answer at once
_device: Callable[[int], Any] = gpu_proofs.stand_in


def device(card: int) -> Any:
    """The device that the fault at hand has made."""
    return _device(card)


@contextmanager
def put_in(fault: Fault, patch: pytest.MonkeyPatch) -> Iterator[Task]:
    """Within, it is there: the task that meets it."""
    global _device
    task = gpu_proofs.task(fault.type_, "gpu_faults.proving:device").with_choices(fault.choices)
    task = replace(task, cards=fault.cards)
    if fault.child:
        yield replace(task, make_device=f"gpu_faults.processes:{fault.child}")
        return
    with gpu_proofs.kernels_in_torch(patch):
        _device = fault.put_in(patch) or gpu_proofs.stand_in
        yield task


def runner(fault: Fault) -> prove.Run:
    """What carries parts out."""
    path = os.pathsep.join((child._path(), str(Path(__file__).parents[1])))

    def in_child(part: Part, task: Task, doing: prove.Say) -> child.Message:
        return child.run(part.name, task, _SILENCE_S, doing, {"PYTHONPATH": path})

    return in_child if fault.child else prove.here


def found(fault: Fault, patch: pytest.MonkeyPatch, alone: bool) -> Verdict:
    """The verdict, of all parts up to the one that fails, or of the expected part alone."""
    with put_in(fault, patch) as task:
        if alone:
            patch.setattr(prove, "PARTS", tuple(part for part in PARTS if part.name == fault.part))
        identity = replace(gpu_proofs.identity_of(fault.type_), card=fault.name_of_cards)
        return prove.prove(identity, task, lambda line: None, to_the_end=False, run=runner(fault))
