"""A flow-level simulation of a multi-plane fat tree: who gets how much bandwidth, also when parts fail.

Every node has one endpoint in every plane. A plane is a two-layer fat tree of its own; flows are spread evenly over the
spines that both leaves still reach (packet spraying), so a flow uses a fraction of many links. Bandwidth is shared
max-min fairly: all flows grow together until a link is full, whose flows then stay as they are (progressive filling,
Bertsekas and Gallager, Data Networks, section 6.5.2). Latency, congestion control and messages' sizes are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from localrun.errors import LocalrunError

_MOST_FLOWS, _MOST_ENTRIES = 200_000, 50_000_000  # of the matrix of links and flows: 400 MB


@dataclass(frozen=True)
class Fabric:
    """Planes of leaves and spines; bandwidth is counted in endpoints' links, nodes from leaf to leaf."""

    planes: int
    leaves: int
    spines: int
    nodes_per_leaf: int

    def __post_init__(self) -> None:
        """Raises LocalrunError on a part that has no members."""
        if min(self.planes, self.leaves, self.spines, self.nodes_per_leaf) < 1:
            raise LocalrunError("a fabric needs at least one plane, leaf, spine and node")

    @property
    def nodes(self) -> int:
        """Of all leaf switches."""
        return self.leaves * self.nodes_per_leaf

    @property
    def uplink(self) -> float:
        """Bandwidth from a leaf to a spine that lets the leaf's endpoints all send at once."""
        return self.nodes_per_leaf / self.spines


@dataclass(frozen=True)
class Failures:
    """What does not work: (plane, leaf, spine) links, (plane, leaf) and (plane, spine) switches, planes."""

    links: frozenset[tuple[int, int, int]] = field(default_factory=frozenset)
    leaves: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    spines: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    planes: frozenset[int] = field(default_factory=frozenset)

    def has_link(self, plane: int, leaf: int, spine: int) -> bool:
        """Whether the link from leaf to spine works."""
        broken = (plane, leaf, spine) in self.links or (plane, spine) in self.spines
        return not (broken or (plane, leaf) in self.leaves or plane in self.planes)

    def has_endpoints(self, plane: int, leaf: int) -> bool:
        """Whether a leaf's endpoints are connected."""
        return plane not in self.planes and (plane, leaf) not in self.leaves


@dataclass(frozen=True)
class Flow:
    """Traffic between two nodes on one plane."""

    plane: int
    source: int
    target: int


@dataclass(frozen=True)
class Shares:
    """Bandwidth of each flow, and who could not be carried at all."""

    flows: tuple[Flow, ...]
    rates: np.ndarray
    lost: tuple[Flow, ...]

    def on(self, plane: int) -> np.ndarray:
        """The rates on a plane."""
        return self.rates[[flow.plane == plane for flow in self.flows]]


def all_to_all(fabric: Fabric, planes: Iterable[int] | None = None) -> list[Flow]:
    """One flow for each pair of nodes on each plane. Raises LocalrunError if that would be too many."""
    chosen = list(range(fabric.planes) if planes is None else planes)
    if fabric.nodes**2 * len(chosen) > _MOST_FLOWS:
        raise LocalrunError(f"{fabric.nodes} nodes on {len(chosen)} planes are too many flows; at most {_MOST_FLOWS}")
    nodes = range(fabric.nodes)
    return [Flow(plane, source, target) for plane in chosen for source in nodes for target in nodes if source != target]


def rerouted(fabric: Fabric, flows: Sequence[Flow], failures: Failures) -> list[Flow]:
    """Flows whose source or target has lost its plane take another plane where both are connected.

    Inside a node data moves from plane to plane (NVLink or PCIe); that is taken to be fast enough. A flow that no plane
    can carry stays where it is, and is lost.
    """
    moved = []
    for flow in flows:
        others = [(flow.plane + step) % fabric.planes for step in range(1, fabric.planes)]
        shift = (flow.source + flow.target) % max(1, len(others))  # spreads the flows of a lost plane over the others
        candidates = [flow.plane, *others[shift:], *others[:shift]]
        working = [plane for plane in candidates if _paths(fabric, failures, Flow(plane, flow.source, flow.target))]
        moved.append(Flow(working[0] if working else flow.plane, flow.source, flow.target))
    return moved


def _paths(fabric: Fabric, failures: Failures, flow: Flow) -> list[int] | None:
    """The spines that both leaves reach; [-1] for nodes of one leaf; None or nothing if there is no way."""
    a, b = flow.source // fabric.nodes_per_leaf, flow.target // fabric.nodes_per_leaf
    if not (failures.has_endpoints(flow.plane, a) and failures.has_endpoints(flow.plane, b)):
        return None
    if a == b:
        return [-1]
    spines = range(fabric.spines)
    return [s for s in spines if failures.has_link(flow.plane, a, s) and failures.has_link(flow.plane, b, s)]


