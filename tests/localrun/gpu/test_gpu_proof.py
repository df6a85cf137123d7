"""The card's proof: what it finds on the stand-in, what becomes of the verdict, and what the user is told."""

from __future__ import annotations

import getpass
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_proofs
import pytest
import tiny_models
from cases import slow_but
from gpu_proofs import CARD, SMALL, V3, identity_of, verdict_of
from ranks_in_process import Post

import localrun
from cli.main import run
from localrun import opening
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.gpu.proof import child, prove, report, verdict
from localrun.gpu.proof.parts import PARTS
from localrun.gpu.proof.task import Findings, Task
from localrun.models.reader import read_config
from localrun.placement import available
from localrun.placement.devices import DeviceRequest
from localrun.plan import first_host
from localrun.plan.first_host import over_hosts
from localrun.plan.link import DEFAULT_LINK, load_link
from localrun.plan.machine import load_machine, with_measured_card
from localrun.plan.shapes import load_model
from localrun.ranks.sharing import Ranks
from localrun.ranks.world import World


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for verdicts; kernels stay where they are."""
    monkeypatch.setattr(verdict, "folder", lambda: tmp_path / "proofs")
    return tmp_path / "proofs"


# ---- the proof -------------------------------------------------------------------------------------------------------


WINDOWED = tiny_models.gpt_oss(
    hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=3, vocab_size=64,
    num_attention_heads=4, head_dim=16, qk_rope_head_dim=16, n_routed_experts=8, num_experts_per_tok=2,
)  # fmt: skip
SPARSE = tiny_models.sparse(index_n_heads=5, index_head_dim=16, index_topk=8)
TYPES = {"F32": V3, "Q8_0": V3, "MXFP4": V3, "BF16": WINDOWED, "F16": SPARSE}


@pytest.mark.parametrize("type_", slow_but(TYPES, {"F32"}))
def test_the_stand_in_passes(type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    with gpu_proofs.kernels_in_torch(monkeypatch):
        identity, task = identity_of(type_, TYPES[type_]), gpu_proofs.task(type_, shape=TYPES[type_])
        found = prove.prove(identity, task, lines.append, run=prove.here)
    assert found.fault == "" and found.complete
    assert lines == [f"proving {CARD} ({i} of {len(PARTS)}): {part.title}" for i, part in enumerate(PARTS, 1)]
    assert {"cuda", "cpu"} == set(found.seconds) and min(found.seconds.values()) > 0
    assert verdict.Verdict.of(json.loads(json.dumps(found.document()))) == found
    shown = list(report.lines(found))
    assert [what for _, what, _ in shown] == [*(part.title for part in PARTS), "verdict"]
    assert ("--device auto computes on the CPU" if found.disadvantage else "--device auto uses it") in shown[-1][2]


@pytest.mark.parametrize("type_", slow_but(TYPES, {"F32"}))
def test_two_stand_ins_pass(type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TYPES[type_]
    task = replace(gpu_proofs.task(type_, shape=shape), cards=(0, 1))
    with gpu_proofs.kernels_in_torch(monkeypatch):
        found = prove.prove(identity_of(type_, shape), task, lambda line: None, run=prove.here)
    (outcome,) = found.outcomes
    assert found.complete and not outcome.faults and len(outcome.figures["layers"]) == 2
    assert list(report.lines(found))[-1][2] == "layers are split among them where one has no room"


def test_a_bound_that_is_crossed_is_a_fault() -> None:
    findings = Findings()
    findings.bounded("Q4_K, 1 tokens", 1.0, 1.0)
    assert not findings.faults
    findings.bounded("Q4_K, 8 tokens", 2.0, 1.0)
    findings.bounded("Q6_K, 1 tokens", float("nan"), 1.0)
    findings.bounded("Q6_K, 8 tokens", 0.5, 1.0)
    findings.bounded("Q8_0, 8 tokens", float("inf"), 1.0)
    assert findings.faults == [
        "Q4_K, 8 tokens: off by 2, and rounding explains 1",
        "Q6_K, 1 tokens: the result is not a number",
        "Q8_0, 8 tokens: off by inf, and rounding explains 1",
    ]
    assert findings.figures["part_of_the_bound"] == {"Q4_K": 2.0, "Q6_K": None, "Q8_0": None}


def test_a_task_comes_back_from_json() -> None:
    task = Task("model.gguf", 2, 48, effort=SMALL, choices={"handover": "host nodes"})
    assert Task.of(json.loads(json.dumps(task.document()))) == task


# ---- the child process -----------------------------------------------------------------------------------------------


def test_a_hang_is_a_fault_and_the_child_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    path = {"PYTHONPATH": os.pathsep.join((child._path(), str(Path(gpu_proofs.__file__).parent)))}
    task = replace(gpu_proofs.task("F32"), make_device="gpu_proofs:hangs")
    assert child.run("kernels", task, 60.0, lambda what: None, path, start_s=3.0) == {
        "faults": ["hangs: no answer for 3 s (it starts)"]
    }
    assert started[0].returncode is not None


# ---- the verdict -----------------------------------------------------------------------------------------------------


def test_a_verdict_is_kept_for_what_it_is_of(cache: Path) -> None:
    identity = identity_of("F32")
    assert verdict.load(identity) is None
    kept = verdict_of(identity)
    path = verdict.save(kept)
    assert path is not None and path.parent == cache and verdict.load(identity) == kept
    for other in (
        identity_of("Q8_0"),
        *(replace(identity, **{name: "other"}) for name in ("card", "driver", "torch", "triton", "localrun")),
    ):
        assert verdict.load(other) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 99}', b"\xff", b"null"])
def test_a_damaged_verdict_is_none(content: bytes, cache: Path) -> None:
    identity = identity_of("F32")
    path = verdict.save(verdict_of(identity))
    path.write_bytes(content)
    assert verdict.load(identity) is None


def test_plan_takes_the_measured_hand_over(cache: Path) -> None:
    """Of a card of the same name; else what is assumed, with what that rests on."""
    machine = load_machine("10k-server")
    assert with_measured_card(machine) == machine and "FreeToken" in machine.sources["gpu.handover_s"]
    for card in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090"):
        kept = verdict_of(replace(identity_of("F32"), card=card))
        speed = replace(kept.outcomes[1], choices={"handover": "host nodes", "handover_s": 4e-5})
        verdict.save(replace(kept, outcomes=(kept.outcomes[0], speed)))
        measured = with_measured_card(machine)
        assert measured.gpu.handover_s == (4e-5 if card.endswith("4090") else 2e-5)
    assert measured.sources["gpu.handover_s"] == "measured by localrun doctor --gpu"


def test_two_cards_prove_themselves_and_then_together(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a verdict of its own, alike or not, and what was fastest on it; a verdict of both is of them alone."""
    monkeypatch.setattr(available, "card", lambda index: CARD)
    tried: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []

    def fake(identity: verdict.Identity, task: Task, say: Callable[[str], None], to_the_end: bool) -> verdict.Verdict:
        tried.append((identity.card, task.cards, task.choices))
        found = verdict_of(identity)
        if len(task.cards) == 1:
            speed = replace(found.outcomes[1], choices={"tiles": {"few": "low"} if task.cards[0] else {}})
            return replace(found, outcomes=(found.outcomes[0], speed))
        return replace(found, outcomes=(verdict.Outcome("cards", "several cards", 1.0, (), {"layers": [1, 1]}),))

    monkeypatch.setattr(prove, "prove", fake)
    both, chosen = (0, 1), [{"tiles": {}}, {"tiles": {"few": "low"}}]
    asked = proof("auto")
    assert asked(False, both) is None and asked(True, both) == ""
    together = f"{CARD} and {CARD} (cuda:1)"
    assert tried == [(CARD, (0,), {}), (f"{CARD} (cuda:1)", (1,), {}), (together, both, {"cards": chosen})]
    again = proof("auto")
    assert again(False, both) == "" and len(tried) == 3 and again.choices(both) == {"choices": chosen}
    (kept,) = (
        found
        for found in (verdict.Verdict.of(json.loads(path.read_text())) for path in cache.glob("*.json"))
        if found.identity.card == together
    )
    assert list(report.lines(kept))[-1][2] == "layers are split among them where one has no room"


