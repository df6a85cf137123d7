"""The speed model: by hand on a machine of round numbers, and what must follow from any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from toy_machine import TYPES, toy

from localrun.plan import measure
from localrun.plan.machine import load_machine, parse_machine
from localrun.plan.memory import Placement, cached_experts, plan_memory
from localrun.plan.report import make_report
from localrun.plan.shapes import ModelShape, load_model
from localrun.plan.speed import attention_flops, decode_speed, experts_touched, mtp_speed, prefill_speed
from quant.target import tuning

CPU_ONLY = Placement(0, head=False, experts=False)


@pytest.fixture(scope="module")
def lite() -> ModelShape:
    return load_model("deepseek-v2-lite")


@pytest.fixture(scope="module")
def v3() -> ModelShape:
    return load_model("deepseek-v3")


def read_a_token(model: ModelShape) -> float:
    """Bytes of the matrices that one token reads, counted tensor by tensor."""
    c, total = model.config, 0.0
    for tensor in model.tensors:
        if len(tensor.shape) > 1 and not model.is_nextn(tensor) and tensor.name != "token_embd.weight":
            total += tensor.n_bytes * (c.num_experts_per_tok / c.n_routed_experts if "_exps" in tensor.name else 1)
    return total


def test_memory_alone(lite: ModelShape) -> None:
    speed = decode_speed(lite, toy(), CPU_ONLY, ctx=0)
    assert speed.seconds == pytest.approx(read_a_token(lite) / 1e11)
    assert speed.bottleneck().part == "routed experts" and speed.bottleneck().bound == "memory"


def test_kernels_alone(lite: ModelShape) -> None:
    speed = decode_speed(lite, toy(read=1e18, gemv=5e9), CPU_ONLY, ctx=0)
    assert speed.seconds == pytest.approx(read_a_token(lite) / (4 * 5e9))
    assert speed.bottleneck().bound == "kernel"


def test_the_longer_of_the_two_counts_matrix_by_matrix(lite: ModelShape) -> None:
    both = decode_speed(lite, toy(read=1e11, gemv=2e10), CPU_ONLY, ctx=0).seconds
    alone = max(
        decode_speed(lite, toy(), CPU_ONLY, 0).seconds, decode_speed(lite, toy(1e18, 2e10), CPU_ONLY, 0).seconds
    )
    assert both >= alone


def test_fixed_costs_and_attention(lite: ModelShape) -> None:
    base = decode_speed(lite, toy(), CPU_ONLY, ctx=1000).seconds
    slow = toy(layer_s=1e-3, attention_decode_flops=1e9)
    flops = 2 * 27 * 16 * 1000 * (512 + 512 + 64)
    cache_read = 1000 * 31_104 / 1e11
    assert decode_speed(lite, slow, CPU_ONLY, 1000).seconds == pytest.approx(base - cache_read + 27e-3 + flops / 1e9)


def test_grouped_attention_by_hand() -> None:
    model = load_model("llama-3.1-405b")
    assert attention_flops(model, 1000, 1) == 2 * 126 * 128 * 1000 * (128 + 128)


def test_latent_attention_takes_the_cheaper_way(v3: ModelShape) -> None:
    per_head = attention_flops(v3, 1, 1) / (2 * 61 * 128)
    assert per_head == 2 * 512 + 64  # absorbed
    many = attention_flops(v3, 1, 512) / (2 * 61 * 128)
    assert many == 256 * 512 + 512 * (256 + 64)  # keys and values rebuilt


def test_experts_touched_is_what_sampling_gives() -> None:
    """E (1 - (1 - K/E)^T) against uniform draws; one token touches K, very many touch all."""
    import numpy as np

    assert experts_touched(256, 8, 1) == pytest.approx(8)
    assert experts_touched(256, 8, 2) == pytest.approx(15.75)
    assert experts_touched(256, 8, 5000) == pytest.approx(256)
    rng = np.random.default_rng(0)
    counts = [len(set(np.concatenate([rng.permutation(64)[:6] for _ in range(10)]))) for _ in range(2000)]
    assert experts_touched(64, 6, 10) == pytest.approx(np.mean(counts), rel=0.01)  # standard error 0.1%


def test_prompts_read_each_expert_once_a_chunk(lite: ModelShape) -> None:
    machine = toy()
    one, two = (prefill_speed(lite, machine, CPU_ONLY, n) for n in (512, 1024))
    assert two.seconds == pytest.approx(2 * one.seconds, rel=0.01)  # the cache is read once more, no more
    assert one.tokens_per_s > 10 * decode_speed(lite, machine, CPU_ONLY, 0).tokens_per_s


def test_rows_are_repacked_from_the_machines_own_number_of_tokens(lite: ModelShape) -> None:
    slow_steps = [toy(gemv=1e9, **kwargs) for kwargs in ({}, {"packed_from": 5}, {"packed_from_interleaved": 5})]
    seconds = [decode_speed(lite, machine, CPU_ONLY, 0, n_tokens=4).seconds for machine in slow_steps]
    assert seconds[1] > 1.5 * seconds[0] and seconds[2] == seconds[0]  # Q4_K's rows are not interleaved


def test_this_machines_number_is_its_tunings(lite: ModelShape, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"type": "Q4_K", "n_cols": 1024, "gemv": 1e9, "expand": 1e9, "gemm": 1e9}
    layer = {"attention_decode_flops": 1e9, "attention_prefill_flops": 1e9, "activation_bytes_per_s": 1e9}
    monkeypatch.setattr(measure, "_read_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(measure, "kernel_rates", lambda *_, **__: rates)
    monkeypatch.setattr(measure, "_probe", lambda *_: layer | {"layer_s": 0.0, "chunk_layer_s": 0.0})
    with tuning.using(tuning.Tuning(packed_from=7, packed_from_interleaved=9)):
        cpu = measure.this_machine(lite, 2).cpu
    assert (cpu.packed_from, cpu.packed_from_interleaved) == (7, 9)


def test_this_machine_is_measured_with_the_models_matrices(lite: ModelShape) -> None:
    """All experts of a layer are one tensor, which many tokens are multiplied with in one job."""
    shapes = [shape for _, n_cols, found in measure._matrices(lite) for shape in found if n_cols == 2048]
    assert shapes.count((64, 1408)) == 2 * 26 and (1, 102_400) in shapes  # gate and up; the head


def test_prompts_by_arithmetic(lite: ModelShape) -> None:
    kernels = [{"type": t, "n_cols": 1024, "gemv": 1e15, "expand": 1e18, "gemm": 1e10} for t in TYPES]
    machine = toy(read=1e18, kernels=kernels)
    weights = sum(
        tensor.n_weights * (6 / 64 if "_exps" in tensor.name else 1)
        for tensor in lite.tensors
        if len(tensor.shape) > 1 and tensor.name not in ("token_embd.weight", "output.weight")
    )
    head = 102_400 * 2048  # of the last token only, by the decoding kernel
    expected = 2 * 512 * weights / 4e10 + head * 6.5625 / 8 / 4e15
    assert prefill_speed(lite, machine, CPU_ONLY, 512).seconds == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("factor", [1.1, 2.0, 8.0])
def test_faster_memory_never_hurts(v3: ModelShape, factor: float) -> None:
    machine = load_machine("10k-server")
    placement = plan_memory(v3, machine, 4096).placement
    before = decode_speed(v3, machine, placement, 512)
    after = decode_speed(v3, machine.with_bandwidth(factor), placement, 512)
    assert before.seconds / factor <= after.seconds <= before.seconds


def test_the_split_adds_up(v3: ModelShape) -> None:
    for name in ("10k-server", "ai-soc", "laptop", "dual-socket"):
        machine = load_machine(name)
        speed = decode_speed(v3, machine, plan_memory(v3, machine, 4096).placement, 4096)
        assert sum(speed.split().values()) == pytest.approx(speed.seconds)


def test_shared_experts_hide_behind_the_routed_ones(v3: ModelShape) -> None:
    machine = load_machine("10k-server")
    speed = decode_speed(v3, machine, plan_memory(v3, machine, 4096).placement, 512)
    shared = [phase.seconds for phase in speed.phases if "shared experts" in phase.part and phase.device == "GPU"]
    assert len(shared) == 2 and all(shared) and speed.hidden_s == pytest.approx(sum(shared))  # with their launches


def test_a_cache_of_experts_takes_its_hits_off_the_cpu(v3: ModelShape) -> None:
    """And runs beside it; each layer still waits for the CPU. No cache where there is no card, or all fits on it."""
    machine = load_machine("10k-server")
    cached = cached_experts(v3, machine, 8192)
    assert cached is not None and 1 < cached.slots < 16
    assert cached.slots / 256 < cached.experts == pytest.approx(cached.slots / 32 * 0.30)  # up to an eighth: a line
    found = decode_speed(v3, machine, cached, 64)
    none = decode_speed(v3, machine, Placement(61, head=True, experts=0.0), 64)
    part = {s: {(p.part, p.device): p.seconds for p in s.phases} for s in (found, none)}
    routed = part[none]["routed experts", "CPU"]
    assert part[found]["routed experts", "CPU"] == pytest.approx((1 - cached.experts) * routed)
    assert part[found]["waiting", ""] == pytest.approx(part[none]["waiting", ""])
    on_gpu = part[found]["routed experts", "GPU"]
    assert found.hidden_s == pytest.approx(none.hidden_s + on_gpu) and on_gpu > 0
    for other, where in ((v3, "laptop"), (load_model("deepseek-v2-lite"), "10k-server")):
        assert cached_experts(other, load_machine(where), 8192) is None


def test_a_drafted_token_reads_nearly_twice_the_experts(v3: ModelShape) -> None:
    """With experts in RAM drafting gains little: verifying reads 1.97 times the experts."""
    machine = load_machine("10k-server")
    placement = plan_memory(v3, machine, 4096).placement
    base = decode_speed(v3, machine, placement, 512)
    two = decode_speed(v3, machine, placement, 512, n_tokens=2)
    experts = [sum(p.n_bytes for p in speed.phases if p.part == "routed experts") for speed in (base, two)]
    assert experts[1] / experts[0] == pytest.approx(1.97, abs=0.005)
    drafted = mtp_speed(v3, machine, placement, 512, 0.85)
    assert drafted is not None and 0.9 < drafted.tokens_per_s / base.tokens_per_s < 1.3
    never = mtp_speed(v3, machine, placement, 512, 0.0)
    assert never is not None and never.tokens_per_s < base.tokens_per_s


def test_models_without_a_prediction_layer_do_not_draft(lite: ModelShape) -> None:
    assert mtp_speed(lite, toy(), CPU_ONLY, 512, 0.85) is None


# --- the report


def test_report_is_json_all_through(v3: ModelShape) -> None:
    import json

    document = make_report(v3, load_machine("10k-server"), 8192)
    json.dumps(document, allow_nan=False)
    assert document["refusal"] is None
    assert document["decode"]["tokens_per_s"] > document["decode_full_context"]["tokens_per_s"]


def test_sensitivity(v3: ModelShape) -> None:
    rows = {row["change"]: row for row in make_report(v3, load_machine("10k-server"), 8192)["sensitivity"]}
    assert rows["13 memory channels, not 12"]["decode_ratio"] >= 1
    fewer = rows["6 experts a token, not 8 (changes what the model says)"]
    assert 1.1 < fewer["decode_ratio"] < 8 / 6
    assert any("drafted" in change for change in rows)
    larger = next(row for change, row in rows.items() if change.startswith("Q5_K"))
    assert larger["decode_ratio"] < 1


def test_sensitivity_without_known_channels(lite: ModelShape) -> None:
    rows = make_report(lite, toy(), 2048)["sensitivity"]
    assert rows[0]["change"] == "memory 1.25 times as fast"
    assert rows[0]["decode_ratio"] == pytest.approx(1.25)


def test_a_refusal_has_no_speed(v3: ModelShape) -> None:
    document = make_report(v3, load_machine("laptop"), 8192)
    assert document["refusal"] and "decode" not in document


# --- machine descriptions


def test_every_preset_is_sound_and_says_its_sources() -> None:
    from localrun.plan.machine import presets

    assert presets() == ["10k-server", "dual-socket", "desktop", "laptop", "ai-soc"]
    for name in presets():
        machine = load_machine(name)
        assert all(machine.sources.values()), name
        assert 0 < machine.cpu.read_bytes_per_s < math.inf


def test_bandwidth_of_channels() -> None:
    machine = load_machine("10k-server")
    assert machine.cpu.read_bytes_per_s == pytest.approx(12 * 4800e6 * 8 * 0.82)
    assert load_machine("dual-socket").cpu.read_bytes_per_s == pytest.approx(2 * 0.7 * machine.cpu.read_bytes_per_s)


def test_kernels_of_the_nearest_width() -> None:
    cpu = load_machine("10k-server").cpu
    assert cpu.kernel("Q4_K", 1536).n_cols == 2048 and cpu.kernel("Q4_K", 18432).n_cols == 7168
    narrow = replace(cpu, kernels=cpu.kernels[:2])
    with pytest.raises(Exception, match="has no rates for Q4_K; it has F32"):
        narrow.kernel("Q4_K", 2048)


def test_a_saved_description_gives_the_same_machine() -> None:
    machine = load_machine("10k-server")
    again = parse_machine(machine.document, "again", "again.json")
    assert (again.cpu, again.gpu, again.ram_bytes) == (machine.cpu, machine.gpu, machine.ram_bytes)
