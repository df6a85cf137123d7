"""Experts over hosts: counted by hand, and against every choice of a small router."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import tiny_models
from toy_machine import toy

from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from localrun.models.summary import group_of
from localrun.models.tensors import GGUFTensors
from localrun.placement.sizes import rank_work_bytes
from localrun.plan.cluster import expert_parallel
from localrun.plan.hosts import (
    Parts,
    busiest_share,
    decode_over,
    equal_parts,
    host_memory,
    layers_of,
    messages,
    prefill_over,
    slices_of,
    spread,
)
from localrun.plan.hosts_report import make_hosts_report
from localrun.plan.link import Link, load_link
from localrun.plan.machine import load_machine
from localrun.plan.report import make_report
from localrun.plan.shapes import ModelShape, load_model, n_bytes
from localrun.plan.speed import MESSAGES, OTHERS, Phase, Speed, decode_speed
from localrun.ranks.sharing import expert_layers
from quant.decode.message_sizes import HEADER_BYTES, PAIR_BYTES, TILE, back_bytes, message_bytes

LINK = Link("toy", "toy", round_trip_s=1e-3, message_s=1e-4, bytes_per_s=1e9)


@pytest.fixture(scope="module")
def v3() -> ModelShape:
    return load_model("deepseek-v3")


def test_a_tokens_messages(v3: ModelShape) -> None:
    """58 layers, a message there and one back for each of two: 7168 values in BF16, 8 choices of 12 bytes."""
    found = messages(v3, n_hosts=3)
    assert (found.out_bytes, found.back_bytes) == (64 + 7168 * 2 + 8 * 12, 64 + 7168 * 2)
    assert (found.per_layer, found.bytes_per_token) == (4, 58 * 2 * (found.out_bytes + found.back_bytes))


def test_what_a_cluster_is_planned_with_is_what_ranks_send(v3: ModelShape) -> None:
    """For each destination a vector in FP8 there and in BF16 back; running ranks send headers, choices and scales more
    (test_ranks.py counts what they send), and once for all experts of a rank."""
    planned = expert_parallel(v3, 1.0, n_tokens=1).bytes_per_step / (8 + 1)
    sent = message_bytes("fp8", 7168, 8, 1) + back_bytes("fp8", 7168, 1)
    assert sent - 2 * HEADER_BYTES - 8 * PAIR_BYTES - 4 * 7168 // TILE == planned
    assert sent / planned == pytest.approx(1.02, abs=0.001)


@pytest.mark.parametrize(("n_experts", "per_token", "n_ranks"), [(8, 3, 2), (9, 4, 3), (7, 2, 3), (6, 6, 2), (8, 3, 1)])
def test_the_busiest_rank(n_experts: int, per_token: int, n_ranks: int) -> None:
    """Over all choices; experts go to ranks in turn, so that counts differ by one at most."""
    most = [
        max(Counter(expert % n_ranks for expert in chosen).values())
        for chosen in combinations(range(n_experts), per_token)
    ]
    assert busiest_share(n_experts, per_token, n_ranks) == pytest.approx(sum(most) / len(most) / per_token)


def test_decoding_by_hand(v3: ModelShape) -> None:
    """Half of the experts' time, and messages as far as shared experts take less time than they are under way."""
    machine = toy()
    placement = host_memory(v3, machine, 64, 2).first.placement
    alone = decode_speed(v3, machine, placement, 64)
    seconds = {phase.part: phase.seconds for phase in alone.phases}
    found = decode_over(v3, machine, placement, 64, 2, LINK, "slices")
    waiting = 58 * (1e-3 + (64 + 7168 * 2 + 8 * 12 + 64 + 7168 * 2) / 1e9) - seconds["shared experts"]
    assert found.messages_s == pytest.approx(waiting)
    assert found.speed.seconds == pytest.approx(alone.seconds - seconds["routed experts"] / 2 + waiting)
    whole = decode_over(v3, machine, placement, 64, 2, LINK, "experts")
    more = (busiest_share(256, 8, 2) - 1 / 2) * seconds["routed experts"]
    assert whole.waiting_s == found.waiting_s == 0  # a rank has as much to do as the other
    assert whole.speed.seconds == pytest.approx(found.speed.seconds + more)
    by_time = decode_over(v3, machine, placement, 64, 2, LINK, "slices by time")
    assert by_time.speed.seconds < found.speed.seconds
    hidden = decode_over(v3, toy(read=1e9), placement, 64, 2, LINK, "slices")
    assert hidden.messages_s == 0  # shared experts take longer


