"""All parts of the proof, one after the other, and what becomes of the verdict. No torch in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gpu import tiles
from localrun.gpu.proof import child, report, verdict
from localrun.gpu.proof.parts import PARTS, TOGETHER, Part
from localrun.gpu.proof.task import Findings, Task
from localrun.gpu.proof.verdict import Identity, Outcome, Verdict
from localrun.gpu.ways import HOST_NODES, STREAM_MEMORY
from localrun.models.config import Config
from localrun.models.names import check_tensors, check_types
from localrun.models.reader import read_config
from localrun.placement import available
from localrun.placement.devices import DeviceRequest
from localrun.placement.placement import why_not_on_gpu

_READ_BYTES, _SLOW_DISK = 10e9, 1e8  # of the first layers of the largest models; bytes/s
_CTX = 8192  # tokens, where the user does not say
Say = Callable[[str], None]
Run = Callable[[Part, Task, Say], child.Message]


def in_a_child(part: Part, task: Task, doing: Say) -> child.Message:
    """A part as child.run does it; it may be as silent as reading what it needs from a slow disk takes."""
    reading_s = min(Path(task.model).stat().st_size, _READ_BYTES) / _SLOW_DISK
    return child.run(part.name, task, part.silence_s + reading_s, doing)


def here(part: Part, task: Task, doing: Say) -> child.Message:
    """A part in this process, which has torch then."""
    from localrun.gpu.proof.parts import carry_out

    findings = Findings(doing)
    carry_out(part.name, task, findings)
    return {"faults": findings.faults, "figures": findings.figures, "choices": findings.choices}


def prove(
    identity: Identity,
    task: Task,
    say: Say,
    doing: Say = lambda what: None,
    to_the_end: bool = True,
    run: Run = in_a_child,
) -> Verdict:
    """The verdict of all parts for the task's cards; of those up to the first that fails, unless to_the_end.

    Args:
        say: told a line before each part.
        doing: told what a part is at.
        run: how a part is carried out.
    """
    outcomes: list[Outcome] = []
    parts = PARTS if len(task.cards) == 1 else TOGETHER
    for number, part in enumerate(parts, 1):
        if outcomes and outcomes[-1].faults and not to_the_end:
            break
        say(f"proving {identity.card} ({number} of {len(parts)}): {part.title}")
        start = time.monotonic()
        found = run(part, task, doing)
        found = report.anonymous(found)
        faults, figures, choices = tuple(found["faults"]), found.get("figures", {}), found.get("choices", {})
        if faults and part.optional:
            faults, figures = (), figures | {"not_used": faults[0]}
            choices = {}
        outcomes.append(Outcome(part.name, part.title, round(time.monotonic() - start, 1), faults, figures, choices))
        task = task.with_choices(choices)
    where = verdict.environment(task.threads, task.ctx)
    complete = len(outcomes) == len(parts)
    return Verdict(identity, time.strftime("%Y-%m-%d"), complete, where, tuple(outcomes))


@dataclass(frozen=True)
class Others:
    """Ranks that share the experts. seconds: with them, as Verdict.seconds, of the figures of the part "speed"."""

    name: str
    seconds: Callable[[Mapping[str, Any]], Mapping[str, float]]


class Proof:
    """Whether a model may use the card: by its verdict, or by proving where there is none.

    What localrun.placement.devices.choose asks.
    """

    def __init__(
        self, file: GGUFFile, config: Config, task: Task, where: DeviceRequest, say: Say, others: Others | None = None
    ):
        """say: told a line for each part that is proven. others: what computes with the card, or with the CPU."""
        self._file, self._config, self._task, self._where, self._say = file, config, task, where, say
        self._others = others
        self._verdicts: dict[tuple[int, ...], Verdict | None] = {}

    def __call__(self, may_run: bool, cards: tuple[int, ...] = (0,)) -> str | None:
        """Why these cards are not to be used, "" if they are; None if that is not known and may_run is false.

        Each has to pass by itself, and several together.
        """
        for some in [*((card,) for card in cards), *([cards] if len(cards) > 1 else [])]:
            found = self._verdict(some, may_run)
            if found is None:
                return None
            if found.refusal:
                return f"{found.refusal}; localrun doctor --gpu MODEL --report FILE says more"
            if len(some) == 1 and self._where.device == "auto" and (reason := self._disadvantage(found)):
                return reason
        return ""

    def _disadvantage(self, found: Verdict) -> str:
        if self._others is None or not found.seconds:
            return found.disadvantage
        return found.compared(self._others.seconds(found.speed), f" beside {self._others.name}")

    def _verdict(self, cards: tuple[int, ...], may_run: bool) -> Verdict | None:
        """Of one card, or of several together, each of which has passed."""
        if self._verdicts.get(cards) is None:
            names = {card: available.card(card) for card in cards}
            identity = verdict.identity(name_of(names), self._config, self._file)
            found = verdict.load(identity)
            if found is None and may_run:
                is_one = len(cards) == 1
                how = (
                    "is new to this version: it proves itself" if is_one else "are new together: they prove themselves"
                )
                self._say(f"{identity.card} {how} once, in some minutes")
                task = replace(self._task, cards=cards)
                task = task if is_one else task.with_choices({"cards": [self._chosen(card) for card in cards]})
                found = prove(identity, task, self._say, to_the_end=False)
                if verdict.save(found) is None:
                    self._say("the verdict can't be kept, so every start proves anew; set LOCALRUN_CACHE to a folder")
            self._verdicts[cards] = found
        return self._verdicts[cards]

    def choices(self, cards: tuple[int, ...]) -> dict[str, Any]:
        """What localrun.gpu.hybrid.HybridModel is told of them; says a line if some of it is unknown here."""
        if any(self._verdicts.get((card,)) is None for card in cards) or not cards:
            return {}
        used: dict[str, Any] = {"choices": [self._chosen(card) for card in cards]}
        first, n_threads = self._verdicts[cards[:1]], self._task.threads
        is_same = first.environment.get("threads") == n_threads > 1
        if is_same and first.choices.get("workers") == n_threads - 1:
            used["workers"] = n_threads - 1
        return used

    def _chosen(self, card: int) -> dict[str, Any]:
        """What is used of what was found to be fastest on a card that has a verdict."""
        found, used = self._verdicts[card,].choices, {}
        if found.get("handover") in (HOST_NODES, STREAM_MEMORY):
            used["handover"] = found["handover"]
        try:
            tiles.named(dict(found.get("tiles", {})))
            used["tiles"] = found.get("tiles", {})
        except (LocalrunError, ValueError, TypeError) as error:
            self._say(f"the proof's choice is not used ({error}); localrun doctor --gpu proves anew")
        return used


def name_of(cards: Mapping[int, str]) -> str:
    """What cards are called, which are given by CUDA's number and by name."""
    return " and ".join(name + (f" (cuda:{card})" if card else "") for card, name in cards.items())


