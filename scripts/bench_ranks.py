"""Routed experts on two ranks of one thread against one process of two threads and of one.

    python scripts/bench_ranks.py MODEL.gguf [-n 32] [-p 512] [-r 5] [--message bf16] [--tcp] [--ranks 2]

Starts itself under mpiexec. Rank 0 has all three engines over the same file; they take turns, a round each, while ranks
that have nothing to do sleep. --tcp: messages go through sockets instead of shared memory, as between hosts. The last
line of stdout is one JSON document: tokens a second, best and median of the rounds, and what messages took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import localrun
from localrun.engine import Engine
from localrun.gguf.file import open_gguf
from localrun.measure.bench import machine
from localrun.ranks.sharing import Ranks, Sharing
from localrun.ranks.worker import serve_share
from localrun.ranks.world import mpi_world

_BEFORE = 16  # tokens in the context when steps begin


def rates(engines: dict[str, Engine], n_prompt: int, n_steps: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of each round, by engine and by what was done."""
    found: dict[str, dict[str, list[float]]] = {name: {"steps": [], "prompt": []} for name in engines}
    rng = np.random.default_rng(0)
    sessions = {name: engine.session("off") for name, engine in engines.items()}
    for number in range(rounds + 1):
        ids = rng.integers(0, next(iter(engines.values())).model.vocab_size, _BEFORE + n_prompt + n_steps).tolist()
        for name, session in sessions.items():
            for what, before, some in (("prompt", 0, n_prompt), ("steps", _BEFORE, n_steps)):
                session.forget(0)
                if before:
                    session.advance(ids[:before])
                began = time.perf_counter()
                if what == "prompt":
                    session.advance(ids[:some])
                else:
                    for token in ids[before : before + some]:
                        session.advance([token])
                if number:  # the first round brings weights in, and compiles
                    found[name][what].append(some / (time.perf_counter() - began))
    return found


def measure(args: argparse.Namespace) -> None:
    """On every rank; rank 0 prints."""
    from mpi4py import MPI

    comm, sharing = MPI.COMM_WORLD, Sharing(args.message)
    world = mpi_world(comm, [f"rank {rank}" for rank in range(comm.size)])
    world.limit_s = 120.0
    if world.rank:
        with open_gguf(args.model) as file:
            serve_share(file, world, sharing, 1)
        return
    ctx, n = _BEFORE + args.prompt + args.steps, comm.size
    with ExitStack() as stack:
        engines = {
            f"{n} ranks of 1 thread": localrun.load(
                args.model, threads=1, ctx=ctx, device="cpu", ranks=Ranks(world, sharing)
            ),
            f"1 rank of {n} threads": localrun.load(args.model, threads=n, ctx=ctx, device="cpu", backend="native"),
            "1 rank of 1 thread": localrun.load(args.model, threads=1, ctx=ctx, device="cpu", backend="native"),
        }
        for engine in engines.values():
            stack.callback(engine.close)
        found = rates(engines, args.prompt, args.steps, args.rounds)
        shared = next(iter(engines.values()))
        results = {
            name: {f"{what}_{how.__name__}": how(values) for what, values in each.items() for how in _HOW}
            for name, each in found.items()
        }
        messages = shared.rank_figures()
    print(json.dumps({"machine": machine(), "settings": vars(args), "tokens_per_s": results, "messages": messages}))


_HOW = (max, statistics.median)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-n", "--steps", type=int, default=32)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--message", default="bf16")
    parser.add_argument("--tcp", action="store_true")
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    if "PMI_RANK" in os.environ:
        measure(args)
        return
    tcp = {"FI_PROVIDER": "tcp", "MPIR_CVAR_NOLOCAL": "1"} if args.tcp else {}
    command = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(args.ranks), sys.executable, *sys.argv]
    sys.exit(subprocess.run(command, env=os.environ | tcp).returncode)


if __name__ == "__main__":
    main()
