"""The shape of the program: imports run one way, light commands stay light, and weights stay in their blocks.

MAY_IMPORT is the contract: the rooms of quant, of localrun and of its GPU half (folders, and modules that lie in none)
from the lowest floor up, each with the rooms that it may import. Whoever needs a new arrow adds it here, if it points
down.
"""

from __future__ import annotations

import ast
import functools
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from paths import ROOT, SCRIPTS

import localrun
from localrun.network.model import Network
from quant.target.kernel import Kernel
from quant.threads.pool import Pool

GRAPH = runpy.run_path(str(SCRIPTS / "import_graph.py"))
MAY_IMPORT = {
    "quant": {
        "errors": "",
        "batch": "",
        "target": "batch errors",
        "simd": "target",
        "block_format": "errors target",
        "matrix": "errors target simd block_format",
        "threads": "errors target simd",
        "gemv": "batch target simd block_format",
        "gemm": "target simd block_format matrix threads",
        "quantize": "errors target simd block_format threads",
        "formats": "batch errors target simd block_format gemv gemm quantize",
        "ops": "batch errors target simd matrix threads gemv gemm",
        "decode": "batch errors target simd matrix threads gemv gemm",
    },
    "localrun": {
        "errors": "",
        "hardware": "",
        "limits": "",
        "arguments": "errors",
        "turn": "errors",
        "workers": "arguments errors hardware",
        "files": "errors",
        "pictures": "errors files",
        "hub": "errors files",
        "bundled": "errors files hub",
        "gguf": "errors files hardware",
        "models": "errors gguf",
        "placement": "arguments errors hardware limits gguf models",
        "network": "errors limits models",
        "ranks": "errors hardware limits gguf models placement network",
        "cpu": "hardware limits gguf models network ranks",
        "gpu": "errors files hardware limits gguf models placement network ranks cpu",
        "backends": "errors limits gguf",
        "text": "arguments errors files gguf backends",
        "runtime": "gguf text turn",
        "generate": "arguments errors files text runtime",
        "convert": "errors files gguf models text",
        "plan": "errors files pictures hardware limits bundled gguf models placement cpu gpu convert",
        "opening": "errors hardware gguf models placement ranks cpu gpu runtime plan",
        "engine": "arguments bundled errors limits gguf models placement ranks backends text turn workers runtime "
        "generate opening",
        "serve": "arguments errors files limits hardware ranks text generate engine",
        "measure": "errors files pictures hardware limits gguf models placement network ranks cpu backends generate "
        "engine",
    },
    "localrun.gpu": {
        "ways": "",
        "compiling": "",
        "tiles": "",
        "e4m3": "",
        "formats": "",
        "handover": "",
        "device": "ways tiles handover",
        "streams": "",
        "matrices": "tiles e4m3 formats",
        "caches": "e4m3",
        "attention": "tiles e4m3 matrices caches",
        "experts": "tiles formats device matrices",
        "weights": "device streams matrices experts",
        "prefill": "",
        "means": "prefill",
        "tuning": "device caches experts prefill",
        "decode": "device caches experts",
        "hybrid": "ways compiling device caches attention weights prefill means tuning decode",
        "proof": "ways tiles formats device streams matrices caches attention experts weights hybrid",
    },
}
# The public face, for the version and, as its users do, load().
MAY_IMPORT_THE_PACKAGE = {"convert", "plan", "ranks", "serve"}
# Package: what no module of it may import, anywhere in it.
FORBIDDEN = {
    "quant": {"localrun", "cli", "torch", "gguf", "typer", "rich", "prompt_toolkit", "transformers", "safetensors"},
    "localrun": {"cli", "typer", "rich", "prompt_toolkit", "transformers"},
    "cli": {"transformers"},
}
# What a module of them imports all the same: convert --check compares with transformers where that is installed; the
# codebooks of a few formats are tables of gguf's.
ALLOWED = {"localrun/measure/reference.py": {"transformers"}, "quant/formats/codebooks.py": {"gguf"}}
HEAVY = {"torch", "numba", "llvmlite", "llama_cpp", "transformers", "safetensors"}
MODULES = sorted(path for package in FORBIDDEN for path in (ROOT / package).rglob("*.py"))
LIBRARIES = [path for path in MODULES if path.relative_to(ROOT).parts[0] != "cli"]
CLI = [path for path in MODULES if path not in LIBRARIES]
LIGHT = ["import localrun", "from localrun import LocalrunError", "import localrun.errors"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Top-level names of what import statements among nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module.split(".")[0])
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), path)


