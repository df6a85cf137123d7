"""Speed of the routed experts of one mixture-of-experts layer, by default DeepSeek-V3's width with 64 experts in RAM.

    python scripts/bench_experts.py [--tokens 1,4,16,64,256,1024] [--type Q4_K] [--beside TYPE] [-t N] [--kt]

In each round every number of tokens is measured once or for a tenth of a second, each time with other experts, chosen
at random, so that weights come from RAM; then a kernel that only reads measures the same weights' memory. GB/s counts
the weights of the experts that were chosen, once each, however many tokens they had. --kt measures kt-kernel in turn
(pip install --no-deps kt-kernel): its AMXINT4 experts, on AMX if this CPU has it, else on AVX-512. --beside measures
the same layer in another type in turn.
A table goes to stderr; stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from make_synthetic import Tensor, Weights

from localrun import hardware
from localrun.measure.bench import machine
from quant.formats import registry
from quant.formats.interleave import interleave
from quant.matrix import ExpertMatrices, quant_matrix
from quant.ops import experts
from quant.target import isa
from quant.threads import bandwidth
from quant.threads.pool import Pool

ROUND_S = 0.1  # for numbers of tokens that take less than that
IDLE_S = 0.2  # until the threads of the engine before sleep; kt-kernel's spin for a while

Run = Callable[[np.ndarray, np.ndarray, np.ndarray], object]  # of x (T, D), ids (T, K), weights (T, K)


@dataclass(frozen=True)
class Layer:
    """Sizes, named as in config.json, and the type of all three matrices."""

    hidden_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    type: str

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Experts, rows and columns of the matrices."""
        n, inner, hidden = self.n_routed_experts, self.moe_intermediate_size, self.hidden_size
        return {"gate": (n, inner, hidden), "up": (n, inner, hidden), "down": (n, hidden, inner)}

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden_size * self.moe_intermediate_size

    @property
    def expert_bytes(self) -> int:
        format_ = registry.get(self.type)
        return self.expert_weights // format_.block * format_.block_bytes


@dataclass
class Times:
    """Seconds and experts in use of each run."""

    seconds: list[float] = field(default_factory=list)
    n_active: list[int] = field(default_factory=list)

    def summary(self, layer: Layer, n_tokens: int) -> dict[str, Any]:
        """What any engine is measured by."""
        flops = 2 * layer.expert_weights * n_tokens * layer.num_experts_per_tok
        figures = {"best": min(self.seconds), "median": statistics.median(self.seconds)}
        return {
            "ms": {name: round(1e3 * seconds, 3) for name, seconds in figures.items()},
            "tflops": {name: round(flops / seconds / 1e12, 3) for name, seconds in figures.items()},
            "runs": len(self.seconds),
        }

    def reading(self, layer: Layer, roof: dict[str, float]) -> dict[str, Any]:
        """How fast the chosen experts' weights were read, and what part that is of the roof, in bytes/s."""
        rates = [n * layer.expert_bytes / s for n, s in zip(self.n_active, self.seconds, strict=True)]
        figures = {"best": max(rates), "median": statistics.median(rates)}
        return {
            "experts": round(statistics.mean(self.n_active), 1),
            "gb_per_s": {name: round(rate / 1e9, 2) for name, rate in figures.items()},
            "fraction_of_read": {name: round(rate / roof[name], 3) for name, rate in figures.items()},
        }


