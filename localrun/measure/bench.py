"""How fast a model runs here: prompt and generation, the weights it reads, and how fast they could be read.

Like llama-bench: ppN evaluates a prompt of N tokens, tgN evaluates N tokens one after the other, both from an empty
context, or from one of D tokens ("tgN @ dD"), without sampling. Engines take turns, repetition by repetition; none runs
while another does. Between repetitions a kernel that only reads measures the same pages of the file's map with the same
number of threads: what it reaches is the roof of generation, in cache or out of it.

These rates are always those of one token a step. Where speculative decoding is on, it is measured beside them: the
greedy reply to a short text, with drafts and without in turn.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np

from localrun import hardware
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.generate.session import Stats, n_common
from localrun.gguf.file import GGUFFile
from localrun.models.config import Config
from localrun.models.summary import weight_bytes_per_token
from localrun.placement.placement import CPU
from quant.threads import bandwidth as stream
from quant.threads.pool import Pool

ROOF_BYTES = 1 << 30  # of the map, to be read between repetitions: beyond all caches but the largest servers'
IDLE_S = 0.05  # until the threads of the engine before have gone to sleep; OpenMP's spin for up to 20 ms
WARM_UP_TOKENS = 8
STORY = "Once upon a time, there was a little girl named Lily. She had a dog and a cat, and every day"

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Settings:
    """What to measure: tokens of prompt and of generation, 0 for leaving it out, and how often.

    Attributes:
        depths: tokens of context that are there before; all is measured from each.
    """

    n_prompt: int = 512
    n_generate: int = 128
    repetitions: int = 3
    depths: tuple[int, ...] = (0,)

    @property
    def ctx(self) -> int:
        """Tokens of context that it takes."""
        return max(self.depths) + max(self.n_prompt, self.n_generate)

    def check(self) -> None:
        """Raises LocalrunError on numbers that make no sense."""
        counts = [("-p", self.n_prompt, 0), ("-n", self.n_generate, 0), ("-r", self.repetitions, 1)]
        for option, count, least in [*counts, *(("-d", depth, 0) for depth in self.depths)]:
            if count < least:
                raise LocalrunError(f"{option} {count}; expected {least} or more")
        if not max(self.n_prompt, self.n_generate):
            raise LocalrunError("-p 0 and -n 0: there is nothing to do")

    def check_fits(self, config: Config) -> None:
        """Raises LocalrunError if the model was not made for so many tokens."""
        limit, deepest = config.max_position_embeddings, max(self.depths)
        for option, count in (("-p", self.n_prompt), ("-n", self.n_generate)):
            if count and deepest + count > limit:
                depth = f"-d {deepest} and " if deepest else ""
                raise LocalrunError(f"{depth}{option} {count}: this model's context is {limit} tokens")


class TimedEngine(Protocol):
    """An engine that can be timed. Calls return when the last logits are there.

    Attributes:
        description: how it runs, for the reader of its figures.
    """

    description: dict[str, Any]

    def hold(self, ids: Sequence[int]) -> None:
        """Have a context of these tokens, whatever was there; what is there of them is not evaluated again."""

    def prompt(self, ids: Sequence[int]) -> float:
        """Evaluate a prompt behind what is held; seconds of it."""

    def generate(self, ids: Sequence[int]) -> list[float]:
        """Evaluate the ids one by one behind what is held; seconds of each, or of all of them."""


class Native:
    """This program's own engine."""

    def __init__(self, engine: Engine) -> None:
        self.description = engine.describe()
        self._model, self._cache = engine.model, engine.new_cache()
        self._held: list[int] = []

    def hold(self, ids: Sequence[int]) -> None:
        """Have the cache hold these tokens, and be able to go back to here; what it has of them stays."""
        self._cache.truncate(n_common(self._held, ids))
        self._held = list(ids)
        self.prompt(ids[self._cache.length :])
        self._cache.mark()

    def prompt(self, ids: Sequence[int]) -> float:
        """Seconds that these tokens take as a prompt, in the model's chunks."""
        length, start = self._cache.length, time.perf_counter()
        for n_tokens in self._model.chunks(len(ids)):
            self._model.forward(ids[self._cache.length - length :][:n_tokens], self._cache)
        return time.perf_counter() - start

    def generate(self, ids: Sequence[int]) -> list[float]:
        """Seconds that each of these tokens takes in a step of its own."""
        seconds = []
        for token in ids:
            start = time.perf_counter()
            self._model.forward([token], self._cache)
            seconds.append(time.perf_counter() - start)
        return seconds


