"""This machine's description, measured: memory, kernels by type and width, and what a layer takes besides arithmetic.

Each rate is measured by itself, on made-up weights; no model's speed goes into its own prediction. What lies between
kernels (dispatch, Python, small operations) is measured on a probe: a model of the same kind with the same heads, whose
matrices are so small that little else is left.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from localrun import hardware
from localrun.convert.made_up import made_up_blocks
from localrun.convert.mixes import TABLE
from localrun.limits import PREFILL_CHUNK
from localrun.models.config import Config
from localrun.models.registry import ARCHITECTURES
from localrun.plan.machine import Cpu, Machine, parse_machine
from localrun.plan.shapes import Conversion, ModelShape, from_config, n_bytes
from localrun.plan.speed import attention_flops
from quant.matrix import quant_matrix

_LARGE_BYTES = 1 << 28  # what a matrix takes at most: far beyond any cache but the largest servers'
_READ_BYTES = 1 << 30  # what is read at most
_PASSED_BYTES = 1 << 33  # about as much in all
_FEW, _MANY = 16, 256  # tokens whose times give expansion and product apart
_MANY_WEIGHTS = 1 << 26  # that they are multiplied with, at most
_ACTIVATION_BYTES = 1 << 25  # more than a core's own caches
_TRY_S = 0.2  # each figure: the median of several runs within this time
_MEASURED = "measured by localrun plan"
_TUNING = {"tuned": "localrun tune", "table": "measured on CPUs of this kind", "default": "measured on another CPU"}
_FROM = "packed_from", "packed_from_interleaved"  # of tuning and of a machine


def this_machine(model: ModelShape, threads: int | None = None) -> Machine:
    """The machine that runs this, for one model's types and heads, with a number of threads (None: all cores)."""
    threads = threads or hardware.usable_cores()
    return parse_machine(describe(model, threads), "this", "this machine")


def describe(model: ModelShape, threads: int) -> dict[str, Any]:
    """The same as a JSON document, to be kept in a file."""
    from quant.target import tuning
    from quant.threads.pool import Pool

    pool, chosen, source = Pool(threads), tuning.current(), _TUNING[tuning.found().source]
    try:
        # No more memory than the model has: where caches help it, they help its rates.
        size = n_bytes(model.tensors)
        read = _read_bandwidth(pool, min(size, _READ_BYTES))
        kernels = [kernel_rates(pool, *matrix, size=min(size, _LARGE_BYTES)) for matrix in _matrices(model)]
    finally:
        pool.close()
    rates = _probe(model, threads)
    return {
        "title": "this machine",
        "source": f"{_MEASURED}, {threads} thread(s)",
        "ram_bytes": hardware.free_ram(),
        "cpu": {
            "cores": threads,
            "memory": {"read_bytes_per_s": {"value": read, "source": f"{_MEASURED}: quant.threads.bandwidth"}},
            "kernels": kernels,
            "process_bytes": {"value": _process_bytes(), "source": _MEASURED},
            **{name: {"value": getattr(chosen, name), "source": source} for name in _FROM},
            **{name: {"value": value, "source": _MEASURED} for name, value in rates.items()},
        },
    }


