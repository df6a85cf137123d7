"""A model on a device through the engine: replies, saved sessions, drafts, serving."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from closeness import error
from gpu_models import (
    CTX,
    GREEDY,
    MTP,
    STEP_TOLERANCE,
    ids_of,
    load,
)

import localrun
from localrun.generate.drafts import MOST
from localrun.serve import job
from localrun.serve.scheduler import Scheduler


@pytest.mark.usefixtures("dense", "gpu")
def test_replies_are_the_cpus() -> None:
    with load() as on_gpu, load(device="cpu") as on_cpu:
        ids = ids_of(11)
        replies = [list(engine.generate(ids, GREEDY, 8)) for engine in (on_gpu, on_cpu)]
        assert replies[0] == replies[1] and len(replies[0]) == 8


@pytest.mark.usefixtures("dense", "gpu")
def test_a_cache_of_8_bits() -> None:
    ids = ids_of(12)
    with load(cache_bits=8) as engine:
        cache = engine.new_cache()
        assert cache.bits == 8
        found = np.concatenate([engine.model.forward(part, cache, True) for part in (ids[:10], ids[10:])])
        # Latents are rounded by up to 2^-4 of a value, each by itself, in two layers. Found: 1e-2.
        assert 1e-4 < error(found, engine.logits(ids)) < 0.05


@pytest.mark.usefixtures("dense", "gpu")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_saved_sessions_go_on_on_either_side(devices: tuple[str, str], tmp_path: Path) -> None:
    ids = ids_of(11)
    with load(device=devices[0]) as first, load(device=devices[1]) as second:
        session = first.session()
        reply = list(session.tokens(ids, GREEDY, max_tokens=4))
        session.save(tmp_path / "session")
        later = [*ids, *reply, 1, 2, 3]
        expected = list(session.tokens(later, GREEDY, max_tokens=6))
        other = second.session()
        other.load(tmp_path / "session")
        assert list(other.tokens(later, GREEDY, max_tokens=6)) == expected
        assert other.stats.reused_tokens == session.stats.reused_tokens > 11


@pytest.mark.slow
@pytest.mark.usefixtures("dense", "gpu")
def test_drafts_change_no_reply() -> None:
    """The model's own head drafts, on the CPU."""
    with load(MTP, speculative=MOST) as engine:
        ids = ids_of(9)
        session = engine.session()
        found = list(session.tokens(ids, GREEDY, max_tokens=9))
        assert session.speculation.draft.name == "mtp" and session.stats.drafted_tokens > 0
        assert found == list(engine.session("off").tokens(ids, GREEDY, max_tokens=9))


@pytest.mark.usefixtures("dense", "gpu")
def test_the_heads_predictions_are_the_cpus() -> None:
    with load(MTP) as on_gpu, load(MTP, "cpu") as on_cpu:
        rows = []
        for engine in (on_gpu, on_cpu):
            engine.model.keep_hidden = True
            cache, ids = engine.model.new_cache(CTX), ids_of(10)
            engine.model.forward(ids, cache)
            mtp = engine.model.mtp
            rows.append(mtp.forward(ids[1:], engine.model.hidden[:-1], mtp.new_cache(CTX))[0])
        assert error(rows[0], rows[1]) < STEP_TOLERANCE


class Spelled:
    """As ReplyText, of tokens without a vocabulary."""

    found = False

    def __init__(self, *_: object) -> None:
        pass

    def push(self, token: int) -> str:
        return f" {token}"

    def flush(self) -> str:
        return ""


def served(engine: localrun.Engine, slots: int, prompts: list[list[int]], limits: list[int]) -> list[list[Any]]:
    """What clients are sent, of all at once."""
    sent: list[list[Any]] = [[] for _ in prompts]
    ended = [threading.Event() for _ in prompts]

    def deliver(i: int, piece: Any) -> None:
        if isinstance(piece, str):
            sent[i].append(piece)
        elif piece is None:
            ended[i].set()

    jobs = [job.Job(prompts[i], GREEDY, limits[i], (), {}, partial(deliver, i)) for i in range(len(prompts))]
    scheduler = Scheduler(engine, slots, 0)
    scheduler.submit(jobs)
    assert all(event.wait(60) for event in ended) and [each.error for each in jobs] == [None] * len(jobs)
    scheduler.close()
    return sent


@pytest.mark.usefixtures("in_torch", "gpu")
def test_served_replies_share_steps_and_are_replies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of different lengths, prompts read between their steps; drafts are verified where a reply is alone."""
    monkeypatch.setattr(job, "ReplyText", Spelled)
    prompts, limits, shared = [ids_of(40)[:n] for n in (20, 3, 11)], [9, 4, 12], []
    with load(MTP, speculative=2) as engine:
        alone = [served(engine, 1, [ids], [n])[0] for ids, n in zip(prompts, limits, strict=True)]
        each = engine.model.forward_each
        engine.model.forward_each = lambda ids, caches: shared.append(len(ids)) or each(ids, caches)
        assert served(engine, 3, prompts, limits) == alone and [len(sent) for sent in alone] == limits
        assert {2, 3} <= set(shared)
