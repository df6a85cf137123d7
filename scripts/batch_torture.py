"""500 prompts of one batch, killed at ten moments and resumed: the same file as undisturbed; and what one load saves.

    python scripts/batch_torture.py [MODEL] [--prompts 500] [--kills 10] [--singles 5] [-n 8]

Kills are SIGKILL, spread over the batch: each comes when so many lines are written, and a moment of chance after that.
Single runs are few, since each loads the model: their mean stands for all.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def generate(args: list[str]) -> float:
    """Seconds of a run. Exits if it fails."""
    started = time.perf_counter()
    process = start(args)
    if process.wait():
        sys.exit(f"generate {' '.join(args)}: exit code {process.returncode}")
    return time.perf_counter() - started


def start(args: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "cli.main", "generate", *args], stdout=subprocess.DEVNULL)


def kill_at(n_lines: int, results: Path, args: list[str]) -> int:
    """Kill a run soon after it has written so many lines; how many there are."""
    process = start(args)
    while process.poll() is None and count(results) < n_lines:
        time.sleep(0.001)
    time.sleep(random.random() * 0.02)
    process.kill()
    process.wait()
    return count(results)


def count(results: Path) -> int:
    return results.read_bytes().count(b"\n") if results.exists() else 0


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
        moments = [given.prompts * kill // given.kills for kill in range(given.kills)]
        lengths = [kill_at(moment, killed, [*command, "-o", str(killed)]) for moment in moments]
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