class Rates:
    """Tokens a second of one test."""

    def __init__(self) -> None:
        self.by_repetition: list[float] = []
        self.by_step: list[float] = []  # a step is a token of generation, or a whole prompt

    def add(self, n_tokens: int, steps: Sequence[float]) -> None:
        """A repetition: the seconds of steps of 1 token, or of one step of all of them."""
        self.by_repetition.append(n_tokens / sum(steps))
        self.by_step += [n_tokens / len(steps) / step for step in steps]

    def summary(self) -> dict[str, Any]:
        """Mean and deviation over repetitions, as llama-bench gives; median and best over steps."""
        rates = self.by_repetition
        return {
            "mean": round(statistics.mean(rates), 3),
            "deviation": round(statistics.stdev(rates), 3) if len(rates) > 1 else 0.0,
            "median": round(statistics.median(self.by_step), 3),
            "best": round(max(self.by_step), 3),
            "repetitions": [round(rate, 3) for rate in rates],
        }


class Roof:
    """Reads the weights where they lie."""

    def __init__(self, file: GGUFFile, threads: int) -> None:
        self._pool = Pool(threads)
        self._runs = _runs(file)
        self.measured: list[stream.Bandwidth] = []

    def bring_in(self) -> None:
        """Read all weights once, so that no page has to come from the disk later."""
        for address, n_bytes in self._runs:
            stream.read(self._pool, address, n_bytes // 256 * 256)

    def measure(self) -> None:
        """Read the longest stretch of weights twice, up to ROOF_BYTES; the bandwidth goes to `measured`."""
        address, n_bytes = max(self._runs, key=lambda run: run[1])
        self.measured.append(stream.read_bandwidth(self._pool, address, min(n_bytes, ROOF_BYTES), passes=2))

    def summary(self) -> dict[str, float]:
        """Bytes a second: the best span of all, and the median of the measurements' medians."""
        best = max(found.best for found in self.measured)
        return {"best": round(best), "median": round(statistics.median(found.median for found in self.measured))}

    def close(self) -> None:
        """End the workers."""
        self._pool.close()


def _runs(file: GGUFFile) -> list[tuple[int, int]]:
    """Address and size of each stretch of the map without a gap of more than a page between tensors."""
    runs: list[tuple[int, int]] = []
    for start, n_bytes in sorted((tensor.data.ctypes.data, tensor.n_bytes) for tensor in file.tensors.values()):
        if runs and start - sum(runs[-1]) < 4096:
            runs[-1] = (runs[-1][0], start + n_bytes - runs[-1][0])
        else:
            runs.append((start, n_bytes))
    return runs


def run(
    engine: Engine,
    settings: Settings,
    other: TimedEngine | None = None,
    report: Report | None = None,
    other_name: str = "llama.cpp",
) -> dict[str, Any]:
    """Measure a native engine, and another runner in turn with it, as one JSON document; rates in tokens/s.

    The settings must fit the model: Settings.check, check_fits.
    """
    runners: dict[str, TimedEngine] = {"localrun": Native(engine)} | ({other_name: other} if other else {})
    roof = Roof(engine.file, engine.threads)
    try:
        rates = _measure(runners, settings, engine.model.vocab_size, roof, report or (lambda done, total, what: None))
    finally:
        roof.close()
    results = {name: {test: each.summary() for test, each in tests.items()} for name, tests in rates.items()}
    document = runners["localrun"].description | {
        "path": str(engine.file.path),
        "machine": machine(),
        "versions": versions(),
        "repetitions": settings.repetitions,
        "results": results["localrun"],
        **_reading(engine, results["localrun"], roof),
    }
    if other:
        document["against"] = {
            "engine": other_name,
            **other.description,
            "results": results[other_name],
        }
        document["ratio"] = _ratios(results["localrun"], results[other_name], "median")
        document["ratio_of_best"] = _ratios(results["localrun"], results[other_name], "best")
    if engine.speculative != "off" and settings.n_generate:
        document["speculation"] = speculation(engine, settings)
    if messages := engine.rank_figures():
        document["messages"] = messages
    if reading := engine.reader_figures():
        document["reading"] = reading
    return document


def speculation(engine: Engine, settings: Settings) -> dict[str, Any]:
    """The greedy reply to a text with the engine's drafts and without, in turn: tokens/s, and what drafts did.

    Reading the prompt is left out. A model without a vocabulary gets random tokens.
    """
    greedy = Sampling(temperature=0.0)
    ids = _story_ids(engine)[: max(1, engine.ctx // 2)]
    found: dict[str, list[Stats]] = {"plain": [], "with_drafts": []}
    replies = []
    for repetition in range(settings.repetitions + 1):  # the first warms up
        for name, stats in found.items():
            time.sleep(IDLE_S)
            session = engine.session("off" if name == "plain" else None)
            replies.append(list(session.tokens(ids, greedy, max_tokens=settings.n_generate)))
            if repetition:
                stats.append(session.stats)
    rates = {name: statistics.median(_rate(each) for each in stats) for name, stats in found.items()}
    last = found["with_drafts"][-1]
    return {
        "setting": engine.speculative,
        "draft": engine.session().speculation.draft.name,
        "generated_tokens": last.generated_tokens,
        "same_reply": all(reply == replies[0] for reply in replies),
        "plain_tokens_per_s": round(rates["plain"], 3),
        "tokens_per_s": round(rates["with_drafts"], 3),
        "speed_up": round(rates["with_drafts"] / rates["plain"], 3),
        "drafted_tokens": last.drafted_tokens,
        "accepted_tokens": last.accepted_tokens,
        "tokens_per_step": round(last.tokens_per_step, 3),
    }


def _story_ids(engine: Engine) -> list[int]:
    if engine.file.metadata.get("tokenizer.ggml.tokens") is not None:
        return engine.tokenizer.encode(STORY)
    return np.random.default_rng(0).integers(0, engine.model.vocab_size, WARM_UP_TOKENS).tolist()


def _rate(stats: Stats) -> float:
    """Tokens a second of what followed the reading of the prompt, which brings the first of them."""
    return (stats.generated_tokens - 1) / stats.decode_s if stats.generated_tokens > 1 else 0.0


def _ratios(ours: dict[str, Any], theirs: dict[str, Any], figure: str) -> dict[str, float]:
    return {test: round(ours[test][figure] / theirs[test][figure], 3) for test in ours}


@dataclass(frozen=True)
class _Test:
    """Tokens to evaluate behind a context, as a prompt or one by one."""

    held: list[int]
    ids: list[int]
    one_by_one: bool

    @property
    def name(self) -> str:
        """As llama-bench has it."""
        behind = f" @ d{len(self.held)}" if self.held else ""
        return f"{'tg' if self.one_by_one else 'pp'}{len(self.ids)}{behind}"

    def time(self, runner: TimedEngine, rates: Rates) -> None:
        """Run it once, behind the context that it has and after a pause; its seconds go to `rates`."""
        runner.hold(self.held)
        time.sleep(IDLE_S)
        rates.add(len(self.ids), runner.generate(self.ids) if self.one_by_one else [runner.prompt(self.ids)])


def _measure(
    runners: dict[str, TimedEngine], settings: Settings, n_vocab: int, roof: Roof, report: Report
) -> dict[str, dict[str, Rates]]:
    """Rates by runner and test."""
    random = np.random.default_rng(0)
    counts = (settings.n_prompt, settings.n_generate, max(settings.depths))
    prompt, reply, held = (random.integers(0, n_vocab, n).tolist() for n in counts)
    kinds = [(ids, one_by_one) for ids, one_by_one in ((prompt, False), (reply, True)) if ids]
    tests = [[_Test(held[:depth], *kind) for kind in kinds] for depth in settings.depths]
    rates = {name: {test.name: Rates() for each in tests for test in each} for name in runners}
    total = len(tests) * settings.repetitions + 1
    report(0, total, "Warming up")
    roof.bring_in()
    for runner in runners.values():
        time.sleep(IDLE_S)
        runner.hold([])
        if prompt:
            runner.prompt(prompt)
        runner.hold([])
        runner.generate((reply or prompt)[:WARM_UP_TOKENS])
    for done in range(total - 1):  # depth by depth, which is read once
        report(done + 1, total, "Measuring")
        roof.measure()
        for test in tests[done // settings.repetitions]:
            for name, runner in runners.items():
                test.time(runner, rates[name][test.name])
    time.sleep(IDLE_S)
    roof.measure()
    return rates


def _reading(engine: Engine, results: dict[str, dict[str, Any]], roof: Roof) -> dict[str, Any]:
    """What generation reads, how fast, and what part that is of what can be read (medians by medians)."""
    assert engine.config is not None
    n_bytes, bandwidth = weight_bytes_per_token(engine.file, engine.config), roof.summary()
    document = {"weight_bytes_per_token": n_bytes, "read_bytes_per_s": bandwidth}
    for test, result in results.items():
        if test.startswith("tg") and "@" not in test and engine.device == CPU:  # else not most of what is read from RAM
            document["weight_bytes_per_s"] = round(n_bytes * result["median"])
            document["fraction_of_read"] = round(n_bytes * result["median"] / bandwidth["median"], 3)
    return document


def machine() -> dict[str, Any]:
    """The machine, as figures are quoted with it; busy_cores includes this program's own."""
    return {
        "cpu": hardware.cpu_model(),
        "cores": hardware.physical_cores(),
        "ram_bytes": hardware.total_ram(),
        "system": platform.platform(),
        "busy_cores": round(hardware.busy_cores(), 2),
    }


def versions() -> dict[str, str]:
    """Of what computes."""
    names = ("localrun", "numba", "numpy", "torch", "llama-cpp-python")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