def simulate(fabric: Fabric, flows: Sequence[Flow], failures: Failures | None = None) -> Shares:
    """Max-min fair bandwidth of the flows, in units of an endpoint's link. Raises LocalrunError on too many."""
    failures = failures or Failures()
    carried, lost, columns, rows, parts = [], [], [], [], []
    for flow in flows:
        paths = _paths(fabric, failures, flow)
        if not paths:
            lost.append(flow)
            continue
        for link, part in _links(fabric, flow, paths):
            rows.append(link)
            columns.append(len(carried))
            parts.append(part)
        carried.append(flow)
    used = sorted(set(rows))
    if len(used) * len(carried) > _MOST_ENTRIES:
        raise LocalrunError(f"{len(carried)} flows over {len(used)} links are too much to simulate: a smaller fabric")
    index = {link: i for i, link in enumerate(used)}
    usage = np.zeros((len(used), len(carried)))
    np.add.at(usage, ([index[link] for link in rows], columns), parts)
    capacity = np.array([fabric.uplink if link[0] in ("up", "down") else 1.0 for link in used])
    return Shares(tuple(carried), max_min_fair(usage, capacity), tuple(lost))


def _links(fabric: Fabric, flow: Flow, paths: list[int]) -> list[tuple[tuple, float]]:
    """Each link that a flow uses, with the part of the flow that goes over it."""
    a, b = flow.source // fabric.nodes_per_leaf, flow.target // fabric.nodes_per_leaf
    ends: list[tuple[tuple, float]]
    ends = [(("send", flow.plane, flow.source), 1.0), (("receive", flow.plane, flow.target), 1.0)]
    if paths == [-1]:
        return ends
    part = 1 / len(paths)
    ups = [(("up", flow.plane, a, spine), part) for spine in paths]
    return ends + ups + [(("down", flow.plane, spine, b), part) for spine in paths]


def max_min_fair(usage: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Rates, float64 (flows,), that no flow can exceed without taking from one that has no more.

    Args:
        usage: float64 (links, flows), the part of each flow that passes each link.
        capacity: float64 (links,).
    """
    rates = np.zeros(usage.shape[1])
    growing = np.ones(usage.shape[1], bool)
    left = capacity.astype(float)
    while growing.any():
        load = usage @ growing
        busy = load > 1e-12
        step = (left[busy] / load[busy]).min()
        rates[growing] += step
        left -= step * load
        full = busy & (left <= 1e-9 * capacity)
        growing &= ~(usage[full] > 0).any(axis=0)
    return rates


def incast(fabric: Fabric, plane: int, target: int) -> list[Flow]:
    """Every other node sends to one node on one plane: a congested receiver."""
    return [Flow(plane, source, target) for source in range(fabric.nodes) if source != target]


@dataclass(frozen=True)
class Kept:
    """Parts of the bandwidth that flows had before; what a flow gains does not count.

    Attributes:
        mean: of all flows.
        slowest: of the worst off, which an exchange of equal messages waits for.
        other_planes: of the worst off among the flows that were on other planes.
        lost: flows that found no way.
    """

    mean: float
    slowest: float
    other_planes: float
    lost: int


def robustness(fabric: Fabric, reroute: bool = True) -> dict[str, Kept]:
    """All-to-all on all planes while parts of plane 0 fail: a link, a spine, half the spines, a leaf, the plane.

    Args:
        reroute: whether nodes that lost plane 0 take other planes. If so, those carry more than before.
    """
    flows = all_to_all(fabric)
    before = simulate(fabric, flows).rates
    cases = {
        "one link": Failures(links=frozenset({(0, 0, 0)})),
        "one spine": Failures(spines=frozenset({(0, 0)})),
        "half the spines": Failures(spines=frozenset((0, spine) for spine in range(fabric.spines // 2))),
        "one leaf": Failures(leaves=frozenset({(0, 0)})),
        "the plane": Failures(planes=frozenset({0})),
    }
    return {name: _kept(fabric, flows, before, failures, reroute) for name, failures in cases.items()}


def _kept(fabric: Fabric, flows: list[Flow], before: np.ndarray, failures: Failures, reroute: bool) -> Kept:
    taken = rerouted(fabric, flows, failures) if reroute else flows
    after = simulate(fabric, taken, failures)
    rates = np.zeros(len(flows))
    rates[[bool(_paths(fabric, failures, flow)) for flow in taken]] = after.rates
    kept = np.minimum(1.0, rates / before)
    others = kept[[flow.plane != 0 for flow in flows]]
    return Kept(float(kept.mean()), float(kept.min()), float(others.min(initial=1.0)), len(after.lost))


def isolation(fabric: Fabric) -> dict[str, float]:
    """What the slowest flow of an all-to-all keeps, plane by plane, while all also send to node 0 on plane 0."""
    background = all_to_all(fabric)
    before = simulate(fabric, background).rates
    crowded = simulate(fabric, [*background, *incast(fabric, 0, 0)]).rates[: len(background)]
    kept = crowded / before
    planes = np.array([flow.plane for flow in background])
    return {f"plane {plane}": float(kept[planes == plane].min()) for plane in range(fabric.planes)}
