"""All parts of the proof, one after the other, and what becomes of the verdict. No torch in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.gguf.file import GGUFFile, open_gguf
from localrun.gpu import tiles
from localrun.gpu.proof import child, report, verdict
from localrun.gpu.proof.parts import PARTS, Part
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
    """The verdict of all parts; of those up to the first that fails, unless to_the_end.

    Args:
        say: told a line before each part.
        doing: told what a part is at.
        run: how a part is carried out.
    """
    outcomes: list[Outcome] = []
    for number, part in enumerate(PARTS, 1):
        if outcomes and outcomes[-1].faults and not to_the_end:
            break
        say(f"proving {identity.card} ({number} of {len(PARTS)}): {part.title}")
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
    complete = len(outcomes) == len(PARTS)
    return Verdict(identity, time.strftime("%Y-%m-%d"), complete, where, tuple(outcomes))


class Proof:
    """Whether a model may use the card: by its verdict, or by proving where there is none.

    What localrun.placement.devices.choose asks.
    """

    def __init__(self, file: GGUFFile, config: Config, task: Task, where: DeviceRequest, say: Say):
        """say: told a line for each part that is proven."""
        self._file, self._config, self._task, self._where, self._say = file, config, task, where, say
        self.verdict: Verdict | None = None

    def __call__(self, may_run: bool) -> str | None:
        """Why the card is not to be used, "" if it is; None if that is not known and may_run is false."""
        if self.verdict is None:
            identity = verdict.identity(available.card(), self._config, self._file)
            self.verdict = verdict.load(identity)
            if self.verdict is None and may_run:
                self._say(f"{identity.card} is new to this version: it proves itself once, in some minutes")
                self.verdict = prove(identity, self._task, self._say, to_the_end=False)
                if verdict.save(self.verdict) is None:
                    self._say("the verdict can't be kept, so every start proves anew; set LOCALRUN_CACHE to a folder")
        if self.verdict is None:
            return None
        hint = "localrun doctor --gpu MODEL --report FILE says more"
        if self.verdict.refusal:
            return f"{self.verdict.refusal}; {hint}"
        if self._where.device == "auto" and self.verdict.disadvantage:
            return self.verdict.disadvantage
        return ""

    @property
    def choices(self) -> dict[str, Any]:
        """What localrun.gpu.hybrid.HybridModel is told of it; says a line if some of it is unknown here."""
        if self.verdict is None:
            return {}
        found, used = self.verdict.choices, {}
        if found.get("handover") in (HOST_NODES, STREAM_MEMORY):
            used["handover"] = found["handover"]
        try:
            tiles.named(dict(found.get("tiles", {})))
            used["tiles"] = found.get("tiles", {})
        except (LocalrunError, ValueError, TypeError) as error:
            self._say(f"the proof's choice is not used ({error}); localrun doctor --gpu proves anew")
        n_threads = self._task.threads
        if self.verdict.environment.get("threads") == n_threads > 1 and found.get("workers") == n_threads - 1:
            used["workers"] = n_threads - 1
        return used


def examine(path: Path, threads: int, ctx: int | None, say: Say, doing: Say) -> Verdict:
    """The verdict of the card and a model, proven anew and kept.

    Raises LocalrunError if there is no card that could run it.
    """
    with open_gguf(path) as file:
        config = read_config(file)
        check_tensors(file, config)
        check_types(file)
        if reason := why_not_on_gpu(config):
            raise LocalrunError(reason)
        found = available.find()
        if isinstance(found, available.NoGpu):
            raise LocalrunError(found.reason)
        identity = verdict.identity(found.name, config, file)
        ctx = ctx or min(_CTX, config.max_position_embeddings)
        done = prove(identity, task_of(path, threads, ctx, DeviceRequest()), say, doing)
    verdict.save(done)
    return done


def task_of(path: Path, threads: int, ctx: int, where: DeviceRequest) -> Task:
    """What is to be proven for a model that is opened like this."""
    vram = None if where.vram is None else int(where.vram * 2**30)
    return Task(str(path), threads, ctx, vram, where.cache_bits)
