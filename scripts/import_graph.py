"""Counts who imports whom: python scripts/import_graph.py [ROOT]. The last line is JSON.

A room is a folder, or a module that lies at the top of its package. An arrow goes from a room to one that it imports.
Every import statement counts, wherever it stands: inside of functions, and under TYPE_CHECKING. A circle is a set of
modules each of which leads to all others; a floor is one more than the highest floor that a room or module imports.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGES = ("quant", "localrun", "cli")
Graph = dict[str, set[str]]


def modules_of(root: Path, packages: tuple[str, ...] = PACKAGES) -> dict[str, Path]:
    """Dotted name -> file of every module of the packages; __init__.py has its folder's name."""
    found = {}
    for path in sorted(path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(modules: Mapping[str, Path]) -> Graph:
    """Module -> those of the modules that it imports."""
    return {name: set(_imported(path, modules)) - {name} for name, path in modules.items()}


def _imported(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in inner if name in modules)
            if node.module in modules and not all(name in modules for name in inner):
                yield node.module


def room_of(module: str) -> str:
    """ "quant.gemm.packed" and "quant.gemm" -> "quant.gemm"; "quant.errors" -> itself."""
    return ".".join(module.split(".")[:2])


def rooms(graph: Graph) -> Graph:
    """The same between rooms."""
    found: Graph = {room_of(name): set() for name in graph}
    for name, imported in graph.items():
        found[room_of(name)] |= {room_of(other) for other in imported} - {room_of(name)}
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules that lead to each other, each and all sorted."""
    reach = {name: _reachable(graph, name) for name in graph}
    found = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return sorted(sorted(circle) for circle in found)


def _reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(graph[start])
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += graph[name]
    return seen


def floors(graph: Graph) -> int:
    """The length of the longest chain; what lies in one circle counts as one."""
    leader = {name: name for name in graph} | {name: circle[0] for circle in circles(graph) for name in circle}
    merged: Graph = {leader[name]: set() for name in graph}
    for name, imported in graph.items():
        merged[leader[name]] |= {leader[other] for other in imported} - {leader[name]}
    floor: dict[str, int] = {}
    for name in TopologicalSorter(merged).static_order():
        floor[name] = 1 + max((floor[other] for other in merged[name]), default=0)
    return max(floor.values(), default=0)


def summary(graph: Graph) -> dict[str, int]:
    """The numbers of a graph of modules."""
    between = rooms(graph)
    return {
        "modules": len(graph),
        "rooms": len(between),
        "arrows_between_modules": sum(map(len, graph.values())),
        "arrows_between_rooms": sum(map(len, between.values())),
        "circles_of_modules": len(circles(graph)),
        "circles_of_rooms": len(circles(between)),
        "floors_of_modules": floors(graph),
        "floors_of_rooms": floors(between),
    }


def main(root: Path) -> None:
    document = {}
    for packages in (("quant",), ("localrun",), PACKAGES):
        graph = import_graph(modules_of(root, packages))
        document[", ".join(packages)] = numbers = summary(graph)
        print(f"{', '.join(packages)}: " + ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in numbers.items()))
        for kind, found in (("modules", circles(graph)), ("rooms", circles(rooms(graph)))):
            for circle in found:
                print(f"  circle of {kind}: {', '.join(circle)}")
    print(json.dumps(document))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
