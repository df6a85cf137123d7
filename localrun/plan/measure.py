"""This machine's description, measured: memory, kernels by type and width, and what a layer takes besides arithmetic.

Each rate is measured by itself, on made-up weights; no model's speed goes into its own prediction. What lies between
kernels (dispatch, Python, small operations) is measured on a probe: a model of the same kind with the same heads, whose
matrices are so small that little else is left.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from localrun import hardware
from localrun.plan.decode import attention_flops
from localrun.plan.machine import Cpu, Machine, parse_machine
from localrun.plan.memory import CHUNK
from localrun.plan.shapes import Conversion, ModelShape, from_config, n_bytes

_LARGE_BYTES = 1 << 28  # what a matrix takes at most: far beyond any cache but the largest servers'
_READ_BYTES = 1 << 30  # what is read at most
_PASSED_BYTES = 1 << 33  # about as much in all: some spans of it will be undisturbed
_FEW, _MANY = 16, 256  # tokens whose times give expansion and product apart
_TRY_S = 0.15  # each figure: the best of several runs within this time
_MEASURED = "measured by localrun plan"


def this_machine(model: ModelShape, threads: int | None = None) -> Machine:
    """The machine that runs this, for one model's types and heads, with a number of threads (None: all cores)."""
    threads = threads or hardware.usable_cores()
    return parse_machine(describe(model, threads), "this", "this machine")


def describe(model: ModelShape, threads: int) -> dict[str, Any]:
    """The same as a JSON document, to be kept in a file."""
    from quant.pool import Pool

    pool, one = Pool(threads), Pool(1)
    try:
        # No more memory than the model has: where caches help it, they help its rates.
        size = n_bytes(model.tensors)
        read = _read_bandwidth(pool, min(size, _READ_BYTES))
        kernels = [kernel_rates(one, *matrix, min(size, _LARGE_BYTES)) for matrix in _matrices(model)]
    finally:
        pool.close()
        one.close()
    rates = _probe(model, threads)
    return {
        "title": "this machine",
        "source": f"{_MEASURED}, {threads} thread(s)",
        "ram_bytes": hardware.free_ram(),
        "cpu": {
            "cores": threads,
            "memory": {"read_bytes_per_s": {"value": read, "source": f"{_MEASURED}: quant.stream"}},
            "kernels": kernels,
            "process_bytes": {"value": _process_bytes(), "source": _MEASURED},
            **{name: {"value": value, "source": _MEASURED} for name, value in rates.items()},
        },
    }


def _matrices(model: ModelShape) -> list[tuple[str, int]]:
    """The types and widths of the model's matrices."""
    return sorted({(t.type, t.shape[-1]) for t in model.tensors if len(t.shape) > 1})


