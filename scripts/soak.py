"""Uses models for an hour in every way, and tells whether memory, descriptors, threads and maps stay flat.

    python scripts/soak.py [--minutes 60] [--seed 0] [--preload LIBRARY|find] [--limit-gb GB]

Requests and openings in random order, some of them wrong on purpose: replies by both backends, chats that grow, are
edited and saved, drafts, iterators that are dropped, threads side by side, engines that are closed, dropped or refused,
broken files, conversions. --preload puts a library before all others (an allocator, say; "find" takes jemalloc,
tcmalloc or mimalloc, whichever there is); --limit-gb limits the address space, as ulimit -v does.

A line a minute on stderr; the last line of stdout is one JSON document. Exit code 1 if something was not flat, or came
out otherwise than expected. What counts as flat, and why, is said at LIMITS.
"""

from __future__ import annotations

import argparse
import ctypes.util
import gc
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import fuzz_checkpoint
import fuzz_gguf
import tiny_models

import localrun
from localrun.bundled import MINIATURE
from localrun.convert import Options, convert, make_plan
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.models.summary import summary_of
from localrun.text.prompt import chat_ids

ALLOCATORS = ("jemalloc", "tcmalloc", "tcmalloc_minimal", "mimalloc")
WARM_UP = 3  # times that each thing is done before anything is counted: libraries are loaded, and pools filled
SETTLING = 0.2  # of the time, that does not count either: the largest of every size of work comes late
SAMPLE_S = 1.0
# What the least of the last third may be above that of the first third: a share, and so much more. The least, since a
# thread that brings a model's file into memory may still be at work when a sample is taken.
LIMITS = {
    "rss_mb": (
        0.05,
        16,
    ),  # what allocators keep between requests of random sizes; a leak of a kilobyte a request is more
    "descriptors": (0.0, 0),  # looked at between requests, when nothing is open but what stays open
    "threads": (0.0, 0),
    "maps": (0.05, 30),  # allocators map and unmap their arenas
}
CTX = 128
TEXT = "Once upon a time there was a little fox who lived in a dark forest, and every day the fox went for a walk. "


