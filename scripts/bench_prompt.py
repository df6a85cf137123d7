"""Where a prompt's time goes in the network, part by part, at several lengths of context, over caches of random rows.

    python scripts/bench_prompt.py MODEL.gguf [-c 0,8192,32768] [-n TOKENS] [-r ROUNDS] [-t THREADS]

A chunk of TOKENS (512) is evaluated behind each context, in turn; of each part the shortest time counts, without what
runs within it under a name of its own. "attention", "indexer", "feed-forward" and "layer" are what is left of them: the
network's own arithmetic in torch. A table goes to stderr, parts of layers of one kind added up; stdout is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_phases import filled, kind_of, show

from localrun import hardware
from localrun.cpu.torch_threads import TorchThreads
from localrun.gguf.file import open_gguf
from localrun.limits import PREFILL_CHUNK
from localrun.measure.bench import machine
from localrun.models.reader import read_config
from quant.threads.pool import Pool

if TYPE_CHECKING:
    from localrun.gguf.file import GGUFFile
    from localrun.models.config import Config
    from localrun.network.model import Network

ALL = "the chunk"


class Clock:
    """Seconds by name of what ran, each without what ran within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = [0.0]  # of each that is running, what ran within it

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """What runs in the block."""
        self._within.append(0.0)
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.seconds[name] += taken - self._within.pop()
        self._within[-1] += taken


class Timed:
    """A module, or what has methods, that notes how long calls take."""

    def __init__(self, clock: Clock, name: str, module: Any):
        self._clock, self._name, self._module = clock, name, module

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._call(self._module, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return partial(self._call, value) if callable(value) and not isinstance(value, Timed) else value

    def _call(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        with self._clock.running(self._name):
            return function(*arguments, **options)


def timed_network(config: Config, file: GGUFFile, pool: Pool, clock: Clock) -> Network:
    """The network, with a clock on all that it calls."""
    from localrun.cpu.weights import LayerWeights
    from localrun.network.model import Network

    class Weights(LayerWeights):
        def __init__(self) -> None:
            super().__init__(file, pool)
            for name in ("attend", "attend_chosen", "attend_rows", "choose_rows", "choose_experts"):
                if hasattr(self, name):
                    setattr(self, name, Timed(clock, name, getattr(self, name)))

        def linear(self, name: str) -> Timed:
            return Timed(clock, name, super().linear(name))

        def heads(self, name: str, n_groups: int | None = None) -> Timed:
            return Timed(clock, name, super().heads(name, n_groups))

        def joined_mlp(self, *names: str) -> Timed:
            return Timed(clock, names[-1], super().joined_mlp(*names))

        def experts(self, index: int) -> Timed:
            return Timed(clock, "experts", super().experts(index))

    network = Network(config, Weights())
    for layer in network.layers:
        for name, part in (("indexer", "indexer"), ("compressor", "compressor")):
            module = getattr(layer.self_attn, name, None)
            if module is not None:
                setattr(layer.self_attn, name, Timed(clock, part, module))
        layer.self_attn, layer.mlp = Timed(clock, "attention", layer.self_attn), Timed(clock, "feed-forward", layer.mlp)
    network.layers = [Timed(clock, "layer", layer) for layer in network.layers]
    return network


def measure(
    config: Config, file: GGUFFile, pool: Pool, contexts: list[int], n_tokens: int, n_rounds: int
) -> dict[int, dict[str, float]]:
    """Seconds by context and part, and of the whole chunk."""
    clock = Clock()
    network = timed_network(config, file, pool, clock)
    caches = {n: filled(config, n, n_tokens) for n in contexts}
    best: dict[int, dict[str, float]] = {n: {} for n in contexts}
    for round_ in range(n_rounds + 1):  # the first brings everything in
        for n, cache in caches.items():
            clock.seconds.clear()
            start = time.perf_counter()
            with pool.passive_wait():
                network.forward([1 + i % 255 for i in range(n_tokens)], cache)
            seconds = {ALL: time.perf_counter() - start}
            cache.length = n  # what rings have lost is as random as what they have
            for name, taken in clock.seconds.items():
                kind = kind_of(name, config)
                seconds[kind] = seconds.get(kind, 0.0) + taken
            if round_:
                best[n] = {kind: min(taken, best[n].get(kind, taken)) for kind, taken in seconds.items()}
    return best


def main() -> None:
    """Measure, show, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("-c", "--contexts", default="0,8192,32768", help="tokens in the cache before, with commas")
    parser.add_argument("-n", "--tokens", type=int, default=PREFILL_CHUNK)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    arguments = parser.parse_args()
    contexts = [int(n) for n in arguments.contexts.split(",")]
    with open_gguf(arguments.model) as file, closing(Pool(arguments.threads)) as pool:
        TorchThreads.hold(arguments.threads)  # before torch is imported
        found = measure(read_config(file), file, pool, contexts, arguments.tokens, arguments.rounds)
    show(found)
    rounded = {n: {kind: round(1e3 * seconds, 4) for kind, seconds in each.items()} for n, each in found.items()}
    print(json.dumps({"model": str(arguments.model), "ms": rounded, "threads": arguments.threads} | machine()))


if __name__ == "__main__":
    main()
