"""localrun doctor: every finding on this machine and on machines made up, in narrow places, and in time."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import slow_but

from cli.main import run as command
from localrun import hardware
from localrun.bundled import model_path
from localrun.hardware import NumaNode
from localrun.measure import doctor
from localrun.measure.doctor import Finding
from localrun.placement import available
from localrun.placement.available import Gpu, NoGpu
from quant.target import kernel_cache, tuning
from quant.target.kernel_cache import Folder

NAMES = [
    *[
        "python",
        "packages",
        "cpu",
        "tuning",
        "cores",
        "load",
        "numa",
        "ram",
        "huge pages",
        "kernel cache",
        "memory",
        "gpu",
    ],
    "disk",
]


def run(*args: str, before: str = "true", **variables: str) -> subprocess.CompletedProcess[str]:
    line = f'{before}; exec "$0" -m cli.main doctor "$@"'
    environment = os.environ | variables
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *args], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.serial
def test_json_here() -> None:
    start = time.monotonic()
    done = run("--json")
    seconds = time.monotonic() - start
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert list(found) == NAMES
    for finding in found.values():
        assert set(finding) == {"status", "text", "advice", "data"}
        assert (finding["status"] == "warning") == bool(finding["advice"]) and finding["text"]
    assert found["packages"]["status"] == "ok"  # the tests' own environment is whole
    assert {"torch", "numba", "jinja2"} <= set(found["packages"]["data"])
    rates = found["memory"]["data"]
    assert "1" in rates and str(hardware.usable_cores()) in rates
    assert all(1e8 < rate["median"] <= rate["best"] < 1e13 for rate in rates.values())  # from a tape to a dream
    assert found["disk"]["data"]["path"] == str(model_path(None))
    assert found["disk"]["data"]["read_bytes_per_s"] > 1e6
    # 20 s is what users were promised, on a machine with nothing else to do; here a suite may run beside it.
    assert seconds < 20 + 5 * os.getloadavg()[0]


def test_a_table_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "READ_BYTES", 1 << 24)
    monkeypatch.setattr(hardware, "last_level_cache", lambda: 1 << 20)
    assert command(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.lstrip().startswith("->")]
    assert [line[9:24].strip() for line in lines] == NAMES
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}


@pytest.mark.slow
def test_a_forced_level_is_shown() -> None:
    found = json.loads(run("--json", LOCALRUN_ISA="generic").stdout)["cpu"]
    assert found["data"]["isa"] == "generic" and found["data"]["LOCALRUN_ISA"] == "generic"
    assert "level generic, forced by LOCALRUN_ISA" in found["text"]
    best = found["data"]["best_isa"]
    assert found["advice"] == ("" if best == "generic" else f"unset LOCALRUN_ISA to use {best}")


def test_refused_tiles_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.target import isa

    monkeypatch.delenv("LOCALRUN_ISA", raising=False)
    monkeypatch.setattr(isa, "host_features", lambda: isa.FEATURES["amx"])
    monkeypatch.setattr(isa, "LEVEL", "avx512_vnni")
    monkeypatch.setattr(isa, "REFUSED", "a trial product with AMX tiles came out wrong")
    found = doctor._cpu()
    assert found.advice == "a trial product with AMX tiles came out wrong: prompts use avx512_vnni instead"
    assert found.data["best_isa"] == found.data["isa"]


def test_a_wrong_level_is_a_finding() -> None:
    done = run("--json", LOCALRUN_ISA="sse9")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and list(found) == NAMES
    assert "LOCALRUN_ISA=sse9 is no level" in found["cpu"]["advice"]
    assert found["memory"]["text"] == "not measured" and found["disk"]["status"] in ("ok", "warning")


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v limits addresses on Linux only")
@pytest.mark.parametrize("kib", slow_but([1_400_000, 3_000_000], [1_400_000]))
def test_little_address_space(kib: int) -> None:
    """Somewhere between starting and nothing at all, every finding is there, and RAM is what is left."""
    done = run("--json", before=f"ulimit -v {kib}")
    found = json.loads(done.stdout)
    assert (done.returncode, list(found)) == (0, NAMES), done.stderr
    assert 0 <= found["ram"]["data"]["free"] < 1024 * kib


def test_no_place_for_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(tmp_path, "Read-only file system")
    monkeypatch.setattr(kernel_cache, "folder", lambda: folder)
    found = doctor._kernels()
    assert found.text == f"{tmp_path}, not used"
    assert (
        found.advice.startswith("Read-only file system, so every start compiles") and "LOCALRUN_CACHE" in found.advice
    )


def test_damaged_kernels_are_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "folder", lambda: Folder(tmp_path))
    assert not doctor._kernels().advice
    for name in ("one.kernel", "two.kernel"):
        (tmp_path / name).write_bytes(bytes(40))
    found = doctor._kernels()
    assert found.text == f"{tmp_path}, 2 kernels"
    assert found.advice == "2 of them are damaged; the next run compiles them anew"


@pytest.mark.parametrize(("path", "message"), [("/no/such", "/no/such: no such file or folder")])
def test_a_wrong_path_is_one_line(path: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", path]) == 1
    assert capsys.readouterr() == ("", f"localrun: {message}\n")


# --- machines made up


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch<2.14,>=2.6", "nosuch-thing>=3", "pytest>=8; extra == 'test'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    found = doctor._packages()
    assert list(found.data) == ["torch", "nosuch-thing"] and found.data["nosuch-thing"] is None
    assert found.advice == "missing: nosuch-thing; pip install nosuch-thing"


@pytest.mark.parametrize(
    ("logical", "quota", "allowed", "advice"),
    [
        (8, None, 8, ""),
        (16, None, 16, ""),
        (8, 3, 8, "a control group's quota leaves 3 of 8 cores"),
        (8, None, 2, "the CPU affinity leaves 2 of 8 cores"),
    ],
)
def test_cores(logical: int, quota: int | None, allowed: int, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "physical_cores", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: logical)
    monkeypatch.setattr(hardware, "_cores_of_mask", lambda root: min(allowed, 8))
    monkeypatch.setattr(hardware, "cpu_quota", lambda root=None: quota)
    found = doctor._cores()
    assert found.data["smt"] == (logical == 16) and found.advice.startswith(advice)
    assert bool(found.advice) == bool(advice)


def test_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hardware, "numa_nodes", lambda root=None: [NumaNode(0, "0-7", 2**34), NumaNode(1, "8-15", 2**34)]
    )
    found = doctor._numa()
    nodes = "node 0: cores 0-7, 16.0 GiB; node 1: cores 8-15, 16.0 GiB"
    assert found.text.startswith(nodes) and not found.advice
    monkeypatch.setattr(hardware, "usable_nodes", lambda: {0: (0,), 1: (8,)})
    assert doctor._numa().text.endswith("; workers and weights stay on each")
    monkeypatch.setattr(hardware, "numa_nodes", lambda root=None: [])
    assert doctor._numa() == Finding("numa", "not known", [])


def test_little_memory_and_much_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_ram", lambda: 1 << 30)
    monkeypatch.setattr(hardware, "busy_cores", lambda: 99.0)
    assert doctor._ram().status == doctor._load().status == "warning"
    monkeypatch.setattr(hardware, "free_ram", lambda: 1 << 34)
    monkeypatch.setattr(hardware, "busy_cores", lambda: 0.1)
    assert doctor._ram().status == doctor._load().status == "ok"


def test_no_memory_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant.threads import bandwidth

    def none_left(pool: Any, n_bytes: int) -> Any:
        raise MemoryError

    monkeypatch.setattr(bandwidth, "buffer", none_left)
    found = doctor._bandwidth()
    assert found.data is None and "ulimit -v" in found.advice


def with_gpu(monkeypatch: pytest.MonkeyPatch, found: Gpu | NoGpu, rate: float = 20e9) -> Finding:
    monkeypatch.setattr(available, "find", lambda *at: found)
    monkeypatch.setattr(doctor, "_copy_rate", lambda index: rate)
    return doctor._gpu(0)


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Gpu("Acme 5000", (8, 9), 24 << 30, 20 << 30, "570.86", "12.8")
    found, rest = with_gpu(monkeypatch, card), "24.0 GiB, 20.0 GiB free, driver 570.86, copies to it 20.0 GB/s"
    assert found.text == f"Acme 5000 (compute capability 8.9), {rest}"
    assert found.data["free_bytes"] == 20 << 30 and found.data["capability"] == [8, 9] and found.status == "ok"
    assert "lanes" in with_gpu(monkeypatch, card, rate=1.5e9).advice


def test_a_gpu_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> float:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(available, "find", lambda *at: Gpu("Acme 5000", (8, 9), 24 << 30, 20 << 30, "", "12.8"))
    monkeypatch.setattr(doctor, "_copy_rate", refuse)
    assert doctor._gpu(0).advice == "CUDA: CUDA error: out of memory"


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that cannot be used is a warning; none is how most machines are."""
    assert with_gpu(monkeypatch, NoGpu("Triton is not installed", True)).advice == "Triton is not installed"
    found = with_gpu(monkeypatch, NoGpu("there is no NVIDIA card", False))
    assert found == Finding("gpu", "none: there is no NVIDIA card", None) and found.status == "ok"


