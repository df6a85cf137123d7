"""Whether the tests notice: a copy of the tree with one small fault at a time, and the tests that should fail.

    python scripts/break_on_purpose.py [NAME ...]

The tests run once without a fault, too, and must pass. Prints a line for each fault, with the first test that caught
it, then a JSON document in one line. Exit 1 if a fault was not caught. A fault whose text is not in its file exactly
once is refused: this list follows the code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in a file; `tests` are those to run, files or folders."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    fault: str
    file: str
    caught_by: str | None  # the first test that failed
    seconds: float


_DECODE, _MTP = "tests/localrun/cpu/test_decode.py", "tests/localrun/cpu/test_mtp.py"
FAULTS = (
    Fault(
        "a rotation's sign, decoding", "quant/decode/queries.py",
        "u * cos - v * sin", "u * cos + v * sin", (_DECODE,),
    ),
    Fault(
        "YaRN's ramp begins a pair late", "localrun/network/rope.py",
        "np.arange(dim // 2) - low", "np.arange(dim // 2) - low - 1", ("tests/localrun/network/test_rope.py",),
    ),
    Fault(
        "split-KV: parts combined unscaled", "quant/decode/values.py",
        "factor = np.float32(math.exp(partial.maximum - largest))\n        total",
        "factor = np.float32(1.0)\n        total",
        ("tests/quant/test_step_attention.py",),
    ),
    Fault(
        "split-KV: all tokens have the first one's parts", "quant/decode/values.py",
        "splits_of(seen_by(a, token))", "splits_of(seen_by(a, 0))", ("tests/quant/test_step_attention.py",),
    ),
    Fault(
        "split-KV: the last part has what is left over", "quant/decode/program.py",
        "(n_cached + unit - 1) // unit * split // splits_of(n_cached) * unit",
        "n_cached // unit // splits_of(n_cached) * unit * split if split < splits_of(n_cached) else n_cached",
        ("tests/localrun/cpu/test_balance.py",),
    ),
    Fault(
        "split-KV: an item has one part, though there are more", "quant/decode/attention.py",
        "for split in range(first, end, step):", "for split in range(first, min(end, first + 1)):",
        ("tests/quant/test_step_compressor.py",),
    ),
    Fault(
        "a prompt's mask lets the next token through", "quant/ops/attention.py",
        "n_before + first + 1 - begin", "n_before + first + 2 - begin", ("tests/quant/test_prompt_attention.py",),
    ),
    Fault(
        "Q4_K without its minimum", "quant/formats/q4_k_q5_k.py",
        "subtract_odd(total, scales))", "total)", ("tests/quant/test_formats.py",),
    ),
    Fault(
        "Q6_K's scales of other sub-blocks", "quant/formats/q6_k.py",
        "4 * (lane % 4) + lane // 4", "4 * (lane % 4) + (lane // 4 ^ 1)", ("tests/quant/test_formats.py",),
    ),
    Fault(
        "interleaved words swapped", "quant/formats/interleave.py",
        "store_i32x16(words + 64 * i + 64, w1)", "store_i32x16(words + 64 * i + 64, w2)", ("tests/quant/test_r16.py",),
    ),
    Fault(
        "a packed scale loses its high bits", "quant/formats/q4_k_q5_k.py",
        "(scales >> 36 & 0x03030303) << 6", "(scales >> 36 & 0x01010101) << 6", ("tests/quant/test_quantize.py",),
    ),
    Fault(
        "router: weights not normalised, decoding", "quant/decode/router.py",
        "divisor = max(total, np.float32(SMALLEST_SUM))", "divisor = max(np.float32(1.0), np.float32(SMALLEST_SUM))",
        ("tests/quant/test_step_experts.py",),
    ),
    Fault(
        "router: the bias moves the weights", "localrun/network/moe.py",
        "affinity_TE.gather(-1, ids_TK)", "choice_TE.gather(-1, ids_TK)", ("tests/localrun/network/test_moe.py",),
    ),
    Fault(
        "router: groups by their best expert alone", "quant/decode/router.py",
        "== SOFTMAX or n == 1 else first + second", "== SOFTMAX or n == 1 else first",
        ("tests/quant/test_step_experts.py",),
    ),
    Fault(
        "RMSNorm: epsilon outside the root", "quant/simd/vectors.py",
        "math.sqrt(total / np.float32(n) + epsilon)", "(math.sqrt(total / np.float32(n)) + epsilon)",
        ("tests/quant/test_vectors.py",),
    ),
    Fault(
        "multi-token prediction: norms exchanged", "localrun/cpu/mtp.py",
        'self._array(name("enorm"))', 'self._array(name("hnorm"))', (_MTP,),
    ),
    Fault(
        "sampling: temperature before the filters", "localrun/generate/sampling.py",
        "probabilities = _softmax(logits[ids])", "probabilities = _softmax(logits[ids] / s.temperature)",
        ("tests/localrun/generate/test_sampling.py",),
    ),
    Fault(
        "converter: heads not reordered into pairs", "localrun/convert/targets.py",
        "rows.reshape(2, -1, out.shape[1]).swapaxes(0, 1)", "rows.reshape(-1, 2, out.shape[1])",
        ("tests/localrun/convert/test_convert_logits.py",),
    ),
    Fault(
        "a cache forgets one token too few", "localrun/network/cache.py",
        "min(self.length, max(0, length))", "min(self.length, max(0, length + 1))", ("tests/localrun/test_engine.py",),
    ),
)  # fmt: skip


def check(faults: tuple[Fault, ...]) -> None:
    """Raises SystemExit if the tree no longer has what a fault changes, or tests that it names."""
    for fault in faults:
        n_found = (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old)
        if n_found != 1:
            raise SystemExit(f"{fault.name}: {fault.old!r} is in {fault.file} {n_found} times, not once")
        missing = [path for path in fault.tests if not (ROOT / path).exists()]
        if missing:
            raise SystemExit(f"{fault.name}: no tests {', '.join(missing)}")


def copy_tree(folder: Path) -> None:
    """All files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def first_failure(folder: Path, tests: tuple[str, ...]) -> str | None:
    """Of the fast suite's tests in a copy of the tree. Raises SystemExit if pytest does not come to run them."""
    environment = os.environ | {"PYTHONPATH": str(folder), "LOCALRUN_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or failed is None:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return failed[1]


def try_out(fault: Fault, folder: Path) -> Result:
    """Break the copy, run the tests, mend it."""
    path = folder / fault.file
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    start = time.monotonic()
    try:
        caught_by = first_failure(folder, fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return Result(fault.name, fault.file, caught_by, round(time.monotonic() - start, 1))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try; all without")
    names = parser.parse_args(arguments).names
    chosen = tuple(fault for fault in FAULTS if not names or fault.name in names)
    check(chosen)
    results = []
    with tempfile.TemporaryDirectory(prefix="localrun-broken-") as name:
        copy_tree(Path(name))
        sound = first_failure(Path(name), tuple(dict.fromkeys(path for fault in chosen for path in fault.tests)))
        if sound:
            raise SystemExit(f"{sound} fails without any fault")
        for fault in chosen:
            results.append(try_out(fault, Path(name)))
            print(f"{fault.name:<32} {results[-1].seconds:6.1f} s  {results[-1].caught_by or 'NOT CAUGHT'}", flush=True)
    print(json.dumps({"faults": [asdict(result) for result in results]}))
    return int(any(result.caught_by is None for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
