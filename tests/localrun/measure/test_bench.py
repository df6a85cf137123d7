"""localrun bench: bytes a token, rates, who runs when, what is printed, and what is refused."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import tiny_models
from paths import SCRIPTS

import localrun
from cli.main import run as command
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.measure import bench
from localrun.measure.llama_cpp_compare import TimedLlamaCpp
from localrun.models import summary
from localrun.models.reader import read_config


def read_bytes(path: Path) -> int:
    with open_gguf(path) as file:
        return summary.weight_bytes_per_token(file, read_config(file))


def sizes(path: Path) -> dict[str, int]:
    """Bytes of each tensor, by gguf's own reader."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def test_a_dense_model_reads_all_but_the_embedding() -> None:
    path = tiny_models.shared("llama", type="Q8_0")
    n_bytes = sizes(path)
    embedding = n_bytes.pop("token_embd.weight")
    assert read_bytes(path) == sum(n_bytes.values()) + embedding // 320


def test_a_tied_head_is_read_whole() -> None:
    path = tiny_models.shared("llama-tied", type="Q8_0")
    n_bytes = sizes(path)
    assert read_bytes(path) == sum(n_bytes.values()) + n_bytes["token_embd.weight"] // 320


@pytest.mark.parametrize("variant", ["v3", "v3-fused-gate-up", "v3-nextn"])
def test_the_chosen_experts_only(variant: str) -> None:
    """4 of 16 experts; the layer for multi-token prediction (the fifth of v3-nextn) is not run."""
    path = tiny_models.shared(variant, type="Q8_0")
    n_bytes = {name: size for name, size in sizes(path).items() if variant != "v3-nextn" or "blk.4." not in name}
    experts = sum(size for name, size in n_bytes.items() if "_exps." in name)
    embedding = n_bytes["token_embd.weight"]
    assert experts > 0 and read_bytes(path) == sum(n_bytes.values()) - experts * 12 // 16 - embedding * 319 // 320


class Fake:
    """An engine that takes the time it is told, and notes what runs when."""

    def __init__(self, log: list[tuple[str, float, float]], name: str, token_s: float) -> None:
        self.description = {"weights": "none"}
        self.log, self.name, self.token_s = log, name, token_s

    def _work(self, seconds: float) -> float:
        start = time.perf_counter()
        time.sleep(seconds)
        self.log.append((self.name, start, time.perf_counter()))
        return time.perf_counter() - start

    def hold(self, ids: Sequence[int]) -> None:
        pass

    def prompt(self, ids: Sequence[int]) -> float:
        return self._work(len(ids) * self.token_s)

    def generate(self, ids: Sequence[int]) -> list[float]:
        return [self._work(self.token_s) for _ in ids]


@pytest.fixture(scope="module")
def engine() -> Any:
    with localrun.load(tiny_models.shared("v3", type="Q8_0"), threads=2, ctx=64) as engine:
        yield engine


@pytest.mark.serial
def test_engines_take_turns(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, float, float]] = []
    monkeypatch.setattr(bench, "Native", lambda engine: Fake(log, "ours", 0.002))
    document = bench.run(engine, bench.Settings(10, 4, 3), Fake(log, "theirs", 0.001))
    names = [name for name, _, _ in log]
    one = ["ours"] + ["theirs"] + ["ours"] * 4 + ["theirs"] * 4
    assert names == ["ours"] * 5 + ["theirs"] * 5 + one * 3  # a warm-up, then three repetitions
    for (before, _, end), (after, start, _) in pairwise(log):
        assert end <= start
        if before != after:
            assert start - end >= bench.IDLE_S  # threads of the other have gone to sleep
    ours, theirs = document["results"], document["against"]["results"]
    # A sleep takes at least as long as it is told: rates are upper bounds.
    for results, limit in ((ours, 500), (theirs, 1000)):
        assert set(results) == {"pp10", "tg4"}
        for result in results.values():
            assert 0.02 * limit < result["mean"] <= limit  # a busy machine wakes sleepers late
            assert result["median"] <= result["best"] <= limit
            assert result["mean"] == pytest.approx(statistics.mean(result["repetitions"]), rel=1e-3)
            assert result["deviation"] == pytest.approx(statistics.stdev(result["repetitions"]), abs=2e-3)
            assert len(result["repetitions"]) == 3
    assert document["ratio"]["tg4"] == pytest.approx(ours["tg4"]["median"] / theirs["tg4"]["median"], rel=2e-3)


