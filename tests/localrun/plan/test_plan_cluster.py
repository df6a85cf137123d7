"""Beyond one machine: limits, devices for a load, networks by construction, bandwidth under failures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.errors import LocalrunError
from localrun.plan import cluster, flows, topology
from localrun.plan.flows import Fabric, Failures, Flow
from localrun.plan.shapes import ModelShape, load_model


@pytest.fixture(scope="module")
def v3() -> ModelShape:
    return load_model("deepseek-v3")


# --- expert parallelism


def test_overlap_hides_the_shorter_half(v3: ModelShape) -> None:
    limit = cluster.expert_parallel(v3, 50e9)
    for seconds in (0.0, limit.step_s / 2, limit.step_s * 3):
        both = cluster.with_compute(limit, seconds)
        assert both.layer_s == pytest.approx(2 * max(limit.step_s, seconds))
        assert both.layer_without_overlap_s == pytest.approx(2 * (limit.step_s + seconds))


def test_dense_models_have_no_experts_to_spread() -> None:
    with pytest.raises(LocalrunError, match="no routed experts"):
        cluster.expert_parallel(load_model("llama-3.1-405b"), 50e9)


def test_a_layers_arithmetic_grows_with_context(v3: ModelShape) -> None:
    device = cluster.load_device("h800")
    short, long = (cluster.layer_compute_s(v3, device, 32, ctx) for ctx in (1024, 131_072))
    cache = 32 * (131_072 - 1024) * 1152 / device.memory_bytes_per_s
    assert long - short == pytest.approx(cache, rel=0.01)


def test_devices_for_a_load(v3: ModelShape) -> None:
    device = cluster.load_device("h800")
    limit = cluster.expert_parallel(v3, device.network_bytes_per_s)
    load = cluster.Load(100.0, 4096, 1024)
    split = cluster.split_sizes(v3, device, limit, load, utilisation=0.4, units=(1, 1))
    assert split.decode_devices * split.decode_tokens_per_device_s >= 100 * 1024
    assert (split.decode_devices - 1) * split.decode_tokens_per_device_s < 100 * 1024 and split.bound == "rate"
    assert split.prefill_devices * split.prefill_tokens_per_device_s >= 100 * 4096
    assert split.concurrent == pytest.approx(100 * 1024 * limit.token_s)  # Little's law
    unit = cluster.split_sizes(v3, device, limit, load, utilisation=0.4, units=(32, 320))
    assert unit.prefill_devices % 32 == 0 and unit.decode_devices % 320 == 0
    long = cluster.split_sizes(v3, device, limit, replace(load, prompt_tokens=10**6), utilisation=0.4, units=(1, 1))
    assert long.bound == "memory"


# --- networks, against graphs built switch by switch


def test_two_layers_by_construction() -> None:
    links = [(leaf, spine) for leaf in range(8) for spine in range(4)]
    network = topology.fat_tree_2(8)
    assert (network.endpoints, network.switches, network.links) == (8 * 4, 12, len(links))


def test_three_layers_by_construction() -> None:
    half = 4
    inside = 8 * half * half
    core = 8 * half * half  # every aggregation switch has half its ports up
    network = topology.fat_tree_3(8)
    assert (network.endpoints, network.switches, network.links) == (8 * half * half, 8 * 8 + half * half, inside + core)


def test_planes_are_copies() -> None:
    one, many = topology.fat_tree_2(16), topology.multi_plane(16, 4)
    assert (many.endpoints, many.switches, many.links) == (4 * one.endpoints, 4 * one.switches, 4 * one.links)


def test_slim_fly_by_construction() -> None:
    """The MMS graph of q = 5: 50 switches of degree 7, diameter 2 (the Hoffman-Singleton graph)."""
    q, squares, others = 5, {1, 4}, {2, 3}
    nodes = list(itertools.product((0, 1), range(q), range(q)))
    near = {node: set() for node in nodes}
    for (s, x, y), (t, m, c) in itertools.combinations(nodes, 2):
        if s == t and x == m and (y - c) % q in (squares if s == 0 else others):
            near[s, x, y].add((t, m, c)), near[t, m, c].add((s, x, y))
        if s == 0 and t == 1 and y == (m * x + c) % q:
            near[s, x, y].add((t, m, c)), near[t, m, c].add((s, x, y))
    degrees = {len(neighbours) for neighbours in near.values()}
    reach = {node: {node} | near[node] | {far for n in near[node] for far in near[n]} for node in nodes}
    assert degrees == {7} and all(len(found) == 50 for found in reach.values())
    network = topology.slim_fly(11)  # 7 + 4 ports
    assert (network.switches, network.links, network.endpoints) == (50, 50 * 7 // 2, 50 * 4)
    assert network.note == "q = 5"


def test_the_papers_slim_fly_is_sizes_only() -> None:
    assert "no power of a prime" in topology.slim_fly(64).note
    assert topology.slim_fly(62).note == "q = 27"


def test_dragonfly_counts() -> None:
    network = topology.dragonfly(7, endpoints=50)  # h = 2, groups of 4 switches and 8 endpoints
    groups = 7
    assert network.endpoints == groups * 8 >= 50
    assert network.links == groups * 6 + groups * 4 * 2 // 2
    assert network.short_links == groups * 6


@pytest.mark.parametrize("endpoints", [2, 100, 2048, 10_000, 65_536])
def test_networks_are_large_enough_where_they_can_be(endpoints: int) -> None:
    for network in topology.compare(64, 8, endpoints):
        largest = next(n for n in topology.compare(64, 8) if n.name == network.name)
        assert network.endpoints >= min(endpoints, largest.endpoints)
        assert network.switches <= largest.switches


def test_prices(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"switch": 10, "link": 1, "endpoint": 0.5}')
    prices = topology.load_prices(path)
    network = topology.fat_tree_2(4)
    assert prices.cost(network) == network.switches * 10 + network.links + network.endpoints * 0.5
    for text, message in (("[]", "holds no object"), ('{"switch": "x"}', "switch is 'x'"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(LocalrunError, match=message):
            topology.load_prices(path)
    with pytest.raises(LocalrunError, match="no such file"):
        topology.load_prices(tmp_path / "none")


@pytest.mark.parametrize(
    ("ports", "planes", "endpoints"),
    [(3, 1, None), (65, 1, None), (64, 0, None), (64, 65, None), (64, 8, 1), (2, 1, 5)],
)
def test_networks_that_make_no_sense(ports: int, planes: int, endpoints: int | None) -> None:
    with pytest.raises(LocalrunError):
        topology.compare(ports, planes, endpoints)


# --- flows

FABRIC = Fabric(planes=4, leaves=4, spines=4, nodes_per_leaf=4)


def test_a_healthy_plane_is_as_good_as_its_endpoints() -> None:
    """Every endpoint sends and receives at full rate: 15 flows of 1/15."""
    shares = flows.simulate(FABRIC, flows.all_to_all(FABRIC))
    assert not shares.lost
    assert shares.rates == pytest.approx(np.full(4 * 16 * 15, 1 / 15))


def test_planes_are_isolated() -> None:
    """Everybody sends to one node on plane 0: its flows there halve, all other planes keep everything."""
    kept = flows.isolation(FABRIC)
    assert kept["plane 0"] == pytest.approx(0.5)  # node 0 receives 15 flows more
    assert all(kept[f"plane {plane}"] == pytest.approx(1.0) for plane in (1, 2, 3))


def test_one_fabric_for_all_is_not_isolated() -> None:
    """The same traffic with all planes' endpoints in one fabric of the same size: everyone who sends there suffers."""
    single = Fabric(planes=1, leaves=4, spines=16, nodes_per_leaf=16)
    background = [Flow(0, s, t) for s in range(64) for t in range(64) if s != t]
    before = flows.simulate(single, background).rates
    after = flows.simulate(single, [*background, *[Flow(0, s, 0) for s in range(1, 64)]]).rates[: len(background)]
    assert (after / before).min() < 0.6


