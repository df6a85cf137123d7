"""What a verdict says to people, and what it keeps to itself. No torch."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from localrun.gpu.proof.verdict import PROMPT, REPLY, Outcome, Verdict

_PATH = re.compile(r"(?<![\w.])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\"]+[/\\])*[^\s/\\:'\",;)]+")
_SHORT = 3  # letters: a name of fewer would be found in every word


def lines(verdict: Verdict) -> Iterator[tuple[str, str, str]]:
    """Status ("ok" or "failed"), what, and a text, for each part and for the whole."""
    for outcome in verdict.outcomes:
        text = "; ".join(outcome.faults) if outcome.faults else _figures(outcome)
        yield "failed" if outcome.faults else "ok", outcome.title, f"{text} ({outcome.seconds:.0f} s)"
    if verdict.refusal:
        yield "failed", "verdict", f"{verdict.refusal}: --device auto computes on the CPU"
    elif verdict.disadvantage:
        yield "ok", "verdict", f"{verdict.disadvantage}: --device auto computes on the CPU"
    elif verdict.is_of_several:
        yield "ok", "verdict", "layers are split among them where one has no room"
    else:
        seconds = verdict.seconds
        took = f"{seconds['cuda']:.1f} s against {seconds['cpu']:.1f} s by the CPU alone"
        yield "ok", "verdict", f"--device auto uses it: {PROMPT} tokens and a reply of {REPLY} take {took}"


def _figures(outcome: Outcome) -> str:
    """The few that matter."""
    figures = outcome.figures
    if outcome.name in ("kernels", "layers"):
        errors = [part for part in figures.get("part_of_the_bound", {}).values() if part is not None]
        shapes = f"{figures['shapes']} shapes of matrices, " if "shapes" in figures else ""
        return f"{shapes}errors up to {100 * max(errors, default=0.0):.0f}% of what rounding explains"
    if outcome.name == "cards":
        return f"{' + '.join(map(str, figures['layers']))} layers, the same bits throughout"
    if outcome.name == "tiles" and "tiles" in outcome.choices:
        return ", ".join(f"{kind}: {name}" for kind, name in outcome.choices["tiles"].items())
    if outcome.name == "memory":
        return f"{_mib(figures['used_bytes'])} used of {_mib(figures['counted_bytes'])} counted, with one full context"
    if outcome.name == "expert_cache":
        came = f"{figures.get('experts_that_came', 0)} came to {figures['slots']} slots of each layer"
        return came if figures["slots"] else "not tried: VRAM has no room for experts"
    if outcome.name == "speed":
        copies, steps = figures["copies"], figures["step_s"]
        rates = ", ".join(f"{where} {rate / 1e9:.1f}" for where, rate in copies.items())
        times = f"a step {1e3 * steps['cuda']:.1f} ms, {1e3 * steps['cpu']:.1f} ms by the CPU"
        if "last_step_s" in figures:
            last = figures["last_step_s"]
            times += f" (at {figures['ctx']} tokens {1e3 * last['cuda']:.1f} and {1e3 * last['cpu']:.1f})"
        return f"{times}; copies, GB/s: {rates}"
    if "not_used" in figures:
        return f"not used: {figures['not_used']}"
    if "handover_s" in figures:
        return f"{1e6 * figures['handover_s']:.0f} us for each layer"
    return "the same bits throughout"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"


def anonymous(value: Any) -> Any:
    """A document without what tells whose it is: paths, the names of the user and of the machine."""
    if isinstance(value, dict):
        return {anonymous(name): anonymous(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [anonymous(each) for each in value]
    if not isinstance(value, str):
        return value
    value = value.replace(str(Path.home()), "~") if len(str(Path.home())) > _SHORT else value
    value = _PATH.sub("<path>", value)
    for name, instead in _names():
        value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", instead, value, flags=re.IGNORECASE)
    return value


def _names() -> Iterator[tuple[str, str]]:
    user = ""
    with suppress(OSError, KeyError):  # no such user, in a container
        user = getpass.getuser()
    host = socket.gethostname()
    for name, instead in ((user, "<user>"), (os.environ.get("SUDO_USER", ""), "<user>"), (host, "<host>")):
        if len(name) >= _SHORT:
            yield name, instead
        if instead == "<host>" and "." in name:
            yield name.split(".")[0], instead