@functools.cache
def import_graph(*packages: str) -> dict[str, set[str]]:
    """Module -> modules that it imports, under TYPE_CHECKING and within functions as well."""
    return GRAPH["import_graph"](GRAPH["modules_of"](ROOT, packages))


def test_all_packages_are_looked_at() -> None:
    assert {name_of(path).split("/")[0] for path in MODULES} == set(FORBIDDEN)
    assert {"quant/ops/linear.py", "localrun/engine.py", "localrun/backends/llama_cpp.py"} <= set(map(name_of, MODULES))
    graph = import_graph(*FORBIDDEN)
    assert len(graph) == len(MODULES)
    assert "localrun.generate.session" in graph["localrun.engine"]  # on top of the file
    assert "localrun.gpu.hybrid" in graph["localrun.opening"]  # in a function
    assert "localrun.engine" in graph["cli.generate"]  # under TYPE_CHECKING


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_packages_import_one_way(path: Path) -> None:
    package = name_of(path).split("/")[0]
    assert not imports(ast.walk(tree_of(path))) & (FORBIDDEN[package] - ALLOWED.get(name_of(path), set()))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_contract_points_down(package: str) -> None:
    below: set[str] = set()
    for room, allowed in MAY_IMPORT[package].items():
        assert set(allowed.split()) <= below, f"{room} climbs"
        below.add(room)


def graph_of(package: str) -> dict[str, set[str]]:
    """As import_graph, of a package's modules alone."""
    inside = f"{package}."
    graph = import_graph(package.split(".")[0])
    return {
        module: {other for other in others if other == package or other.startswith(inside)}
        for module, others in graph.items()
        if module.startswith(inside)
    }


def room_of(module: str, package: str) -> str:
    """ "quant.gemm.packed" of "quant" -> "gemm"; "" for the package itself."""
    return module.removeprefix(package).removeprefix(".").split(".")[0]


def may_import(package: str, room: str, other: str) -> bool:
    if not other:
        return room in MAY_IMPORT_THE_PACKAGE
    return other in (room, *MAY_IMPORT[package][room].split())


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_rooms_import_what_the_contract_allows(package: str) -> None:
    graph = graph_of(package)
    assert {room_of(module, package) for module in graph} == set(MAY_IMPORT[package])
    wrong = [
        f"{module} -> {other}"
        for module in sorted(graph)
        for other in sorted(graph[module])
        if not may_import(package, room_of(module, package), room_of(other, package))
    ]
    assert not wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_contract_allows_nothing_that_nobody_needs(package: str) -> None:
    imported: dict[str, set[str]] = {room: set() for room in MAY_IMPORT[package]}
    for module, others in graph_of(package).items():
        imported[room_of(module, package)] |= {room_of(other, package) for other in others}
    for room, allowed in MAY_IMPORT[package].items():
        assert not set(allowed.split()) - imported[room], room


