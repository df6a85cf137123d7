"""The first run on a machine compiles kernels and says so; later ones find them."""

import fcntl
import os
import subprocess
import sys
import zlib
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
from cases import slow_but

import localrun
from localrun.cpu import warmup
from localrun.cpu.model import NativeModel
from localrun.gguf.file import open_gguf
from localrun.models.reader import read_config
from quant.target import isa, kernel_cache

# All kernels of a model's steps; or one module's, without a model that would need the others.
PROGRAMS = {
    "all": "localrun.load(sys.argv[1], threads=1, ctx=8, progress=show, notice=notice).close()",
    "few": """
from localrun.cpu import warmup
warmup.hardware.usable_cores = lambda: 1
kernels = warmup.Kernels({"quant.decode.attention": "decoding: attention"}, ["F32"], ["gemv", "gemv_batch", "expand"])
warmup.warm_up(kernels, show, notice)
""",
}
START = """
import sys, localrun
show = (lambda done, total, what: print(done, total, what)) if sys.argv[2] == "progress" else None
notice = lambda line: print("notice:", line)
"""


def load(cache: Path, how: str, which: str) -> list[str]:
    arguments = [sys.executable, "-c", START + PROGRAMS[which], str(tiny_models.shared("llama-mha")), how]
    environment = os.environ | {"LOCALRUN_CACHE": str(cache)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.first
@pytest.mark.parametrize(("which", "n_kernels"), slow_but([("few", 3), ("all", 15)], {("few", 3)}))
def test_only_the_first_run_compiles_and_says_so(which: str, n_kernels: int, tmp_path: Path) -> None:
    first = load(tmp_path, "quiet", which)
    assert first == ["notice: first run on this machine: compiling the kernels, which takes a while"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")}
    assert len(kept) > n_kernels
    steps = [line.split(" ", 2) for line in load(tmp_path, "progress", which)]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.kernel")} == kept
    done, totals, names = zip(*steps, strict=True)
    assert [int(n) for n in done] == list(range(len(steps))) and set(totals) == {str(len(steps) - 1)}
    assert "Kernels: decoding: attention" in names and "Kernels: F32" in names


@pytest.mark.parametrize("variant", ["llama-mha", "qwen3moe", "v3-nextn", "v2-lite"])
def test_a_reply_needs_no_other_kernels_than_its_list(variant: str) -> None:
    with localrun.load(tiny_models.shared(variant), threads=1, ctx=16) as model:
        types = {tensor.type.name for tensor in model.file.tensors.values()}
        known = {id(kernel) for kernel, _ in warmup.needed(warmup.for_steps(model.model.config, types))}
        phases = model.model._step.program._phases
        needed = {kernel.__name__: id(kernel) for phase in phases for kernel in (phase.prepare, phase.run)}
        assert not [name for name, kernel in needed.items() if kernel not in known]


@pytest.mark.parametrize(("latent", "rope", "bits"), [(64, 16, {8, 16}), (32, 16, {16}), (48, 16, set()), (64, 8, {8})])
def test_attention_in_integers_is_listed_where_rows_fit(latent: int, rope: int, bits: set[int]) -> None:
    with open_gguf(tiny_models.shared("v2-lite")) as file:
        config = replace(read_config(file), num_attention_heads=16, kv_lora_rank=latent, qk_rope_head_dim=rope)
    for n_bits in (8, 16):
        listed = f"quant.decode.attention_i{n_bits}" in warmup.for_steps(config, {"Q8_0"}, n_bits).modules
        assert listed == (n_bits in bits and isa.has("avx512_vnni"))


def test_the_networks_kernels_come_when_it_does() -> None:
    asked = []
    with ExitStack() as stack:
        file = stack.enter_context(open_gguf(tiny_models.shared("llama-mha")))
        model = NativeModel(read_config(file), file, 1, warm_up=lambda: asked.append(1))
        stack.callback(model.close)
        model.forward([1, 2], model.new_cache(8))
        assert not asked
        model.prepare()
        model.prepare()
    assert asked == [1]


@pytest.mark.parametrize(("stopped", "expected"), [(False, {"_step", "_nothing"}), (True, set())])
def test_a_child_leaves_out_what_another_process_is_at(
    stopped: bool, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "localrun" / "kernels" / kernel_cache.folder().path.name
    monkeypatch.setenv("LOCALRUN_CACHE", str(tmp_path))
    folder.mkdir(parents=True, mode=0o755)
    module = "quant.decode.program"
    with (folder / "compiling.lock").open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, zlib.crc32(f"{module}._begin".encode()))
        child = warmup.start_child(warmup.Kernels({module: "decoding"}, [], []))
        if stopped:
            child.stdin.close()
        assert child.wait(60) == 0
    assert {path.stem.rsplit(".", 1)[1] for path in folder.glob("*.kernel")} == expected
