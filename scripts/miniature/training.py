"""The training loop: AdamW, warm-up, stable rate and decay, bias balancing, a log, checkpoints that go on exactly."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from miniature.config import Config
from miniature.data import Stream
from miniature.model import Model

BIAS_RATE = 0.001  # V3's, section 4.2 of its report
MTP_WEIGHT, MTP_WEIGHT_IN_DECAY = 0.3, 0.1  # V3's, there for the first 10 T and the last 4.8 T tokens
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM = (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Settings:
    """What decides the course of a run; a checkpoint of other settings is refused.

    Attributes:
        balance: move the routers' biases.
        warmup_steps: of linear growth to learning_rate, which then stays.
    """

    model: Config
    precision: str = "bf16"
    balance: bool = True
    seed: int = 0
    n_sequences: int = 8
    length: int = 512
    learning_rate: float = 2e-3
    warmup_steps: int = 100


@dataclass(frozen=True)
class Schedule:
    """Where a run ends.

    Attributes:
        steps: all steps, from the first of the first run that it continues.
        decay_steps: the last of them, over which the learning rate falls linearly to nothing.
    """

    steps: int
    decay_steps: int = 0

    def learning_rate(self, step: int, settings: Settings) -> float:
        rise = min(1.0, (step + 1) / settings.warmup_steps)
        fall = min(1.0, (self.steps - step) / self.decay_steps) if self.decay_steps else 1.0
        return settings.learning_rate * rise * fall

    def mtp_weight(self, step: int) -> float:
        return MTP_WEIGHT_IN_DECAY if step >= self.steps - self.decay_steps else MTP_WEIGHT


class Trainer:
    """A model, its optimiser and how far they are."""

    def __init__(self, settings: Settings, stream: Stream) -> None:
        self.settings, self.stream, self.step = settings, stream, 0
        self.model = Model(settings.model, settings.precision, settings.seed)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        norms = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, fused=True)

    def train_step(self, schedule: Schedule) -> dict[str, Any]:
        """One step; its figures for the log."""
        s, started = self.settings, time.perf_counter()
        ids = torch.from_numpy(self.stream.batch(self.step, s.n_sequences, s.length))
        learning_rate, mtp_weight = schedule.learning_rate(self.step, s), schedule.mtp_weight(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        main, mtp = self.model.losses(ids)
        (main + mtp_weight * mtp).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step}: the gradient's norm is {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if s.balance:
            for _, router in self.model.routers():
                router.balance(BIAS_RATE)
        self.step += 1
        n_tokens = s.n_sequences * s.length
        return {
            "step": self.step,
            "tokens": self.step * n_tokens,
            "loss": round(main.item(), 5),
            "mtp_loss": round(mtp.item(), 5),
            "lr": round(learning_rate, 8),
            "mtp_weight": mtp_weight,
            "grad_norm": round(float(norm), 4),
            "max_violation": {index: round(router.max_violation(), 4) for index, router in self.model.routers()},
            "load": {index: router.load.tolist() for index, router in self.model.routers()},
            "seconds": round(time.perf_counter() - started, 3),
        }

    def save(self, path: Path) -> None:
        """The whole state, complete or not at all."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises SystemExit if it was made under other settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise SystemExit(f"{path}: was trained with {state['settings']}; asked for {asdict(self.settings)}")
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class Log:
    """One JSON line a step in a file; what lies behind the step to go on from is cut off."""

    def __init__(self, path: Path, step: int) -> None:
        kept = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in kept if line.endswith("}") and json.loads(line)["step"] <= step]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


class _Interruption:
    """Ctrl-C or a kill ends the run behind the current step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


def run(trainer: Trainer, schedule: Schedule, folder: Path, checkpoint_seconds: float) -> None:
    """Trains to the end of the schedule or an interruption; checkpoint.pt and log.jsonl in the folder."""
    log, interruption = Log(folder / "log.jsonl", trainer.step), _Interruption()
    saved = time.monotonic()
    while trainer.step < schedule.steps and not interruption.asked:
        line = trainer.train_step(schedule)
        log.write(line)
        _show(line, schedule, trainer.settings)
        if time.monotonic() - saved > checkpoint_seconds:
            trainer.save(folder / "checkpoint.pt")
            saved = time.monotonic()
    trainer.save(folder / "checkpoint.pt")


def _show(line: dict[str, Any], schedule: Schedule, settings: Settings) -> None:
    rate = settings.n_sequences * settings.length / line["seconds"]
    violation = max(line["max_violation"].values(), default=0.0)
    text = (
        f"step {line['step']}/{schedule.steps}  {line['tokens'] / 1e6:.2f} M tokens  loss {line['loss']:.4f}  "
        f"MTP {line['mtp_loss']:.4f}  max violation {violation:.2f}  {rate:.0f} tokens/s"
    )
    print(text, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


def keep_memory() -> None:
    """Lets glibc's malloc keep what it has: giving buffers of some MB back to the system costs page faults."""
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