def test_what_is_read_and_could_be(engine: Any) -> None:
    document = bench.run(engine, bench.Settings(8, 8, 2))
    n_bytes, read = document["weight_bytes_per_token"], document["read_bytes_per_s"]
    assert n_bytes == read_bytes(engine.file.path)
    assert 0 < read["median"] <= read["best"]
    assert document["weight_bytes_per_s"] == pytest.approx(n_bytes * document["results"]["tg8"]["median"], rel=1e-3)
    expected = document["weight_bytes_per_s"] / read["median"]
    assert document["fraction_of_read"] == pytest.approx(expected, abs=6e-4)  # three digits
    assert 0 < document["fraction_of_read"] < 1  # the tiny model's time is spent elsewhere
    assert document["repetitions"] == 2 and document["threads"] == 2 and document["isa"]
    assert {"cpu", "cores", "ram_bytes"} <= set(document["machine"])
    assert {"python", "numba", "torch", "localrun"} <= set(document["versions"])


def test_one_kind_only(engine: Any) -> None:
    assert set(bench.run(engine, bench.Settings(8, 0, 1))["results"]) == {"pp8"}
    document = bench.run(engine, bench.Settings(0, 3, 1))
    assert set(document["results"]) == {"tg3"} and document["results"]["tg3"]["deviation"] == 0


def test_behind_contexts_that_are_read_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, int]] = []  # tokens before, and tokens of each evaluation
    forward = engine.model.forward
    monkeypatch.setattr(
        engine.model,
        "forward",
        lambda ids, cache: (steps.append((cache.length, len(ids))), forward(ids, cache))[1],
    )
    monkeypatch.setattr(engine, "speculative", "off")
    document = bench.run(engine, bench.Settings(20, 2, 2, depths=(0, 12, 30)))
    assert list(document["results"]) == ["pp20", "tg2", "pp20 @ d12", "tg2 @ d12", "pp20 @ d30", "tg2 @ d30"]
    warm_up = [(0, 20), (0, 1), (1, 1)]
    assert steps == [
        *warm_up,
        *[(0, 20), (0, 1), (1, 1)] * 2,
        *[(0, 12), *[(12, 20), (12, 1), (13, 1)] * 2],
        *[(12, 18), *[(30, 20), (30, 1), (31, 1)] * 2],
    ]
    assert document["weight_bytes_per_s"] == pytest.approx(
        document["weight_bytes_per_token"] * document["results"]["tg2"]["median"], rel=1e-3
    )


def test_the_map_is_read_in_whole(engine: Any) -> None:
    """Every tensor lies in the one run of the file, which holds little else."""
    tensors, runs = engine.file.tensors.values(), bench._runs(engine.file)
    assert len(runs) == 1
    for tensor in tensors:
        address = tensor.data.ctypes.data
        assert sum(start <= address and address + tensor.n_bytes <= start + size for start, size in runs) == 1
    padding = 32 * len(tensors)  # GGUF's alignment
    assert sum(size for _, size in runs) <= sum(tensor.n_bytes for tensor in tensors) + padding


def _used(runner: TimedLlamaCpp) -> list[Any]:
    return [runner._contexts[flash] for flash in {runner._for_prompt, runner._for_reply}]


def _length(context: Any) -> int:
    """Tokens of the first sequence."""
    return llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(context), 0) + 1


