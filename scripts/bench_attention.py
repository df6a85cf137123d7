"""Attention behind contexts of several lengths: in float32 and in 16-bit integers, in turn.

    python scripts/bench_attention.py MODEL.gguf [-c 512,2048,8192,32768] [-n 512] [-r ROUNDS] [-t THREADS] [--layer 1]

One layer's attention of the last N tokens of each context, over a cache of random rows, without the projections before
and behind it: keys and values of 32 bits are multiplied in float32, those of 16 in integers. With -n 1 it is that of a
decode step with latent attention, over a 16-bit cache both times. The shortest time of each counts. A table goes to
stderr; the last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import localrun
from localrun import hardware
from localrun.models.config import Config
from quant.decode.attention import Heads, attend_phase
from quant.decode.attention_i16 import integer_attend_phase
from quant.decode.program import Program
from quant.formats import registry
from quant.gemv.rows_i16 import pack_scaled_rows, row_bytes
from quant.matrix import quant_matrix
from quant.threads.pool import Pool, aligned_bytes


def calls(module: Callable, n_tokens: int, n_cached: int) -> dict[str, Callable[[], object]]:
    """The attention of a layer over random rows, by the bits of its cache."""
    import torch  # after the engine, which tells its threads how to wait

    c, generator = module.config, torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    if c.attention == "mla":
        q_nope, q_rope = (random(n_tokens, c.num_attention_heads, d) for d in (c.qk_nope_head_dim, c.qk_rope_head_dim))
        rows = random(n_cached, c.kv_lora_rank + c.qk_rope_head_dim).half()
        attend = module._absorbed if module._absorbing_is_cheaper(n_tokens) else module._decompressed
        wide = rows.float()
        return {"32": lambda: attend(q_nope, q_rope, wide), "16": lambda: attend(q_nope, q_rope, rows)}
    q = random(n_tokens, c.num_attention_heads, c.head_dim)
    keys, values = (random(n_cached, c.num_key_value_heads, d).half() for d in (c.head_dim, c.v_head_dim))
    wide, out = (keys.float(), values.float()), torch.empty(n_tokens, c.num_attention_heads, c.v_head_dim)
    attend, window = module.weights.attend, module.window
    return {
        "32": lambda: attend([(q, wide[0])], wide[1], module.scale, out, window, module.sinks),
        "16": lambda: attend([(q, keys)], values, module.scale, out, window, module.sinks),
    }


def steps(config: Config, pool: Pool, n_cached: int) -> dict[str, Callable[[], object]]:
    """The phase of a decode step in which all heads attend to the cache, by the bits of its products."""
    together = max(n for n in range(1, 17) if config.num_attention_heads % n == 0)
    row_width, random = config.kv_lora_rank + config.qk_rope_head_dim, np.random.default_rng(0)
    heads = Heads(
        n_groups=config.num_attention_heads // together, per_group=together,
        key_width=row_width, value_width=config.kv_lora_rank, key_slot=0, value_slot=0,
        key_row=row_bytes(row_width), value_row=row_bytes(row_width), key_group=0, value_group=0, is_scaled=True,
    )  # fmt: skip
    values = random.standard_normal((n_cached, row_width), dtype=np.float32)
    rows = np.empty((n_cached, row_bytes(row_width)), np.uint8)
    pack_scaled_rows.ctypes(values.ctypes.data, n_cached, row_width, rows.ctypes.data)
    embedding = quant_matrix(np.zeros(64, np.uint8), registry.get("F32"), (1, 16))
    programs = {}
    for bits, make in (("32", attend_phase), ("16", integer_attend_phase)):
        program = Program(pool, embedding, np.ones(1), 1.0, 1)
        queries = program.vector(heads.n_heads * heads.query_width)
        program.add(make(heads, queries, program.keep(aligned_bytes(heads.partials_bytes))))
        program.finish()
        programs[bits] = partial(_step, program, rows)
    return programs


def _step(program: Program, rows: np.ndarray) -> None:
    """A token behind all but the last of these rows."""
    program.run([0], [len(rows) - 1], np.array([rows.ctypes.data]), cache_rows=np.array([len(rows)]))


def seconds(functions: dict[str, Callable[[], object]], n_rounds: int) -> dict[str, float]:
    """The shortest time of each, in turn."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(n_rounds + 1):  # the first one compiles, and touches memory
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - start)
    return {name: min(times[1:]) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-c", "--contexts", default="512,2048,8192,32768")
    parser.add_argument("-n", "--tokens", type=int, default=512)
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=hardware.usable_cores())
    parser.add_argument("--layer", type=int, default=1)
    options = parser.parse_args()
    results = {}
    with localrun.load(options.model, threads=options.threads, ctx=16) as engine:
        module = engine.model.network.layers[options.layer].self_attn
        for n_cached in map(int, options.contexts.split(",")):
            if options.tokens == 1 and engine.config.attention == "mla":
                functions = steps(engine.config, engine.model._pool, n_cached)
            else:
                functions = calls(module, min(options.tokens, n_cached), n_cached)
            times = seconds(functions, options.rounds)
            results[n_cached] = times | {"ratio": times["32"] / times["16"]}
            line = f"{1e3 * times['32']:9.1f} ms in float32 {1e3 * times['16']:9.1f} in 16-bit integers"
            print(f"{n_cached:7} {line} {results[n_cached]['ratio']:6.2f}", file=sys.stderr, flush=True)
    print(json.dumps({"model": options.model.name, "tokens": options.tokens, "seconds": results}))


if __name__ == "__main__":
    main()
