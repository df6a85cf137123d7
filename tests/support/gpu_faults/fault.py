"""What a deliberate fault is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gpu_proofs

from localrun.gpu.proof import prove

if TYPE_CHECKING:
    import pytest

MIB = 1 << 20
OFF = r": off by [\d.e+-]+, and rounding explains [\d.e+-]+"


@dataclass(frozen=True)
class Fault:
    """One of them.

    Attributes:
        part: that finds it.
        line: a regular expression, of the whole fault.
        put_in: puts it in, and gives what makes the device if that is not the stand-in.
        type_: of the model's matrices.
        child: a function of processes.py that makes the device in a process of its own, "" for one in this process.
        choices: that parts before have made.
        cards: that are proven, by itself or together.
    """

    name: str
    part: str
    line: str
    put_in: Callable[[pytest.MonkeyPatch], Callable[[int], Any] | None] = lambda patch: None
    type_: str = "F32"
    child: str = ""
    choices: dict[str, Any] = field(default_factory=dict)
    cards: tuple[int, ...] = (0,)

    @property
    def name_of_cards(self) -> str:
        """As a verdict has it."""
        return prove.name_of(dict.fromkeys(self.cards, gpu_proofs.CARD))