class Ours:
    """quant.ops.experts over random weights."""

    def __init__(self, layer: Layer, pool: Pool) -> None:
        n = layer.n_routed_experts
        self._pool, weights = pool, Weights(pool)
        self.memory = np.empty(n * layer.expert_bytes, np.uint8)
        matrices, at = [], 0
        for name, shape in layer.shapes.items():
            start = at
            at += n * layer.expert_bytes // 3
            self._fill(self.memory[start:at], Tensor(name, shape, shape[-1] ** -0.5), weights, layer.type)
            if layer.type in registry.INTERLEAVED:
                self._interleave(self.memory[start:at].reshape(n, -1), shape, layer.type)
            matrices.append(quant_matrix(self.memory[start:at], registry.get(layer.type), shape))
        self._experts = ExpertMatrices(*matrices)

    @staticmethod
    def _fill(memory: np.ndarray, tensor: Tensor, weights: Weights, type_: str) -> None:
        """Random weights, in the plain type."""
        at = 0
        for chunk in weights.chunks(tensor, type_.removesuffix("_R16")):
            memory[at : at + chunk.nbytes] = chunk.reshape(-1)
            at += chunk.nbytes

    @staticmethod
    def _interleave(matrices: np.ndarray, shape: tuple[int, ...], type_: str) -> None:
        """In place, an expert at a time; uint8 (E, bytes)."""
        for matrix in matrices:
            matrix[:] = interleave(registry.get(type_), matrix, shape[1], len(matrix) // shape[1]).reshape(-1)

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        experts.run(self._pool, self._experts, x.ctypes.data, ids, weights, out.ctypes.data)
        return out


class KtKernel:
    """kt-kernel's AMXInt4_MOE over random weights; 4 bits with a scale a row."""

    def __init__(self, layer: Layer, threads: int, most_tokens: int) -> None:
        """Raises SystemExit where it cannot run."""
        try:
            import kt_kernel
            import kt_kernel_ext
            import torch
            from kt_kernel_ext.moe import AMXInt4_MOE, MOEConfig
        except ImportError as error:
            raise SystemExit(f"--kt: kt-kernel cannot run here: {error}") from None
        n, inner, hidden = layer.n_routed_experts, layer.moe_intermediate_size, layer.hidden_size
        needed = 3 * layer.expert_weights * n  # as 16-bit floats, and then in 4 bits and buffers
        if hardware.free_ram() < needed:
            raise SystemExit(f"--kt: takes {needed / 2**30:.0f} GiB of RAM; use fewer --experts")
        self.variant = kt_kernel.__cpu_variant__
        self._torch, self._cpu = torch, kt_kernel_ext.CPUInfer(threads)
        one = torch.randn(inner, hidden).mul_(hidden**-0.5).bfloat16()
        gate, down = one.repeat(n, 1, 1), one.T.repeat(n, 1, 1)
        self._mask, self._order = torch.zeros(n, dtype=torch.bool), torch.arange(n)
        config = MOEConfig(n, layer.num_experts_per_tok, hidden, inner, self._mask.data_ptr())
        config.layer_idx, config.pool, config.max_len = 0, self._cpu.backend_, most_tokens
        config.gate_proj = config.up_proj = gate.data_ptr()
        config.down_proj = down.data_ptr()
        self._moe = AMXInt4_MOE(config)
        self._cpu.submit(self._moe.load_weights_task(self._order.data_ptr()))
        self._cpu.sync()

    def __call__(self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> None:
        torch = self._torch
        x_16 = torch.from_numpy(x).bfloat16()
        out, length = torch.empty_like(x_16), torch.tensor([len(x)], dtype=torch.int32)
        pointers = ids.ctypes.data, weights.ctypes.data, x_16.data_ptr(), out.data_ptr()
        self._cpu.submit(self._moe.forward_task(length.data_ptr(), ids.shape[1], *pointers, False))
        self._cpu.sync()


def measure(run: Run, layer: Layer, n_tokens: int, random: np.random.Generator, times: Times, seconds: float) -> None:
    """Add one run, or as many as there are in so many seconds."""
    x = random.standard_normal((n_tokens, layer.hidden_size), np.float32)
    weights = np.full((n_tokens, layer.num_experts_per_tok), 1 / layer.num_experts_per_tok, np.float32)
    all_ids = np.tile(np.arange(layer.n_routed_experts), (n_tokens, 1))
    until = time.perf_counter() + seconds
    while True:
        ids = np.ascontiguousarray(random.permuted(all_ids, axis=1)[:, : layer.num_experts_per_tok])
        start = time.perf_counter()
        run(x, ids, weights)
        times.seconds.append(time.perf_counter() - start)
        times.n_active.append(len(np.unique(ids)))
        if time.perf_counter() > until:
            return


def compare(engines: dict[str, Run], layer: Layer, counts: list[int], n_rounds: int, read: Callable[[], None]) -> dict:
    """Times by engine and number of tokens; engines take turns, and nothing else runs meanwhile."""
    random = np.random.default_rng(0)
    times = {name: {count: Times() for count in counts} for name in engines}
    for round_ in range(n_rounds + 1):  # the first warms up
        for name, run in engines.items():
            time.sleep(IDLE_S)
            for count in counts:
                found = Times() if round_ == 0 else times[name][count]
                measure(run, layer, count, random, found, ROUND_S if round_ else 0)
        time.sleep(IDLE_S)
        read()
    return times


def results(times: dict[str, dict[int, Times]], layer: Layer, roof: dict[str, float]) -> dict[int, dict[str, Any]]:
    """Figures by number of tokens and engine, with the ratio to the other engine."""
    found: dict[int, dict[str, Any]] = {}
    for count, ours in times["localrun"].items():
        found[count] = {name: each[count].summary(layer, count) for name, each in times.items()}
        found[count]["localrun"] |= ours.reading(layer, roof)
        for other in list(times)[1:]:
            ms, theirs = found[count]["localrun"]["ms"], found[count][other]["ms"]
            found[count]["localrun"]["ratio"] = {name: round(theirs[name] / ms[name], 2) for name in ms}
    return found


def show(found: dict[int, dict[str, Any]], roof: dict[str, float]) -> None:
    """The table, of the best runs and the medians."""
    columns = ("best ms", 9), ("median", 9), ("TFLOPS", 7), ("GB/s", 6), ("of read", 8), ("ratio", 6)
    lines = [f"tokens {'engine':<9}" + "".join(f" {name:>{width}}" for name, width in columns)]
    for count, engines in found.items():
        for name, r in engines.items():
            row = f"{count:>6} {name:<9} {r['ms']['best']:>9.2f} {r['ms']['median']:>9.2f} {r['tflops']['best']:>7.3f}"
            if "gb_per_s" in r:
                row += f" {r['gb_per_s']['best']:>6.1f} {r['fraction_of_read']['best']:>8.0%}"
            lines.append(row + (f" {r['ratio']['best']:>6.2f}" if "ratio" in r else ""))
    lines.append(f"read: best {roof['best'] / 1e9:.1f} GB/s, median {roof['median'] / 1e9:.1f}")
    print("\n".join(lines), file=sys.stderr)


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,4,16,64,256,1024", help="numbers of tokens, with commas")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--inner", type=int, default=2048, help="columns of an expert's down matrix")
    parser.add_argument("--experts", type=int, default=64, help="in RAM")
    parser.add_argument("--top-k", type=int, default=8, help="experts a token")
    parser.add_argument(
        "--type", default="Q4_K", choices=(*registry.NAMES, *registry.INTERLEAVED), help="of all three matrices"
    )
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    parser.add_argument("-r", "--rounds", type=int, default=5)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--kt", action="store_true", help="measure kt-kernel too")
    other.add_argument("--beside", choices=(*registry.NAMES, *registry.INTERLEAVED), help="measure this type too")
    arguments = parser.parse_args()
    if not 0 < arguments.top_k <= arguments.experts:
        parser.error(f"--top-k {arguments.top_k} of {arguments.experts} experts")
    return arguments


def main() -> None:
    """Measure, show, print."""
    arguments = parse()
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # kt-kernel prints to stdout, even at the very end
    counts = [int(count) for count in arguments.tokens.split(",")]
    layer = Layer(arguments.hidden, arguments.inner, arguments.experts, arguments.top_k, arguments.type)
    pool, reads = Pool(arguments.threads), []
    kt_kernel = KtKernel(layer, arguments.threads, -(-max(counts) // 32) * 32) if arguments.kt else None
    ours = Ours(layer, pool)
    engines: dict[str, Run] = {"localrun": ours} | ({"kt-kernel": kt_kernel} if kt_kernel else {})
    if arguments.beside:
        engines[arguments.beside] = Ours(replace(layer, type=arguments.beside), pool)
    n_read = min(ours.memory.nbytes, 1 << 30)

    def read() -> None:
        reads.append(bandwidth.read_bandwidth(pool, ours.memory.ctypes.data, n_read, passes=2))

    times = compare(engines, layer, counts, arguments.rounds, read)
    pool.close()
    roof = {"best": max(r.best for r in reads), "median": statistics.median(r.median for r in reads)}
    found = results(times, layer, roof)
    show(found, roof)
    document = {
        "layer": vars(layer) | {"expert_bytes": layer.expert_bytes},
        "threads": arguments.threads,
        "isa": isa.LEVEL,
        "kt_kernel": kt_kernel.variant if kt_kernel else None,
        "read_gb_per_s": {name: round(rate / 1e9, 2) for name, rate in roof.items()},
        "tokens": found,
        "machine": machine(),
    }
    print(json.dumps(document), file=stdout, flush=True)


if __name__ == "__main__":
    main()
