"""The parts of the proof: what each is called, how long it may be silent, and which module carries it out. No torch.

Every part speaks before each thing it tries, and any of these may compile kernels first, some seconds each.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from localrun.errors import LocalrunError
from localrun.gpu.proof.task import Findings, Task
from quant.errors import QuantError

_SILENCE_S = 60.0


@dataclass(frozen=True)
class Part:
    """One of them. The module localrun.gpu.proof.NAME has prove(subject, findings).

    Attributes:
        optional: whether the card is used in spite of its faults, without what it is about.
    """

    name: str
    title: str
    silence_s: float = _SILENCE_S
    optional: bool = False


PARTS = (
    Part("tiles", "tiles of kernels", silence_s=120.0, optional=True),  # a candidate is compiled for each format
    Part("kernels", "kernels"),
    Part("layers", "layers and logits"),
    Part("handover", "hand-over to the workers"),
    Part("stream_memory", "stream memory operations", silence_s=20.0, optional=True),
    Part("steps", "captured steps"),
    Part("expert_cache", "a cache of experts"),
    Part("memory", "memory"),
    Part("speed", "speed"),
)
# Of several cards, each of which has passed all of these by itself.
TOGETHER = (Part("cards", "several cards"),)


def carry_out(name: str, task: Task, findings: Findings) -> None:
    """Do a part; what is raised in it, of errors, is a fault."""
    import torch

    try:
        from localrun.gpu.proof.subject import Subject

        with Subject(task) as subject:
            import_module(f"localrun.gpu.proof.{name}").prove(subject, findings)
    except (LocalrunError, QuantError) as error:
        findings.fault(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        findings.fault(f"out of memory: {_line(error)}")
    except Exception as error:  # whatever it is, it is what the card, or what drives it, does here
        findings.fault(f"{type(error).__name__}: {_line(error)}")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