def test_waiting_for_others_is_not_what_messages_take(v3: ModelShape) -> None:
    """Of 8 blocks a layer the first host has 1, another one 4: it waits for that, less what the shared experts take."""
    machine, parts = toy(), Parts(1 / 8, 4 / 8)
    alone = decode_speed(v3, machine, host_memory(v3, machine, 64, 3).first.placement, 64)
    seconds = {phase.part: phase.seconds for phase in alone.phases}
    under_way = 58 * (1e-3 + 2 * 1e-4 + 2 * (64 + 7168 * 2 + 8 * 12 + 64 + 7168 * 2) / 1e9)
    found = spread(alone, v3, 3, LINK, parts)
    waiting = seconds["routed experts"] * 3 / 8 - seconds["shared experts"]
    assert found.waiting_s == pytest.approx(waiting) and waiting > 0
    assert found.messages_s == pytest.approx(under_way)
    by_others = {phase.part: phase.seconds for phase in found.speed.phases if not phase.device}
    assert by_others == {OTHERS: pytest.approx(found.waiting_s), MESSAGES: pytest.approx(under_way)}
    least = spread(alone, v3, 3, LINK, Parts(3 / 8, 3 / 8))
    assert (least.waiting_s, least.messages_s) == (0, pytest.approx(under_way - seconds["shared experts"]))


@pytest.mark.parametrize(("n_hosts", "blocks"), [(2, (4, 4)), (3, (3, 3)), (4, (2, 2)), (5, (2, 2)), (8, (1, 1))])
def test_equal_slices_are_whole_blocks(v3: ModelShape, n_hosts: int, blocks: tuple[int, int]) -> None:
    """As ranks divide the 8 of each expert (3, 2 and 3 of three); of more hosts than blocks whole experts."""
    assert equal_parts(v3, n_hosts) == Parts(*(pytest.approx(n / 8) for n in blocks))
    assert equal_parts(v3, 9) == Parts(1 / 9, 1 / 9)
    assert slices_of(Speed(1, ()), v3, n_hosts, LINK, 0.0, "slices") == equal_parts(v3, n_hosts)
    memory, machine = host_memory(v3, toy(), 512, n_hosts), toy()
    experts = n_bytes(v3.groups()["routed experts"]) + mtp_experts(v3)
    work = rank_work_bytes(v3.config, blocks[1] / 8, "bf16")
    assert memory.others - work - machine.cpu.process_bytes == pytest.approx(experts * blocks[1] / 8, abs=1)


def mtp_experts(model: ModelShape) -> int:
    """Bytes of the prediction layer's routed experts, of which other hosts have a share too."""
    return n_bytes([tensor for tensor in model.groups()["mtp"] if group_of(tensor.name) == "routed experts"])


@pytest.mark.parametrize(("exchange_s", "blocks"), [(0.0, [2, 4]), (1.0, [3, 3]), (2.0, [4, 2]), (9.0, [5, 1])])
def test_slices_by_time(exchange_s: float, blocks: list[int]) -> None:
    """Routed experts of 6 blocks that take 3 s a layer, and a shared one that takes 1 s."""
    model = load_model("deepseek-v2-lite")
    layer = [replace(t, shape=(*t.shape[:-1], 6 * 256), type="Q4_K") for t in model.tensors if "_down_exps" in t.name]
    model = replace(model, tensors=tuple(layer))
    n_layers = model.n_moe_layers
    phases = tuple(Phase(part, "CPU", s * n_layers) for part, s in (("routed experts", 3.0), ("shared experts", 1.0)))
    alone, link = Speed(1, phases), Link("toy", "toy", exchange_s, 0.0, 1e18)
    found = slices_of(alone, model, 2, link, 0.0, "slices by time")
    assert (6 * found.first, 6 * found.others) == pytest.approx(blocks)
    both = spread(alone, model, 2, link, found)
    took = max(blocks[0] / 2 + 1, blocks[1] / 2 + exchange_s)
    assert both.speed.seconds == pytest.approx(n_layers * took)
    memory = host_memory(model, toy(), 512, 2, found)
    work = rank_work_bytes(model.config, blocks[1] / 6, "bf16")
    assert memory.others - toy().cpu.process_bytes == pytest.approx(n_bytes(layer) * blocks[1] / 6 + work, abs=1)


