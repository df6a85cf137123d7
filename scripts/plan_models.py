"""A file of each known model for a machine, and its planned speed: the table of docs/models.md.

    python scripts/plan_models.py [MODEL ...] [--ctx 8192] [--machines 10k-server desktop:64GB desktop:192GB]

The file is Q4_K_M, or the largest that fits where that does not. A machine is a preset, or one with another size of
RAM. Prints a Markdown table, then one JSON document in a line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from localrun.errors import LocalrunError
from localrun.plan.fit import find_fit, with_ram
from localrun.plan.machine import Machine, load_machine
from localrun.plan.memory import refusal
from localrun.plan.report import make_report
from localrun.plan.shapes import known_models, load_model

MACHINES = ("10k-server", "desktop:64GB", "desktop:128GB", "desktop:192GB")


def machine_of(text: str) -> Machine:
    """ "desktop:64GB" is the preset with so much RAM."""
    name, _, ram = text.partition(":")
    machine = load_machine(name)
    return with_ram(machine, ram) if ram else machine


def planned(name: str, machine: Machine, ctx: int) -> dict[str, Any] | None:
    """Type, bytes, tokens/s of replies and of a prompt of 512; None where no type fits."""
    model = load_model(name)
    if refusal(model, machine, ctx):
        try:
            model = find_fit(model, machine, ctx).chosen
        except LocalrunError:
            return None
    document = make_report(model, machine, ctx)
    speeds = {part: document[part]["tokens_per_s"] for part in ("decode", "prefill")}
    return {"type": model.type, "bytes": document["model"]["tensor_bytes"]} | speeds


def cell(plan: dict[str, Any] | None) -> str:
    """ "Q4_K_M, 380 GB: 21.1, 180"."""
    if plan is None:
        return "does not fit"
    return f"{plan['type']}, {plan['bytes'] / 1e9:.0f} GB: {plan['decode']:.1f}, {plan['prefill']:.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all known ones if not given")
    parser.add_argument("--ctx", type=int, default=8192)
    parser.add_argument("--machines", nargs="+", default=MACHINES)
    arguments = parser.parse_args()
    machines = {text: machine_of(text) for text in arguments.machines}
    rows = {
        model: {text: planned(model, machine, arguments.ctx) for text, machine in machines.items()}
        for model in arguments.models or known_models()
    }
    print("| model | " + " | ".join(machines) + " |")
    print("|---" * (len(machines) + 1) + "|")
    for model, plans in rows.items():
        print(f"| {model} | " + " | ".join(map(cell, plans.values())) + " |")
    print(json.dumps({"ctx": arguments.ctx, "models": rows}))


if __name__ == "__main__":
    main()
