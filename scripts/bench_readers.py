"""A prompt that another process reads (--prefill-hosts) against one that is read here, and what replies notice of both.

    python scripts/bench_readers.py MODEL [--network 1gbit ...] [-p 512] [-r 3]

This process and the reader have a thread each. In turn: steps alone; a prompt that is read here; one that is read there
while nothing else goes on; steps while one is read there. Without --network rows travel through memory; with it the
reader is in a network namespace as in scripts/compare_ranks.py (root, ip and tc). The last line of stdout is one JSON
document: medians of seconds and of tokens/s; what reading elsewhere takes on top of its computing, and what
`localrun plan` reckons for that from what `doctor` measures of the link.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from compare_ranks import OTHER, command, network

import localrun
from localrun.generate.session import Session
from localrun.measure.bench import machine
from localrun.plan.link import load_link
from localrun.plan.readers import on_top_s
from localrun.plan.shapes import load_model
from localrun.ranks.places import reader_places
from localrun.ranks.start import reading_ranks

_BEFORE, _STEPS = 16, 16  # tokens of the context that steps go on from; steps that are timed alone


def seconds_of(session: Session, ids: list[int]) -> float:
    """Of reading a prompt from an empty context."""
    session.forget(0)
    began = time.perf_counter()
    session.advance(ids)
    return time.perf_counter() - began


def steps(session: Session, is_over: Any) -> float:
    """Tokens a second of steps, until it is so."""
    session.forget(_BEFORE)
    began, n_steps = time.perf_counter(), 0
    while not is_over(n_steps):
        session.advance([n_steps % 100])
        n_steps += 1
        if len(session.ids) > 1000:
            session.forget(_BEFORE)
    return n_steps / (time.perf_counter() - began)


def measure(model: str, host: str, n_prompt: int, rounds: int) -> dict[str, float]:
    """Medians of the rounds; the first one brings weights in, and compiles."""
    path, found = Path(model), dict[str, list[float]]()
    ids = [(7 * i) % 1000 for i in range(n_prompt)]
    with ExitStack() as stack:
        world = stack.enter_context(reading_ranks(path, reader_places(host), 1, dense_attention=False))
        there = stack.enter_context(localrun.load(path, threads=1, ctx=2048, readers=world))
        here = stack.enter_context(localrun.load(path, threads=1, ctx=2048, device="cpu", backend="native"))
        reply, away, own = there.session("off"), there.session("off"), here.session("off")
        reply.advance(ids[:_BEFORE])
        for number in range(rounds + 1):
            before = there.reader_figures()
            figures = {
                "steps_alone_per_s": steps(reply, lambda n: n >= _STEPS),
                "here_s": seconds_of(own, ids),
                "elsewhere_s": seconds_of(away, ids),
            }
            after = there.reader_figures()
            figures |= {f"elsewhere_{name}": after[name] - before[name] for name in ("computing_s", "on_top_s")}
            away.forget(0)
            chunk = ids[: there.model.chunks(len(ids))[0]]
            assert not there.readers.has_read(chunk, away.cache, 0.0)
            is_read = partial(there.readers.has_read, chunk, away.cache, 0.0)
            figures["steps_meanwhile_per_s"] = steps(reply, lambda n, is_read=is_read: is_read())
            away.advance(chunk)
            for name, value in figures.items() if number else ():
                found.setdefault(name, []).append(value)
    return {name: round(median(values), 4) for name, values in found.items()}


def compare(arguments: argparse.Namespace, host: str, where: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What is measured, in a process of its own, beside what is reckoned."""
    with tempfile.TemporaryDirectory() as folder:
        link = f"{folder}/link.json"
        command(environment, "doctor", *where, "--link", link)
        program = [
            sys.executable,
            __file__,
            arguments.model,
            "--host",
            host,
            "-p",
            str(arguments.p),
            "-r",
            str(arguments.r),
        ]
        done = subprocess.run(program, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shape = load_model(arguments.model, None)
        predicted = on_top_s(shape, load_link(link), arguments.p, found["elsewhere_computing_s"])
    return found | {"on_top_predicted_s": round(predicted, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--network", nargs="*", default=[], metavar="RATE", help="as tc writes it: 1gbit, 10gbit")
    parser.add_argument("--host", help=argparse.SUPPRESS)
    parser.add_argument("-p", type=int, default=512)
    parser.add_argument("-r", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.host:
        print(json.dumps(measure(arguments.model, arguments.host, arguments.p, arguments.r)))
        return
    document: dict[str, Any] = {"machine": machine(), "model": arguments.model}
    document["memory"] = compare(arguments, "localhost", ["--ranks", "2"], {})
    print(f"memory: {document['memory']}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        for rate in arguments.network:
            with network(rate, Path(name)) as environment:
                document[rate] = compare(arguments, OTHER, ["--hosts", OTHER], environment)
            print(f"{rate}: {document[rate]}", file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