def _best_s(*runs: Callable[[], None], threads: int = 1) -> list[float]:
    """The least time of each call, over several turns for _TRY_S: other programs only ever add to it.

    Of one thread the processor time counts, which does not include the time that others had the core.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    best, until = [float("inf")] * len(runs), time.perf_counter() + _TRY_S * len(runs)
    for run in runs:
        run()
    while time.perf_counter() < until or float("inf") in best:
        for index, run in enumerate(runs):
            started = clock()
            run()
            best[index] = min(best[index], clock() - started)
    return best


def _read_bandwidth(pool: Any, size: int) -> float:
    """Bytes/s of all workers reading this much memory again and again."""
    from quant import stream

    memory = stream.buffer(pool, min(size, hardware.free_ram() // 4))
    passes = max(3, _PASSED_BYTES // memory.nbytes)
    return stream.read_bandwidth(pool, memory.ctypes.data, memory.nbytes, passes).best


def _random_blocks(pool: Any, format_: Any, n_rows: int, n_cols: int) -> np.ndarray:
    """Valid blocks of n_rows rows: a few packed ones, repeated."""
    from quant.pack import pack

    few = min(n_rows, 64)
    values = np.random.default_rng(0).standard_normal((few, n_cols), np.float32)
    packed = np.empty(few * format_.row_bytes(n_cols), np.uint8)
    pack(pool, format_, values.ctypes.data, few, n_cols, packed.ctypes.data)
    return np.resize(packed, n_rows * format_.row_bytes(n_cols))


def kernel_rates(pool: Any, type_: str, n_cols: int, size: int = _LARGE_BYTES) -> dict[str, Any]:
    """The rates of one core for a type, on a matrix of this size: a row of machine.Kernel. The pool has one worker."""
    from quant import formats, linear

    format_ = formats.get(type_)
    n_rows = max(64, size // format_.row_bytes(n_cols))
    matrix = linear.weight(_random_blocks(pool, format_, n_rows, n_cols), format_, (n_rows, n_cols))
    (one,) = _best_s(_product(pool, matrix, 1))
    part = matrix.rows(0, min(n_rows, max(64, (1 << 21) // n_cols)))
    few, many = _best_s(_product(pool, part, _FEW), _product(pool, part, _MANY))
    weights, per_token = part.n_rows * n_cols, (many - few) / (_MANY - _FEW)
    return {
        "type": type_,
        "n_cols": n_cols,
        "gemv": n_rows * format_.row_bytes(n_cols) / one,
        "expand": weights / max(few - _FEW * per_token, few / 20),  # of floats there is nothing to expand
        "gemm": 2 * weights / per_token,
    }


def _product(pool: Any, matrix: Any, n_tokens: int) -> Callable[[], None]:
    from quant import linear

    x = np.random.default_rng(1).standard_normal((n_tokens, matrix.n_cols), np.float32)
    out = np.empty((n_tokens, matrix.n_rows), np.float32)
    return lambda: linear.multiply(pool, matrix, x.ctypes.data, n_tokens, out.ctypes.data)


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


_PROBE_HIDDEN, _PROBE_INNER, _PROBE_LAYERS, _PROBE_VOCAB = 256, 64, 8, 512
_SMALL_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "q_lora_rank": None,
                "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32}  # fmt: skip
_SHORT_CTX, _LONG_CTX = 16, 1024  # tokens in the cache in two runs whose difference is attention's


def _probe(model: ModelShape, threads: int) -> dict[str, float]:
    """The rates of attention, and what a layer takes besides: two probes, with the model's heads and with small ones.

    Attention over the cache is what a longer context adds to a token, and what a chunk takes beyond two half as long:
    everything else is the same for each token.
    """
    with _Probe(_probe_config(model), threads) as probe:
        decode_s = probe.decode_s(_LONG_CTX) - probe.decode_s(_SHORT_CTX)
        prefill_s = probe.prefill_s(CHUNK) - 2 * probe.prefill_s(CHUNK // 2)
        decode_flops = attention_flops(probe.shape, _LONG_CTX - _SHORT_CTX, 1)
        prefill_flops = _own_flops(probe.shape, CHUNK) - 2 * _own_flops(probe.shape, CHUNK // 2)
    prefill_rate = prefill_flops / max(prefill_s, 1e-6)
    small = _probe_config(model)
    small |= {name: value for name, value in _SMALL_HEADS.items() if name in small}
    with _Probe(small, threads) as probe:
        layer_s = probe.decode_s(_SHORT_CTX) / _PROBE_LAYERS
        chunk_s = probe.prefill_s(CHUNK) - _own_flops(probe.shape, CHUNK) / prefill_rate
    return {
        "layer_s": layer_s,
        "chunk_layer_s": max(0.0, chunk_s) / _PROBE_LAYERS,
        "attention_decode_flops": decode_flops / max(decode_s, 1e-6),
        "attention_prefill_flops": prefill_rate,
        "activation_bytes_per_s": _activation_bytes_per_s(model.config.hidden_size, threads),
    }


def _own_flops(model: ModelShape, n_tokens: int) -> float:
    """Attention of a chunk over itself."""
    return attention_flops(model, n_tokens, n_tokens)


def _activation_bytes_per_s(hidden_size: int, threads: int) -> float:
    """Small operations of torch over a chunk's activations, with the threads it has while an engine is open."""
    from localrun.native import TorchThreads

    TorchThreads.hold(threads)
    import torch

    x, y = torch.ones(CHUNK, hidden_size), torch.ones(CHUNK, hidden_size)
    (seconds,) = _best_s(lambda: x + y, threads=torch.get_num_threads())
    TorchThreads.release()
    return 3 * 4 * CHUNK * hidden_size / seconds


