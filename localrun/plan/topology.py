"""Networks of switches: endpoints, switches, links and cost of fat trees, multi-plane fat trees, slim fly, dragonfly.

Links are those between switches; every endpoint has one cable more, which a price list counts apart. Sources: fat trees
of P-port switches as in Leiserson 1985 and Al-Fares 2008; Slim Fly, Besta and Hoefler, SC 2014 (MMS graphs of
parameter q = 4w + d, d in -1, 0, 1: 2 q^2 switches with (3q - d) / 2 ports to others); Dragonfly, Kim et al., ISCA 2008
(groups of a = 2h switches, p = h endpoints and h links to other groups each, at most a h + 1 groups). The published
table: arXiv 2505.09343, table 3.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.plan.known import load_data, read_json

MOST_PORTS = 4096
_MOST_DOLLARS = 1e12  # of one part


@dataclass(frozen=True)
class Topology:
    """A network's size.

    Attributes:
        links: between switches; short_links of them inside a group of neighbours.
        hops: switches on the longest of the shortest ways between two endpoints.
        note: what is particular about it.
    """

    name: str
    endpoints: int
    switches: int
    links: int
    hops: int
    note: str = ""
    short_links: int = 0


@dataclass(frozen=True)
class Prices:
    """Dollars for a switch, a link between switches (short or not) with its optics, an endpoint's cable with its."""

    switch: float
    link: float
    short_link: float
    endpoint: float
    source: str

    def cost(self, network: Topology) -> float:
        """Dollars of the whole network, without the endpoints' own adapters."""
        links = (network.links - network.short_links) * self.link + network.short_links * self.short_link
        return network.switches * self.switch + links + network.endpoints * self.endpoint


def load_prices(path: Path | None = None) -> Prices:
    """The price list in a JSON file, see Prices, or the one that comes along. Raises LocalrunError."""
    if path is None:
        return Prices(**load_data("prices"))
    return _parse_prices(read_json(path, str(path), "no such file"), path)


def _parse_prices(document: Any, path: Path) -> Prices:
    if not isinstance(document, dict):
        raise LocalrunError(f"{path}: holds no object; expected switch, link and endpoint")
    numbers = {}
    for key in ("switch", "link", "short_link", "endpoint"):
        value = document.get(key, document.get("link") if key == "short_link" else None)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= _MOST_DOLLARS:
            raise LocalrunError(f"{path}: {key} is {value!r}; expected dollars, 0 to {_MOST_DOLLARS:g}")
        numbers[key] = float(value)
    return Prices(**numbers, source=str(document.get("source", path)))


def fat_tree_2(ports: int, endpoints: int | None = None) -> Topology:
    """Leaves with half their ports down, spines over all of them; as many leaves as the endpoints need."""
    half = ports // 2
    leaves = ports if endpoints is None else math.ceil(endpoints / half)
    spines = math.ceil(leaves * half / ports)
    return Topology("FT2", leaves * half, leaves + spines, leaves * half, 3, f"{leaves} leaves, {spines} spines")


def multi_plane(ports: int, planes: int, endpoints: int | None = None) -> Topology:
    """Two-layer fat trees side by side; a node has an endpoint in each."""
    plane = fat_tree_2(ports, None if endpoints is None else math.ceil(endpoints / planes))
    note = f"{planes} planes of {plane.endpoints} endpoints; from plane to plane inside a node"
    return Topology("MPFT", planes * plane.endpoints, planes * plane.switches, planes * plane.links, 3, note)


def fat_tree_3(ports: int, endpoints: int | None = None) -> Topology:
    """Pods of edge and aggregation switches under a core; as many pods as the endpoints need."""
    half = ports // 2
    pods = ports if endpoints is None else math.ceil(endpoints / half**2)
    size = pods * half**2
    core = math.ceil(size / ports)
    return Topology("FT3", size, pods * ports + core, 2 * size, 5, f"{pods} pods")


