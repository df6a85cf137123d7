"""Replies with drafts and without, of small models."""

from __future__ import annotations

import tiny_models
from forced_draft import ForcedDraft

from localrun.engine import Engine
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation

GREEDY = Sampling(temperature=0.0)
CTX = 96
N_VOCAB = 320
SETTINGS = [1, 2, 3, 4, "auto"]


def prompt(engine: Engine, n: int = 20) -> list[int]:
    return tiny_models.prompt("v3" if engine.config.kv_lora_rank else "llama")[:n]


def plain(engine: Engine, ids: list[int], n: int, sampling: Sampling = GREEDY) -> list[int]:
    return list(engine.session("off").tokens(ids, sampling, max_tokens=n))


def forced(engine: Engine, ids: list[int], acceptance: float, setting: str | int, n: int = CTX) -> Session:
    """A session whose drafts for the greedy reply to ids come true so often."""
    truth = [*ids, *plain(engine, ids, n)]
    return Session(engine, Speculation(ForcedDraft(truth, acceptance, N_VOCAB), setting))
