"""Tiles that a card's proof chooses among: the fastest is kept and used.

That each gives what is right: test_gpu_linear.py and test_gpu_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gpu_proofs
import pytest
from gpu_device import DEVICE, HAS_GPU

from localrun.errors import LocalrunError
from localrun.gpu import tiles
from localrun.gpu.proof import prove, speed, verdict
from localrun.gpu.proof import tiles as proof_of_tiles
from localrun.gpu.proof.parts import PARTS
from localrun.gpu.proof.subject import Subject
from localrun.gpu.proof.task import Findings
from localrun.placement import available
from localrun.placement.devices import DeviceRequest


@pytest.fixture(autouse=True)
def usual_afterwards() -> Iterator[None]:
    yield
    tiles.use(DEVICE, tiles.Tiles())


# ---- names -----------------------------------------------------------------------------------------------------------


def test_names_are_tiles_by_kind() -> None:
    found = tiles.named({"few": "low"}, tiles.SMALL)
    assert found == tiles.Tiles(
        tiles.Few(rows=16, programs=8), tiles.Many(tokens=16, warps=8, stages=1), tiles.Attention(1)
    )
    assert tiles.named({}) == tiles.Tiles()
    for names in ({"few": "huge"}, {"other": "usual"}, {"few": 3}):
        with pytest.raises(LocalrunError, match="there are no tiles"):
            tiles.named(names)


# ---- the proof -------------------------------------------------------------------------------------------------------


def proven(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[tiles.Tiles], float]) -> dict[str, Any]:
    """What the part finds where steps take so long by the tiles in use."""
    monkeypatch.setattr(proof_of_tiles, "_seconds", lambda subject, work: seconds(tiles.of(DEVICE)))
    (part,) = (part for part in PARTS if part.name == "tiles")
    with gpu_proofs.kernels_in_torch(monkeypatch):
        return prove.here(part, gpu_proofs.task("F32"), lambda what: None)


def times(used: tiles.Tiles) -> float:
    """By them "low" is fastest, "narrow" not by enough to be more than noise."""
    return 1.0 - 0.5 * (used.few.rows == 16) - 0.02 * (used.many.units == 4)


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
def test_the_fastest_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = proven(monkeypatch, times)
    assert found["choices"] == {"tiles": {"few": "low", "many": "usual", "attention": "usual"}}
    assert found["faults"] == [] and found["figures"]["few"] == {"usual": 1e6, "low": 5e5, "eight warps": 1e6}
    assert tiles.of(DEVICE) == tiles.named({"few": "low"})


@pytest.mark.slow
@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    upload = proof_of_tiles._products

    def products(*arguments: Any) -> Callable[[], Any]:
        work = upload(*arguments)

        def tried() -> Any:
            if tiles.of(DEVICE).few.rows == 16:
                raise OutOfResources(131_072, 101_376, "shared memory")
            return work()

        return tried

    monkeypatch.setattr(proof_of_tiles, "_products", products)
    found = proven(monkeypatch, times)
    assert found["choices"]["tiles"]["few"] == "usual" and "low" not in found["figures"]["few"]


@pytest.mark.skipif(HAS_GPU, reason="kernels are not interpreted, so the stand-in has none")
@pytest.mark.parametrize(("step_s", "choices"), [(0.5, {"workers": 1}), (0.99, {})])
def test_one_worker_less(step_s: float, choices: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_step_s", lambda subject, model, capacity: step_s / model.pool.n_workers)
    findings = Findings()
    with gpu_proofs.kernels_in_torch(monkeypatch), Subject(replace(gpu_proofs.task("F32"), threads=2)) as subject:
        speed._one_worker_less(subject, findings, 1.0)
    assert findings.choices == choices


def kept(monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any], told: list[str], threads: int = 4) -> dict[str, Any]:
    """Of a verdict with these choices, found with 4 threads, what the model is told."""
    identity = gpu_proofs.identity_of("F32")
    made = gpu_proofs.verdict_of(identity)
    outcome = replace(made.outcomes[1], choices=choices)
    made = replace(made, outcomes=(made.outcomes[0], outcome), environment={"threads": 4})
    monkeypatch.setattr(available, "card", lambda *at: gpu_proofs.CARD)
    monkeypatch.setattr(verdict, "load", lambda wanted: made)
    proof = gpu_proofs.proof("F32", DeviceRequest("cuda"), told.append)
    proof._task = replace(proof._task, threads=threads)
    assert proof(False) == ""
    told_of = proof.choices((0,))
    return told_of.pop("choices")[0] | told_of


@pytest.mark.parametrize(
    ("threads", "workers", "used"), [(4, 3, {"workers": 3}), (5, 3, {}), (4, 2, {}), (4, "3", {}), (1, 0, {})]
)
def test_the_model_is_told(threads: int, workers: Any, used: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of workers only where as many were asked for as in the proof."""
    told: list[str] = []
    choices = {"handover": "host nodes", "tiles": {"few": "low"}}
    assert kept(monkeypatch, choices | {"workers": workers}, told, threads) == choices | used and not told


@pytest.mark.parametrize("names", [{"few": "huge"}, {"many": ["narrow"]}, "low", 3, None])
def test_an_unknown_choice_is_ignored_with_its_line(names: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    assert kept(monkeypatch, {"handover": "host nodes", "tiles": names}, told) == {"handover": "host nodes"}
    assert len(told) == 1 and told[0].startswith("the proof's choice is not used (")