def slim_fly(ports: int, endpoints: int | None = None) -> Topology:
    """The largest q whose switches have ports enough, or the smallest that has enough endpoints."""
    fitting = [q for q in range(3, ports) if _slim_fly_ports(q) <= ports]
    if not fitting:
        raise LocalrunError(f"a slim fly needs switches of at least {_slim_fly_ports(3)} ports; these have {ports}")
    q = fitting[-1] if endpoints is None else next((q for q in fitting if _slim_fly(q) >= endpoints), fitting[-1])
    between = _slim_fly_degree(q)
    note = f"q = {q}" + ("" if _is_prime_power(q) else ", no power of a prime: no such graph is known, sizes only")
    return Topology("SF", _slim_fly(q), 2 * q * q, q * q * between, 3, note)


def _slim_fly_degree(q: int) -> int:
    """Ports to other switches; q = 4w + 2 is taken as d = 0."""
    remainder = q % 4
    return (3 * q - {1: 1, 3: -1}.get(remainder, 0)) // 2


def _slim_fly_ports(q: int) -> int:
    return _slim_fly_degree(q) + math.ceil(_slim_fly_degree(q) / 2)


def _slim_fly(q: int) -> int:
    return 2 * q * q * math.ceil(_slim_fly_degree(q) / 2)


def _is_prime_power(q: int) -> bool:
    prime = next(p for p in range(2, q + 1) if q % p == 0)
    while q % prime == 0:
        q //= prime
    return q == 1


def dragonfly(ports: int, endpoints: int | None = None) -> Topology:
    """Balanced groups of 2h switches, h = (ports + 1) // 4; as many groups as the endpoints need."""
    h = (ports + 1) // 4
    if h < 1:
        raise LocalrunError(f"a dragonfly needs switches of at least 3 ports; these have {ports}")
    per_group = 2 * h
    most = per_group * h + 1
    # The published table has two groups fewer than the most that links allow, 511 of 513.
    groups = max(2, most - 2) if endpoints is None else min(most, max(2, math.ceil(endpoints / (per_group * h))))
    switches = groups * per_group
    local, between = groups * per_group * (per_group - 1) // 2, switches * h // 2
    note = f"{groups} groups of {per_group} switches"
    return Topology("DF", switches * h, switches, local + between, 4, note, short_links=local)


def compare(ports: int = 64, planes: int = 8, endpoints: int | None = None) -> list[Topology]:
    """All five: as large as switches of this many ports allow, or just large enough for the endpoints.

    Those that cannot be as large are left at their largest; see Topology.endpoints. Raises LocalrunError.
    """
    if not 4 <= ports <= MOST_PORTS or ports % 2:
        raise LocalrunError(f"switches of {ports} ports; expected an even number from 4 to {MOST_PORTS}")
    if not 1 <= planes <= ports:
        raise LocalrunError(f"{planes} planes; expected 1 to {ports}")
    if endpoints is not None and not 2 <= endpoints <= 10**9:
        raise LocalrunError(f"{endpoints} endpoints; expected 2 to 10^9")
    makers = (
        (lambda n: fat_tree_2(ports, n), fat_tree_2(ports).endpoints),
        (lambda n: multi_plane(ports, planes, n), multi_plane(ports, planes).endpoints),
        (lambda n: fat_tree_3(ports, n), fat_tree_3(ports).endpoints),
        (lambda n: slim_fly(ports, n), slim_fly(ports).endpoints),
        (lambda n: dragonfly(ports, n), dragonfly(ports).endpoints),
    )
    return [make(endpoints if endpoints is not None and endpoints <= most else None) for make, most in makers]


def as_rows(networks: list[Topology], prices: Prices) -> list[dict[str, Any]]:
    """Each network with its cost in dollars."""
    return [
        asdict(network) | {"cost": prices.cost(network), "cost_per_endpoint": prices.cost(network) / network.endpoints}
        for network in networks
    ]
