"""Where a decode step's time goes, phase by phase, at several lengths of context, over caches of random rows.

    python scripts/bench_phases.py MODEL.gguf [-c 1024,131072] [-r ROUNDS] [-t THREADS]

Each phase's time is that of the step up to its end less that up to the one before, each the best of some rounds in
which phases and contexts take turns; so a model of few layers measures best (make_synthetic.py's slices). What an
indexer chooses among random rows says nothing, but costs as much as among real ones. A table goes to stderr, phases of
layers of one kind added up; stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np

from localrun import hardware
from localrun.cpu.compressed import decode_step
from localrun.cpu.decode import DecodeStep
from localrun.gguf.file import open_gguf
from localrun.measure.bench import machine
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, new_cache
from quant.threads.pool import Pool

STEP = "a token"


def filled(config: Config, n_tokens: int) -> Cache:
    """A cache with n_tokens tokens of random rows."""
    cache, random, rows = new_cache(config, n_tokens + 1), np.random.default_rng(0), {}
    for layer in range(config.num_hidden_layers):
        for part, kind in enumerate(config.rows(layer)):
            values = random.standard_normal((kind.count(n_tokens), kind.width), dtype=np.float32)
            rows[f"{layer}.{part}"] = values if kind.is_exact else values.astype(np.float16)
    cache.load(rows, n_tokens)
    return cache


def kind_of(phase: str, config: Config) -> str:
    """What phases are added up under: their name without the layer's number, with its ratio or its window."""
    if not phase.startswith("blk."):
        return phase
    _, index, name = phase.split(".", 2)
    if not name.startswith("attn") or int(index) >= config.num_hidden_layers:
        return name
    seen = [("ratio", config.compress_ratio(int(index))), ("window", config.window(int(index)))]
    return f"{name}" + "".join(f", {word} {n}" for word, n in seen[: 2 - bool(config.compress_ratios)] if n)


def measure(step: DecodeStep, caches: dict[int, Cache], n_rounds: int) -> dict[int, dict[str, float]]:
    """Seconds by context and kind of phase, and of the whole step."""
    names = step.program.names
    best = {n: dict.fromkeys(names, float("inf")) for n in caches}
    for round_ in range(n_rounds + 1):  # the first brings everything in
        for name in names:
            for n, cache in caches.items():
                start = time.perf_counter()
                step.program.run([1], [n], cache.addresses, cache_rows=cache.n_rows, until=name)
                if round_:
                    best[n][name] = min(best[n][name], time.perf_counter() - start)
    found: dict[int, dict[str, float]] = {}
    for n, until in best.items():
        kinds, before = defaultdict(float), 0.0
        for name in names:
            kinds[kind_of(name, step.config)] += until[name] - before
            before = until[name]
        found[n] = {**kinds, STEP: before}
    return found


def show(found: dict[int, dict[str, float]]) -> None:
    """The table, in milliseconds."""
    print(f"{'ms':<44}" + "".join(f"{n:>10}" for n in found), file=sys.stderr)
    for kind in next(iter(found.values())):
        print(f"{kind:<44}" + "".join(f"{1e3 * each[kind]:>10.3f}" for each in found.values()), file=sys.stderr)


def main() -> None:
    """Measure, show, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-c", "--contexts", default="1024,131072", help="tokens in the cache, with commas")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    arguments = parser.parse_args()
    contexts = [int(n) for n in arguments.contexts.split(",")]
    with open_gguf(arguments.model) as file, closing(Pool(arguments.threads)) as pool:
        config = read_config(file)
        step, caches = decode_step(config, GGUFTensors(file), pool), {n: filled(config, n) for n in contexts}
        for cache in caches.values():
            step.run_until(step.program.names[0], [1], cache)  # makes room for the choices of an indexer
        found = measure(step, caches, arguments.rounds)
    show(found)
    rounded = {n: {kind: round(1e3 * seconds, 4) for kind, seconds in each.items()} for n, each in found.items()}
    print(json.dumps({"model": str(arguments.model), "ms": rounded, "threads": arguments.threads} | machine()))


if __name__ == "__main__":
    main()