def test_a_verdict_that_cannot_be_kept_is_no_error(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    assert verdict.save(verdict_of(identity_of("F32"))) is None


def proof(device: str, told: list[str] | None = None) -> prove.Proof:
    return gpu_proofs.proof("F32", DeviceRequest(device), [].append if told is None else told.append)


@pytest.mark.parametrize(
    ("kept", "for_auto", "for_cuda"),
    [
        ({}, "", ""),
        ({"fault": "Q4_K: off"}, f"{CARD} failed its proof (kernels: Q4_K: off); localrun doctor", True),
        ({"cuda": 9.0}, f"{CARD} is no faster than the CPU: 9.0 s against 4.0 s for 512 tokens and a reply of 128", ""),
        ({"cuda": None}, f"{CARD} was not timed against the CPU", ""),
    ],
)
def test_a_verdict_decides(kept: dict[str, Any], for_auto: str, for_cuda: str | bool, monkeypatch: Any) -> None:
    """auto wants a card that is right and faster, cuda one that is right; neither proves again."""
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    monkeypatch.setattr(prove, "prove", lambda *arguments, **more: pytest.fail("proven again"))
    verdict.save(verdict_of(identity_of("F32"), **kept))
    for device, expected in (("auto", for_auto), ("cuda", for_auto if for_cuda is True else for_cuda)):
        for may_try in (False, True):
            assert (proof(device)(may_try) or "").startswith(expected) and bool(proof(device)(may_try)) == bool(
                expected
            )


@pytest.mark.parametrize(("cpu", "slower"), [(2.9, True), (3.1, False)])
def test_beside_other_ranks_the_cpu_may_be_faster(cpu: float, slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is so without them: what either side does with them is what counts, for auto."""
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    verdict.save(verdict_of(identity_of("F32")))
    others = prove.Others("1 more rank", lambda figures: {"cuda": 3.0, "cpu": cpu + 0 * figures["step_s"]["cpu"]})
    took = f"3.0 s against {cpu} s for 512 tokens and a reply of 128"
    reason = f"{CARD} is no faster than the CPU beside 1 more rank: {took}" if slower else ""
    assert gpu_proofs.proof("F32", DeviceRequest("auto"), print, others)(False) == reason
    assert gpu_proofs.proof("F32", DeviceRequest("cuda"), print, others)(False) == ""


def test_other_ranks_are_reckoned_as_plan_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file's shape, and the link that plan takes."""
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    path, found = tiny_models.shared(gpu_proofs.V3, type="F32"), verdict_of(identity_of("F32"))
    verdict.save(found)
    seconds = over_hosts(found.speed, load_model(str(path)), 2, load_link(DEFAULT_LINK))
    ranks = Ranks(World(0, ["rank 0", "rank 1"], Post().links(0)))
    with open_gguf(path) as file:
        made = opening.proof_of(file, read_config(file), 1, 48, DeviceRequest("auto"), print, ranks)
        assert made is not None and (made(False) == "") == (seconds["cuda"] < seconds["cpu"])
        monkeypatch.setattr(first_host, "over_hosts", lambda figures, *rest: {"cuda": seconds["cuda"], "cpu": 0.0})
        assert f"beside 1 more rank: {seconds['cuda']:.1f} s against 0.0 s" in str(made(False))


def test_without_a_verdict_the_card_proves_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    told: list[str] = []
    tried: list[Task] = []

    def fake(identity: verdict.Identity, task: Task, say: Callable[[str], None], to_the_end: bool) -> verdict.Verdict:
        assert not to_the_end
        tried.append(task)
        return verdict_of(identity)

    monkeypatch.setattr(prove, "prove", fake)
    assert proof("auto", told)(False) is None and not tried and not told
    assert proof("auto", told)(True) == ""
    assert proof("auto", told)(False) == "" and len(tried) == 1
    assert told == [f"{CARD} is new to this version: it proves itself once, in some minutes"]


def test_after_a_fault_the_user_is_not_kept_waiting() -> None:
    def fails(part: Any, task: Task, doing: Any) -> child.Message:
        return {"faults": ["the GPU failed: CUDA error: an illegal memory access was encountered"]}

    found = prove.prove(identity_of("F32"), gpu_proofs.task("F32"), lambda line: None, to_the_end=False, run=fails)
    assert [bool(each.faults) for each in found.outcomes] == [False, True]  # the card can do without the first part
    assert not found.complete and found.refusal


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_nothing_private_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(socket, "gethostname", lambda: "wonder.example.org")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/alice"))
    faults = [
        "/home/alice/models/secret-7b.gguf: was cut short",
        "alice@wonder: no room on /mnt/alice's disk/x, 3/4 of it; C:\\Users\\alice\\x.gguf",
    ]

    def fails(part: Any, task: Task, doing: Any) -> child.Message:
        return {"faults": faults, "figures": {"/home/alice": {"where": ["wonder", 1.5]}}}

    task = Task("/home/alice/models/secret-7b.gguf", 2, 48)
    found = prove.prove(identity_of("F32"), task, lambda line: None, run=fails)
    text = json.dumps(found.document())
    for private in ("alice", "wonder", "secret", "/home", "/mnt", "Users"):
        assert private not in text, private
    assert found.outcomes[1].faults[0] == "<path>: was cut short" and "3/4 of it" in text


def doctor(monkeypatch: pytest.MonkeyPatch, *args: str, **kept: Any) -> int:
    """doctor --gpu with a card made up, whose parts find what was wanted."""
    monkeypatch.setattr(available, "find", lambda *at: gpu_proofs.GPU)
    monkeypatch.setattr(prove, "prove", lambda identity, *arguments: verdict_of(identity, **kept))
    return run(["doctor", "--gpu", str(tiny_models.shared(V3)), *args])


def test_doctor_prints_and_writes(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    assert doctor(monkeypatch, "--report", str(tmp_path / "report.json")) == 0
    out, _ = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["ok"] * 3
    assert "auto uses it: 512 tokens and a reply of 128 take 2.0 s against 4.0 s by the CPU alone" in out
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["usable"] and document["faster"]
    assert doctor(monkeypatch, "--json") == 0
    assert json.loads(capsys.readouterr()[0]) == document


def test_doctor_of_two_cards(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Each, and if both have passed, both together."""
    monkeypatch.setattr(available, "count", lambda: 2)
    monkeypatch.setattr(available, "find", lambda card: replace(gpu_proofs.GPU, index=card))
    monkeypatch.setattr(prove, "prove", lambda identity, *arguments: verdict_of(identity))
    assert run(["doctor", "--gpu", str(tiny_models.shared(V3))]) == 0
    heads = [line for line in capsys.readouterr()[0].splitlines() if line.startswith(CARD)]
    assert heads == [f"{CARD}:", f"{CARD} (cuda:1):", f"{CARD} and {CARD} (cuda:1):"]
    monkeypatch.setattr(prove, "prove", lambda identity, *rest: verdict_of(identity, "off" * ("1" in identity.card)))
    assert run(["doctor", "--gpu", "--json", str(tiny_models.shared(V3))]) == 1
    assert [each["usable"] for each in json.loads(capsys.readouterr()[0])["verdicts"]] == [True, False]


def test_doctor_of_a_card_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert doctor(monkeypatch, fault="Q4_K: off") == 1
    assert capsys.readouterr()[0].splitlines()[-1].startswith(f"failed   verdict            {CARD} failed its proof")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["doctor", "--report", "x"], "--report is for doctor --gpu"),
        (["doctor", "--gpu", "--report", "/nowhere/x"], "/nowhere/x: folder /nowhere does not exist"),
        (["doctor", "--gpu", "smollm2"], "the GPU is for models with experts, and this one has none"),
        (["doctor", "--gpu"], "there is no NVIDIA card"),
    ],
)
def test_doctor_refuses_in_one_line(args: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(available, "find", lambda *at: available.NoGpu("there is no NVIDIA card", False))
    assert run(args) == 1
    assert capsys.readouterr() == ("", f"localrun: {line}\n")


@pytest.mark.slow
def test_a_card_that_is_slower_costs_no_torch(tmp_path: Path) -> None:
    """Its verdict is known before torch is imported."""
    code = (
        "import sys, localrun, gpu_proofs\n"
        "from localrun.placement import available\n"
        f"available.card = lambda *at: {CARD!r}\n"
        "from localrun.gpu.proof import verdict\n"
        f"verdict.folder = lambda: __import__('pathlib').Path({str(tmp_path)!r})\n"
        "verdict.save(gpu_proofs.verdict_of(gpu_proofs.identity_of('F32'), cuda=9.0))\n"
        "told = []\n"
        f"engine = localrun.load({str(tiny_models.shared(V3))!r}, ctx=48, threads=1, notice=told.append)\n"
        "print(engine.device, told[0].split(':')[0], [name for name in ('torch', 'triton') if name in sys.modules])"
    )
    support = str(Path(gpu_proofs.__file__).parent)
    path = os.pathsep.join((child._path(), support))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout == f"cpu {CARD} is no faster than the CPU []\n", done.stderr


@pytest.mark.slow
def test_load_refuses_a_card_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find", lambda *at: gpu_proofs.GPU)
    monkeypatch.setattr(available, "card", lambda *at: CARD)
    verdict.save(verdict_of(identity_of("F32"), fault="Q4_K: off"))
    path, told = tiny_models.shared(V3), []
    with pytest.raises(LocalrunError, match=rf"^device 'cuda': {CARD} failed its proof \(kernels: Q4_K: off\)"):
        localrun.load(path, device="cuda", ctx=48, threads=1)
    with localrun.load(path, ctx=48, threads=1, notice=told.append) as engine:
        assert engine.device == "cpu" and told[0].startswith(f"{CARD} failed its proof")
