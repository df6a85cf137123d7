"""What the proof found on a card, kept in a file: of which card and model, with all figures. No torch.

The file lies in the cache folder, named after what it depends on: card, driver, torch, Triton, this program (its
version and the sources of the GPU half), and the model's shape and types. It holds no path, no name of a file, a user
or a machine, so that it can be attached to a report of a problem as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from localrun import hardware
from localrun.errors import LocalrunError
from localrun.files import read_bytes, write_json
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.placement import available

FORMAT = 1
_MOST_BYTES = 1 << 22  # of a file
_GPU_HALF = Path(__file__).resolve().parents[1]
REPLY, PROMPT = 128, 512  # tokens by which card and CPU are compared: of a reply, and of what it replies to


@dataclass(frozen=True)
class Identity:
    """What a verdict is of."""

    card: str
    driver: str
    torch: str
    triton: str
    localrun: str
    model: dict[str, Any]

    @property
    def key(self) -> str:
        """A name that no other identity has."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]


def identity(card: str, config: Config, file: GGUFFile) -> Identity:
    """Of a card's name and a model. Imports no torch."""
    types: dict[str, set[str]] = {}
    for name, tensor in file.tensors.items():
        types.setdefault(re.sub(r"^blk\.\d+\.", "", name), set()).add(tensor.type.name)
    shape = json.loads(json.dumps(asdict(config)))  # as it comes back from a file
    return Identity(
        card,
        available.driver_version(),
        _version("torch"),
        _version("triton"),
        f"{_version('localrun')} {_sources()}",
        shape | {"types": {name: sorted(found) for name, found in sorted(types.items())}},
    )


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(_GPU_HALF.rglob("*.py")):
        digest.update(path.relative_to(_GPU_HALF).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Outcome:
    """Of one part.

    Attributes:
        faults: what is wrong; none if it has passed.
    """

    name: str
    title: str
    seconds: float
    faults: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, Any] = field(default_factory=dict)


_SIDES = "cuda", "cpu"


@dataclass(frozen=True)
class Verdict:
    """Of a card and a model.

    Attributes:
        complete: whether all parts were tried: after a fault the rest may be left out.
        environment: of the figures.
    """

    identity: Identity
    date: str
    complete: bool
    environment: dict[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def fault(self) -> str:
        """The first thing that is wrong, in one line; "" if nothing is."""
        return next((f"{each.title}: {each.faults[0]}" for each in self.outcomes if each.faults), "")

    @property
    def speed(self) -> dict[str, Any]:
        """The figures of that part."""
        return next((each.figures for each in self.outcomes if each.name == "speed"), {})

    @property
    def seconds(self) -> dict[str, float]:
        """By "cuda" and "cpu": what PROMPT tokens and a reply of REPLY tokens take; empty where not measured."""
        return self.speed.get("exchange_s") or {}

    @property
    def choices(self) -> dict[str, Any]:
        """What was found to be fastest here."""
        return {name: value for each in self.outcomes for name, value in each.choices.items()}

    @property
    def refusal(self) -> str:
        """Why the card is not to be used, whoever asks for it; "" if it works."""
        return f"{self.identity.card} failed its proof ({self.fault})" if self.fault else ""

    @property
    def is_of_several(self) -> bool:
        """Whether it is of several cards together, each of which has one of its own."""
        return any(each.name == "cards" for each in self.outcomes)

    @property
    def disadvantage(self) -> str:
        """Why the CPU alone is better; "" if it is not."""
        return self.compared(self.seconds)

    def compared(self, seconds: Mapping[str, float], others: str = "") -> str:
        """Why the CPU is better, of such seconds; "" if it is not. Several cards are not timed.

        others: what computes with either.
        """
        if self.is_of_several or (seconds and seconds["cuda"] < seconds["cpu"]):
            return ""
        if not seconds:
            return f"{self.identity.card} was not timed against the CPU"
        took = f"{seconds['cuda']:.1f} s against {seconds['cpu']:.1f} s"
        what = f"{self.identity.card} is no faster than the CPU{others}"
        return f"{what}: {took} for {PROMPT} tokens and a reply of {REPLY}"

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": FORMAT, **asdict(self), "usable": not self.refusal, "faster": not self.disadvantage}

    @classmethod
    def of(cls, document: Any) -> Verdict:
        """From JSON. Raises ValueError, TypeError or KeyError if it is something else."""
        if not isinstance(document, dict) or document["format"] != FORMAT:
            raise ValueError("another format")
        outcomes = tuple(Outcome(**each | {"faults": tuple(map(str, each["faults"]))}) for each in document["outcomes"])
        found = cls(
            Identity(**document["identity"]), str(document["date"]), bool(document["complete"]),
            dict(document["environment"]), outcomes,
        )  # fmt: skip
        if found.seconds:
            times = [found.speed[what][side] for what in ("exchange_s", "step_s", "prompt_s") for side in _SIDES]
            if any(not isinstance(each, float | int) or each <= 0 for each in [*times, found.speed["prompt_tokens"]]):
                raise ValueError("times that are none")
        return found


def environment(threads: int, ctx: int) -> dict[str, Any]:
    """What the figures depend on, besides the identity; nothing that tells whose machine it is."""
    return {
        "cpu": hardware.cpu_model(),
        "cores": hardware.usable_cores(),
        "ram_bytes": hardware.total_ram(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "numba": _version("numba"),
        "threads": threads,
        "ctx": ctx,
    }


# ---- the file --------------------------------------------------------------------------------------------------------


def folder() -> Path | None:
    """In $LOCALRUN_CACHE, else in the user's cache; None where there is no home folder."""
    base = os.environ.get("LOCALRUN_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if base.startswith("~") else Path(base) / "localrun" / "proofs"


def load(wanted: Identity) -> Verdict | None:
    """The verdict that was kept; None if there is none, or no whole one."""
    place = folder()
    if place is None:
        return None
    try:
        content = read_bytes(place / f"{wanted.key}.json", "the verdict", _MOST_BYTES)
        found = Verdict.of(json.loads(content))
    except (LocalrunError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if found.identity == wanted else None


def measured_handover(card: str) -> float | None:
    """Seconds of a layer's hand-over to the CPU and back, by the last verdict of a card whose name ends like this."""
    place = folder()
    paths = [] if place is None or not place.is_dir() else place.glob("*.json")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(LocalrunError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            found = Verdict.of(json.loads(read_bytes(path, "the verdict", _MOST_BYTES)))
            seconds = found.choices.get("handover_s")
            if found.identity.card.endswith(card) and isinstance(seconds, float) and 0 < seconds < 1:
                return seconds
    return None


def save(verdict: Verdict) -> Path | None:
    """Keep it for the next start; None where that can't be: then the next start proves anew."""
    place = folder()
    if place is None:
        return None
    with suppress(LocalrunError, OSError):
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / f"{verdict.identity.key}.json", verdict.document())
        return place / f"{verdict.identity.key}.json"
    return None