@pytest.mark.serial
@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_llama_cpp_runs_the_same_file(variant: str) -> None:
    path = tiny_models.shared(variant, type="Q8_0")
    with open_gguf(path) as file:
        runner = TimedLlamaCpp(file, 2, 40)
        runner.prompt([1, 2, 3] * 13)
        runner.hold([])
        seconds = runner.generate([1, 2, 3, 4, 5])
        assert len(seconds) == 5 and min(seconds) > 0
        assert set(runner.description["flash_attention"]) == {"prompt", "generation"}
        for held in ([4] * 5, [4] * 5, [5] * 9):
            runner.hold(held)
            assert {_length(context) for context in _used(runner)} == {len(held)}
            runner.prompt([1, 2, 3])
            assert _length(runner._contexts[runner._for_prompt]) == len(held) + 3
        time.sleep(bench.IDLE_S)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.1  # its threads sleep: one that spun would use all of the 0.2 s
        runner.close()


def test_command_json_against_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_models.shared("v3", type="Q8_0"))
    assert (
        command(["bench", path, "-p", "20", "-n", "5", "-r", "2", "-t", "2", "--against", "llama.cpp", "--json"]) == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == path
    assert set(document["ratio"]) == set(document["ratio_of_best"]) == {"pp20", "tg5"}
    assert set(document["against"]["results"]) == {"pp20", "tg5"}
    assert document["against"]["threads"] == document["threads"] == 2


LLAMA_BENCH = """#!{python}
import json, sys
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(__file__ + ".log", "a") as log:
    print(*sys.argv[1:], file=log)
if "-d" in args and args.get("-old"):
    sys.exit("error: unknown argument: -d")
n_tokens = int(args["-p"]) + int(args["-n"])
print("[", "=== Adjusted tensors {{of one kind}} ===", sep="\\n")  # as ik_llama.cpp's does
print(json.dumps({{"n_depth": args.get("-d"), "samples_ns": [n_tokens * 1_000_000]}}), "]", sep="\\n")
"""


@pytest.fixture
def llama_bench(tmp_path: Path) -> Path:
    """A program with the options of one that takes a millisecond a token; its log lies beside it."""
    path = tmp_path / "llama-bench"
    path.write_text(LLAMA_BENCH.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_command_against_another_llama_bench(
    llama_bench: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, picture = str(tiny_models.shared("v3", type="Q8_0")), tmp_path / "x.svg"
    args = ["bench", model, "-p", "20", "-n", "5", "-r", "2", "-t", "2", "-d", "0,9", "--plot", str(picture)]
    assert command([*args, "--against", f"ik:'{llama_bench}' -rtr 1"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[-2:] for line in out.splitlines() if " ik " in f" {line} "][:4] == [["1000.00", "1000.00"]] * 4
    assert "times as fast as ik (best by best" in out and picture.read_text().count("<svg") == 1
    runs = [line.split() for line in Path(f"{llama_bench}.log").read_text().splitlines()]
    assert all(run[:10] == ["-m", model, "-t", "2", "-r", "1", "-o", "json", "-rtr", "1"] for run in runs)
    prompt, reply = ["-p", "20", "-n", "0"], ["-p", "0", "-n", "5"]
    behind = [[*kind, "-d", "9"] for kind in (prompt, reply)]
    assert [run[10:] for run in runs] == [prompt, reply] * 3 + behind * 2  # the first two warm up


def test_a_llama_bench_that_fails(llama_bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_models.shared("v3", type="Q8_0"))
    args = ["bench", model, "-p", "0", "-n", "5", "-r", "1", "-d", "9", "--against", f"old:{llama_bench} -old 1"]
    assert command(args) == 1
    assert f"{llama_bench}: ended with 1 and no result; it said: error: unknown argument: -d" in capsys.readouterr().err


def test_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny_models.shared("v3", type="Q8_0"))
    assert command(["bench", path, "-p", "20", "-n", "5", "-r", "1", "-v"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split()[:2] for line in out.splitlines()]
    assert ["pp20", "localrun"] in rows and ["tg5", "localrun"] in rows
    assert "of what can be read" in out and "\x1b" not in out
    assert "localrun: loaded in" in err and "isa" in err


@pytest.mark.parametrize("variant", ["v3", "llama"])
def test_drafts_are_measured_beside_the_rates(variant: str) -> None:
    path = tiny_models.shared(variant, type="Q8_0")
    with localrun.load(path, threads=1, ctx=64, speculative=2) as engine:
        document = bench.run(engine, bench.Settings(0, 40, 2))
    found = document["speculation"]
    assert (found["setting"], found["generated_tokens"], found["same_reply"]) == (2, 40, True)
    assert found["draft"] == "n-gram" and 0 <= found["accepted_tokens"] <= found["drafted_tokens"] <= 2 * 39
    assert found["speed_up"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"], abs=2e-3)
    assert set(document["results"]) == {"tg40"}


def test_no_drafts_where_none_were_asked_for(engine: Any) -> None:
    assert "speculation" not in bench.run(engine, bench.Settings(8, 0, 1))


def test_command_prints_what_drafts_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["bench", "smollm2", "-p", "0", "-n", "30", "-r", "1", "--speculative", "auto"]) == 0
    out = capsys.readouterr().out
    assert "greedy text with drafts: " in out and " times as fast\n" in out and "drafts accepted (n-gram), " in out


REFUSALS = {
    "nothing to do": (["-p", "0", "-n", "0"], "-p 0 and -n 0: there is nothing to do"),
    "negative": (["-p", "-1"], "-p -1; expected 0 or more"),
    "no repetitions": (["-r", "0"], "-r 0; expected 1 or more"),
    "longer than the model's context": (["-p", "1025"], "-p 1025: this model's context is 1024 tokens"),
    "generation too": (["-n", "1025"], "-n 1025: this model's context is 1024 tokens"),
    "depth of no number": (["-d", "0,x"], "-d 0,x: expected numbers of tokens with commas between"),
    "negative depth": (["-d", "5,-1"], "-d -1; expected 0 or more"),
    "depth beyond the context": (["-d", "0,600"], "-d 600 and -p 512: this model's context is 1024 tokens"),
    "no such peer": (["--against", "ollama"], "--against ollama: expected llama.cpp, or NAME:PATH of a llama-bench"),
    "no such program": (["--against", "ik:/nowhere/llama-bench"], "/nowhere/llama-bench: no such file"),
    "no program": (["--against", "ik:'"], "expected the path of a llama-bench"),
    "no picture": (["--plot", "x.txt"], "x.txt: a picture's name ends in"),
    "no threads": (["-t", "0"], "threads is 0"),
    "much longer": (["-n", "99999999999"], "-n 99999999999: this model's context is 1024 tokens"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args, message = REFUSALS[name]
    assert command(["bench", str(tiny_models.shared("v3", type="Q8_0")), *args]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("localrun: ") and err.count("\n") == 1
    assert message in err


def test_a_model_that_is_not_native(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert command(["bench", str(tmp_path / "a.gguf")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "architecture 'mamba' is not native" in err


def test_settings_that_a_caller_gets_wrong() -> None:
    with pytest.raises(LocalrunError, match="-r -3; expected 1 or more"):
        bench.Settings(repetitions=-3).check()


# --- scripts/bench_experts.py


def test_the_experts_script() -> None:
    script = SCRIPTS / "bench_experts.py"
    sizes = ["--hidden", "512", "--inner", "256", "--experts", "4", "--top-k", "2"]
    done = subprocess.run(
        [sys.executable, script, *sizes, "--tokens", "1,9", "-r", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["layer"]["expert_bytes"] == 3 * 512 * 256 * 144 // 256  # Q4_K: 144 bytes for 256 weights
    assert set(document["tokens"]) == {"1", "9"}
    for count, results in document["tokens"].items():
        ours = results["localrun"]
        flops = int(count) * 2 * 2 * 3 * 512 * 256  # 2 experts a token, 2 operations a weight
        # Three digits of milliseconds, three of TFLOPS.
        assert ours["tflops"]["best"] == pytest.approx(flops / ours["ms"]["best"] / 1e9, rel=0.02, abs=6e-4)
        rate = ours["gb_per_s"]["best"] * 1e9
        most = ours["experts"] * document["layer"]["expert_bytes"] * 1.5 + 1e4  # the mean, and a run may have had more
        assert 0 < rate * ours["ms"]["best"] / 1e3 < most
    assert document["tokens"]["1"]["localrun"]["experts"] == 2
