"""Predictions of `localrun plan --machine this` beside what `localrun bench` measures, in turn, in one run.

    python scripts/compare_plan.py [MODEL ...] [-t 1 2] [-p 512] [-n 128] [-r 3]

Both take the best of several runs, since other programs only ever add time. The last line of stdout is one JSON
document: predicted and measured tokens/s of prompt and reply, and how far off the prediction is.
"""

import argparse
import json
import subprocess
import sys
from typing import Any


def localrun(*args: str) -> dict[str, Any]:
    """What a command says with --json."""
    done = subprocess.run([sys.executable, "-m", "cli.main", *args, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(model: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model with one number of threads."""
    n_prompt, n_reply = str(arguments.p), str(arguments.n)
    plan = localrun("plan", model, "-t", str(threads), "--prompt", n_prompt, "-c", str(max(arguments.p, arguments.n)))
    bench = localrun("bench", model, "-t", str(threads), "-p", n_prompt, "-n", n_reply, "-r", str(arguments.r))
    results = bench["results"]
    figures = {"threads": threads, "busy_cores": bench["machine"]["busy_cores"]}
    for what, key in (("prefill", f"pp{n_prompt}"), ("decode", f"tg{n_reply}")):
        predicted, measured = plan[what]["tokens_per_s"], results[key]["best"]
        figures[what] = {
            "predicted": round(predicted, 2),
            "measured_best": measured,
            "measured_median": results[key]["median"],
            "error_percent": round(100 * (predicted / measured - 1), 1),
            "split_s": {name: round(seconds, 5) for name, seconds in plan[what]["split_s"].items()},
        }
    cpu = plan["machine"]["file"]["cpu"]
    figures["read_bytes_per_s"] = {
        "plan": round(cpu["memory"]["read_bytes_per_s"]["value"]),
        "bench": bench["read_bytes_per_s"]["best"],
    }
    return figures


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"], help="GGUF files; the bundled model if not given")
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-p", type=int, default=512, help="tokens of prompt")
    parser.add_argument("-n", type=int, default=128, help="tokens of reply")
    parser.add_argument("-r", type=int, default=3, help="repetitions of bench")
    arguments = parser.parse_args()
    runs = {model: [compare(model, threads, arguments) for threads in arguments.threads] for model in arguments.models}
    for model, figures in runs.items():
        for run in figures:
            for what in ("prefill", "decode"):
                row = run[what]
                print(
                    f"{model} -t {run['threads']} {what}: {row['predicted']} predicted, {row['measured_best']} measured"
                )
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
