"""Which device is chosen, what the user is told, and what is printed of it, on GPUs made up."""

from __future__ import annotations

import importlib.machinery
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models

import localrun
import localrun.opening
from cli.main import run
from localrun.cpu.model import NativeModel
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from localrun.placement import available, devices
from localrun.placement.available import Gpu, NoGpu
from localrun.placement.devices import DeviceRequest, choose
from localrun.placement.memory_table import gib
from localrun.placement.placement import Placement

GIB = 1 << 30
CARD = Gpu("Acme 5000", (8, 9), 24 * GIB, 20 * GIB, "570.86", "12.8")


class Passed:
    """A proof that has nothing against the card."""

    def choices(self, cards: tuple[int, ...]) -> dict[str, Any]:
        return {}

    def __call__(self, may_try: bool, cards: tuple[int, ...]) -> str:
        return ""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A card that has proven itself, and a hybrid model that computes on the CPU and remembers its placement."""
    monkeypatch.setattr(localrun.opening, "Proof", lambda *arguments: Passed())
    hybrid = ModuleType("localrun.gpu.hybrid")
    hybrid.__spec__ = importlib.machinery.ModuleSpec(hybrid.__name__, None)

    class HybridModel(NativeModel):
        def __init__(self, config: Any, file: Any, n_threads: int, placement: Placement, notice: Any, remote: None):
            super().__init__(config, file, n_threads)
            hybrid.placement = placement

    hybrid.HybridModel = HybridModel
    monkeypatch.setitem(sys.modules, hybrid.__name__, hybrid)
    with_card(monkeypatch, CARD)
    return hybrid


def with_card(monkeypatch: pytest.MonkeyPatch, found: Gpu | NoGpu) -> None:
    monkeypatch.setattr(available, "find", lambda *at: found)
    monkeypatch.setattr(available, "card", lambda *at: "" if isinstance(found, NoGpu) else found.name)


def chosen(
    variant: str = "v3-nextn",
    ctx: int = 64,
    drafts: bool = False,
    proof: devices.Proof = lambda *asked: "",
    **where: Any,
) -> tuple[Placement, list[str]]:
    """The placement and the notices."""
    notices: list[str] = []
    with open_gguf(tiny_models.shared(variant)) as file:
        return choose(DeviceRequest(**where), file, read_config(file), ctx, drafts, notices.append, proof), notices


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_is_used(gpu: ModuleType, device: str) -> None:
    placement, notices = chosen(device=device)
    assert placement.device == "cuda" and placement.available["VRAM"] == 20 * GIB and notices == []
    assert all(len(ids) == placement.n_experts for ids in placement.experts.values())


def test_its_options(gpu: ModuleType) -> None:
    assert [chosen(gpu_experts=text)[0].expert_slots for text in ("3", "cache:3", "cache:0")] == [0, 3, 0]
    placement, _ = chosen(vram=1.5, gpu_experts="3", cache_bits=8, drafts=True)
    assert placement.available["VRAM"] == 1.5 * GIB and placement.cache_bits == 8
    assert set(placement.experts.values()) == {(0, 1, 2)}
    assert placement.n_bytes("RAM", "multi-token prediction") > 0
    assert chosen(vram=100)[0].available["VRAM"] == 20 * GIB  # no more than there is
    assert chosen(drafts=False)[0].n_bytes("RAM", "multi-token prediction") == 0
    assert chosen("v3", drafts=True)[0].n_bytes("RAM", "multi-token prediction") == 0


def test_the_cpu_if_asked_for(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find", lambda *at: pytest.fail("looked for a GPU"))
    placement, notices = chosen(device="cpu")
    assert placement.device == "cpu" and set(placement.needed) == {"RAM"} and notices == []


WITHOUT_EFFECT = "--vram, --gpu-experts and --expert-usage have no effect; computing on the CPU"


@pytest.mark.parametrize(
    ("found", "options", "told"),
    [
        (NoGpu("there is no NVIDIA card", False), {}, []),
        (NoGpu("there is no NVIDIA card", False), {"vram": 8}, [f"there is no NVIDIA card: {WITHOUT_EFFECT}"]),
        (NoGpu("the driver is too old", True), {}, ["the driver is too old; computing on the CPU"]),
    ],
)
def test_without_a_gpu(
    found: NoGpu, options: dict[str, Any], told: list[str], gpu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto computes on the CPU, and says why where there is a card or options for one; cuda is refused."""
    with_card(monkeypatch, found)
    placement, notices = chosen(**options)
    assert placement.device == "cpu" and placement.cache_bits == 16 and notices == told
    with pytest.raises(LocalrunError, match=f"^device 'cuda': {found.reason}$"):
        chosen(device="cuda", **options)


