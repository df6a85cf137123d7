"""A decode step far into the context, with sparse attention and dense in turn, over a cache of random rows.

    python scripts/bench_sparse.py MODEL.gguf [-c TOKENS] [-r REPETITIONS] [-t THREADS]

MODEL has an indexer: make_synthetic.py's v3.2-attention, say. Which rows the indexer chooses among random
ones says nothing, but that costs as much as among real ones. The last line of stdout is one JSON document; seconds are
of the best step and of the median one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import localrun
from localrun.engine import Engine
from localrun.network.cache import Cache

WAYS = {"sparse": False, "dense": True}  # dense_attention of each


def filled(engine: Engine, n_tokens: int) -> Cache:
    """A cache with n_tokens tokens of random rows."""
    cache, random = engine.new_cache(), np.random.default_rng(0)
    rows = {
        name: random.standard_normal((n_tokens, rows.shape[1]), dtype=np.float32).astype(np.float16)
        for name, rows in cache.save().items()
    }
    cache.load(rows, n_tokens)
    return cache


def step(engine: Engine, cache: Cache) -> float:
    """Seconds of one token, which is then forgotten."""
    length, start = cache.length, time.perf_counter()
    engine.model.forward([1], cache)
    seconds = time.perf_counter() - start
    cache.truncate(length)
    return seconds


def measure(path: Path, n_tokens: int, repetitions: int, threads: int | None = None) -> dict[str, object]:
    """Seconds of steps both ways. Raises LocalrunError if the model has no indexer."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        engines = {
            way: stack.enter_context(
                localrun.load(
                    path, device="cpu", threads=threads, ctx=n_tokens + 1, speculative="off", dense_attention=dense
                )
            )
            for way, dense in WAYS.items()
        }
        config = engines["sparse"].config
        if config is None or not config.index_topk:
            raise localrun.LocalrunError(f"{path}: has no indexer that chooses tokens")
        caches = {way: filled(engine, n_tokens) for way, engine in engines.items()}
        for repetition in range(repetitions + 1):
            for way, engine in engines.items():
                taken = step(engine, caches[way])
                if repetition:  # the first brings everything in
                    seconds[way].append(taken)
    best = {way: min(taken) for way, taken in seconds.items()}
    return {
        "model": str(path),
        "context": n_tokens,
        "index_topk": config.index_topk,
        "best_s": {way: round(value, 5) for way, value in best.items()},
        "median_s": {way: round(statistics.median(taken), 5) for way, taken in seconds.items()},
        "dense_over_sparse": round(best["dense"] / best["sparse"], 3),
    }


def main() -> None:
    """Measure; print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-c", "--ctx", type=int, default=32768, metavar="TOKENS", help="in the cache; 32768")
    parser.add_argument("-r", "--repetitions", type=int, default=7, metavar="REPETITIONS")
    parser.add_argument("-t", "--threads", type=int, metavar="THREADS")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.model, arguments.ctx, arguments.repetitions, arguments.threads)))


if __name__ == "__main__":
    main()
