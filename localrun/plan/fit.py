"""The type mix to choose for a machine: the largest that fits with the context wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from localrun.errors import LocalrunError
from localrun.placement.memory_table import gib
from localrun.plan.machine import Machine
from localrun.plan.memory import plan_memory
from localrun.plan.shapes import ModelShape

_ALL = "this"  # what the machine has
_UNITS = {"M": 2, "G": 3, "T": 4}  # powers of 1024: memory is sold so, whatever it is called
_MOST = 1 << 60
_SYSTEM_BYTES = 4 << 30  # that a system of that size keeps, as in the presets


@dataclass(frozen=True)
class Fit:
    """The largest mix that fits, and the one after it; None if there is no larger one."""

    chosen: ModelShape
    next: ModelShape | None


def with_ram(machine: Machine, size: str) -> Machine:
    """The machine with so much RAM, "256GB", or as it is for "this". Raises LocalrunError."""
    if size.lower() == _ALL:
        return machine
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([MGT])(?:iB|B)?", size, re.ASCII | re.IGNORECASE)
    ram_bytes = float(match[1]) * 1024 ** _UNITS[match[2].upper()] if match else 0.0
    if not 0 < ram_bytes <= _MOST:
        raise LocalrunError(f"--fit {size!r}; expected this, or a size of RAM such as 256GB")
    title, reserved = f"{machine.title}, with {gib(ram_bytes)} of RAM", machine.reserved_bytes or _SYSTEM_BYTES
    return replace(machine, title=title, ram_bytes=ram_bytes, reserved_bytes=float(reserved))


def find_fit(model: ModelShape, machine: Machine, ctx: int) -> Fit:
    """Among the mixes that can be packed here. Raises LocalrunError if none fits."""
    larger = None
    for shape in model.in_mixes():
        if plan_memory(shape, machine, ctx).fits:
            return Fit(shape, larger)
        larger = shape
    shortage = plan_memory(larger, machine, ctx).shortage()
    raise LocalrunError(
        f"{model.name}, {ctx} tokens of context: no type fits {machine.title}; the smallest, {larger.type}, needs "
        f"{shortage}"
    )