def test_too_little_vram(gpu: ModuleType) -> None:
    reason = (
        r"a context of 64 tokens needs \d\.\d GiB of VRAM \(0\.1 GiB usable\); --vram \d\.\d or --device cpu would fit"
    )
    placement, notices = chosen(vram=0.1)
    assert placement.device == "cpu" and re.fullmatch(f"{reason}; computing on the CPU", notices[0])
    with pytest.raises(LocalrunError, match=f"^device 'cuda': {reason}$"):
        chosen(device="cuda", vram=0.1)


def test_a_model_without_experts_runs_on_the_cpu(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "find", lambda *at: pytest.fail("looked for a GPU in vain"))
    placement, notices = chosen("llama")
    assert placement.device == "cpu" and notices == []
    with pytest.raises(LocalrunError, match="the GPU is for models with experts, and this one has none"):
        chosen("llama", device="cuda")


@pytest.mark.parametrize(("known", "tried"), [("it is slower", None), (None, "it failed"), (None, ""), ("", "")])
def test_the_proof_decides(known: str | None, tried: str | None, gpu: ModuleType) -> None:
    """What is known is asked for first; where nothing is, the card is tried, if the model fits on it."""
    asked: list[bool] = []

    def proof(may_try: bool, cards: tuple[int, ...]) -> str | None:
        asked.append(may_try)
        return tried if may_try else known

    placement, notices = chosen(proof=proof)
    reason = known or tried
    assert placement.device == ("cpu" if reason else "cuda")
    assert notices == ([f"{reason}; computing on the CPU"] if reason else [])
    assert asked == ([False] if known else [False, True])
    if reason:
        with pytest.raises(LocalrunError, match=f"^device 'cuda': {reason}$"):
            chosen(device="cuda", proof=proof)


@pytest.mark.parametrize(("variant", "where"), [("v3", {"vram": 0.1}), ("llama", {}), ("v3", {"device": "cpu"})])
def test_a_card_is_not_tried_in_vain(variant: str, where: dict[str, Any], gpu: ModuleType) -> None:
    placement, _ = chosen(variant, proof=lambda may_try, cards: pytest.fail("tried") if may_try else None, **where)
    assert placement.device == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; expected auto, cpu, cuda or cuda:N"),
        ({"vram": 0}, "vram is 0; expected more than 0 GiB"),
        ({"vram": float("nan")}, "vram is nan"),
        ({"vram": float("inf")}, "vram is inf"),
        (
            {"gpu_experts": "many"},
            "gpu_experts is 'many'; expected auto, cache, cache:N, or 0 or more experts of each layer",
        ),
        ({"gpu_experts": -1}, "gpu_experts is -1"),
        ({"cache_bits": 4}, "cache_bits is 4; expected 16 or 8"),
        ({"unproven": True}, "--unproven uses a card that has not proven itself: it is for --device cuda"),
        ({"device": "cpu", "vram": 8}, "leave them out with --device cpu"),
        ({"device": "cpu", "gpu_experts": "0"}, "leave them out with --device cpu"),
        ({"device": "cpu", "expert_usage": "x"}, "leave them out with --device cpu"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalrunError, match=re.escape(message)):
        DeviceRequest(**options)