@pytest.mark.parametrize(("variant", "type_"), [("v3-odd", "F32"), ("gpt-oss", "MXFP4"), ("v3-fused-gate-up", "Q8_0")])
def test_slices_are_cut_where_ranks_cut_them(variant: str, type_: str) -> None:
    path = tiny_models.shared(variant, type=type_)
    with open_gguf(path) as file:
        config, tensors = read_config(file), GGUFTensors(file)
        layers = [tensors.expert_matrices(index) for index in expert_layers(file, config)]
    blocks = [whole.gate.n_rows // whole.inner_unit for whole in layers]
    assert [layer.n_blocks for layer in layers_of(load_model(str(path), None))] == blocks and blocks


def test_more_hosts_take_turns_on_the_firsts_adapter() -> None:
    assert LINK.exchange_s(1e6, 2e6, 1) == pytest.approx(1e-3 + 3e-3)
    assert LINK.exchange_s(1e6, 2e6, 4) == pytest.approx(1e-3 + 4 * 3e-3 + 3 * 2e-4)


def test_a_prompts_messages_go_once_a_chunk(v3: ModelShape) -> None:
    machine = toy(read=1e18, gemv=1e18)
    placement = host_memory(v3, machine, 1024, 2).first.placement
    link = replace(LINK, bytes_per_s=1e18)
    short, long = (prefill_over(v3, machine, placement, n, 2, link).messages_s for n in (512, 1024))
    assert long == pytest.approx(2 * short) and short == pytest.approx(58e-3, rel=0.1)


def test_memory_of_all_hosts_is_the_models(v3: ModelShape) -> None:
    machine = toy()
    alone, shared = host_memory(v3, machine, 512, 1), host_memory(v3, machine, 512, 4)
    experts = n_bytes(v3.groups()["routed experts"])
    theirs = (experts + mtp_experts(v3)) / 4
    assert shared.others == pytest.approx(theirs + rank_work_bytes(v3.config, 1 / 4, "bf16"), abs=1)
    saved = alone.first.needed["RAM"] - shared.first.needed["RAM"]
    assert saved == pytest.approx(3 * experts / 4, abs=1000)
    assert not host_memory(v3, replace(machine, ram_bytes=1e11), 512, 4).fits


def test_one_host_is_the_plan_of_a_machine(v3: ModelShape) -> None:
    machine = load_machine("10k-server")
    report = make_hosts_report(v3, machine, load_link("10GbE"), 8192, 4)
    assert report["rows"][0]["decode"]["tokens_per_s"] == make_report(v3, machine, 8192)["decode"]["tokens_per_s"]
    assert report["rows"][0]["prefill"]["tokens_per_s"] == make_report(v3, machine, 8192)["prefill"]["tokens_per_s"]
    without = make_hosts_report(v3, replace(machine, gpu=None), load_link("10GbE"), 8192, 4)
    assert without["pays"] == {"n_hosts": 2, "sharing": "slices"}  # 4% more on three, 9% on four
    with_card, on_cpu = ([row["decode"]["tokens_per_s"] for row in each["rows"][:2]] for each in (report, without))
    for one, two in (with_card, on_cpu):
        assert two / one > 1.3  # 10 GbE: what peers' arithmetic gives two hosts
    assert report["pays"] == {"n_hosts": 3, "sharing": "slices by time"}  # 5% on two hosts, 3% on three


def test_a_card_on_the_first_host_by_hand(v3: ModelShape) -> None:
    """It has all but the experts; half of these is the CPU's, and messages come on top of that half, beside the card's
    shared experts."""
    machine = load_machine("10k-server")
    machine = replace(machine, gpu=replace(machine.gpu, vram_bytes=18e9))  # no room for experts
    memory, alone = host_memory(v3, machine, 8192, 2), host_memory(v3, machine, 8192, 1)
    placement = memory.first.placement
    assert placement == alone.first.placement and placement.layers == 61 and placement.experts == 0
    experts = n_bytes(v3.groups()["routed experts"])
    assert memory.first.needed["VRAM"] == alone.first.needed["VRAM"]
    assert alone.first.needed["RAM"] - memory.first.needed["RAM"] == pytest.approx(experts / 2, abs=2)
    one = decode_speed(v3, machine, placement, 64)
    routed = sum(phase.seconds for phase in one.phases if phase.part == "routed experts")
    under_way = 58 * LINK.round_trip_s + messages(v3, 2).bytes_per_token / LINK.bytes_per_s
    found = decode_over(v3, machine, placement, 64, 2, LINK, "slices")
    shared = one.hidden_s  # less than half of the routed experts
    assert 0 < shared < routed / 2 and found.speed.hidden_s == shared
    assert found.messages_s == pytest.approx(under_way)
    assert found.speed.seconds == pytest.approx(one.seconds - routed / 2 + under_way)


def test_layers_that_vram_holds_send_nothing() -> None:
    """Other hosts have nothing of them."""
    lite, machine = load_model("deepseek-v2-lite"), load_machine("10k-server")
    machine = replace(machine, gpu=replace(machine.gpu, vram_bytes=8e9))
    memory = host_memory(lite, machine, 4096, 2)
    part, experts = memory.first.placement.experts, n_bytes(lite.groups()["routed experts"])
    assert 0.1 < part < 0.9
    others = memory.others - machine.cpu.process_bytes - rank_work_bytes(lite.config, 1 / 2, "bf16")
    assert others == pytest.approx(experts * (1 - part) / 2, abs=1)
    in_all = [memory.first.needed["RAM"] + others, host_memory(lite, machine, 4096, 1).first.needed["RAM"]]
    assert in_all[0] == pytest.approx(in_all[1], abs=2)
    whole = messages(lite, 2)
    assert messages(lite, 2, part).bytes_per_token == pytest.approx(whole.bytes_per_token * (1 - part), abs=1)
    found = decode_over(lite, machine, memory.first.placement, 64, 2, LINK, "slices")
    under_way = (1 - part) * (26 * LINK.round_trip_s + whole.bytes_per_token / LINK.bytes_per_s)
    assert 0.98 * under_way < found.messages_s < under_way  # the card's shared experts take longer than half the routed


def test_a_unified_gpu_is_left_out() -> None:
    """It would hold all experts, which others are to have."""
    machine = load_machine("ai-soc")
    lite = load_model("deepseek-v2-lite")
    assert host_memory(lite, machine, 4096, 1).first.placement.experts == 1
    assert host_memory(lite, machine, 4096, 2).first.placement.layers == 0
