"""What `localrun plan --hosts 2` predicts beside what `localrun bench` measures with two ranks of one thread.

    python scripts/compare_ranks.py MODEL [--network 10gbit ...] [-p 512] [-n 64] [-r 3] [--rounds 2]

In turn, for each network: `doctor` times messages, `plan` reckons with them and with this machine's rates of one
thread, `bench` runs one rank and two. Without --network ranks send through memory. With it the other rank has a network
namespace of its own, joined to this one by a veth pair that tc's tbf holds to the rate (needs root, ip and tc); UCX is
told to use TCP. The last line of stdout is one JSON document: tokens/s of prompt and reply, predicted and measured, how
far off the prediction is, and how many times as fast two ranks are as one, of one thread and of two.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE, HERE, THERE = "localrun-rank", "localrun0", "localrun1"
ADDRESS, OTHER = "10.77.0.1", "10.77.0.2"
_SSH = f"""#!/bin/sh
# What mpiexec calls to reach a host.
shift 2
exec ip netns exec {NAMESPACE} sh -c "$*"
"""


@contextmanager
def network(rate: str, folder: Path) -> Iterator[dict[str, str]]:
    """A namespace whose only way out has this rate; the environment in which mpiexec starts ranks there."""
    inside = ["ip", "netns", "exec", NAMESPACE]
    shape = ["root", "tbf", "rate", rate, "burst", "1mb", "latency", "50ms"]
    steps = [
        ["ip", "netns", "add", NAMESPACE],
        ["ip", "link", "add", HERE, "type", "veth", "peer", "name", THERE, "netns", NAMESPACE],
        ["ip", "addr", "add", f"{ADDRESS}/24", "dev", HERE],
        ["ip", "link", "set", HERE, "up"],
        [*inside, "ip", "addr", "add", f"{OTHER}/24", "dev", THERE],
        [*inside, "ip", "link", "set", THERE, "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
        ["tc", "qdisc", "add", "dev", HERE, *shape],
        [*inside, "tc", "qdisc", "add", "dev", THERE, *shape],
    ]
    program = folder / "ssh"
    program.write_text(_SSH)
    program.chmod(0o755)
    try:
        for step in steps:
            subprocess.run(step, check=True)
        yield {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(program), "UCX_TLS": "self,tcp"}
    finally:
        subprocess.run(["ip", "link", "del", HERE], check=False)
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)


def command(environment: dict[str, str], *args: str) -> dict[str, Any]:
    """What a command prints with --json."""
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *args, "--json"],
        stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | environment,
    )  # fmt: skip
    return json.loads(done.stdout)


def compare(
    arguments: argparse.Namespace, where: list[str], environment: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Medians over the rounds: of prompt and reply, predicted and measured."""
    model, lengths = str(Path(arguments.model).resolve()), ["-p", str(arguments.p), "-n", str(arguments.n)]
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        link = str(folder / "link.json")
        timed = command(environment, "doctor", *where, "--link", link)
        plan = command({}, "plan", model, "-t", "1", "--hosts", "2", "--link", link, "--prompt", str(arguments.p))
        planned = next(row for row in plan["rows"] if row["sharing"] == "slices")
        runs = {
            "two_ranks": command(environment, "bench", model, *lengths, "-r", str(arguments.r), "-t", "1", *where),
            "one_thread": command({}, "bench", model, *lengths, "-r", str(arguments.r), "-t", "1"),
            "two_threads": command({}, "bench", model, *lengths, "-r", str(arguments.r), "-t", "2"),
        }
        figures = {"layer_us": 1e6 * timed["ranks"][0]["layer_s"]}
        for what, test, key in (("prompt", f"pp{arguments.p}", "prefill"), ("reply", f"tg{arguments.n}", "decode")):
            figures[f"{what}_predicted"] = planned[key]["tokens_per_s"]
            figures |= {f"{what}_{name}": run["results"][test]["median"] for name, run in runs.items()}
        figures["message_us"] = runs["two_ranks"]["messages"]["message_us_median"]
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    result = {name: round(median(values), 3) for name, values in found.items()}
    for what in ("prompt", "reply"):
        two = result[f"{what}_two_ranks"]
        result[f"{what}_off_percent"] = round(100 * (result[f"{what}_predicted"] / two - 1), 1)
        for one in ("one_thread", "two_threads"):
            result[f"{what}_times_{one}"] = round(two / result[f"{what}_{one}"], 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--network", nargs="*", default=[], metavar="RATE", help="as tc writes it: 1gbit, 10gbit")
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    document: dict[str, Any] = {"model": arguments.model, "memory": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        document["memory"] = compare(arguments, ["--ranks", "2"], {}, folder)
        print(f"memory: {document['memory']}", file=sys.stderr)
        for rate in arguments.network:
            with network(rate, folder) as environment:
                document[rate] = compare(arguments, ["--hosts", OTHER], environment, folder)
            print(f"{rate}: {document[rate]}", file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
