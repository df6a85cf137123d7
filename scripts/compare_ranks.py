"""What `localrun plan` predicts beside what is measured: two ranks of one thread, one process of one thread and of two.

    python scripts/compare_ranks.py MODEL [--network memory tcp 10gbit ...] [-p 512] [-n 64] [-r 3]

For each network `doctor` times messages, and one process has all three engines over the file, which take turns. What a
shared machine can do changes within minutes, so its rates are measured anew before each round, and what plan reckons
with them and those messages (localrun.plan) is compared with that round alone. memory: ranks
send through it; tcp: through sockets of this machine; else a rate as tc writes it: the other rank has a network
namespace of its own, joined to this one by a veth pair that tbf holds to the rate (needs root, ip and tc).

Ranks of one machine share its memory, which hosts do not: what both compute at once is reckoned with half of the rates
that two threads have together, everything else with those of one alone. The last line of stdout is
one JSON document, by network: of prompt and reply the median over rounds of tokens/s predicted, measured (a round's
median step), and of their ratio, with the rounds' ratios and the part of the time that the engine's first thread had
its core (what is predicted has it all the time); messages of the replies; how many times as fast two ranks are as one
process; seconds that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import localrun
from localrun.engine import Engine
from localrun.measure.bench import machine as this_one
from localrun.placement.memory_table import EXPERTS
from localrun.plan.hosts import Parts, host_memory, messages, spread
from localrun.plan.link import Link, load_link
from localrun.plan.machine import Machine, parse_machine
from localrun.plan.measure import describe
from localrun.plan.shapes import ModelShape, load_model
from localrun.plan.speed import Speed, decode_speed, prefill_speed
from localrun.ranks.places import places_of
from localrun.ranks.sharing import Sharing
from localrun.ranks.start import sharing_ranks

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE, HERE, THERE = "localrun-rank", "localrun0", "localrun1"
ADDRESS, OTHER = "10.77.0.1", "10.77.0.2"
RANKS, ONE, TWO = "two ranks", "one thread", "two threads"
_BURST_S = 560e-6  # of the rate that tbf lets pass at once: at 1 Gbit/s just more than TCP gives a veth at a time
_BEFORE = 16  # tokens of the context that replies go on from
_TCP = {"UCX_TLS": "self,tcp"}
_SSH = f"""#!/bin/sh
# What mpiexec calls to reach a host.
shift 2
exec ip netns exec {NAMESPACE} sh -c "$*"
"""


def _bits_per_s(rate: str) -> float:
    found = re.fullmatch(r"(\d+)([kmg])bit", rate)
    if found is None:
        sys.exit(f"--network {rate}: expected memory, tcp, or a rate such as 10gbit")
    return float(found[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[found[2]]


@contextmanager
def network(rate: str, folder: Path) -> Iterator[dict[str, str]]:
    """A namespace whose only way out has this rate; the environment in which mpiexec starts ranks there."""
    inside, burst = ["ip", "netns", "exec", NAMESPACE], round(_bits_per_s(rate) / 8 * _BURST_S)
    shape = ["root", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms"]
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
        yield {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(program)} | _TCP
    finally:
        subprocess.run(["ip", "link", "del", HERE], check=False)
        subprocess.run(["ip", "netns", "del", NAMESPACE], check=False)


def command(environment: dict[str, str], *args: str) -> dict[str, Any]:
    """What a command prints with --json."""
    return _last_line(environment, "-m", "cli.main", *args, "--json")


def _last_line(environment: dict[str, str], *args: str) -> dict[str, Any]:
    """Of a Python program's output, as JSON."""
    done = subprocess.run(
        [sys.executable, *args], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | environment
    )
    return json.loads(done.stdout.splitlines()[-1] if args[0] != "-m" else done.stdout)


# ---- what is measured ------------------------------------------------------------------------------------------------


def measure(path: Path, places: tuple[str | None, str | None], n_prompt: int, n_reply: int, rounds: int) -> Any:
    """By round this machine's rates, and tokens/s by engine; what the replies' messages took.

    A round before them brings weights in.
    """
    found, shape = list[dict[str, Any]](), load_model(str(path), None)
    with ExitStack() as stack:
        ranks = stack.enter_context(sharing_ranks(path, places_of(*places), Sharing(), 1))
        of = {RANKS: {"threads": 1, "ranks": ranks, "device": "cpu"}, ONE: {"threads": 1}, TWO: {"threads": 2}}
        ctx, alone = _BEFORE + max(n_prompt, n_reply), {"device": "cpu", "backend": "native"}
        engines = {
            name: stack.enter_context(localrun.load(path, ctx=ctx, **(alone if "ranks" not in own else {}) | own))
            for name, own in of.items()
        }
        ids = np.random.default_rng(0).integers(0, engines[ONE].model.vocab_size, ctx).tolist()
        for number in range(rounds + 1):
            described = {name: describe(shape, n) for name, n in ((ONE, 1), (TWO, 2))} if number else {}
            rates = {name: _rates(engine, ids, n_prompt, n_reply) for name, engine in engines.items()}
            found += [{"machines": described, "rates": rates}] if number else []
        times, figures = engines[RANKS].model.remote.times, engines[RANKS].rank_figures()
    names = ("sent", "own", "waited", "busiest_other")
    return {
        "rounds": found,
        "messages": figures
        | {f"{name}_us": round(float(np.median(each)) / 1e3, 1) for name, each in zip(names, times.T, strict=True)},
    }