def examine(path: Path, threads: int, ctx: int | None, say: Say, doing: Say) -> list[Verdict]:
    """The verdicts of each card and a model, and of all together if all have passed, proven anew and kept.

    Raises LocalrunError if there is no card that could run it.
    """
    with open_gguf(path) as file:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
        if reason := why_not_on_gpu(config):
            raise LocalrunError(reason)
        found = [available.find(card) for card in DeviceRequest().cards]
        cards = {each.index: each.name for each in found if isinstance(each, available.Gpu)}
        if not cards:
            raise LocalrunError(found[0].reason)
        ctx = ctx or min(_CTX, config.max_position_embeddings)
        task = task_of(path, threads, ctx, DeviceRequest())

        def proven(some: Mapping[int, str], choices: dict[str, Any]) -> Verdict:
            identity = verdict.identity(name_of(some), config, file)
            done = prove(identity, replace(task, cards=tuple(some), choices=choices), say, doing)
            verdict.save(done)
            return done

        verdicts = [proven({card: name}, {}) for card, name in cards.items()]
        if len(cards) > 1 and not any(each.refusal for each in verdicts):
            verdicts.append(proven(cards, {"cards": [each.choices for each in verdicts]}))
    return verdicts


def task_of(path: Path, threads: int, ctx: int, where: DeviceRequest) -> Task:
    """What is to be proven for a model that is opened like this."""
    vram = None if where.vram is None else int(where.vram * 2**30)
    return Task(str(path), threads, ctx, vram, where.cache_bits)