def test_circles_and_floors_are_counted(tmp_path: Path) -> None:
    """Of four modules in two folders: a and b import each other, one for its types and one in a function."""
    sources = {
        "low/c.py": "import sys\n",
        "low/b.py": "def f():\n    from package.high import a\n",
        "high/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.low.b import f\n",
        "high/d.py": "import package.high.a\nfrom package.low import b, c\n",
    }
    for name, source in sources.items():
        (tmp_path / "package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "package" / name).write_text(source)
    graph = GRAPH["import_graph"](GRAPH["modules_of"](tmp_path, ("package",)))
    assert GRAPH["circles"](graph) == [["package.high.a", "package.low.b"]]
    assert GRAPH["rooms"](graph) == {"package.low": {"package.high"}, "package.high": {"package.low"}}
    assert (sum(map(len, graph.values())), GRAPH["floors"](graph)) == (5, 2)


def test_no_circles() -> None:
    """Neither of modules, nor, which the contract leaves no room for, of folders."""
    graph = import_graph(*FORBIDDEN)
    assert GRAPH["circles"](graph) == []


@pytest.mark.parametrize("path", LIBRARIES, ids=name_of)
def test_libraries_print_nothing(path: Path) -> None:
    """Only cli writes to the terminal. Programs of their own are read by their parents."""
    names = {node.id for node in ast.walk(tree_of(path)) if isinstance(node, ast.Name)}
    attributes = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    is_program = path.name.endswith("_child.py")
    assert "print" not in names
    assert not attributes & {"sys.stderr", *(() if is_program else ("sys.stdout",))}


@pytest.mark.parametrize("path", CLI, ids=name_of)
def test_cli_modules_import_heavy_libraries_where_they_use_them(path: Path) -> None:
    assert not imports(iter(tree_of(path).body)) & (HEAVY | {"gguf", "numpy"})


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a new interpreter has after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement", ["import localrun", "from localrun import LocalrunError", "import localrun.errors"]
)
def test_importing_localrun_is_light(statement: str) -> None:
    assert not loaded_by(statement) & (HEAVY | {"gguf", "numpy", "jinja2"})


def test_importing_the_command_line_is_light() -> None:
    loaded = loaded_by("import cli.app")
    assert "typer" in loaded and not loaded & (HEAVY | {"gguf"})


@pytest.mark.parametrize(
    "module", ["localrun.models.reader", "localrun.gguf.file", "localrun.generate.sampling", "localrun.bundled"]
)
def test_reading_a_header_needs_no_torch(module: str) -> None:
    """What inspect needs."""
    assert not loaded_by(f"import {module}") & HEAVY


# ------------------------------------------------------------------------------------- weights stay in their blocks


def reachable(root: object) -> Iterator[object]:
    """Every object that root's attributes and containers lead to, but kernels and the workers' scratch memory."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | type(sys) | Kernel | Pool):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, dict):
            pending += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            pending += thing
        if not isinstance(thing, torch.Tensor | np.ndarray):
            pending += getattr(thing, "__dict__", {}).values()
            pending += [getattr(thing, slot) for slot in getattr(type(thing), "__slots__", ()) if hasattr(thing, slot)]


VARIANTS = ["v3", "v3-legacy-kv-b", "v3-fused-gate-up", "v2-lite", "llama", "llama-rope-freqs", "wide"]


@pytest.mark.parametrize("type_", ["F32", "F16", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_layer_holds_dequantised_weights(variant: str, type_: str) -> None:
    """Tensors of the model are its vectors; arrays are views of the mapped file. Also after it has been used."""
    with localrun.load(tiny_models.shared(variant, type=type_), threads=1, ctx=64) as model:
        model.logits([1, 2, 3])
        list(model.session().tokens([1, 2, 3], localrun.Sampling(temperature=0.0), max_tokens=2))
        vectors = [tensor for tensor in model.file.tensors.values() if len(tensor.shape) == 1]
        mapped = [(t.data.ctypes.data, t.data.ctypes.data + t.n_bytes) for t in model.file.tensors.values()]
        assert isinstance(model.model.network, Network)
        things = list(reachable(model.model.network))
        tensors = {t.data_ptr(): t for t in things if isinstance(t, torch.Tensor)}
        rope_bytes = 8 * model.config.qk_rope_head_dim // 2 * (1 + 3)  # frequencies, float64; the last prompt's turns
        assert sum(t.nbytes for t in tensors.values()) <= 4 * sum(t.shape[0] for t in vectors) + rope_bytes
        assert len(tensors) >= 2 * model.config.num_hidden_layers  # the walk has found the layers
        arrays = [thing for thing in things if isinstance(thing, np.ndarray) and thing.nbytes > 4096]
        assert len(arrays) >= 4 * model.config.num_hidden_layers
        for array in arrays:
            start = array.ctypes.data
            assert any(first <= start and start + array.nbytes <= end for first, end in mapped)
