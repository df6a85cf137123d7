"""Speed of one model natively and through llama.cpp, in turn, in one run.

    python scripts/compare_speed.py [MODEL] [-p 512] [-n 128] [-r 5] [-t N]

Each repetition runs `localrun generate` once with each backend on the same prompt of about -p tokens and -n greedy
tokens. The last line of stdout is one JSON document: medians in tokens/s and their ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version

BACKENDS = ("native", "llama.cpp")


def generate(backend: str, prompt_file: str, arguments: argparse.Namespace) -> dict:
    """What `localrun generate --json` says."""
    model = [arguments.model] if arguments.model else []
    threads = ["-t", str(arguments.threads)] if arguments.threads else []
    command = [sys.executable, "-m", "cli.main", "generate", *model, "--raw", "-f", prompt_file, "--temp", "0"]
    command += ["-n", str(arguments.n), "--backend", backend, "--json", *threads]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="a GGUF file; the bundled model if not given")
    parser.add_argument("-p", type=int, default=512, help="tokens of prompt, about")
    parser.add_argument("-n", type=int, default=128, help="tokens of reply")
    parser.add_argument("-r", type=int, default=5, help="repetitions")
    parser.add_argument("-t", "--threads", type=int)
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as prompt:
        prompt.write("The quick brown fox jumps over the lazy dog. " * (arguments.p // 10))
        prompt.flush()
        for repetition in range(arguments.r + 1):  # the first warms caches and compiles kernels
            for backend in BACKENDS:
                result = generate(backend, prompt.name, arguments)
                if repetition:
                    runs[backend].append(result)
    medians = {
        name: {
            "prompt_tokens_per_s": statistics.median(r["timings"]["prompt_tokens_per_s"] for r in results),
            "generated_tokens_per_s": statistics.median(r["timings"]["generated_tokens_per_s"] for r in results),
        }
        for name, results in runs.items()
    }
    first = runs["native"][0]
    ratios = {key: round(medians["native"][key] / medians["llama.cpp"][key], 2) for key in medians["native"]}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "isa": first["isa"]}
    versions = {name: version(name) for name in ("localrun", "numba", "torch", "llama-cpp-python")}
    facts = {"prompt_tokens": first["prompt_tokens"], "generated_tokens": first["generated_tokens"]}
    settings = {"repetitions": arguments.r, "threads": first["threads"]} | facts
    print(json.dumps({"medians": medians, "ratio": ratios} | settings | {"machine": machine, "versions": versions}))


if __name__ == "__main__":
    main()
