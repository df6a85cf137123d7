"""Speed of the types' kernels: one MoE layer of DeepSeek-V3's width, also by libggml, and both's dot products.

    python scripts/bench_types.py [--types Q2_K IQ2_XXS] [--tokens 1,256] [--experts 32] [-t N] [-r ROUNDS]

The layer is bench_experts.py's, with fewer experts, so that all types fit; a type at a time, reading in turn with it.
"of Q4_K": its TFLOPS over those of Q4_K in the same run. "ggml": how many times as fast as the libggml that
llama-cpp-python carries does the same layer by a graph of its own (ggml_layer.py), for one token, in turn, on as many
threads. "vec_dot": as its dot product: one thread, rows of 7168 columns, which stay in the cache, in turn. How fast
libggml is depends on how it was built. vec_dot is called row by row from compiled code, as ggml does: a call by ctypes
takes 4 us.
A table goes to stderr; stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_experts import Layer, Ours, compare, results
from ggml_layer import GgmlExperts
from llvmlite import ir
from numba import types

from localrun import hardware
from localrun.measure.bench import machine
from quant.formats import registry
from quant.simd.core import F32, I32, I64, define
from quant.target import isa
from quant.target.jit import kernel
from quant.target.kernel import Kernel
from quant.threads import bandwidth
from quant.threads.pool import Pool, aligned_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
import ggml
import kernels

YARDSTICK = "Q4_K"
LOW_BIT = ("TQ2_0", "NVFP4", "Q2_K", "Q3_K", "IQ3_S", "IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
COLS, ROWS_BYTES = 7168, 300 << 10
GGML_ROUNDS = 60


def _call_vec_dot(builder, function, n_cols, out, row, x):
    """Emits vec_dot(n, s, bs, x, bx, y, by, 1)."""
    pointer, n, one = F32.as_pointer(), builder.trunc(n_cols, I32), I32(1)
    kind = ir.FunctionType(ir.VoidType(), [I32, pointer, I64, pointer, I64, pointer, I64, I32])
    out, row, x = (builder.inttoptr(address, pointer) for address in (out, row, x))
    zero = I64(0)
    builder.call(builder.inttoptr(function, kind.as_pointer()), [n, out, zero, row, zero, x, zero, one])


_vec_dot = define(types.void, (types.int64,) * 5, _call_vec_dot)


@kernel("void(int64, int64, int64, int64, int64, int64, int64)")
def _vec_dots(function, n_rows, n_cols, rows, row_bytes, x, out):
    """out[r] = rows[r] . x by ggml's function at this address."""
    for r in range(n_rows):
        _vec_dot(function, n_cols, out + 4 * r, rows + row_bytes * r, x)


def layer_speed(type_: str, options: argparse.Namespace, pool: Pool) -> dict[str, Any]:
    """Figures of one type by number of tokens, as bench_experts.results gives them, and the reading rate.

    "ggml": those of one token in turn with libggml.
    """
    layer = Layer(7168, 2048, options.experts, 8, type_)
    ours, reads = Ours(layer, pool), []
    theirs = GgmlExperts(type_, [*layer.shapes.values()], np.split(ours.memory, 3), 8, options.threads)

    def read() -> None:
        reads.append(bandwidth.read_bandwidth(pool, ours.memory.ctypes.data, ours.memory.nbytes, passes=2))

    _check(ours, theirs, layer)
    of_one = compare({"localrun": ours, "ggml": theirs}, layer, [1], options.rounds, read)
    times = compare({"localrun": ours}, layer, options.counts, options.rounds, read)
    theirs.close()
    roof = {"best": max(r.best for r in reads), "median": statistics.median(r.median for r in reads)}
    return {"read": roof, "tokens": results(times, layer, roof), "ggml": results(of_one, layer, roof)[1]}


def _check(ours: Ours, theirs: GgmlExperts, layer: Layer) -> None:
    """Both round activations to 8 bits, each its own way: far apart they would not have read the same weights."""
    random = np.random.default_rng(0)
    x = random.standard_normal((1, layer.hidden_size), np.float32)
    ids = random.permutation(layer.n_routed_experts)[None, : layer.num_experts_per_tok]
    weights = random.random(ids.shape, np.float32)
    assert np.corrcoef(ours(x, ids, weights)[0], theirs(x, ids, weights))[0, 1] > 0.99, layer.type


