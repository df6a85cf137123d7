"""A card of the first of several hosts: what its proof timed, over hosts; on machines that are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toy_machine import toy

from localrun.gpu.proof.verdict import PROMPT, REPLY
from localrun.plan.first_host import over_hosts
from localrun.plan.hosts import decode_over, host_memory, prefill_over
from localrun.plan.link import Link
from localrun.plan.shapes import ModelShape, load_model, n_bytes
from localrun.plan.speed import decode_speed, prefill_speed

SLOW = Link("slow", "slow", round_trip_s=2e-3, message_s=1e-5, bytes_per_s=1e12)
FAST = Link("fast", "fast", round_trip_s=1e-9, message_s=0.0, bytes_per_s=1e15)


@pytest.fixture(scope="module")
def model() -> ModelShape:
    """All matrices of one type, so that weights and bytes go together."""
    return load_model("deepseek-v2-lite", "Q8_0")


def figures(step: tuple[float, float], prompt: tuple[float, float], n_prompt: int = PROMPT) -> dict[str, Any]:
    """As the proof's: seconds with the card and without."""
    named = [dict(zip(("cuda", "cpu"), seconds, strict=True)) for seconds in (step, prompt)]
    return {"step_s": named[0], "prompt_s": named[1], "prompt_tokens": n_prompt}


@pytest.mark.parametrize("link", [SLOW, FAST])
@pytest.mark.parametrize("n_hosts", [2, 3])
def test_a_cpus_time_is_the_plans(model: ModelShape, n_hosts: int, link: Link) -> None:
    """Where a reply takes what memory takes, and a prompt what products take: to 1%, which caches and norms are."""
    reply, prompt = toy(), toy(read=1e18)
    kernels = tuple(replace(kernel, gemm=1e11) for kernel in prompt.cpu.kernels)
    prompt = replace(prompt, cpu=replace(prompt.cpu, kernels=kernels))
    placement = host_memory(model, reply, 512, n_hosts).first.placement
    step_s = decode_speed(model, reply, placement, 1).seconds
    prompt_s = prefill_speed(model, prompt, placement, PROMPT).seconds
    found = over_hosts(figures((9.0, step_s), (9.0, prompt_s)), model, n_hosts, link)
    expected = prefill_over(model, prompt, placement, PROMPT, n_hosts, link).speed.seconds
    expected += REPLY * decode_over(model, reply, placement, 1, n_hosts, link, "slices").speed.seconds
    assert found["cpu"] == pytest.approx(expected, rel=0.01)


def test_a_card_gains_less_over_hosts(model: ModelShape) -> None:
    """It has the shared experts, which without it are computed while messages are under way: that much was its gain."""
    groups = model.groups()
    routed, shared = (
        n_bytes(groups[part]) * times for part, times in (("routed experts", 6 / 64), ("shared experts", 1))
    )
    read = routed + shared + sum(n_bytes(groups[part]) for part in groups if part not in (
        "routed experts", "shared experts", "mtp", "embedding"))  # fmt: skip
    cpu_s = read / 1e10
    cuda_s = cpu_s - 0.9 * shared / 1e10  # it wins by less than the shared experts take
    one_host = figures((cuda_s, cpu_s), (1e-9, 1e-9))
    slow, fast = (over_hosts(one_host, model, 2, link) for link in (SLOW, FAST))
    assert slow["cuda"] > slow["cpu"] and fast["cuda"] < fast["cpu"]
    waits = REPLY * model.n_moe_layers * SLOW.exchange_s(0, 0, 1)
    assert slow["cuda"] - fast["cuda"] == pytest.approx(waits, rel=0.1)
    assert fast["cpu"] == pytest.approx(REPLY * (cpu_s - routed / 2 / 1e10), rel=0.01)
