"""What a part of the proof is asked, and what it finds. Both go between processes as JSON. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

_MOST_FAULTS = 20  # that are listed: a broken card has thousands


@dataclass(frozen=True)
class Effort:
    """How much is tried.

    Attributes:
        few, many: numbers of tokens of matrix products; a step takes the former.
        rows: of a matrix's results that are compared, from the first, the last and in between.
        experts: of a layer that are tried in VRAM.
        slots: of each layer, of a cache of experts.
        contexts: cached tokens that attention is tried with.
        steps: numbers of tokens of steps.
        replays: of a captured step, with other inputs each time.
        delay_s: by which either side is made late.
        patience_s: for which copies are held up that no step should wait for.
        prompt: tokens of prompts.
        whole_bytes: of a model that is compared as a whole: a larger one takes longer to read than the proof may.
        runs: of what is timed.
        copy_bytes: of copies that are timed.
        nodes: hand-overs in a row that are timed.
    """

    few: tuple[int, ...] = (1, 2, 5, 8)
    many: tuple[int, ...] = (16, 64, 512)
    rows: int = 192
    experts: int = 3
    slots: int = 2
    contexts: tuple[int, ...] = (17, 1024, 8192)
    steps: tuple[int, ...] = (1, 2, 5)
    replays: int = 200
    delay_s: float = 2e-3
    patience_s: float = 10.0
    prompt: int = 512
    whole_bytes: int = 12 << 30
    runs: int = 30
    copy_bytes: int = 256 << 20
    nodes: int = 64

    @classmethod
    def of(cls, document: dict[str, Any]) -> Effort:
        """From JSON."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})


@dataclass(frozen=True)
class Task:
    """What is proven.

    Attributes:
        model: path of the file.
        make_device: "module:function", which makes the device of a number; tests have others than the card's.
        threads, ctx, vram, cache_bits: as localrun.load has them; vram in bytes, None for all.
        choices: that earlier parts have made; of several cards "cards" has each one's.
        cards: CUDA's numbers of those that are proven, by itself or together.
    """

    model: str
    threads: int
    ctx: int
    vram: int | None = None
    cache_bits: int = 16
    effort: Effort = Effort()
    choices: dict[str, Any] = field(default_factory=dict)
    make_device: str = "localrun.gpu.device:Cuda"
    cards: tuple[int, ...] = (0,)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def of(cls, document: dict[str, Any]) -> Task:
        """From JSON."""
        return cls(**document | {"effort": Effort.of(document["effort"]), "cards": tuple(document["cards"])})

    def with_choices(self, choices: dict[str, Any]) -> Task:
        """The same with some more."""
        return replace(self, choices=self.choices | choices)


class Findings:
    """What a part has found so far; it tells at once what it is at.

    Attributes:
        figures: for the report.
        choices: for the parts behind it, and for the model afterwards.
        faults: what is wrong, a line each; none if the part has passed.
    """

    def __init__(self, doing: Callable[[str], None] = lambda what: None):
        self._tell = doing
        self.figures: dict[str, Any] = {}
        self.choices: dict[str, Any] = {}
        self.faults: list[str] = []

    def doing(self, what: str) -> None:
        """What comes next: should it never end, this is the name it has."""
        self._tell(what)

    def fault(self, line: str) -> None:
        """Something is wrong."""
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(line)

    def bounded(self, what: str, error: float, bound: float) -> None:
        """A fault unless error <= bound.

        figures["part_of_the_bound"] keeps the largest part of its bound that any error has; None if one was no number.
        """
        if math.isnan(error):
            self.fault(f"{what}: the result is not a number")
        elif error > bound:
            self.fault(f"{what}: off by {error:.2g}, and rounding explains {bound:.2g}")
        part = float(error / bound) if bound else 0.0
        kind = what.split(",")[0]
        errors = self.figures.setdefault("part_of_the_bound", {})
        before = errors.get(kind, 0.0)
        errors[kind] = round(max(before, part), 4) if before is not None and math.isfinite(part) else None

    def same(self, what: str, is_same: bool) -> None:
        """A fault unless they are the same to the bit."""
        if not is_same:
            self.fault(f"{what}: other bits")