def against_vec_dot(type_: str) -> dict[str, float]:
    """Nanoseconds for 256 weights, ours and libggml's, and how many times as fast ours are; in turn, best of all."""
    format_, random = registry.get(type_), np.random.default_rng(0)
    row_bytes = format_.row_bytes(COLS)
    n_rows = ROWS_BYTES // row_bytes // 4 * 4
    raw = aligned_bytes(n_rows * row_bytes)
    raw[:] = kernels.random_blocks(type_, (n_rows, COLS), random).reshape(-1)
    x, outs = random.standard_normal(COLS).astype(np.float32), np.empty((2, n_rows), np.float32)
    record, kind = kernels.record(x, format_), ggml.GGMLQuantizationType[type_]
    theirs_x = ggml.quantize_activations(x, ggml.activation_type(kind))
    function = ggml.vec_dot_address(kind)
    runs = {
        "ours": _bound(format_.gemv, raw, n_rows, COLS, record, outs[0]),
        "ggml": _bound(_vec_dots, function, n_rows, COLS, raw, row_bytes, theirs_x, outs[1]),
    }
    seconds = {name: min(times) for name, times in _in_turn(runs).items()}
    assert np.corrcoef(outs)[0, 1] > 0.99, type_  # as in _check
    ns = {name: 1e9 * value * 256 / COLS / n_rows for name, value in seconds.items()}
    return ns | {"ratio": ns["ggml"] / ns["ours"]}


def _bound(kernel_: Kernel, *arguments: int | np.ndarray) -> Callable[[], None]:
    """A call of a kernel, prepared beforehand: that takes 4 us, a tenth or a third of what is measured."""
    values = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(values))(kernel_.address)
    return lambda: function(*values)


def _in_turn(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(GGML_ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def header(counts: list[int]) -> str:
    """Of the table."""
    columns = [f"{'ms, ' + str(count):>9}" for count in counts]
    return f"type    {''.join(columns)}   GB/s  of read  of {YARDSTICK}   ggml  vec_dot"


def row(type_: str, found: dict[str, dict[str, Any]], counts: list[int]) -> str:
    """A type's, of its best runs."""
    tokens, one = found[type_]["tokens"], found[type_]["tokens"][counts[0]]["localrun"]
    flops, theirs = (found[name]["tokens"][counts[-1]]["localrun"]["tflops"]["best"] for name in (type_, YARDSTICK))
    ms = "".join(f" {tokens[count]['localrun']['ms']['best']:>8.2f}" for count in counts)
    rates = f" {one['gb_per_s']['best']:>6.1f} {one['fraction_of_read']['best']:>8.0%}"
    ratios = f"{found[type_]['ggml']['localrun']['ratio']['best']:>6.2f} {found[type_]['vec_dot']['ratio']:>8.1f}"
    return f"{type_:<8}{ms}{rates} {flops / theirs:>7.2f} {ratios}"


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=LOW_BIT, choices=registry.NAMES, metavar="TYPE")
    parser.add_argument("--tokens", default="1,256", help="numbers of tokens, with commas")
    parser.add_argument("--experts", type=int, default=32, help="in RAM")
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    parser.add_argument("-r", "--rounds", type=int, default=4)
    options = parser.parse_args()
    options.counts = [int(count) for count in options.tokens.split(",")]
    pool, found = Pool(options.threads), {}
    print(header(options.counts), file=sys.stderr)
    for type_ in (YARDSTICK, *(name for name in options.types if name != YARDSTICK)):
        found[type_] = layer_speed(type_, options, pool) | {"vec_dot": against_vec_dot(type_)}
        print(row(type_, found, options.counts), file=sys.stderr, flush=True)
    pool.close()
    print(json.dumps({"isa": isa.LEVEL, "types": found, "machine": machine()}))


if __name__ == "__main__":
    main()
