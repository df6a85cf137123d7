"""The memory table: which memory, what is in it, bytes; and what is said where one is too small. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VRAM, RAM = "VRAM", "RAM"
EXPERTS, MTP, MARKS = "routed experts", "multi-token prediction", "marks to go back to"
DRAFTS_HEAD = "head, for multi-token prediction"


@dataclass(frozen=True)
class Row:
    """A line of a memory table: where ("RAM", "VRAM", "VRAM 2" of a second card, "disk"), what, bytes."""

    where: str
    what: str
    n_bytes: int


def vram_of(place: int) -> str:
    """What the memory of the first card (0), of a second one (1), ... is called."""
    return VRAM if place == 0 else f"{VRAM} {place + 1}"


def shortage(needed: Mapping[str, int], available: Mapping[str, int]) -> str:
    """ "386.0 GiB of RAM (60.0 GiB usable)", for each memory that is too small."""
    short = [where for where in needed if needed[where] > available[where]]
    return ", ".join(f"{gib(needed[w])} of {w} ({gib(max(0, available[w]))} usable)" for w in short)


def gib(n_bytes: float) -> str:
    """ "1.5 GiB"."""
    return f"{n_bytes / 2**30:.1f} GiB"
