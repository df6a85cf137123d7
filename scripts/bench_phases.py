"""Where a decode step's time goes, phase by phase, at several lengths of context, over caches of random rows.

    python scripts/bench_phases.py MODEL.gguf [-c 1024,131072] [-r ROUNDS] [-t THREADS] [--cache-bits 8]

Behind each phase stands one more that notes the time, which costs a microsecond or two. Contexts take turns; of each
phase the shortest time counts. What an indexer chooses among random rows says nothing, but costs as much as among real
ones. A table goes to stderr, phases of layers of one kind added up; stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numba import types

from localrun import hardware
from localrun.cpu.compressed import decode_step
from localrun.cpu.decode import DecodeStep
from localrun.gguf.file import open_gguf
from localrun.measure.bench import machine
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.models.tensors import GGUFTensors
from localrun.network.cache import Cache, new_cache
from quant.decode.program import HEADER, NOTHING, PHASE, Phase, Program
from quant.simd.struct import address, struct
from quant.target.jit import kernel
from quant.threads.pool import Pool

STEP, TIMED = "a token", "timed"
STAMP = struct("Stamp", phase=PHASE, out=address)
_MONOTONIC = 1  # Linux's CLOCK_MONOTONIC
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))


def filled(config: Config, n_tokens: int, n_more: int = 1, bits: int = 16) -> Cache:
    """A cache with n_tokens tokens of random rows, and room for n_more."""
    cache, random, rows = new_cache(config, n_tokens + n_more, bits=bits), np.random.default_rng(0), {}
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


@kernel("void(int64, int64, int64)")
def _note_time(phase, item, work):
    _clock_gettime(types.int32(_MONOTONIC), STAMP(phase).out)


@contextmanager
def noting_times() -> Iterator[list[np.ndarray]]:
    """Programs that are made meanwhile note when each phase ends: seconds and nanoseconds, int64 (2,) a phase."""
    add, times = Program.add, []

    def add_both(program: Program, phase: Phase, name: str = "") -> None:
        times.append(np.zeros(2, np.int64))
        add(program, phase, name)
        arguments = STAMP.pack(phase=HEADER, out=times[-1].ctypes.data)
        add(program, Phase(NOTHING, _note_time, 1, arguments, 0), f"{name}, {TIMED}")

    Program.add = add_both
    try:
        yield times
    finally:
        Program.add = add


def measure(
    step: DecodeStep, times: list[np.ndarray], caches: dict[int, Cache], n_rounds: int
) -> dict[int, dict[str, float]]:
    """Seconds by context and kind of phase, and of the whole step."""
    names = step.program.names[::2]
    best = {n: np.full(len(names) + 1, np.inf) for n in caches}
    for round_ in range(n_rounds + 1):  # the first brings everything in
        for n, cache in caches.items():
            begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
            step.program.run([1], [n], cache.addresses, cache_rows=cache.n_rows)
            ends = np.array(times) @ [10**9, 1]
            taken = np.array([*np.diff(ends, prepend=begin), ends[-1] - begin]) / 1e9
            best[n] = np.minimum(best[n], taken) if round_ else best[n]
    found: dict[int, dict[str, float]] = {}
    for n, seconds in best.items():
        kinds = defaultdict(float)
        for name, each in zip([*names, STEP], seconds, strict=True):
            kinds[kind_of(name, step.config)] += float(each)
        found[n] = dict(kinds)
    return found


def show(found: dict[int, dict[str, float]]) -> None:
    """The table, in milliseconds."""
    print(f"{'ms':<44}" + "".join(f"{n:>10}" for n in found), file=sys.stderr)
    for kind in dict.fromkeys(kind for each in found.values() for kind in each):
        cells = (f"{1e3 * each.get(kind, 0.0):>10.3f}" for each in found.values())
        print(f"{kind:<44}" + "".join(cells), file=sys.stderr)


def main() -> None:
    """Measure, show, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-c", "--contexts", default="1024,131072", help="tokens in the cache, with commas")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    parser.add_argument("--cache-bits", type=int, choices=(16, 8), default=16)
    arguments = parser.parse_args()
    contexts = [int(n) for n in arguments.contexts.split(",")]
    with open_gguf(arguments.model) as file, closing(Pool(arguments.threads)) as pool:
        config = read_config(file)
        with noting_times() as times:
            step = decode_step(config, GGUFTensors(file), pool, cache_bits=arguments.cache_bits)
        caches = {n: filled(config, n, bits=arguments.cache_bits) for n in contexts}
        for cache in caches.values():
            step.run_until(step.program.names[0], [1], cache)  # makes room for the choices of an indexer
        found = measure(step, times, caches, arguments.rounds)
    show(found)
    rounded = {n: {kind: round(1e3 * seconds, 4) for kind, seconds in each.items()} for n, each in found.items()}
    print(json.dumps({"model": str(arguments.model), "ms": rounded, "threads": arguments.threads} | machine()))


if __name__ == "__main__":
    main()