def _probe_config(model: ModelShape) -> dict[str, Any]:
    """A config.json with the model's heads, ranks and experts, everything else small."""
    c = model.config
    values: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": _PROBE_HIDDEN,
        "intermediate_size": _PROBE_INNER,
        "max_position_embeddings": 4096,
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": _PROBE_LAYERS,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": _PROBE_VOCAB,
    }
    if not c.kv_lora_rank:
        heads = {"num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim}
        return values | heads | {"architectures": ["LlamaForCausalLM"]}
    is_sigmoid = c.scoring_func == "sigmoid"
    latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    routing = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "scoring_func", "norm_topk_prob")
    return (
        values
        | {name: getattr(c, name) for name in latent + routing}
        | {
            "architectures": ["DeepseekV3ForCausalLM" if is_sigmoid else "DeepseekV2ForCausalLM"],
            "first_k_dense_replace": 0 if c.n_routed_experts else _PROBE_LAYERS,
            "moe_intermediate_size": _PROBE_INNER,
            "n_shared_experts": int("shared experts" in model.groups()),
            "topk_method": "noaux_tc" if is_sigmoid else "group_limited_greedy",
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
            self._engine = localrun.load(path, threads=threads, ctx=_LONG_CTX + CHUNK)
        self._threads, self._cache = threads, self._engine.new_cache()

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.close()

    def decode_s(self, ctx: int) -> float:
        """Seconds of one token after ctx others."""
        self._fill(ctx)
        return _best_s(lambda: self._again([1], ctx), threads=self._threads)[0]

    def prefill_s(self, n_tokens: int) -> float:
        """Seconds of a chunk, from an empty context."""
        return _best_s(lambda: self._again(_ids(n_tokens), 0), threads=self._threads)[0]

    def _fill(self, ctx: int) -> None:
        self._cache.truncate(ctx)
        while self._cache.length < ctx:
            self._engine.model.forward(_ids(min(CHUNK, ctx - self._cache.length)), self._cache)

    def _again(self, ids: list[int], ctx: int) -> None:
        self._cache.truncate(ctx)
        self._engine.model.forward(ids, self._cache)


def _ids(count: int) -> list[int]:
    return [7 * i % _PROBE_VOCAB for i in range(count)]


def _write_random(path: Path, conversion: Conversion) -> None:
    """The file of a conversion to Q8_0 with random weights, norms near 1."""
    from localrun.convert.layout import make_layout
    from quant import formats
    from quant.pool import Pool

    types = conversion.types("Q8_0")
    layout = make_layout(path, conversion.metadata, conversion.targets, types)
    rng, pool = np.random.default_rng(0), Pool(1)
    with path.open("wb") as file:
        file.write(layout.parts[0].header)
        for target, type_, place in zip(conversion.targets, types, layout.places, strict=True):
            file.seek(place.offset)
            if type_ == "F32":
                file.write((0.5 + rng.random(target.n_weights, np.float32)).tobytes())
            else:
                file.write(_random_blocks(pool, formats.get(type_), target.n_rows, target.n_cols).tobytes())
        file.truncate(layout.parts[0].size)
    pool.close()


def unmeasured() -> Machine:
    """This machine's memory without any rates: what memory.refusal looks at, and no more."""
    cpu = Cpu(hardware.usable_cores(), 0.0, 0, (), 0.0, 0.0, 0.0, 0.0, 0.0, float(_process_bytes()))
    return Machine("this", "this machine", float(hardware.free_ram()), 0.0, cpu, None)
