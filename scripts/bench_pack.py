"""Packing speed of one thread and packing error, ours against libggml's ggml_quantize_chunk, interleaved in one run.

    python scripts/bench_pack.py [TYPE ...] [--importances] [--rows 256] [--cols 2048] [-r 9]

Speeds are medians over the repetitions, errors root mean squares after gguf's dequantize on Gaussian and heavy-tailed
(Student's t, 3 degrees of freedom) weights. With --importances both pack by log-normal ones, and errors are weighted by
them; types that libggml packs in no other way are left out without. The last line of stdout is one JSON document.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

from quant.formats import registry
from quant.quantize import tensor
from quant.target import isa
from quant.threads.pool import Pool

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import ggml


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(function, *arguments) -> float:
    """Processor time of one call: what else the machine runs does not count."""
    start = time.thread_time()
    function(*arguments)
    return time.thread_time() - start


def error(blocks: np.ndarray, x: np.ndarray, kind: gguf.GGMLQuantizationType, importance: np.ndarray | None) -> float:
    """Root mean square of what packing changed, relative to the weights', both weighted by importance."""
    values = gguf.quants.dequantize(blocks, kind).reshape(x.shape).astype(np.float64)
    squares = [np.average(each**2, axis=-1, weights=importance).mean() for each in (values - x, x.astype(np.float64))]
    return float(np.sqrt(squares[0] / squares[1]))


def measure(name: str, shape: tuple[int, int], repetitions: int, by_importance: bool, pool: Pool) -> dict[str, float]:
    """Speeds, in million weights a second, and errors of one type."""
    rng = np.random.default_rng(0)
    format_, kind = registry.get(name), gguf.GGMLQuantizationType[name]
    out = np.zeros((shape[0], format_.row_bytes(shape[1])), np.uint8)
    importance = np.exp(1.5 * rng.standard_normal(shape[1])).astype(np.float32) if by_importance else None
    address = 0 if importance is None else importance.ctypes.data

    def ours(x: np.ndarray) -> None:
        tensor.pack(pool, format_, x.ctypes.data, *shape, out.ctypes.data, address)

    def libggmls(x: np.ndarray) -> np.ndarray:
        return ggml.quantize(x, kind, importance)

    gaussian = (rng.standard_normal(shape) * 0.02).astype(np.float32)
    ours(gaussian)  # compiles, and touches the pages
    times = [(seconds(ours, gaussian), seconds(libggmls, gaussian)) for _ in range(repetitions)]
    ours_s, libggml_s = (statistics.median(side) for side in zip(*times, strict=True))
    result = {"ours_mw_s": gaussian.size / ours_s / 1e6, "libggml_mw_s": gaussian.size / libggml_s / 1e6}
    result["speed_ratio"] = statistics.median(theirs / mine for mine, theirs in times)
    heavy = (rng.standard_t(3, shape) * 0.02).astype(np.float32)
    for which, x in (("gaussian", gaussian), ("heavy_tailed", heavy)):
        ours(x)
        mine, theirs = error(out, x, kind, importance), error(libggmls(x), x, kind, importance)
        result[f"{which}_error"] = mine
        result[f"{which}_error_ratio"] = mine / theirs if theirs else 1.0
    return {key: float(f"{value:.5g}") for key, value in result.items()}


def main() -> None:
    """Print a line for each type, then the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="such as Q4_K; all but F32 if not given")
    parser.add_argument("--importances", action="store_true")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--cols", type=int, default=2048)
    parser.add_argument("-r", "--repetitions", type=int, default=9)
    arguments = parser.parse_args()
    pool, results = Pool(1), {}
    left_out = ("F32",) if arguments.importances else ("F32", *ggml.NEED_IMPORTANCES)
    for name in arguments.types or [name for name in registry.QUANTIZABLE if name not in left_out]:
        shape = arguments.rows, arguments.cols
        results[name] = measure(name, shape, arguments.repetitions, arguments.importances, pool)
        print(name, *(f"{key} {value}" for key, value in results[name].items()), file=sys.stderr)
    machine = {"cpu": cpu_name(), "isa": isa.LEVEL, "threads": 1}
    packages = ("numba", "llvmlite", "numpy", "gguf", "llama-cpp-python")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    print(
        json.dumps({"machine": machine, "versions": versions, "importances": arguments.importances, "types": results})
    )


if __name__ == "__main__":
    main()
