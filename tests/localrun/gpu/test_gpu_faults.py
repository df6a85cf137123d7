"""Deliberate faults (tests/support/gpu_faults): the proof finds each, names it, and the CPU computes."""

from __future__ import annotations

import re

import pytest
from cases import slow_but
from gpu_faults.every import FAULTS
from gpu_faults.proving import found
from gpu_proofs import CARD, GPU, V3
from tiny_models import shared

from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from localrun.placement import available
from localrun.placement.devices import DeviceRequest, choose

_BY_NAME = {fault.name: fault for fault in FAULTS}
_QUICK = {"a wrong scale in one format", "NaN in a row between", "a stale graph", "a race with late workers", "a leak"}


def test_there_are_many_and_each_has_a_name() -> None:
    assert len(_BY_NAME) == len(FAULTS) >= 30


@pytest.mark.parametrize("name", slow_but(_BY_NAME, _QUICK))
def test_it_is_found_and_named_and_leads_to_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = _BY_NAME[name]
    verdict = found(fault, monkeypatch, alone=True)
    (outcome,) = verdict.outcomes
    assert any(re.fullmatch(fault.line, line) for line in outcome.faults), outcome.faults
    assert verdict.refusal == f"{fault.name_of_cards} failed its proof ({outcome.title}: {outcome.faults[0]})"
    monkeypatch.undo()
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    monkeypatch.setattr(available, "find", lambda *at: GPU)
    told: list[str] = []
    with open_gguf(shared(V3)) as file:
        where = DeviceRequest("auto")
        placement = choose(where, file, read_config(file), 48, False, told.append, lambda *asked: verdict.refusal)
    assert placement.device == "cpu" and told == [f"{verdict.refusal}; computing on the CPU"]
