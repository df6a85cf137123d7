"""Level neon_dotprod: its kernels' instructions, and where an emulator of ARM is installed their results.

Nothing here has been run by an ARM CPU. On Debian: apt install qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kernels
import numpy as np
import pytest
from paths import SUPPORT

from quant.batch import MAX_BATCH
from quant.formats import registry
from quant.gemm import packed
from quant.gemm.microkernel_k_block import SIGNED_BYTES
from quant.gemv.activations import q8_ref
from quant.target import isa

GCC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
emulated = pytest.mark.skipif(not (shutil.which(GCC) and shutil.which(QEMU)), reason=f"needs {GCC} and {QEMU}")
x86 = pytest.mark.skipif("sse2" not in isa.host_features(), reason="compiled across, from x86")
# One of each kind: unsigned nibbles with minima, signed bytes, a table, 6 bits, 2 bits, a grid, no integers.
FORMATS = ("Q4_K", "Q8_0", "MXFP4", "Q6_K", "Q2_K", "Q5_0", "IQ2_XXS", "F16")
N_ROWS = 5
PANELS = ("Q4_K", "Q8_0", "MXFP4", "Q6_K", "Q2_K", "Q5_0")  # one of each kind, and twins


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, dict[str, str]]]]:
    """By features: the folder with object files, and assembly by format and function."""
    found = {}
    for features in ("dotprod", "dotprod,i8mm"):
        folder = tmp_path_factory.mktemp(features)
        command = [sys.executable, str(SUPPORT / "neon_kernels.py"), features, str(folder), *FORMATS]
        environment = os.environ | {"LOCALRUN_CACHE": str(folder), "LOCALRUN_ISA": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        found[features] = folder, json.loads(done.stdout)
    return found


def count(assembly: str) -> Counter[str]:
    """Instructions by name."""
    return Counter(re.findall(r"^\t([a-z]\w*)\t", assembly, re.MULTILINE))


@x86
@pytest.mark.parametrize("features", ["dotprod", "dotprod,i8mm"])
def test_products_of_bytes_are_dot_instructions(features: str, compiled: dict) -> None:
    for name, assembly in compiled[features][1].items():
        found = count(assembly["gemv"] + assembly["gemv_batch"])
        dots = found["sdot"] + found["usdot"]
        assert (dots > 8) == registry.get(name).integer, name
        assert found["usdot"] == 0 or "i8mm" in features, name
        if name in ("Q4_K", "Q8_0", "MXFP4", "Q6_K"):  # what LLVM makes of products that it must widen
            assert found["smull"] + found["smlal"] + found["umull"] < dots / 4, name
        if "tile" in assembly:  # of 1 to 6 tokens, 8 products of 4 columns for each 4 rows
            found = count(assembly["tile"])
            assert found["sdot"] + found["usdot"] == 2 * 8 * sum(range(1, 7)) and found["smull"] + found["umull"] == 0
            is_signed = packed.find(registry.get(name)).kind == SIGNED_BYTES
            assert (found["usdot"] > 0) == ("i8mm" in features and not is_signed), name
    assert count(compiled[features][1]["MXFP4"]["gemv"])["tbl"] > 4  # the table of 16 values


@x86
@emulated
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("features", ["dotprod", "dotprod,i8mm"])
def test_results_are_this_cpus(features: str, name: str, compiled: dict, tmp_path: Path) -> None:
    random, format_ = np.random.default_rng(5), registry.get(name)
    data = kernels.random_blocks(name, (N_ROWS, kernels.COLS), random)
    x = random.standard_normal((MAX_BATCH, kernels.COLS), np.float32)
    q8 = np.stack([kernels.record(row, format_) for row in x])
    objects = [str(compiled[features][0] / f"{name}.{part}.o") for part in ("gemv", "gemv_batch")]
    program = tmp_path / "program"
    subprocess.run([GCC, "-static", "-O1", str(SUPPORT / "neon_run.c"), *objects, "-o", str(program)], check=True)
    sizes = map(str, (N_ROWS, kernels.COLS, data.nbytes, q8.shape[1], len(q8)))
    command = [QEMU, "-cpu", "max", str(program), *sizes]
    done = subprocess.run(command, input=data.tobytes() + q8.tobytes(), capture_output=True, timeout=120, check=True)
    found = np.frombuffer(done.stdout, np.float32).reshape(2, len(q8), N_ROWS)
    expected = kernels.rounded(x, format_).astype(np.float64) @ kernels.oracle(name, data).astype(np.float64).T
    # Integer sums are exact; float32 sums of 1,536 products and their blocks' scales err by some 1e-7 each.
    size = np.abs(kernels.rounded(x, format_)) @ np.abs(kernels.oracle(name, data)).T
    assert (np.abs(found - expected) / size).max() < 2e-6
    assert kernels.same_bits(found[0], found[1]) or not format_.integer  # as of any level: a few tokens as one by one


def token_panel(q: np.ndarray, d: np.ndarray, kind: int, offset: int) -> bytes:
    """What quant.gemm.packed says of one block of tokens: q int8 (n, columns), d float32 (n, columns / 32)."""
    halves = q.reshape(*d.shape, 2, 16).sum(-1, dtype=np.int32)
    first, second = (halves[..., i] for i in range(2))
    words = {
        packed.AFFINE: (d * (first + second), 0 * d),
        packed.TWO_MINIMA: (d * first, d * second),
        packed.TWO_SCALES: [(packed.BIAS - offset * half).view(np.float32) for half in (first, second)],
    }.get(kind, ((packed.BIAS - offset * (first + second)).view(np.float32), 0 * d))
    fields = [q.reshape(*d.shape, 32), *(np.asarray(word, np.float32) for word in (d, *words))]
    parts = [field[:, k] for k in range(d.shape[1]) for field in fields]
    return b"".join(part.tobytes() for part in parts)


@x86
@emulated
@pytest.mark.parametrize("n_tokens", [1, 6])
@pytest.mark.parametrize("name", PANELS)
@pytest.mark.parametrize("features", ["dotprod", "dotprod,i8mm"])
def test_products_of_panels(features: str, name: str, n_tokens: int, compiled: dict, tmp_path: Path) -> None:
    random, format_, n_cols = np.random.default_rng(6), registry.get(name), 512
    data = kernels.random_blocks(name, (packed.ROWS, n_cols), random)
    q, d = q8_ref(random.standard_normal((n_tokens, n_cols), np.float32))
    panels, n_k_blocks = format_.panels, n_cols // packed.K_BLOCK
    tokens = token_panel(q, d, panels.kind, panels.offset)
    objects = [str(compiled[features][0] / f"{name}.{part}.o") for part in ("repack", "tile")]
    program = tmp_path / "program"
    subprocess.run([GCC, "-static", "-O1", str(SUPPORT / "neon_panels.c"), *objects, "-o", str(program)], check=True)
    sizes = (
        format_.row_bytes(n_cols), n_cols // format_.block, n_k_blocks, packed.part_bytes(panels.kind), len(tokens),
        n_tokens, packed.AHEAD,
    )  # fmt: skip
    command = [QEMU, "-cpu", "max", str(program), *map(str, sizes)]
    done = subprocess.run(command, input=data.tobytes() + tokens, capture_output=True, timeout=120, check=True)
    found = np.frombuffer(done.stdout, np.float32).reshape(n_tokens, packed.ROWS)
    x = (q.reshape(*d.shape, 32) * d[..., None].astype(np.float64)).reshape(n_tokens, n_cols)
    weights = kernels.oracle(name, data).astype(np.float64)
    assert (np.abs(found - x @ weights.T) / (np.abs(x) @ np.abs(weights).T)).max() < 2e-6  # as above


def test_the_level_is_no_step_of_x86() -> None:
    assert not isa.has(isa.NEON)
    assert isa.LEVELS[-1] == isa.NEON and isa.detect() != isa.NEON


def test_where_the_level_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, level in (({"neon"}, "generic"), ({"neon", "dotprod"}, isa.NEON), ({"neon", "i8mm"}, "generic")):
        monkeypatch.setattr(isa, "host_features", lambda features=features: frozenset(features))
        monkeypatch.setattr(isa, "_target_features", lambda features=features: frozenset(features))
        assert isa.detect() == level
    monkeypatch.setattr(isa, "LEVEL", isa.NEON)
    assert [level for level in isa.LEVELS if isa.has(level)] == ["generic", isa.NEON]
