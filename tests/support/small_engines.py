"""Small engines of both backends, as a program would load them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import tiny_models

import localrun
from localrun.engine import Engine
from localrun.generate.sampling import Sampling

GREEDY = Sampling(temperature=0.0)
CTX = 96
MODELS = {"native": "v3", "llama.cpp": "llama"}  # backend: variant


def opened(backend: str = "native", **options: Any) -> Engine:
    settings = {"threads": 1, "ctx": CTX, "speculative": "off"} | options
    return localrun.load(tiny_models.shared(MODELS[backend]), backend=backend, **settings)


def prompts(n: int, length: int = 20) -> list[list[int]]:
    return [tiny_models.token_ids("v3", length, seed=seed) for seed in range(n)]


def alone(engine: Engine, ids: list[int], n: int) -> list[int]:
    return list(engine.generate(ids, GREEDY, max_tokens=n))


def side_by_side(work: Callable[[int], Any], n: int) -> list[Any]:
    """What work gives for 0 to n - 1 in a thread each, or the error that it raises."""
    results: list[Any] = [None] * n

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "hangs"
    return results