def test_too_many_experts(gpu: ModuleType) -> None:
    with pytest.raises(LocalrunError, match="99 experts of each layer on the GPU; expected auto, or 0 to"):
        chosen(gpu_experts=99)


# --- several cards


@pytest.fixture
def cards(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """GiB of VRAM that three cards have free."""
    free = [2.0, 2.0, 2.0]
    monkeypatch.setattr(available, "count", lambda: len(free))
    monkeypatch.setattr(available, "card", lambda index: f"Acme {index}")

    def find(index: int) -> Gpu | NoGpu:
        found = index < len(free)
        return (
            replace(CARD, free=int(free[index] * GIB), index=index)
            if found
            else NoGpu(f"there is no card {index}", True)
        )

    monkeypatch.setattr(available, "find", find)
    return free


LONG = 65536  # tokens, with which one card needs 0.66 GiB of VRAM, and each of two 0.58 and 0.60


@pytest.mark.parametrize(
    ("free", "where", "used"),
    [
        ((2, 2, 2), {}, (0,)),
        ((0.1, 2, 2), {}, (1,)),
        ((2, 2, 2), {"device": "cuda:2"}, (2,)),
        ((0.63, 0.63, 2), {}, (2,)),
        ((0.63, 0.63, 0.1), {}, (0, 1)),
        ((2, 2, 2), {"vram": 0.63}, (0, 1)),
        ((0.1, 0.63, 0.63), {}, (1, 2)),
    ],
)
def test_as_few_cards_as_have_room(
    free: tuple[float, ...], where: dict[str, Any], used: tuple[int, ...], cards: list[float]
) -> None:
    """One if any has it, else the first ones that have it together."""
    cards[:] = free
    placement, notices = chosen("v3", ctx=LONG, gpu_experts=0, **where)
    assert (placement.device, placement.cards, notices) == ("cuda", used, [])
    assert [index for here in placement.layers for index in here] == list(range(5))
    assert list(placement.available) == ["VRAM", "VRAM 2", "RAM"][2 - len(used) :] if len(used) > 1 else ["VRAM", "RAM"]


def test_where_no_cards_have_room(cards: list[float]) -> None:
    with pytest.raises(
        LocalrunError, match=r"^device 'cuda:1': a context of 65536 tokens needs 0\.7 GiB of VRAM \(0\.6"
    ):
        chosen("v3", ctx=LONG, device="cuda:1", vram=0.63)
    with pytest.raises(LocalrunError, match=r"^device 'cuda:7': there is no card 7$"):
        chosen("v3", device="cuda:7")
    placement, notices = chosen("v3", ctx=LONG, vram=0.52)
    assert placement.device == "cpu" and placement.cards == ()
    assert re.match(r"a context of 65536 tokens needs 0\.5 GiB of VRAM \(0\.5 GiB usable\), .* of VRAM 3", notices[0])
    with pytest.raises(LocalrunError, match=r"; a cache of experts is for one card$"):
        chosen("v3", ctx=LONG, device="cuda", vram=0.63, gpu_experts="cache:1")


def test_cards_that_fail_are_left_out(cards: list[float]) -> None:
    """Known or tried; those that fail together are not used together."""
    refused: dict[tuple[int, ...], str] = {(0,): "0 failed"}

    def proof(may_try: bool, some: tuple[int, ...]) -> str | None:
        return refused.get(some, "" if may_try else None)

    assert chosen("v3", proof=proof)[0].cards == (1,)
    assert chosen("v3", proof=lambda may_try, some: ("failed" if some == (0,) else "") if may_try else None)[
        0
    ].cards == (1,)
    assert chosen("v3", ctx=LONG, vram=0.63, gpu_experts=0, proof=proof)[0].cards == (1, 2)
    refused[1, 2] = "both failed"
    placement, notices = chosen("v3", ctx=LONG, vram=0.63, gpu_experts=0, proof=proof)
    assert placement.device == "cpu" and notices == ["both failed; computing on the CPU"]
    refused[1,], refused[2,] = "1 failed", "2 failed"
    assert chosen("v3", proof=proof)[1] == ["0 failed; computing on the CPU"]


# --- through the engine and the command line


def test_the_engine_loads_it_as_placed(gpu: ModuleType) -> None:
    placed: list[Placement] = []
    path = tiny_models.shared("v3")
    with localrun.load(path, device="cuda", gpu_experts=2, ctx=64, threads=1, placed=placed.append) as engine:
        assert engine.device == engine.describe()["device"] == "cuda"
        assert placed == [gpu.placement] == [engine.placement]
        assert set(engine.placement.experts.values()) == {(0, 1)}
        assert engine.logits([1, 2, 3]).shape[0] == 3


def test_a_draft_model_stays_on_the_cpu(gpu: ModuleType) -> None:
    path = tiny_models.shared("v3")
    with localrun.load(path, ctx=64, threads=1, draft=path) as engine:
        assert engine.device == "cuda" and engine.draft_model.device == "cpu"


def test_llama_cpp_computes_on_the_cpu(gpu: ModuleType) -> None:
    path, notices = tiny_models.shared("v3"), []
    with pytest.raises(LocalrunError, match=r"^device 'cuda': llama\.cpp runs this model, on the CPU"):
        localrun.load(path, device="cuda", backend="llama.cpp", ctx=64)
    with localrun.load(path, vram=4, backend="llama.cpp", ctx=64, notice=notices.append) as engine:
        assert engine.placement is None and engine.device == "cpu"
    assert notices == ["llama.cpp runs this model, on the CPU: options for the GPU have no effect"]


def test_what_stays_in_ram_may_be_too_much(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs all the same, from the disk, and says so."""
    notices: list[str] = []
    monkeypatch.setattr(devices.hardware, "total_ram", lambda: 1 << 20)
    with localrun.load(tiny_models.shared("v3"), ctx=64, threads=1, notice=notices.append):
        assert re.fullmatch(r"what stays in RAM has \d+ GiB and this machine .* at the disk's speed", notices[0])


def bench(*args: str) -> int:
    path = str(tiny_models.shared("v3"))
    return run(["bench", path, "-p", "4", "-n", "2", "-r", "1", "-t", "1", *args])


def test_the_table_comes_before_loading(gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("-v", "--json", "--vram", "2") == 0
    out, err = capsys.readouterr()
    document, placement = json.loads(out), gpu.placement
    assert document["device"] == "cuda" and document["placement"] == json.loads(json.dumps(placement.document()))
    assert "fraction_of_read" not in document  # of RAM: most weights are not there
    lines = err.splitlines()
    loaded = next(i for i, line in enumerate(lines) if "loaded in" in line)
    table = [line.split(None, 3) for line in lines[:loaded] if line.startswith(("VRAM", "RAM"))]
    assert [(row[0], row[3]) for row in table[:-2]] == [(row.where, row.what) for row in placement.rows]
    assert table[-2][3] == f"needed, {gib(2 * GIB)} usable"


def test_a_refusal_is_one_line(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_card(monkeypatch, NoGpu("there is no NVIDIA card", False))
    assert bench("--device", "cuda") == 1
    assert capsys.readouterr() == ("", "localrun: device 'cuda': there is no NVIDIA card\n")


@pytest.mark.skipif(isinstance(available.find(), Gpu), reason="this machine has a GPU")
def test_auto_imports_no_torch_where_there_is_no_gpu() -> None:
    code = (
        "import sys, localrun\n"
        f"engine = localrun.load({str(tiny_models.shared('v3'))!r}, ctx=64, threads=1, device='auto')\n"
        "print(engine.device, [name for name in ('torch', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "cpu []\n", done.stderr


def test_importances_are_collected_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("x")
    assert run(["imatrix", "-f", str(tmp_path / "text"), "-o", str(tmp_path / "out"), "--device", "cuda"]) == 1
    assert capsys.readouterr().err.startswith("localrun: device 'cuda': importances are collected on the CPU")