def sample() -> dict[str, float]:
    """What the process has just now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),
        "maps": len(Path("/proc/self/maps").read_text().splitlines()),
    }


class Soak:
    """The models that stay open, and everything that is done with them.

    Attributes:
        done: how often each thing was done, and how often it was refused.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.done = folder, rng, Counter()
        self.files = {
            "native": [MINIATURE, tiny_models.shared("v3"), tiny_models.shared("llama", type="Q8_0")],
            "llama.cpp": [MINIATURE, tiny_models.shared("llama")],
        }
        self.checkpoint = fuzz_checkpoint.write(fuzz_checkpoint.bases()["llama"].files(), folder / "checkpoint")
        self.engines = [
            localrun.load(MINIATURE, threads=2, ctx=CTX),
            localrun.load(tiny_models.shared("v3"), threads=2, ctx=CTX, draft=tiny_models.shared("v3", seed=1)),
            localrun.load(MINIATURE, threads=2, ctx=CTX, backend="llama.cpp"),
        ]
        self.sessions = [engine.session() for engine in self.engines]
        self.templates = self._template()
        self.things: list[Callable[[], Any]] = [
            *[self.reply] * 6, *[self.turn] * 6, *[self.dropped] * 3, *[self.wrong] * 3, *[self.opened] * 4,
            *[self.refused] * 8, self.logits, self.saved, self.side_by_side, self.left_open, self.converted, self.chat,
        ]  # fmt: skip

    def _template(self) -> Any:
        from localrun.text.chat_template import CHATML, ChatTemplate

        return ChatTemplate(CHATML, bos_token="", eos_token="")

    def warm_up(self) -> None:
        """Everything a few times."""
        for thing in self.things * WARM_UP:
            self.one(thing)
        self.done.clear()

    def one(self, thing: Callable[[], Any]) -> None:
        """A thing, which may be refused if it is wrong, or memory is short."""
        try:
            thing()
            self.done[thing.__name__] += 1
        except (LocalrunError, MemoryError) as error:
            if thing.__name__ not in ("refused", "wrong") and "memory" not in str(error).lower():
                raise
            self.done[f"{thing.__name__}, refused"] += 1

    def ids(self, engine: Engine, most: int = CTX // 2) -> list[int]:
        count = self.rng.randrange(1, most)
        return [self.rng.randrange(engine.model.vocab_size) for _ in range(count)]

    def sampling(self) -> localrun.Sampling:
        rng = self.rng
        return localrun.Sampling(
            temperature=rng.choice((0, 0.5, 1.2)),
            top_k=rng.choice((0, 1, 40)),
            repeat_penalty=rng.choice((1.0, 1.1)),
            seed=rng.randrange(1000),
        )

    def reply(self) -> None:
        engine = self.rng.choice(self.engines)
        speculative = self.rng.choice((None, "off", "auto", 2)) if engine.backend == "native" else None
        session = engine.session(speculative)
        list(session.tokens(self.ids(engine), self.sampling(), max_tokens=self.rng.randrange(40)))

    def turn(self) -> None:
        """A session that stays goes on, is edited, or begins anew; in time its context is full."""
        session = self.rng.choice(self.sessions)
        kept = session.ids[: self.rng.choice((len(session.ids), len(session.ids) // 2, 0))]
        ids = [*kept, *self.ids(session.engine, 20)]
        if len(ids) > session.engine.ctx:
            ids = ids[-20:]
        list(session.tokens(ids, self.sampling(), max_tokens=self.rng.randrange(1, 30)))

    def dropped(self) -> None:
        """An iterator that is left, closed, or ended by the next reply."""
        session = self.rng.choice(self.sessions)
        reply = session.tokens(self.ids(session.engine), self.sampling())
        for _ in zip(range(self.rng.randrange(1, 9)), reply, strict=False):
            pass
        if self.rng.random() < 0.5:
            reply.close()
        elif self.rng.random() < 0.5:
            list(session.tokens(self.ids(session.engine), max_tokens=3))

    def wrong(self) -> None:
        """What has to be refused."""
        engine = self.rng.choice(self.engines)
        ids = self.rng.choice(([], [-1], [10**9], "text", [1.5], [0] * (CTX + 1)))
        list(engine.generate(ids, max_tokens=2))
        raise AssertionError(f"{ids!r} was taken")

    def opened(self) -> None:
        """A model of some backend, closed again; now and then another one too."""
        backend = self.rng.choice(list(self.files))
        threads, ctx = self.rng.randrange(1, 4), self.rng.choice((32, CTX))
        with localrun.load(self.rng.choice(self.files[backend]), threads=threads, ctx=ctx, backend=backend) as engine:
            list(engine.generate(self.ids(engine, 20), self.sampling(), max_tokens=5))

    def left_open(self) -> None:
        """A model that nobody closes."""
        engine = localrun.load(self.rng.choice(self.files["native"]), threads=2, ctx=32)
        next(engine.generate(self.ids(engine, 20), self.sampling()), None)

    def refused(self) -> None:
        """A broken file, or one that is sound after all."""
        path = self.folder / "broken.gguf"
        path.write_bytes(fuzz_gguf.header_case(1, self.rng.randrange(10**9))[1])
        with open_gguf(path) as file:
            summary_of(file)
        localrun.load(path, threads=1, ctx=16, backend="native").close()

    def logits(self) -> None:
        """A prompt long enough for torch."""
        engine = self.rng.choice(self.engines)
        engine.logits([self.rng.randrange(engine.model.vocab_size) for _ in range(self.rng.randrange(1, CTX))])

    def saved(self) -> None:
        session = self.rng.choice(self.sessions)
        path = self.folder / "session"
        session.save(path)
        session.load(path)

    def side_by_side(self) -> None:
        engine = self.rng.choice(self.engines)
        prompts = [self.ids(engine, 30) for _ in range(4)]
        with ThreadPoolExecutor(len(prompts)) as threads:
            list(threads.map(lambda ids: list(engine.generate(ids, max_tokens=10)), prompts))

    def converted(self) -> None:
        """A conversion, whose result is opened, or one that is given up."""
        path = self.folder / "out.gguf"
        plan = make_plan(self.checkpoint, path, Options(mix=self.rng.choice(("Q8_0", "BF16", "Q4_0"))))
        convert(plan, threads=2, force=True)
        localrun.load(path, threads=1, ctx=16).close()
        path.unlink()

    def chat(self) -> None:
        """A template, rendered in its process, and the text of a reply."""
        engine = self.engines[0]
        text = TEXT * self.rng.randrange(1, 3)
        ids = chat_ids(self.templates, engine.tokenizer, [{"role": "user", "content": text}])
        "".join(engine.session().reply(ids[-CTX // 2 :], self.sampling(), max_tokens=10, stop=["fox"]))

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def verdict(samples: list[dict[str, float]]) -> dict[str, dict[str, float | bool]]:
    """For each of LIMITS: the least of the first and of the last third that count, and whether it is flat."""
    samples = samples[int(len(samples) * SETTLING) :]
    third, found = max(1, len(samples) // 3), {}
    for name, (share, more) in LIMITS.items():
        first, last = (min(s[name] for s in part) for part in (samples[:third], samples[-third:]))
        highest = max(s[name] for s in samples)
        is_flat = last <= first * (1 + share) + more
        found[name] = {"first": round(first, 1), "last": round(last, 1), "highest": round(highest, 1), "flat": is_flat}
    return found


def preload(library: str) -> None:
    """Begin again with a library before all others, which only a new process can have."""
    if library == "find":
        names = [found for name in ALLOCATORS if (found := ctypes.util.find_library(name))]
        if not names:
            raise SystemExit(f"none of {', '.join(ALLOCATORS)} is installed; name a library")
        library = names[0]
    if os.environ.get("LD_PRELOAD") != library:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"LD_PRELOAD": library})
    if Path(library).name not in Path("/proc/self/maps").read_text():
        raise SystemExit(f"{library} was not loaded")


def run(minutes: float, seed: int) -> dict[str, Any]:
    """Everything, until the time is over."""
    samples, fault, next_sample, next_line = [], None, 0.0, 60.0
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), random.Random(seed))
        soak.warm_up()
        started = time.monotonic()
        while fault is None and (now := time.monotonic() - started) < 60 * minutes:
            if now >= next_sample:
                samples.append(sample())
                next_sample = now + SAMPLE_S
            if now >= next_line:
                facts = ", ".join(f"{name} {value:.0f}" for name, value in samples[-1].items())
                print(f"{now / 60:5.0f} min, {soak.done.total()} done: {facts}", file=sys.stderr, flush=True)
                next_line += 60
            try:
                soak.one(soak.rng.choice(soak.things))
            except Exception:
                fault = traceback.format_exc()
                print(fault, file=sys.stderr)
        soak.close()
    found = verdict(samples)
    return {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "seed": seed,
        "preload": os.environ.get("LD_PRELOAD"),
        "address_space_limit": resource.getrlimit(resource.RLIMIT_AS)[0],
        "done": dict(sorted(soak.done.items())),
        "found": found,
        "fault": fault,
        "flat": fault is None and all(each["flat"] for each in found.values()),
    }


def main() -> None:
    """Run, print the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--preload", metavar="LIBRARY|find")
    parser.add_argument("--limit-gb", type=float)
    arguments = parser.parse_args()
    if arguments.preload:
        preload(arguments.preload)
    if arguments.limit_gb:
        resource.setrlimit(resource.RLIMIT_AS, (int(arguments.limit_gb * 2**30),) * 2)
    document = run(arguments.minutes, arguments.seed)
    print(json.dumps(document))
    sys.exit(not document["flat"])


if __name__ == "__main__":
    main()