# --- disks


def test_the_read_rate_is_bytes_by_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads read a file of 10 chunks once, each chunk as it is in the file."""
    path, seen = tmp_path / "a.gguf", []
    path.write_bytes(b"".join(bytes([i]) * doctor._DISK_CHUNK for i in range(10)))
    real = os.preadv

    def preadv(fd: int, buffers: list[Any], offset: int) -> int:
        n_read = real(fd, buffers, offset)
        if n_read == doctor._DISK_CHUNK:
            seen.append((offset // doctor._DISK_CHUNK, buffers[0][0], buffers[0][-1]))
        return n_read

    monkeypatch.setattr(os, "preadv", preadv)
    start = time.perf_counter()
    rate, _ = doctor.read_rate(path)
    seconds = time.perf_counter() - start
    assert sorted(seen) == [(i, i, i) for i in range(10)]
    assert rate >= 10 * doctor._DISK_CHUNK / seconds


def test_reading_ends_in_time(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with open(path, "wb") as file:
        file.truncate(1 << 36)  # holes, but as long as a large model
    start = time.perf_counter()
    doctor.read_rate(path, seconds=0.2)
    assert time.perf_counter() - start < 5  # chunks under way are read to the end


def test_a_file_system_without_direct_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 100)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    rate, direct = doctor.read_rate(path)
    assert rate > 0 and not direct
    assert "perhaps from the file cache" in doctor._disk(path).text


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    for name, mib in (("large.bin", 9), ("small.gguf", 5), ("smaller.gguf", 4)):
        (tmp_path / name).write_bytes(bytes(mib << 20))
    assert doctor._disk(tmp_path).data["path"] == str(tmp_path / "small.gguf")
    (tmp_path / "none").mkdir()
    assert doctor._disk(tmp_path / "none").text.endswith("holds no file to read")
    assert doctor._disk(None).text == "not measured: no model is installed"


def test_a_slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(doctor, "read_rate", lambda path: (100e6, True))
    assert doctor._disk(tmp_path / "a").advice == "a model of 10 GB takes 100 s to come in; keep models on an SSD"


def test_libraries_that_cannot_be_loaded_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the rest of the machine is still looked at."""
    import quant.target
    import quant.threads

    monkeypatch.setattr(doctor, "_DISK_SECONDS", 0.01)
    for module in ("llama_cpp", "quant.target.isa", "quant.target.kernel_cache", "quant.threads.bandwidth"):
        monkeypatch.setitem(sys.modules, module, None)
    for package, name in ((quant.target, "isa"), (quant.target, "kernel_cache"), (quant.threads, "bandwidth")):
        monkeypatch.delattr(package, name, raising=False)
    assert command(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == NAMES
    for name in ("packages", "cpu", "kernel cache", "memory"):
        assert found[name]["status"] == "warning", name
    assert found["packages"]["advice"].endswith("pip install --force-reinstall llama-cpp-python")


@pytest.mark.parametrize(
    ("source", "advised", "said"),
    [("tuned", False, "measured here"), ("table", False, "of the table"), ("default", True, "nothing is known")],
)
def test_the_tuning_in_use(source: str, advised: bool, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = tuning.Tuning(interleaving_pays=source == "table")
    monkeypatch.setattr(tuning, "_of_this_cpu", lambda: tuning.Found(chosen, source))
    found = doctor._tuning()
    assert said in found.text and ("do not pay" in found.text) == (source != "table")
    assert ("localrun tune" in found.advice) == advised
    assert found.data == {"cpu": tuning.cpu(), "source": source, "tuning": tuning.as_json(chosen)}
