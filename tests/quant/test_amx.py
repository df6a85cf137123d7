"""Level amx: its kernels with emulated tiles against avx512_vnni's, their assembly, and when the level is taken.

What only a CPU with AMX can show is in test_results_are_those_of_avx512_vnni, skipped elsewhere.
"""

import ctypes
import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import kernels
import numpy as np
import pytest
from cases import slow_but
from llvmlite import ir
from numba import types
from paths import SUPPORT

from quant.errors import QuantError
from quant.formats import registry
from quant.gemm.amx_emulated import EmulatedTiles
from quant.gemm.microkernel_amx import shapes
from quant.simd.core import I64, define
from quant.target import amx, isa
from quant.target.jit import Kernel, kernel
from quant.threads.pool import aligned_bytes

vnni = pytest.mark.skipif(not isa.has("avx512_vnni"), reason="emulated tiles are AVX-512 VNNI code")


def run(script: str, *arguments: str, **variables: str) -> str:
    """stdout of one of this folder's programs."""
    command = [sys.executable, str(SUPPORT / script), *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- results ---------------------------------------------------------------------------------------------------------


PANEL_FORMATS = [format_ for name in registry.NAMES if (format_ := registry.get(name)).panels]
FEW = ("Q4_K",)  # has minima, which the rest of what a kind has is without
# Both levels make the same panels. What multiplies them differs by their kind: one format each.
EACH_KIND = tuple({format_.panels.kind: format_.name for format_ in PANEL_FORMATS}.values())
FORMATS = [(FEW, 45), (EACH_KIND, 220)]  # with the number of results


def results(folder: Path, level: str, *formats: str) -> dict[str, np.ndarray]:
    """panel_results.py at a level."""
    path = folder / f"{level}.npz"
    run("panel_results.py", str(path), *formats, LOCALRUN_ISA=level)
    return dict(np.load(path))


@vnni
@pytest.mark.parametrize("level", ["amx_emulated", "amx"])
@pytest.mark.parametrize(("formats", "at_least"), slow_but(FORMATS, FORMATS[:1]))
def test_results_are_those_of_avx512_vnni(level: str, formats: tuple[str, ...], at_least: int, tmp_path: Path) -> None:
    """To the bit: integer dot products are exact, and floats see the same operations in the same order."""
    if level == "amx" and isa.detect() != "amx":
        pytest.skip("no AMX tiles on this machine")
    want, found = (results(tmp_path, each, *formats) for each in ("avx512_vnni", level))
    assert found.keys() == want.keys() and len(want) > at_least
    assert [name for name in want if not np.array_equal(found[name], want[name])] == []
    assert all(np.isfinite(values).all() for values in want.values())


# ---- emulated tiles --------------------------------------------------------------------------------------------------


def _program(builder: ir.IRBuilder, file: ir.Value, config: ir.Value, a: ir.Value, b: ir.Value, c: ir.Value) -> None:
    """c += a @ b, with rows of 128, 96 and 80 bytes in memory."""
    tiles = EmulatedTiles(builder, file)
    tiles.configure(config)
    tiles.load(1, a, 128)
    tiles.load(2, b, 96)
    tiles.load(0, c, 80)
    tiles.add_product(0, 1, 2)
    tiles.store(0, c, 80)


def _use_released(builder: ir.IRBuilder, file: ir.Value, config: ir.Value) -> None:
    tiles = EmulatedTiles(builder, file)
    tiles.configure(config)
    tiles.release()
    tiles.zero(0)


if isa.has("avx512_vnni"):
    _run_program = define(types.void, (types.int64,) * 5, _program)
    _run_released = define(types.void, (types.int64,) * 2, _use_released)

    @kernel("void(int64, int64, int64, int64, int64)")
    def program(file, config, a, b, c):
        _run_program(file, config, a, b, c)

    @kernel("void(int64, int64)")
    def use_released(file, config):
        _run_released(file, config)


def _bytes(config: bytes) -> np.ndarray:
    return np.frombuffer(config, np.uint8).copy()


@vnni
def test_emulated_products_of_random_shapes() -> None:
    rng = np.random.default_rng(0)
    file = aligned_bytes(EmulatedTiles.FILE_BYTES)
    for _ in range(200):
        m, n, k = rng.integers(1, 17, 3)
        a, b = rng.integers(-128, 128, (m, 128), np.int8), rng.integers(0, 256, (k, 96), np.uint8)
        c = rng.integers(-(2**31), 2**31, (m, 20)).astype(np.int32)
        file[amx.CONFIG_BYTES :] = 0xFF  # of the program before
        before, columns = c.copy(), b[:, : 4 * n].reshape(k, n, 4).transpose(0, 2, 1).reshape(4 * k, n)
        kernels.call(program, file, _bytes(amx.config([(m, 4 * n), (m, 4 * k), (k, 4 * n)])), a, b, c)
        with np.errstate(over="ignore"):
            before[:, :n] += a[:, : 4 * k].astype(np.int32) @ columns.astype(np.int32)
        assert np.array_equal(c, before)  # nothing beyond the shape written
        tiles = file[amx.CONFIG_BYTES :].reshape(8, 16, 64)
        assert np.array_equal(tiles[0, :m, : 4 * n], c[:, :n].copy().view(np.uint8))
        assert not tiles[0, m:].any() and not tiles[0, :, 4 * n :].any()
        assert not tiles[1, m:].any() and not tiles[1, :, 4 * k :].any() and not tiles[3:].any()


def dies(kernel_: Kernel, *arguments: np.ndarray) -> bool:
    """Whether a kernel ends its process by an illegal instruction."""
    assert kernel_.address  # compiled before the fork
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        kernels.call(kernel_, *arguments)
        os._exit(0)
    return os.WIFSIGNALED(status := os.waitpid(child, 0)[1]) and os.WTERMSIG(status) == signal.SIGILL


def _changed(at: int, value: int) -> bytes:
    config = bytearray(amx.config([(4, 64), (4, 32), (8, 64)]))
    config[at] = value
    return bytes(config)


FAULTS = {
    "palette": _changed(0, 2),
    "start row": _changed(1, 1),
    "reserved byte": _changed(15, 1),
    "ninth register": _changed(32, 64),
    "rows": _changed(48, 17),
    "bytes of a row": _changed(20, 65),
    "bytes of a row, high byte": _changed(21, 1),
    "rows of nothing": _changed(16, 0),
    "nothing wide": _changed(50, 0),
    "no operand": amx.config([(4, 64), (4, 32)]),
    "other rows": amx.config([(5, 64), (4, 32), (8, 64)]),
    "other depth": amx.config([(4, 64), (4, 28), (8, 64)]),
    "other width": amx.config([(4, 64), (4, 32), (8, 60)]),
    "no multiple of 4": amx.config([(4, 62), (4, 32), (8, 62)]),
}


@vnni
@pytest.mark.parametrize("fault", FAULTS)
def test_emulated_faults(fault: str) -> None:
    memory = [np.zeros(2048, np.uint8) for _ in range(3)]
    assert not dies(program, aligned_bytes(EmulatedTiles.FILE_BYTES), _bytes(_changed(0, 1)), *memory)
    assert dies(program, aligned_bytes(EmulatedTiles.FILE_BYTES), _bytes(FAULTS[fault]), *memory)


@vnni
def test_emulated_tiles_are_gone_after_release() -> None:
    assert dies(use_released, aligned_bytes(EmulatedTiles.FILE_BYTES), _bytes(_changed(0, 1)))


# ---- assembly --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def assembly(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    if not isa.FEATURES["avx2"] <= isa.host_features():
        pytest.skip("compiling for another CPU takes an x86 with AVX2")
    return json.loads(run("amx_assembly.py", LOCALRUN_CACHE=cache, LOCALRUN_ISA=""))


def _tile_instructions(assembly: str) -> list[str]:
    """Mnemonics and registers, memory operands as `m`."""
    lines = re.findall(r"^\t(\w*tile\w*|tdp\w+|tcmm\w+)(?:\t(.*))?$", assembly, re.MULTILINE)
    return [f"{name} {re.sub(r'-?[0-9]*[(].*?[)]', 'm', operands)}".strip() for name, operands in lines]


def _step(is_last: bool) -> tuple[str, ...]:
    """The instructions of a product with 32 rows: a block of 12 tokens in tmm0, 1 and 4, the last one in 2, 3 and 5."""
    found = [f"tileloadd m, %tmm{4 + is_last}"]
    for part in range(2):
        sums, rows = f"%tmm{2 * is_last + part}", f"%tmm{6 + part}"
        found += [f"tileloadd m, {rows}", f"tilezero {sums}"]
        found += [f"tdpbsud {rows}, %tmm{4 + is_last}, {sums}", f"tilestored {sums}, m"]
    return tuple(found)


@pytest.mark.parametrize(
    ("name", "halves"), [("minimum", 1), ("minima", 1), ("offset", 1), ("bytes", 1), ("halves", 2)]
)
def test_tile_kernels_are_the_expected_instructions(assembly: dict[str, str], name: str, halves: int) -> None:
    """The weights second in AT&T order, as the unsigned operand; before the loop and in it, for 5 to 12 tokens."""
    found, length = _tile_instructions(assembly[name]), len(_step(False))
    steps = Counter(tuple(found[i : i + length]) for i in range(0, len(found), length))
    assert steps == {_step(is_last=True): 7 * 2 * halves, _step(is_last=False): 2 * halves}


def test_jobs_configure_and_release(assembly: dict[str, str]) -> None:
    assert _tile_instructions(assembly["multiply"]) == ["ldtilecfg m", "tilerelease"]


def test_nothing_is_called_but_addresses_given(assembly: dict[str, str]) -> None:
    """No function of a library stands in for an instruction, and nothing traps."""
    for name, text in assembly.items():
        body = text[: text.index("\t.size")]  # behind it comes Numba's wrapper
        assert re.findall(r"\t(?:call\w*\t+[^*]|ud2|int3).*", body) == []
        symbols = set(re.findall(r"movabsq\t\$([.\w]*[A-Za-z_][.\w]*)", body))
        assert symbols <= {"amx_configs"} | {s for s in symbols if s.startswith((".LJTI", ".LCPI"))}, name


@vnni
def test_shapes_belong_together() -> None:
    """Of every configuration, as TDPBSUD wants them: sums (n, 16), tokens (n, depth), weights (depth / 4, 16)."""
    for depth in (16, 32):
        for last in range(5, 12):
            registers = shapes(depth, 12, last)
            for n, sums, tokens in ((12, (0, 1), 4), (last, (2, 3), 5)):
                assert registers[tokens] == (n, depth) and all(registers[i] == (n, 64) for i in sums)
            assert registers[6] == registers[7] == (depth // 4, 64)


# ---- whether the level is taken --------------------------------------------------------------------------------------


@pytest.fixture
def with_amx(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As on a CPU with AMX, as far as features go; LOCALRUN_ISA unset."""
    monkeypatch.setattr(isa, "host_features", lambda: isa.FEATURES["amx"])
    monkeypatch.setattr(isa, "_target_features", lambda: isa.FEATURES["amx"])
    monkeypatch.delenv("LOCALRUN_ISA", raising=False)
    return monkeypatch


def test_granted_and_right_is_taken(with_amx: pytest.MonkeyPatch) -> None:
    with_amx.setattr(amx, "_request_permission", lambda: "")
    with_amx.setattr(amx, "_trial_agrees", lambda: True)
    assert isa.detect() == "amx" and isa._choose() == ("amx", "")


def test_permission_refused(with_amx: pytest.MonkeyPatch) -> None:
    with_amx.setattr(amx, "_request_permission", lambda: "No space left on device")
    with_amx.setattr(amx, "_trial_agrees", lambda: pytest.fail("tiles used without permission"))
    reason = "the operating system does not grant AMX tiles (No space left on device)"
    assert isa._choose() == ("avx512_vnni", reason)
    with_amx.setenv("LOCALRUN_ISA", "amx")
    with pytest.raises(QuantError, match=f"LOCALRUN_ISA=amx, but {re.escape(reason)}"):
        isa._choose()


def test_a_wrong_product_refuses(with_amx: pytest.MonkeyPatch) -> None:
    with_amx.setattr(amx, "_request_permission", lambda: "")
    with_amx.setattr(amx, "_trial_agrees", lambda: False)
    assert isa._choose() == ("avx512_vnni", "a trial product with AMX tiles came out wrong")


def test_a_lower_level_asks_nothing(with_amx: pytest.MonkeyPatch) -> None:
    with_amx.setattr(amx, "refusal", lambda: pytest.fail("asked"))
    with_amx.setenv("LOCALRUN_ISA", "avx512_vnni")
    assert isa._choose() == ("avx512_vnni", "")


@vnni
@pytest.mark.parametrize("wrong", [False, True])
def test_the_trial_product(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Itself, with emulated tiles."""
    file = aligned_bytes(EmulatedTiles.FILE_BYTES)

    class OnFile(EmulatedTiles):
        def __init__(self, builder: ir.IRBuilder, _: ir.Value):
            super().__init__(builder, I64(file.ctypes.data))

        def add_product(self, c: int, a: int, b: int) -> None:
            super().add_product(c, a, b)
            if wrong:
                super().add_product(c, a, b)

    monkeypatch.setattr(amx, "Tiles", OnFile)
    assert amx._trial_agrees() is not wrong


@pytest.mark.skipif(sys.platform != "linux", reason="arch_prctl is Linux's")
def test_permission_is_what_the_kernel_says_was_granted() -> None:
    """ARCH_GET_XCOMP_PERM (0x1022), bit 18; nothing where the kernel knows no such permissions."""
    refused, granted = amx._request_permission(), ctypes.c_uint64(0)
    ctypes.CDLL(None).syscall(ctypes.c_long(158), ctypes.c_long(0x1022), ctypes.byref(granted))
    assert (refused == "") == bool(granted.value >> 18 & 1)
