"""scripts/simulate_expert_cache.py: hits and copies counted by hand; what admission is for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from paths import SCRIPTS

from localrun.gpu.experts.policy import Policy


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    import simulate_expert_cache

    yield simulate_expert_cache


def test_hits_and_copies_are_counted(script: ModuleType) -> None:
    """One layer, two experts a token, two slots that hold 0 and 1 at first."""
    choices_TLK = np.array([[[0, 1]], [[0, 2]], [[2, 0]], [[3, 0]], [[1, 2]]])
    held_LN = np.array([[0, 1]])
    assert [each.tolist() for each in script.static(choices_TLK, held_LN)] == [[2, 1, 1, 1, 1], [0] * 5]
    assert [each.tolist() for each in script.lru(choices_TLK, held_LN)] == [[2, 1, 2, 1, 0], [0, 1, 0, 1, 2]]
    never = Policy(4, held_LN, margin=99.0)
    assert [each.tolist() for each in script.admitted(choices_TLK, held_LN, never)] == [[2, 1, 1, 1, 1], [0] * 5]


def test_a_policy_that_admits_follows_the_text(script: ModuleType, tmp_path: Path) -> None:
    """A text with other experts than the first: more hits than static, and far fewer copies than without admission."""
    counts = {"one": [[900, 800, 9, 9, 9, 9, 9, 9]], "other": [[9, 9, 9, 9, 900, 800, 300, 300]]}
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"counts": counts}))
    found = {row.policy: row for row in script.simulate(script.of_counts(path, 400, 2), 2)}
    assert found["static"].hits < 0.1 < 0.6 < found["admitted"].hits
    assert found["admitted"].copies < 0.05 < found["lru"].copies
    assert found["admitted"].traffic < 0.6 < min(found["static"].traffic, found["lru"].traffic)