def _rates(engine: Engine, ids: list[int], n_prompt: int, n_reply: int) -> dict[str, float]:
    session, found = engine.session("off"), {}
    if n_prompt:
        began, on_core = time.perf_counter(), time.thread_time()
        session.advance(ids[:n_prompt])
        seconds = time.perf_counter() - began
        found |= {"prompt": n_prompt / seconds, "prompt on core": (time.thread_time() - on_core) / seconds}
    session.forget(0)
    session.advance(ids[:_BEFORE])
    steps, on_core = [], time.thread_time()
    for token in ids[_BEFORE : _BEFORE + n_reply]:
        began = time.perf_counter()
        session.advance([token])
        steps.append(time.perf_counter() - began)
    return found | {"reply": 1 / median(steps), "reply on core": (time.thread_time() - on_core) / sum(steps)}


# ---- what is predicted -----------------------------------------------------------------------------------------------


def predict(shape: ModelShape, by_name: dict[str, Machine], link: Link, n_prompt: int, n_reply: int) -> Any:
    """Tokens/s by engine, and of ranks the milliseconds by part and how long a layer waits for the other."""
    placement, found = host_memory(shape, by_name[ONE], 512, 2).first.placement, {}
    for what, speed in (
        ("prompt", lambda machine: prefill_speed(shape, machine, placement, max(1, n_prompt))),
        ("reply", lambda machine: decode_speed(shape, machine, placement, _BEFORE + n_reply / 2)),
    ):
        of = {name: speed(machine) for name, machine in by_name.items()}
        routed = next(phase for phase in of[TWO].phases if phase.part == EXPERTS)
        at_half = replace(routed, seconds=2 * routed.seconds)
        phases = tuple(at_half if phase.part == EXPERTS else phase for phase in of[ONE].phases)
        of[RANKS] = spread(Speed(of[ONE].tokens, phases), shape, 2, link, Parts(1 / 2, 1 / 2))
        for name, each in of.items():
            found.setdefault(name, {})[what] = each.tokens_per_s
        waits_s = of[RANKS].messages_s + of[RANKS].waiting_s
        found[RANKS][f"{what}_layer_waits_us"] = round(1e6 * waits_s / shape.n_moe_layers, 1)
        found[RANKS][f"{what}_ms"] = {p.part: round(1e3 * p.seconds, 2) for p in of[RANKS].speed.phases}
    return found


def compare(arguments: argparse.Namespace, name: str, shape: ModelShape) -> dict[str, Any]:
    """One network's figures."""
    began = time.perf_counter()
    lengths = [str(n) for n in (arguments.p, arguments.n, arguments.r)]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        where, environment = ["--ranks", "2"], {"memory": {}, "tcp": _TCP}.get(name)
        if environment is None:
            where, environment = ["--hosts", OTHER], stack.enter_context(network(name, Path(folder)))
        timed = command(environment, "doctor", *where, "--link", f"{folder}/link.json")
        done = _last_line(environment, __file__, arguments.model, *where, "--measure", *lengths)
        link, rounds = load_link(f"{folder}/link.json"), done["rounds"]
    predicted = []
    for each in rounds:
        by_name = {of: parse_machine(document, of, "this machine") for of, document in each["machines"].items()}
        predicted.append(predict(shape, by_name, link, arguments.p, arguments.n))
    found: dict[str, Any] = {"doctor_layer_us": round(1e6 * timed["ranks"][0]["layer_s"], 1)}
    for what in ("prompt", "reply") if arguments.p else ("reply",):
        for engine in (RANKS, ONE, TWO):
            pairs = [(p[engine][what], r["rates"][engine][what]) for p, r in zip(predicted, rounds, strict=True)]
            ratios = [reckoned / measured for reckoned, measured in pairs]
            found[f"{what}, {engine}"] = {
                "predicted": round(median(reckoned for reckoned, _ in pairs), 3),
                "measured": round(median(measured for _, measured in pairs), 3),
                "ratio": round(median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "on_core": [round(each["rates"][engine][f"{what} on core"], 2) for each in rounds],
            }
        for engine in (ONE, TWO):
            times = [each["rates"][RANKS][what] / each["rates"][engine][what] for each in rounds]
            found[f"{what}, times {engine}"] = round(median(times), 3)
    own = {key: value for key, value in predicted[-1][RANKS].items() if key not in ("prompt", "reply")}
    found |= {"token_bytes": messages(shape, 2).bytes_per_token, "messages": done["messages"], "plan": own}
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--network", nargs="*", default=["memory"], metavar="NAME", help="memory, tcp, or 10gbit")
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", type=int, default=3)
    parser.add_argument("--measure", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", help=argparse.SUPPRESS)
    parser.add_argument("--hosts", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        places = arguments.ranks, arguments.hosts
        print(json.dumps(measure(Path(arguments.model), places, *arguments.measure)))
        return
    arguments.model, shape = str(Path(arguments.model).resolve()), load_model(arguments.model, None)
    document: dict[str, Any] = {"machine": this_one(), "model": arguments.model}
    for name in arguments.network:
        document[name] = compare(arguments, name, shape)
        print(f"{name}: {document[name]}", file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
