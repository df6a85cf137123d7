"""What goes where, what fits, and what is proposed where it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localrun.errors import LocalrunError
from localrun.plan.machine import Machine, load_machine, parse_machine
from localrun.plan.memory import Placement, nearest_that_fits, plan_memory, refusal
from localrun.plan.shapes import ModelShape, load_model, n_bytes
from localrun.plan.speed import decode_speed


@pytest.fixture(scope="module")
def v3() -> ModelShape:
    return load_model("deepseek-v3")


@pytest.fixture(scope="module")
def lite() -> ModelShape:
    return load_model("deepseek-v2-lite")


def with_ram(machine: Machine, gib: float) -> Machine:
    return replace(machine, ram_bytes=gib * 2**30 + machine.reserved_bytes)


def test_all_weights_are_somewhere(v3: ModelShape) -> None:
    for name in ("10k-server", "laptop", "ai-soc", "desktop"):
        memory = plan_memory(v3, load_machine(name), 4096)
        weights = sum(row.n_bytes for row in memory.rows if row.what.startswith("weights"))
        assert weights == n_bytes(t for t in v3.tensors if not v3.is_nextn(t))
        cache = sum(row.n_bytes for row in memory.rows if row.what.startswith("KV cache"))
        assert cache == 4096 * 70_272
        file = next(row for row in memory.rows if row.where == "disk")
        assert file.n_bytes == n_bytes(v3.tensors)


def test_the_target_machine_holds_the_model(v3: ModelShape) -> None:
    """Attention and all but the routed experts in 24 GB, the experts in RAM (arXiv 2505.09343, section 2.2.2)."""
    memory = plan_memory(v3, load_machine("10k-server"), 8192)
    assert memory.fits and memory.placement == Placement(61, head=True, experts=memory.placement.experts)
    # What is left takes the experts of one layer: 256 times gate, up and down of 2048 x 7168, at 4.5, 4.5, 6.5625 bits.
    layer = next(row for row in memory.rows if row.what == "weights on the GPU: routed experts, 1 of 58 layers")
    assert layer.n_bytes == 256 * 2048 * 7168 * (4.5 + 4.5 + 6.5625) / 8
    assert memory.placement.experts == layer.n_bytes / n_bytes(v3.groups()["routed experts"])
    on_gpu = next(row.n_bytes for row in memory.rows if row.what == "weights on the GPU")
    assert on_gpu == n_bytes(
        t for group, ts in v3.groups().items() if group not in ("routed experts", "mtp") for t in ts
    )


def test_a_small_model_is_all_on_the_gpu(lite: ModelShape) -> None:
    assert plan_memory(lite, load_machine("10k-server"), 8192).placement == Placement(27, head=True, experts=True)


def test_a_card_that_is_too_small_is_left_out(v3: ModelShape) -> None:
    """Part of a network on the GPU is nothing the runner does."""
    machine = load_machine("10k-server")
    assert machine.gpu is not None
    small = replace(machine, gpu=replace(machine.gpu, vram_bytes=10 * 2**30))
    for model, where in ((load_model("qwen2.5-72b"), machine), (v3, small)):
        memory = plan_memory(model, where, 8192)
        assert memory.placement == Placement(0, head=False, experts=False) and memory.needed["VRAM"] == 0
        assert plan_memory(model, replace(where, gpu=None), 8192).rows == memory.rows


def test_layers_are_split_where_one_card_is_too_small(v3: ModelShape) -> None:
    """One if it has room, else as few as have; what goes from card to card is waited for."""
    machine = load_machine("10k-server")
    assert machine.gpu is not None
    small = replace(machine, n_gpus=3, gpu=replace(machine.gpu, vram_bytes=10 * 2**30))
    memory = plan_memory(v3, small, 8192)
    assert memory.placement == Placement(61, head=True, experts=0.0, cards=2) and memory.fits
    assert set(memory.needed) == {"VRAM", "VRAM 2", "RAM"}
    assert sum(row.what.startswith("weights on the GPU (layers ") for row in memory.rows) == 2
    assert plan_memory(v3, replace(machine, n_gpus=3), 8192).placement == plan_memory(v3, machine, 8192).placement
    parts = [phase.part for phase in decode_speed(v3, small, memory.placement, 64).phases]
    assert parts.count("from card to card") == 1


def test_cards_are_counted(v3: ModelShape) -> None:
    document = load_machine("10k-server").document
    assert parse_machine(document | {"gpus": 2}, "x", "x").n_gpus == 2
    for wrong in (
        document | {"gpus": 0},
        {key: value for key, value in document.items() if key != "gpu"} | {"gpus": 2},
    ):
        with pytest.raises(LocalrunError, match=r"x: gpus is [02]; expected how many cards like `gpu`"):
            parse_machine(wrong, "x", "x")


def test_more_layers_of_experts_on_larger_cards(v3: ModelShape) -> None:
    machine, before = load_machine("10k-server"), 0.0
    assert machine.gpu is not None
    for gib in (16, 24, 48, 96):
        memory = plan_memory(v3, replace(machine, gpu=replace(machine.gpu, vram_bytes=gib * 2**30)), 8192)
        assert memory.fits and (memory.placement.experts > before or gib == 16)
        before = memory.placement.experts
    assert plan_memory(v3, machine, 131_072).placement.experts == 0  # the cache takes their room


def test_without_a_gpu_nothing_is_on_one(lite: ModelShape) -> None:
    memory = plan_memory(lite, load_machine("laptop"), 8192)
    assert memory.placement == Placement(0, head=False, experts=False) and set(memory.needed) == {"RAM"}


def test_unified_memory_is_counted_once(lite: ModelShape) -> None:
    memory = plan_memory(lite, load_machine("ai-soc"), 8192)
    assert {row.where for row in memory.rows} == {"RAM", "disk"}
    assert memory.available["RAM"] == 96 * 2**30  # what the GPU may have of 128


def test_refusal_proposes_a_shorter_context(lite: ModelShape) -> None:
    laptop = with_ram(load_machine("laptop"), 12)
    text = refusal(lite, laptop, 160_000)
    assert "needs 15.4 GiB of RAM" in text and "(12.0 GiB usable)" in text
    ctx = int(text.split("--ctx ")[1].split()[0])
    assert plan_memory(lite, laptop, ctx).fits and not plan_memory(lite, laptop, ctx + 256).fits


def test_refusal_proposes_a_smaller_type(lite: ModelShape) -> None:
    big = lite.with_type("Q8_0")
    machine = with_ram(load_machine("laptop"), 13)
    text = refusal(big, machine, 8192)
    assert text.endswith("--type Q5_K_M would fit") or text.endswith("--type Q5_1 would fit")
    chosen = big.with_type(text.split("--type ")[1].split()[0])
    assert plan_memory(chosen, machine, 8192).fits
    larger = [big.with_type(mix) for mix in ("Q5_1", "Q5_K_M", "Q5_K_S", "Q5_0", "Q6_K")]
    assert not any(n_bytes(o.tensors) > n_bytes(chosen.tensors) and plan_memory(o, machine, 8192).fits for o in larger)


def test_refusal_when_nothing_fits(v3: ModelShape) -> None:
    text = refusal(v3, load_machine("laptop"), 8192)
    assert "needs 379.1 GiB of RAM (28.0 GiB usable)" in text
    assert "no type fits: the smallest" in text and "\n" not in text


def test_no_refusal_where_it_fits(lite: ModelShape) -> None:
    assert refusal(lite, load_machine("laptop"), 8192) == ""


def test_both_may_have_to_shrink(lite: ModelShape) -> None:
    machine = with_ram(load_machine("laptop"), 9.6)
    advice = nearest_that_fits(lite, machine, 163_840)
    assert advice.startswith("--type ") and " --ctx " in advice
