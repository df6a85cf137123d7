"""Several contexts at once: tokens a second of steps that 1, 2, 4 and 8 share; how long a long prompt stops a reply.

    python scripts/bench_contexts.py [MODEL.gguf] [-t THREADS] [-r 5] [-n 24] [-c 256] [--prompt 4096] [--max-pause 1]

Rounds of localrun and of llama.cpp (a llama_batch with a sequence a context) are in turn, on the same file, contexts
and tokens, in one process. Then a reply runs while a prompt is read: by localrun's scheduler, whose chunks are to keep
the pause below --max-pause, and by llama.cpp with the reply's token in each batch of 512. The last line of stdout is
one JSON document: tokens/s of all contexts together, best and median of the rounds; seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np

import localrun
from localrun.bundled import MINIATURE
from localrun.engine import Engine
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.measure.llama_cpp_compare import N_BATCH, TimedLlamaCpp
from localrun.serve.job import Job
from localrun.serve.scheduler import Scheduler

CONTEXTS = 1, 2, 4, 8
LOCALRUN, LLAMA_CPP = "localrun", "llama.cpp"
_WARM_STEPS = 8  # of the reply, before the prompt comes


@dataclass
class Texts:
    """What both programs evaluate."""

    prompts: list[list[int]]
    steps: list[list[int]]  # a token of each context

    @classmethod
    def random(cls, vocab_size: int, n_prompt: int, n_steps: int) -> Texts:
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, vocab_size, (max(CONTEXTS), n_prompt)).tolist()
        return cls(prompts, rng.integers(0, vocab_size, (n_steps, max(CONTEXTS))).tolist())


def our_round(engine: Engine, sessions: list[Session], texts: Texts, count: int) -> float:
    """Seconds of the steps of the first `count` contexts."""
    for session, prompt in zip(sessions, texts.prompts, strict=True):
        session.forget(len(prompt))
    started = time.perf_counter()
    for ids in texts.steps:
        engine.step_many(list(zip(sessions[:count], ids[:count], strict=True)))
    return time.perf_counter() - started


def their_round(peer: TimedLlamaCpp, texts: Texts, count: int) -> float:
    """The same of llama.cpp."""
    length = len(texts.prompts[0])
    peer.cut(length)
    started = time.perf_counter()
    for i, ids in enumerate(texts.steps):
        peer.step(ids[:count], length + i)
    return time.perf_counter() - started


def together(engine: Engine, n_prompt: int, n_steps: int, rounds: int) -> dict[str, dict[int, dict[str, float]]]:
    """Tokens a second by program and number of contexts."""
    texts = Texts.random(engine.model.vocab_size, n_prompt, n_steps)
    sessions = [engine.session("off") for _ in texts.prompts]
    for session, prompt in zip(sessions, texts.prompts, strict=True):
        session.advance(prompt)
    peer = TimedLlamaCpp(engine.file, engine.threads, n_prompt + n_steps, len(sessions))
    peer.begin(texts.prompts)
    runs: dict[str, Callable[[int], float]] = {
        LOCALRUN: lambda count: our_round(engine, sessions, texts, count),
        LLAMA_CPP: lambda count: their_round(peer, texts, count),
    }
    rates: dict[str, dict[int, list[float]]] = {name: {count: [] for count in CONTEXTS} for name in runs}
    for _ in range(rounds):
        for count in CONTEXTS:
            for name, run in runs.items():
                rates[name][count].append(count * n_steps / run(count))
    peer.close()
    return {
        name: {
            count: {"best": round(max(found), 2), "median": round(statistics.median(found), 2)}
            for count, found in by_count.items()
        }
        for name, by_count in rates.items()
    }


# ---- a long prompt beside a reply ------------------------------------------------------------------------------------


@dataclass(eq=False)
class TimedJob(Job):
    """A job that notes when each of its units was done."""

    times: list[float] = field(default_factory=list)
    is_over: Event = field(default_factory=Event)

    def units(self, *arguments: Any) -> Iterator[None]:
        for unit in super().units(*arguments):
            self.times.append(time.perf_counter())
            yield unit


def timed_job(ids: list[int], max_tokens: int) -> TimedJob:
    job = TimedJob(ids, Sampling(temperature=0.0), max_tokens, [], {}, lambda piece: None)
    job.deliver = lambda piece: job.is_over.set() if piece is None else None
    return job


def pauses(times: list[float], begin: float, end: float) -> dict[str, float]:
    """Of a reply with a token at these times: between begin and end, in seconds."""
    before = max(at for at in times if at <= begin)
    marks = [before, *(at for at in times if begin < at <= end)]
    gaps = np.diff([*marks, end] if len(marks) == 1 else marks)
    return {
        "longest_pause_s": round(float(gaps.max()), 3),
        "median_pause_s": round(float(np.median(gaps)), 3),
        "prompt_s": round(end - begin, 2),
        "tokens_of_the_reply": len(gaps),
    }


def our_pause(engine: Engine, prompt: list[int], most_pause_s: float) -> dict[str, float]:
    """A reply's pauses while a prompt is read, and how long that takes beside it and alone."""
    engine.prepare()
    scheduler = Scheduler(engine, 2, 0, most_pause_s=most_pause_s)
    stream, reading, alone = timed_job(prompt[:32], engine.ctx - 32), timed_job(prompt, 1), timed_job(prompt, 1)
    scheduler.submit([stream])
    while len(stream.times) < _WARM_STEPS:
        time.sleep(0.01)
    begin = time.perf_counter()
    scheduler.submit([reading])
    reading.is_over.wait()
    found = pauses(stream.times, begin, reading.times[-1])
    stream.cancelled = True
    stream.is_over.wait()
    begin = time.perf_counter()
    scheduler.submit([alone])
    alone.is_over.wait()
    found["prompt_alone_s"] = round(alone.times[-1] - begin, 2)
    scheduler.close()
    return found