def _matrices(model: ModelShape) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """The types and widths of the model's matrices, with how many lie in one tensor and the rows of each, by tensor."""
    found: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for tensor in model.tensors:
        if tensor.is_matrix:
            *_, n_rows, n_cols = tensor.shape
            found.setdefault((tensor.type, n_cols), []).append((tensor.n_weights // (n_rows * n_cols), n_rows))
    return [(*key, shapes) for key, shapes in sorted(found.items())]


def _typical_s(*runs: Callable[[], None], threads: int = 1) -> list[float]:
    """The median time of each call, over several turns for _TRY_S.

    Of one thread the processor time counts, which does not include the time that others had the core.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    until = time.perf_counter() + _TRY_S * len(runs)
    while time.perf_counter() < until or not taken[-1]:
        for run, seconds in zip(runs, taken, strict=True):
            started = clock()
            run()
            seconds.append(clock() - started)
    return [statistics.median(seconds) for seconds in taken]


def _read_bandwidth(pool: Any, size: int) -> float:
    """Bytes/s of all workers reading this much memory again and again, in pages as a model's file is mapped."""
    from quant.threads import bandwidth

    memory = bandwidth.buffer(pool, min(size, hardware.free_ram() // 4), as_mapped=True)
    passes = max(3, _PASSED_BYTES // memory.nbytes)
    return bandwidth.read_bandwidth(pool, memory.ctypes.data, memory.nbytes, passes).median


def _random_blocks(pool: Any, format_: Any, n_rows: int, n_cols: int) -> np.ndarray:
    """Valid blocks of n_rows rows: a few made-up ones, repeated, in pages as a model's file is mapped."""
    from quant.threads import bandwidth

    few = made_up_blocks(pool, format_.name, min(n_rows, 64) * n_cols // format_.block, 1.0).reshape(-1)
    blocks = bandwidth.buffer(pool, n_rows * format_.row_bytes(n_cols), as_mapped=True)
    for start in range(0, len(blocks), len(few)):
        part = blocks[start : start + len(few)]
        part[:] = few[: len(part)]
    return blocks


def kernel_rates(
    pool: Any, type_: str, n_cols: int, shapes: list[tuple[int, int]], size: int = _LARGE_BYTES
) -> dict[str, Any]:
    """The rates of one core for a type, while all of the pool's work: a row of machine.Kernel.

    Args:
        shapes: of the model's tensors, matrices and rows of each. A token is multiplied with one after the other, as
            experts lie anywhere: in small ones a core waits for the other's last piece. Many are multiplied with all of
            a tensor in one job, in which the rounding of activations counts for little.
        size: bytes of all matrices that one token is multiplied with.
    """
    from quant.formats import registry

    format_ = registry.get(type_)
    large = max(64, size // format_.row_bytes(n_cols))
    rows = [min(n_rows, large) for _, n_rows in shapes]
    together = Counter(min(n * n_rows, large, max(64, _MANY_WEIGHTS // n_cols)) for n, n_rows in shapes)
    matrix = quant_matrix(_random_blocks(pool, format_, large, n_cols), format_, (large, n_cols))
    step, used = _step(pool, matrix, rows)
    (one,) = _typical_s(lambda: step.run([0], [0], np.zeros(1, np.int64)), threads=pool.n_workers)
    weights = few = many = 0.0
    for n_rows, count in together.items():
        part = matrix.rows(0, n_rows)
        times = _typical_s(_product(pool, part, _FEW), _product(pool, part, _MANY), threads=pool.n_workers)
        weights, few, many = weights + count * n_rows * n_cols, few + count * times[0], many + count * times[1]
    per_token = (many - few) / (_MANY - _FEW)
    return {
        "type": type_,
        "n_cols": n_cols,
        "gemv": used * format_.row_bytes(n_cols) / one / pool.n_workers,
        "expand": weights / max(few - _FEW * per_token, few / 20) / pool.n_workers,  # floats need none
        "gemm": 2 * weights / per_token / pool.n_workers,
    }


def _step(pool: Any, matrix: Any, rows: list[int]) -> tuple[Any, int]:
    """A decode step over the matrix, cut into the model's, as a program; and the rows of the matrix that it uses."""
    from quant.decode.linear import Input, rows_phase
    from quant.decode.program import Program
    from quant.formats import registry

    vector = quant_matrix(np.zeros(4 * matrix.n_cols, np.uint8), registry.get("F32"), (1, matrix.n_cols))
    program, used = Program(pool, vector, np.zeros(0), 1.0, 0), 0
    out = program.vector(max(rows))
    for n_rows in cycle(rows):
        if used + n_rows > matrix.n_rows:
            break
        program.add(rows_phase(Input(program.x), [(matrix.rows(used, n_rows), out)], pool.n_workers))
        used += n_rows
    program.finish()
    return program, used


def _product(pool: Any, matrix: Any, n_tokens: int) -> Callable[[], None]:
    from quant.ops import linear

    x = np.random.default_rng(1).standard_normal((n_tokens, matrix.n_cols), np.float32)
    out = np.empty((n_tokens, matrix.n_rows), np.float32)
    return lambda: linear.multiply(pool, matrix, x.ctypes.data, n_tokens, out.ctypes.data)


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


_PROBE_HIDDEN, _PROBE_INNER, _PROBE_VOCAB = 256, 64, 512
_ATTENTION_LAYERS, _SMALL_LAYERS = 2, 8  # of the two probes: enough to be timed
_SMALL_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "q_lora_rank": None,
                "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}  # fmt: skip
_SHORT_CTX, _LONG_CTX = 16, 1024  # tokens in the cache in two runs whose difference is attention's


def _probe(model: ModelShape, threads: int) -> dict[str, float]:
    """The rates of attention, and what a layer takes besides: two probes, with the model's heads and with small ones.

    Attention over the cache is what a longer context adds to a token or a chunk: everything else is the same.
    """
    with _Probe(_probe_config(model, _ATTENTION_LAYERS), threads) as probe:
        decode_s = probe.decode_s(_LONG_CTX) - probe.decode_s(_SHORT_CTX)
        prefill_s = probe.prefill_s(_LONG_CTX) - probe.prefill_s(0)
        decode_flops = attention_flops(probe.shape, _LONG_CTX - _SHORT_CTX, 1)
        prefill_flops = attention_flops(probe.shape, _LONG_CTX, PREFILL_CHUNK)
    prefill_rate = prefill_flops / max(prefill_s, 1e-6)
    small = _probe_config(model, _SMALL_LAYERS)
    small |= {name: value for name, value in _small_heads(model.config).items() if name in small}
    with _Probe(small, threads) as probe:
        layer_s = probe.decode_s(_SHORT_CTX) / _SMALL_LAYERS
        chunk_s = probe.prefill_s(0) - attention_flops(probe.shape, PREFILL_CHUNK, PREFILL_CHUNK) / prefill_rate
    return {
        "layer_s": layer_s,
        "chunk_layer_s": max(0.0, chunk_s) / _SMALL_LAYERS,
        "attention_decode_flops": decode_flops / max(decode_s, 1e-6),
        "attention_prefill_flops": prefill_rate,
        "activation_bytes_per_s": _activation_bytes_per_s(model.config.hidden_size, threads),
    }


def _small_heads(config: Config) -> dict[str, Any]:
    """Settings of heads that take next to no time; groups of them are projected together."""
    if config.attention == "compressed":
        return {"num_attention_heads": config.o_groups, "o_lora_rank": 32}
    return _SMALL_HEADS


def _activation_bytes_per_s(hidden_size: int, threads: int) -> float:
    """Small operations of torch over a chunk's activations, with the threads it has while an engine is open."""
    from localrun.cpu.torch_threads import TorchThreads

    TorchThreads.hold(threads)
    import torch

    vectors = [
        torch.ones(PREFILL_CHUNK, hidden_size)
        for _ in range(max(2, _ACTIVATION_BYTES // (4 * PREFILL_CHUNK * hidden_size)))
    ]
    (seconds,) = _typical_s(lambda: [x + y for x, y in pairwise(vectors)], threads=torch.get_num_threads())
    TorchThreads.release()
    return (len(vectors) - 1) * 3 * 4 * PREFILL_CHUNK * hidden_size / seconds


def _probe_config(model: ModelShape, n_layers: int) -> dict[str, Any]:
    """A config.json of n_layers with the model's heads, ranks and experts, everything else small."""
    c = model.config
    layers = {"compress_ratios": list(c.compress_ratios[-n_layers:])} if c.compress_ratios else {}
    return (
        ARCHITECTURES[c.architecture].settings(c)
        | layers
        | {
            "hidden_size": _PROBE_HIDDEN,
            "intermediate_size": _PROBE_INNER,
            "moe_intermediate_size": _PROBE_INNER,
            "first_k_dense_replace": 0 if c.n_routed_experts else n_layers,
            "n_shared_experts": int("shared experts" in model.groups()),
            "max_position_embeddings": 4096,
            "num_hidden_layers": n_layers,
            "num_nextn_predict_layers": 0,
            "tie_word_embeddings": True,
            "vocab_size": _PROBE_VOCAB,
        }
    )


class _Probe:
    """A model of random weights for a config.json, written to a temporary file and opened."""

    def __init__(self, values: dict[str, Any], threads: int) -> None:
        import localrun

        self.shape = from_config(values, Path("probe"), "Q8_0")
        self.shape.conversion.metadata.string("tokenizer.ggml.model", "none")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "probe.gguf"
            _write_random(path, self.shape.conversion)
            self._engine = localrun.load(path, threads=threads, ctx=_LONG_CTX + PREFILL_CHUNK)
        self._threads, self._cache = threads, self._engine.new_cache()

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def decode_s(self, ctx: int) -> float:
        """Seconds of one token after ctx others."""
        self._fill(ctx)
        return _typical_s(lambda: self._again([1], ctx), threads=self._threads)[0]

    def prefill_s(self, ctx: int) -> float:
        """Seconds of a chunk after ctx tokens."""
        self._fill(ctx)
        return _typical_s(lambda: self._again(_ids(PREFILL_CHUNK), ctx), threads=self._threads)[0]

    def _fill(self, ctx: int) -> None:
        self._cache.truncate(ctx)
        while self._cache.length < ctx:
            self._engine.model.forward(_ids(min(PREFILL_CHUNK, ctx - self._cache.length)), self._cache)
        self._cache.mark()

    def _again(self, ids: list[int], ctx: int) -> None:
        self._cache.truncate(ctx)
        self._engine.model.forward(ids, self._cache)


def _ids(count: int) -> list[int]:
    return [7 * i % _PROBE_VOCAB for i in range(count)]


def _write_random(path: Path, conversion: Conversion) -> None:
    """The file of a conversion to Q8_0 with random weights, norms near 1."""
    from localrun.convert.layout import make_layout
    from quant.formats import registry
    from quant.threads.pool import Pool

    types = conversion.types("Q8_0")
    layout = make_layout(path, conversion.metadata, conversion.targets, types)
    rng, pool = np.random.default_rng(0), Pool(1)
    with path.open("wb") as file:
        file.write(layout.parts[0].header)
        for target, type_, place in zip(conversion.targets, types, layout.places, strict=True):
            file.seek(place.offset)
            if type_ == "F32":
                file.write((0.5 + rng.random(target.n_weights, np.float32)).tobytes())
            elif type_ == TABLE:  # of each token's experts
                file.write((np.arange(target.n_weights, dtype=np.int32) % target.n_cols).tobytes())
            else:
                file.write(_random_blocks(pool, registry.get(type_), target.n_rows, target.n_cols).tobytes())
        file.truncate(layout.parts[0].size)
    pool.close()


def unmeasured() -> Machine:
    """This machine's memory without any rates: what memory.refusal looks at, and no more."""
    cpu = Cpu(hardware.usable_cores(), 0.0, 0, (), 0.0, 0.0, 0.0, 0.0, 0.0, float(_process_bytes()))
    return Machine("this", "this machine", float(hardware.free_ram()), 0.0, cpu, None)
