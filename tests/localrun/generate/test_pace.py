"""The pace: how many drafts pay, found out while replying, on fake costs and a fake clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import fake_engine
import numpy as np
import pytest
from forced_draft import ForcedDraft

import localrun.generate.session
from localrun.generate.pace import Pace
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.generate.speculative import Speculation

PROMPT = list(b"<|im_start|>assistant\n")  # after which the fake engine says its text
GREEDY = Sampling(temperature=0.0)

# Seconds of a step with 0 to 4 drafts, over a plain one's.
COSTS = {
    "weights shared": [1, 1.05, 1.1, 1.15, 1.2],
    "half shared": [1, 1.25, 1.5, 1.75, 2],
    "experts": [1, 1.5, 1.95, 2.35, 2.7],
    "nothing shared": [1, 2, 3, 4, 5],
}


class Simulation:
    """A reply of n_tokens with given costs and acceptance; noise disturbs what the pace is told, not what counts."""

    def __init__(self, costs: list[float], acceptance: float, seed: int, noise: float = 0.1):
        self.costs, self.acceptance, self.noise = costs, acceptance, noise
        self.random, self.pace = random.Random(seed), Pace()

    def run(self, n_tokens: int) -> float:
        """The speed-up over plain decoding."""
        seconds, n = 0.0, 0
        while n < n_tokens:
            k, accepted = self.pace.next(), 0
            while accepted < k and self.random.random() < self.acceptance:
                accepted += 1
            disturbed = self.random.lognormvariate(0, self.noise)
            if self.noise and self.random.random() < 0.05:
                disturbed *= self.random.choice([2, 5, 10])
            self.pace.record(k, accepted, 0.0, self.costs[k] * disturbed)
            seconds, n = seconds + self.costs[k], n + 1 + accepted
        return n / seconds


def best_rate(costs: list[float], a: float) -> float:
    """Of always the same number of drafts: (1 + a + a^2 + ...) / cost."""
    return max(sum(a**i for i in range(k + 1)) / cost for k, cost in enumerate(costs))


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("name", COSTS)
def test_auto_never_loses_more_than_two_percent(name: str, acceptance: float, noise: float) -> None:
    """Over 2,000 tokens, with times that differ by 5% from step to step and one in twenty 2 to 10 times as long."""
    for seed in range(10):
        assert Simulation(COSTS[name], acceptance, seed, noise).run(2000) >= 0.98


@pytest.mark.parametrize("acceptance", [0.5, 0.7, 0.85, 1.0])
@pytest.mark.parametrize("name", COSTS)
def test_auto_wins_most_of_what_can_be_won(name: str, acceptance: float) -> None:
    best = best_rate(COSTS[name], acceptance)
    found = [Simulation(COSTS[name], acceptance, seed).run(2000) for seed in range(10)]
    assert np.mean(found) - 1 >= 0.35 * (best - 1) - 0.02  # where little can be won, 10% of noise hides it at times
    if best > 1.3:
        assert np.mean(found) >= 0.94 * best


def test_both_sides_of_break_even() -> None:
    """A step with one draft costs 1.5: half of the drafts must come true."""
    costs = [1, 1.5, 2, 2.5, 3]
    below, above = (Simulation(costs, a, 0, noise=0.02) for a in (0.35, 0.7))
    assert 0.98 <= below.run(3000) <= 1 and below.pace._best == 0
    assert 1.08 <= above.run(3000) <= 1.2


def test_drafts_that_begin_to_come_true_are_noticed() -> None:
    simulation = Simulation(COSTS["half shared"], 0.0, 0)
    assert simulation.run(500) >= 0.98
    simulation.acceptance = 0.9
    assert simulation.run(600) >= 1.4  # of 2.05, the wait for the next try included


def test_drafts_that_no_longer_come_true_are_left() -> None:
    simulation = Simulation(COSTS["half shared"], 0.9, 0)
    assert simulation.run(500) >= 1.7
    simulation.acceptance = 0.0
    simulation.pace.start_reply()
    assert simulation.run(1000) >= 0.98


def test_tries_get_rarer() -> None:
    pace, steps = Pace(), []
    for _ in range(5000):
        k = pace.next()
        steps.append(k)
        pace.record(k, 0, 0.0, [1, 1.5][min(k, 1)])
    tried = [i for i, k in enumerate(steps) if k]
    pauses = np.diff(tried[3:])  # after the three that tell the cost
    assert len(tried) < 15 and (pauses[1:] >= 1.9 * pauses[:-1])[:5].all()


def test_a_first_step_that_meets_cold_weights_is_no_verdict() -> None:
    pace, n_drafts = Pace(), 0
    for _ in range(300):
        k = pace.next()
        pace.record(k, k, 0.0, 50.0 if k and not n_drafts else 1 + 0.1 * k)
        n_drafts += k
    assert pace._best == 4


def test_slow_proposals_count(draft_cost: float = 0.8) -> None:
    """Verifying is free, but each draft costs most of a plain step to make."""
    pace, total, tokens = Pace(), 0.0, 0
    rng = random.Random(0)
    while tokens < 2000:
        k, accepted = pace.next(), 0
        while accepted < k and rng.random() < 0.6:
            accepted += 1
        pace.record(k, accepted, draft_cost * k, 1.0)
        total, tokens = total + 1 + draft_cost * k, tokens + 1 + accepted
    assert tokens / total >= 0.98 and pace._best == 0


def test_reading_what_was_missed_counts() -> None:
    """A draft that takes 6 steps to catch up after each stretch without it, and then pays for itself but no more."""
    pace, rng = Pace(), random.Random(0)
    total = tokens = missed = 0
    while tokens < 4000:
        k = pace.next()
        behind = 6.0 if k and missed > 8 else 0.0
        accepted = int(k > 0 and rng.random() < 0.5)
        cost = [1, 1.5, 2.4, 3.3, 4.2][k]
        pace.record(k, accepted, behind, cost)
        missed = 0 if k else missed + 1
        total, tokens = total + cost + behind, tokens + 1 + accepted
    assert tokens / total >= 0.98


@pytest.mark.parametrize("block", [4, 8, 16, 32, 64, 128])
def test_text_that_keeps_changing(block: int) -> None:
    """Drafts that come true in one stretch and fail in the next: what was learnt is wrong whenever it is used."""
    pace, total, tokens = Pace(), 0.0, 0
    while tokens < 4000:
        k = pace.next()
        accepted = k if tokens // block % 4 == 0 else 0
        pace.record(k, accepted, 0.0, [1, 1.8, 2.6, 3.4, 4.2][k])
        total, tokens = total + [1, 1.8, 2.6, 3.4, 4.2][k], tokens + 1 + accepted
    assert tokens / total >= 0.98


class Clock:
    """Time that passes when a model of given costs works."""

    def __init__(self, fake: fake_engine.Engine, costs: list[float], monkeypatch: pytest.MonkeyPatch):
        self.now, forward = 0.0, fake.model.forward

        def timed(ids: Sequence[int], cache: fake_engine.Cache, all_logits: bool = False) -> np.ndarray:
            self.now += costs[len(ids) - 1] if len(ids) <= len(costs) else 0.0
            return forward(ids, cache, all_logits)

        monkeypatch.setattr(fake.model, "forward", timed)
        monkeypatch.setattr(localrun.generate.session, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.85, 1.0])
def test_a_session_on_a_fake_clock(name: str, acceptance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the session's measurements to its choice, and what it says of it."""
    n, text = 1000, "".join(chr(65 + i % 50) for i in range(1001))
    fake = fake_engine.Engine(text, ctx=2000, template=False)
    truth = [*PROMPT, *text.encode()]
    draft = ForcedDraft(truth, acceptance, 256)
    clock = Clock(fake, COSTS[name], monkeypatch)
    session = Session(fake, Speculation(draft))
    found = list(session.tokens(PROMPT, GREEDY, max_tokens=n))
    assert found == truth[len(PROMPT) : len(PROMPT) + n]
    speed_up = (n - 1) / clock.now
    assert speed_up >= 0.98
    assert session.stats.speed_up == pytest.approx(speed_up, rel=0.02)
    best = best_rate(COSTS[name], acceptance)
    assert speed_up >= (0.9 * best if best > 1.3 else 0.98)
