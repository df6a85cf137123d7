"""Everything that a card can tell, in one call of less than ten minutes: tests, the proof with two models, the bench.

    python scripts/prove_gpu.py OUT_FOLDER [--dry-run]

First run without a card what needs none, once: `python scripts/make_synthetic.py v3-slice OUT_FOLDER/v3-slice.gguf` and
the same of 16b-v3-style; missing ones are made here (17 GB of disk, a minute or two each). OUT_FOLDER then has

    tests.txt           pytest tests/localrun/gpu
    v3-slice.json, 16b-v3-style.json    localrun doctor --gpu --report
    hybrid.json         scripts/bench_hybrid.py v3-slice.gguf --kernels
    summary.json        exit codes and seconds of each

and a line of each goes to stdout. A step that runs longer than its share is ended, and the next one begins. --dry-run
prints the commands, to see what would run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("v3-slice", "16b-v3-style")


@dataclass(frozen=True)
class Step:
    """A command, the file that its stdout goes to, and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    output: str
    limit_s: float


def steps(folder: Path) -> list[Step]:
    """All of them; what comes first matters most."""
    python, cli = sys.executable, (sys.executable, "-m", "cli.main")
    models = {name: str(folder / f"{name}.gguf") for name in MODELS}
    return [
        *(
            Step(f"doctor {name}", (*cli, "doctor", "--gpu", path, "--report", str(folder / f"{name}.json")),
                 f"{name}.txt", 150)
            for name, path in models.items()
        ),
        Step("tests", (python, "-m", "pytest", "-q", "-n0", "-m", "slow or not slow", "tests/localrun/gpu"),
             "tests.txt", 150),
        Step("bench", (python, "scripts/bench_hybrid.py", models["v3-slice"], "--kernels"), "hybrid.json", 120),
    ]  # fmt: skip


def run(step: Step, folder: Path) -> dict[str, float | int]:
    """Exit code, -1 if it was ended, and seconds."""
    start = time.monotonic()
    with (folder / step.output).open("wb") as out, (folder / f"{step.output}.log").open("wb") as log:
        try:
            code = subprocess.run(step.command, cwd=ROOT, stdout=out, stderr=log, timeout=step.limit_s).returncode
        except subprocess.TimeoutExpired:
            code = -1
    return {"exit_code": code, "seconds": round(time.monotonic() - start, 1)}


def main() -> int:
    """All steps, whichever fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.dry_run:
        for step in steps(folder):
            print(f"{step.limit_s:4.0f} s  {' '.join(step.command)} > {step.output}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        if not (path := folder / f"{name}.gguf").exists():
            print(f"making {path.name}", flush=True)
            subprocess.run([sys.executable, "scripts/make_synthetic.py", name, str(path)], cwd=ROOT, check=True)
    summary = {}
    for step in steps(folder):
        summary[step.name] = run(step, folder)
        print(f"{step.name}: {summary[step.name]}", flush=True)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(any(found["exit_code"] for found in summary.values()))


if __name__ == "__main__":
    sys.exit(main())
