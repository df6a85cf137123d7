"""Predictions of `localrun plan --machine this` beside what `localrun bench` measures, in turn, in one run.

    python scripts/compare_plan.py [MODEL ...] [-t 1 2] [-p 512] [-n 128] [-r 3]
    python scripts/compare_plan.py --public

Both take turns, several times, and medians count, since the machine's speed drifts. The last line of stdout is one JSON
document: predicted and measured tokens/s of prompt and reply, and how far off the prediction is. With --public: what
localrun should reach on machines for which others have published the speed of their programs.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
from typing import Any

# DeepSeek-V3 or R1, one request. What changes from the preset 10k-server; decode tokens/s as published, and by whom.
_ONE_8_CHANNEL = {"channels": 8, "read_fraction": 220 / 307.2}  # Intel MLC inside a socket, SOSP 2025 artifact
PUBLIC = [
    {
        "what": "KTransformers, one EPYC 9654, 12 x DDR5-4800, RTX 4090, R1 at 4 bits, 1K context",
        "decode": 14.0,
        "source": "https://github.com/kvcache-ai/ktransformers/issues/314",
        "cpu": {"cores": 84},
    },
    {
        "what": "KTransformers 0.2, one Xeon Gold 6454S, 8 x DDR5-4800, RTX 4090D, Q4_K_M",
        "decode": 8.73,
        "source": "ktransformers doc/en/DeepseekR1_V3_tutorial.md",
        "cpu": {"cores": 32},
        "memory": _ONE_8_CHANNEL,
    },
    {
        "what": "ik_llama.cpp, one EPYC 9355, 12 x DDR5-6400, RTX 4090, UD-Q4_K_XL",
        "decode": 17.0,
        "source": "ik_llama.cpp discussion 258",
        "cpu": {"cores": 32},
        "memory": {"mega_transfers": 6400},
    },
    {
        "what": "KTransformers, two Xeon 8452Y, 8 x DDR5-4800 each, RTX 4080, int4",
        "decode": 16.15,
        "source": "ktransformers branch sosp25-ae, Figure12-decode",
        "cpu": {"cores": 72},
        "memory": _ONE_8_CHANNEL | {"sockets": 2, "numa_fraction": 0.7},
        "type": "Q4_0",
    },
]


def compare_public() -> list[dict[str, Any]]:
    """The prediction for each of PUBLIC, with the preset's kernels and card."""
    from localrun.plan.machine import load_machine, parse_machine
    from localrun.plan.memory import plan_memory
    from localrun.plan.shapes import load_model
    from localrun.plan.speed import decode_speed

    rows = []
    for case in PUBLIC:
        document = copy.deepcopy(load_machine("10k-server").document)
        document["cpu"] |= case.get("cpu", {})
        document["cpu"]["memory"] |= case.get("memory", {})
        machine, model = parse_machine(document, "public", case["what"]), load_model("deepseek-v3", case.get("type"))
        speed = decode_speed(model, machine, plan_memory(model, machine, 4096).placement, 1024)
        experts = speed.split()["experts"]
        rows.append(
            {
                "what": case["what"],
                "published": case["decode"],
                "predicted": round(speed.tokens_per_s, 2),
                "published_to_predicted": round(case["decode"] / speed.tokens_per_s, 2),
                "read_gb_per_s": round(machine.cpu.read_bytes_per_s / 1e9),
                "experts_ms": round(1e3 * experts, 1),
                "source": case["source"],
            }
        )
    return rows


def localrun(*args: str) -> dict[str, Any]:
    """What a command says with --json."""
    done = subprocess.run([sys.executable, "-m", "cli.main", *args, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def compare(model: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model with one number of threads."""
    n_prompt, n_reply = str(arguments.p), str(arguments.n)
    plans, benches = [], []
    for _ in range(arguments.r):
        ctx = str(max(arguments.p, arguments.n))
        plans.append(localrun("plan", model, "-t", str(threads), "--prompt", n_prompt, "-c", ctx))
        benches.append(localrun("bench", model, "-t", str(threads), "-p", n_prompt, "-n", n_reply, "-r", "1"))
    figures: dict[str, Any] = {"threads": threads, "busy_cores": benches[-1]["machine"]["busy_cores"]}
    for what, key in (("prefill", f"pp{n_prompt}"), ("decode", f"tg{n_reply}")):
        each = [plan[what]["tokens_per_s"] for plan in plans], [bench["results"][key]["median"] for bench in benches]
        predicted, measured = map(statistics.median, each)
        figures[what] = {
            "predicted": round(predicted, 2),
            "measured": round(measured, 2),
            "error_percent": round(100 * (predicted / measured - 1), 1),
            "predicted_each": each[0],
            "measured_each": each[1],
            "split_s": {name: round(seconds, 5) for name, seconds in plans[-1][what]["split_s"].items()},
        }
    read = [plan["machine"]["file"]["cpu"]["memory"]["read_bytes_per_s"]["value"] for plan in plans]
    figures["read_bytes_per_s"] = {
        "plan": round(statistics.median(read)),
        "bench": round(statistics.median(bench["read_bytes_per_s"]["median"] for bench in benches)),
    }
    return figures


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["smollm2"], help="GGUF files; the bundled model if not given")
    parser.add_argument("-t", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-p", type=int, default=512, help="tokens of prompt")
    parser.add_argument("-n", type=int, default=128, help="tokens of reply")
    parser.add_argument("-r", type=int, default=3, help="rounds, of which medians are taken")
    parser.add_argument("--public", action="store_true", help="against published figures; measures nothing")
    arguments = parser.parse_args()
    if arguments.public:
        rows = compare_public()
        for row in rows:
            print(f"{row['what']}: {row['predicted']} predicted, {row['published']} published")
        print(json.dumps(rows))
        return
    runs = {model: [compare(model, threads, arguments) for threads in arguments.threads] for model in arguments.models}
    for model, figures in runs.items():
        for run in figures:
            for what in ("prefill", "decode"):
                row = run[what]
                line = f"{row['predicted']} predicted, {row['measured']} measured ({row['error_percent']:+}%)"
                print(f"{model} -t {run['threads']} {what}: {line}")
    print(json.dumps(runs))


if __name__ == "__main__":
    main()