def their_pause(engine: Engine, prompt: list[int]) -> dict[str, float]:
    """The same of llama.cpp, whose batches carry the reply's token and as much of the prompt as there is room for."""
    peer = TimedLlamaCpp(engine.file, engine.threads, engine.ctx, 2)
    peer.begin([prompt[:32]])
    position, times = 32, []
    for token in prompt[32 : 32 + _WARM_STEPS]:
        peer.step([token], position)
        position += 1
        times.append(time.perf_counter())
    begin = time.perf_counter()
    for first in range(0, len(prompt), N_BATCH - 1):
        peer.step([prompt[position % len(prompt)]], position, prompt[first : first + N_BATCH - 1], first)
        position += 1
        times.append(time.perf_counter())
    found = pauses(times, begin, times[-1])
    begin = time.perf_counter()
    peer.prompt(prompt)
    found["prompt_alone_s"] = round(time.perf_counter() - begin, 2)
    peer.close()
    return found


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=MINIATURE, help="a GGUF file; the bundled miniature if not given")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-r", type=int, default=5, help="rounds")
    parser.add_argument("-n", type=int, default=24, help="steps of a round")
    parser.add_argument("-c", type=int, default=256, help=f"tokens of each context, at most {N_BATCH}")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the long prompt; 0 to leave it out")
    parser.add_argument("--max-pause", type=float, default=1.0, help="seconds")
    a = parser.parse_args()
    ctx = max(a.c + a.n, 2 * a.prompt)
    with localrun.load(a.model, device="cpu", backend="native", threads=a.threads, ctx=ctx) as engine:
        document: dict[str, Any] = {"model": engine.file.path.name, "threads": engine.threads}
        document["tokens_per_s"] = together(engine, a.c, a.n, a.r)
        for name, by_count in document["tokens_per_s"].items():
            print(name, {count: found["best"] for count, found in by_count.items()}, flush=True)
        if a.prompt:
            engine.tokenizer.eog_ids = frozenset()  # a random model's reply may end with any token
            prompt = np.random.default_rng(1).integers(0, engine.model.vocab_size, a.prompt).tolist()
            document["max_pause_s"] = a.max_pause
            document["pause"] = {}
            for name, found in (
                (LOCALRUN, lambda: our_pause(engine, prompt, a.max_pause)),
                (LLAMA_CPP, lambda: their_pause(engine, prompt)),
            ):
                document["pause"][name] = found()
                print(name, document["pause"][name], flush=True)
        print(json.dumps(document))


if __name__ == "__main__":
    main()
