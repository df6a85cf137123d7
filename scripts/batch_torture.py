"""500 prompts of one batch, killed at ten moments and resumed: the same file as undisturbed; and what one load saves.

    python scripts/batch_torture.py [MODEL] [--prompts 500] [--kills 10] [--singles 5] [-n 8]

Kills are SIGKILL, each after a tenth or so of the time that the undisturbed run took. Single runs are few, since each
loads the model: their mean stands for all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def generate(args: list[str], timeout: float | None = None) -> float:
    """Seconds of a run, or of what was left of it when it was killed. Exits if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "cli.main", "generate", *args], stdout=subprocess.DEVNULL)
    try:
        if process.wait(timeout):
            sys.exit(f"generate {' '.join(args)}: exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--singles", type=int, default=5)
    parser.add_argument("-n", "--n-tokens", type=int, default=8)
    given = parser.parse_args()
    texts = [f"Once there was a fox of {number} years. One day" for number in range(given.prompts)]
    common = [given.model, "-n", str(given.n_tokens), "--seed", "1"]
    with tempfile.TemporaryDirectory() as folder:
        batch, whole, killed = (Path(folder) / name for name in ("batch.jsonl", "whole.jsonl", "killed.jsonl"))
        batch.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        command = [*common, "--batch", str(batch), "--resume"]
        undisturbed_s = generate([*command, "-o", str(whole)])
        start_s = generate([*command, "-o", str(whole)])  # nothing is left to do
        lengths = []
        for _ in range(given.kills):
            generate([*command, "-o", str(killed)], start_s + 0.9 * (undisturbed_s - start_s) / given.kills)
            lengths.append(killed.read_bytes().count(b"\n") if killed.exists() else 0)
        generate([*command, "-o", str(killed)])
        same = killed.read_bytes() == whole.read_bytes()
        single_s = [generate([*common, "-p", text]) for text in texts[: given.singles]]
    mean_s = sum(single_s) / len(single_s)
    all_s = mean_s * given.prompts
    print(f"{given.prompts} prompts, {given.n_tokens} tokens each: {undisturbed_s:.1f} s")
    print(
        f"killed with {lengths} lines written, then resumed to the end: {'the same file' if same else 'ANOTHER FILE'}"
    )
    print(f"a single run: {mean_s:.2f} s, mean of {len(single_s)}")
    print(f"{given.prompts} of them: {all_s:.0f} s, {all_s / undisturbed_s:.0f} times as long")
    sys.exit(not same)


if __name__ == "__main__":
    main()