def test_a_link_costs_its_leaf_a_share() -> None:
    kept = flows.robustness(FABRIC)["one link"]
    # Leaf 0 reaches 3 of 4 spines: 12 of 15 flows leave the leaf, over 3/4 of the uplinks: (3/4) / (12/15)
    assert kept.slowest == pytest.approx(0.75 / (12 / 15))
    assert kept.other_planes == pytest.approx(1.0) and kept.lost == 0


def test_spines_cost_all_leaves_a_share() -> None:
    kept = flows.robustness(FABRIC)
    assert kept["one spine"].slowest == pytest.approx(0.75 / (12 / 15))
    assert kept["half the spines"].slowest == pytest.approx(0.5 / (12 / 15))
    assert kept["one spine"].mean > kept["half the spines"].mean
    assert kept["half the spines"].other_planes == pytest.approx(1.0)


def test_a_plane_is_carried_by_the_others() -> None:
    """Of 4 planes 3 remain: three quarters of the bandwidth, and nobody is cut off."""
    kept = flows.robustness(FABRIC)["the plane"]
    assert kept.mean == pytest.approx(0.75, abs=1e-6) and kept.lost == 0
    assert kept.slowest > 0.7
    alone = flows.robustness(FABRIC, reroute=False)["the plane"]
    assert alone.lost == 16 * 15 and alone.slowest == 0 and alone.other_planes == pytest.approx(1.0)


def test_a_leaf_loses_only_its_own_nodes() -> None:
    alone = flows.robustness(FABRIC, reroute=False)["one leaf"]
    assert alone.lost == 16 * 15 - 12 * 11  # flows from or to its 4 nodes
    assert flows.robustness(FABRIC)["one leaf"].lost == 0


def test_all_planes_down_is_all_lost() -> None:
    failures = Failures(planes=frozenset(range(4)))
    traffic = flows.rerouted(FABRIC, flows.all_to_all(FABRIC), failures)
    shares = flows.simulate(FABRIC, traffic, failures)
    assert len(shares.lost) == 4 * 16 * 15 and not len(shares.rates)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_max_min_fairness_holds(seed: int) -> None:
    """No link is overfull, and every flow has a full link on which nobody has more (Bertsekas and Gallager, 6.5.2)."""
    rng = np.random.default_rng(seed)
    n_links, n_flows = rng.integers(1, 8), rng.integers(1, 12)
    usage = rng.random((n_links, n_flows)) * (rng.random((n_links, n_flows)) < 0.5)
    usage = np.vstack([usage, np.eye(n_flows)])  # an endpoint of its own for each
    capacity = rng.random(len(usage)) + 0.1
    rates = flows.max_min_fair(usage, capacity)
    load = usage @ rates
    assert (load <= capacity * (1 + 1e-6)).all()
    full = load >= capacity * (1 - 1e-6)
    for flow in range(n_flows):
        bottlenecks = [link for link in np.flatnonzero(full) if usage[link, flow] > 0]
        assert any(rates[flow] >= rates[usage[link] > 0].max() * (1 - 1e-6) for link in bottlenecks)


@pytest.mark.parametrize("text", ["", "4x4", "4x4x4x4x4", "ax4x4x4", "0x4x4x4", "-1x4x4x4", "9999x9999x9999x9999"])
def test_fabrics_that_make_no_sense(text: str) -> None:
    from localrun.plan.cluster_report import Wanted, make_report

    with pytest.raises(LocalrunError):
        make_report(Wanted(fabric=text))
