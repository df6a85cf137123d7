"""Compiles Triton kernels for cards that are not there, from calls of the functions that launch them.

Not for a process that interprets kernels: run this file with names of VARIANTS (all without) and `--capability 80`, or
`--hip gfx1100` for an AMD card. A JSON line for each kernel: registers, bytes of stack (where spills go), shared memory
(of an AMD card the last alone), or why it does not compile. stderr says whether one had to be compiled, or all were in
Triton's cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from localrun.gpu import compiling, streams, tiles
from localrun.gpu.attention import (
    compressed_decoding,
    compressed_rows,
    flash_decoding,
    grouped,
    indexer,
    latent_queries,
)
from localrun.gpu.attention.turns import Turns
from localrun.gpu.caches.cache import new_cache
from localrun.gpu.experts import in_vram, router
from localrun.gpu.formats.layout import LAYOUTS
from localrun.gpu.matrices import fp8, gemm, gemv, matrix
from localrun.models.config import SLIDING, Config
from localrun.network.rope import Rope
from localrun.network.weight_source import Seen
from quant.simd.gated import SWIGLU, Activation

_TYPES = {
    torch.uint8: "*u8", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def launches(call: Callable[[], object]) -> list[tuple[JITFunction, tuple, dict]]:
    """Kernel, arguments and options of every launch in a call; nothing is run."""
    made, original = [], JITFunction.__getitem__
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **options: made.append((kernel, args, options))
    try:
        call()
    finally:
        JITFunction.__getitem__ = original
    return made


def compiled(kernel: JITFunction, args: tuple, options: dict, target: GPUTarget) -> CompiledKernel:
    """The kernel as a launch with these arguments would compile it on such a card."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    hints: dict[tuple[int], list] = {}
    named = {parameter.name for parameter in kernel.params}
    by_name = [options[parameter.name] for parameter in kernel.params[len(args) :]]
    options = {name: value for name, value in options.items() if name not in named}
    for i, (parameter, value) in enumerate(zip(kernel.params, [*args, *by_name], strict=True)):
        is_tensor = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or (not is_tensor and value == 1):
            signature[parameter.name], constants[i,] = "constexpr", value
            continue
        signature[parameter.name] = _TYPES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=target, options=options)


def usage(kernel: CompiledKernel) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread, bytes of shared memory."""
    if "cubin" not in kernel.asm:
        return {"shared": kernel.metadata.shared}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack) + int(local), "shared": kernel.metadata.shared}


def _matrix(name: str, n_groups: int, n_rows: int, n_cols: int) -> matrix.Matrix:
    layout = LAYOUTS[name]
    scales = torch.empty(n_groups, -(-n_rows // 128), -(-n_cols // 128)) if name == "FP8_E4M3" else None
    return matrix.Matrix(layout, torch.empty(16, dtype=torch.uint8), n_groups, n_rows, n_cols, scales)


def _few(name: str, n_tokens: int, n_rows: int = 2048) -> Callable[[], object]:
    return lambda: gemv.multiply(_matrix(name, 1, n_rows, 7168), torch.empty(n_tokens, 1, 7168))


def _many(name: str, n_tokens: int) -> Callable[[], object]:
    return lambda: gemm.multiply(_matrix(name, 1, 2048, 7168), torch.empty(n_tokens, 1, 7168))


def _rows(name: str) -> Callable[[], object]:
    return lambda: gemv.expand_rows(_matrix(name, 1, 2048, 7168), torch.arange(2))


def _transposed(name: str) -> Callable[[], object]:
    return lambda: gemv.multiply_transposed(_matrix(name, 128, 128, 512), torch.empty(1, 128, 128))


def _experts(n_tokens: int, gate: str, down: str) -> Callable[[], object]:
    def call() -> None:
        gate_matrix, down_matrix = _matrix(gate, 8, 2048, 7168), _matrix(down, 8, 7168, 2048)
        between = in_vram.Between.__new__(in_vram.Between)
        between.is_biased = between.is_bounded = gate == "MXFP4"  # as gpt-oss has them
        between.gate = between.up = between.down = torch.zeros(8 * 7168)
        between.activation = 1.702, 7.0, 1.0
        slots = torch.arange(8, dtype=torch.int32)
        layer = in_vram.Experts.of(gate_matrix, gate_matrix, down_matrix, slots, between)
        ids = torch.zeros(n_tokens, 8, dtype=torch.int64)
        layer(torch.empty(n_tokens, 7168), ids, torch.empty(n_tokens, 8))

    return call


def _fp8(native: bool) -> Callable[[], object]:
    def call() -> None:
        linear = object.__new__(fp8.FP8Linear)
        linear.matrix = _matrix("FP8_E4M3", 1, 2048, 7168)
        linear._many(torch.empty(64, 7168), native)

    return call


def _config(n_heads: int) -> Config:
    """DeepSeek's sizes of latent attention, and V3's router."""
    return Config(
        architecture="deepseek2", attention="mla", rope="pairs",
        hidden_size=7168, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=n_heads, vocab_size=1, max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=1e4,
        rope_scaling=None, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128,
        n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, scoring_func="sigmoid",
        norm_topk_prob=True,
    )  # fmt: skip


def _grouped_config(n_heads: int, width: int, **more: Any) -> Config:
    """Of GLM-4.5's or gpt-oss' attention."""
    return Config(
        architecture="glm4moe", attention="gqa", rope="halves",
        hidden_size=5120, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=n_heads, vocab_size=1, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=1e6,
        rope_scaling=None, qk_rope_head_dim=64, v_head_dim=width, num_key_value_heads=8, head_dim=width, **more,
    )  # fmt: skip


_GROUPED = {
    "GLM-4.5": _grouped_config(96, 128),
    "gpt-oss": _grouped_config(64, 64, sliding_window=128, layer_types=(SLIDING,)),
}
_MODELS = {"V3": _config(128), "V2-Lite": _config(16)}


def _attend(model: str, bits: int) -> Callable[[], object]:
    """Both kernels of attention to one token; products of float16, or float32 over an exact cache."""

    def call() -> None:
        c, dtype = _MODELS[model], torch.float32 if bits == 32 else torch.float16
        cache = new_cache(c, 16, torch.device("cpu"), bits)
        latent, rope = torch.empty(1, c.num_attention_heads, 512), torch.empty(1, c.num_attention_heads, 64)
        flash_decoding.attend(latent, rope, cache, 0, c, 0.1, 33, dtype)

    return call


def _attend_grouped(model: str, bits: int) -> Callable[[], object]:
    """The rows' write as well."""

    def call() -> None:
        c, dtype = _GROUPED[model], torch.float32 if bits == 32 else torch.float16
        cache, window = new_cache(c, 16, torch.device("cpu"), bits), c.window(0)
        sinks = torch.empty(c.num_attention_heads) if window else None
        keys, values = torch.empty(1, c.num_key_value_heads, c.head_dim), torch.empty(1, cache.values[0].shape[1])
        grouped.append(keys, values, cache.places(1), 0, c, window)
        q = torch.empty(1, c.num_attention_heads, c.head_dim)
        grouped.attend_grouped(q, cache, 0, c, 0.1, 33, dtype, window, sinks)

    return call


def _sparse() -> None:
    """V3.2's indexer and attention over what it has chosen, to one token."""
    c = dataclasses.replace(
        _MODELS["V3"], index_n_heads=64, index_head_dim=128, index_topk=2048, indexer_types=("full",)
    )
    cache = new_cache(c, 16, torch.device("cpu"))
    places = dataclasses.replace(cache.places(1), most=4096)
    indexer.append_keys(torch.empty(1, 128), places, 0)
    indexer.scores_of(torch.empty(1, 64, 128), torch.empty(1, 64), places, 0, torch.float16)
    latent, rope, chosen = torch.empty(1, 128, 512), torch.empty(1, 128, 64), torch.empty(1, 2048, dtype=torch.int32)
    flash_decoding.attend(latent, rope, places, 0, c, 0.1, 33, torch.float16, chosen)


def _by(kind: str, name: str, call: Callable[[], object]) -> Callable[[], object]:
    """With tiles of that name."""

    def called() -> None:
        tiles.use(torch.device("cpu"), tiles.named({kind: name}))
        try:
            call()
        finally:
            tiles.use(torch.device("cpu"), tiles.Tiles())

    return called


_V4 = Config(  # Flash's
    architecture="deepseek4", attention="compressed", rope="pairs",
    hidden_size=4096, intermediate_size=0, num_hidden_layers=3, num_attention_heads=64, vocab_size=129280,
    max_position_embeddings=1 << 20, rms_norm_eps=1e-6, rope_theta=1e4, rope_scaling=None, qk_rope_head_dim=64,
    v_head_dim=512, head_dim=512, sliding_window=128, compress_ratios=(0, 4, 128), index_n_heads=64,
    index_head_dim=128, index_topk=512, hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, n_routed_experts=256,
    num_experts_per_tok=6, scoring_func="sqrtsoftplus", norm_topk_prob=True,
)  # fmt: skip


def _compressed(bits: int) -> Callable[[], object]:
    """One token through a layer of each ratio, and its rows; a prompt's attention; the indexer's scores."""

    def call() -> None:
        c, cpu, dtype = _V4, torch.device("cpu"), torch.float32 if bits == 32 else torch.float16
        turns, cache = Turns(Rope(c), cpu), new_cache(c, 4096, cpu, bits)
        q, sinks, rows = torch.empty(1, 64, 512), torch.empty(64), torch.empty(128, 512, dtype=dtype)
        places = dataclasses.replace(cache.places(1), most=4096)
        compressed_rows.turned_heads(q, places.positions, turns, 64, 1e-6)
        compressed_rows.turned_heads(torch.empty(1, 64, 128), places.positions, turns, 64, None)
        for layer, widths in ((0, ()), (1, ((1024, 512), (256, 128))), (2, ((512, 512),))):
            openings = []
            for width, of_row in widths:
                wide, bias = torch.empty(1, width), torch.empty(c.compress_ratio(layer), width)
                openings.append(compressed_rows.Opening(wide, wide, bias, torch.empty(of_row)))
            compressed_rows.append(torch.empty(1, 512), torch.empty(512), openings, turns, places, layer, c)
        for layer, chosen in ((0, None), (1, torch.empty(1, 512, dtype=torch.int32)), (1, None), (2, None)):
            how = compressed_decoding.Attending(c, layer, turns, sinks, 0.04, 33, dtype)
            compressed_decoding.attend_at(how, q, places, chosen)
            seen = Seen(127, rows, c.compress_ratio(layer), chosen, rows, 128)
            compressed_decoding.attend_seen(how, q, places.positions, seen)
        indexer.scores_of(torch.empty(1, 64, 128), torch.empty(1, 64), places, 1, dtype, 4)

    return call


def _compressed_chosen() -> None:
    c, cpu = _V4, torch.device("cpu")
    how = compressed_decoding.Attending(c, 1, Turns(Rope(c), cpu), torch.empty(64), 0.04, 33, torch.float16)
    places = new_cache(c, 16, cpu).places(1)
    compressed_decoding.attend_at(how, torch.empty(1, 64, 512), places, torch.empty(1, 512, dtype=torch.int32))


def _streams() -> None:
    computed, scale, base, given = torch.empty(1, 24), torch.empty(3), torch.empty(24), torch.empty(1, 4, 4096)
    x, expand = streams.mix_streams(computed, scale, base, given, torch.empty(4096), _V4)
    expand(x)


def _gated() -> None:
    for activation in (SWIGLU, Activation(1.0, 10.0, 0.0)):
        in_vram.gated(activation, torch.empty(1, 2048), torch.empty(1, 2048))


def _hashed_router() -> None:
    router.choose_experts(torch.empty(1, 256), None, _V4, torch.empty(1, 6, dtype=torch.int64))
    router.choose_experts(torch.empty(1, 256), torch.empty(256), _V4)


def _queries(model: str, bits: int) -> Callable[[], object]:
    def call() -> None:
        c, cpu = _MODELS[model], torch.device("cpu")
        cache, turns = new_cache(c, 16, cpu, bits), Turns(Rope(c), cpu)
        projected = torch.empty(1, c.num_attention_heads * 192)
        latent_queries.turn_and_append(projected, torch.empty(1, 576), torch.empty(512), turns, cache, 0, c)

    return call


def _router() -> None:
    router.choose_experts(torch.empty(1, 256), torch.empty(256), _MODELS["V3"])


_OTHERS = {kind: [name for name in names if name != tiles.USUAL] for kind, names in tiles.CANDIDATES.items()}
VARIANTS: dict[str, Callable[[], object]] = {
    **{f"{name} {n} tokens": _few(name, n) for name in LAYOUTS for n in (1, 2, 4, 5, 8)},
    **{f"{name} {n} tokens, split": _few(name, n, 24) for name in LAYOUTS for n in (1, 8)},
    **{f"{name} {n} tokens": _many(name, n) for name in LAYOUTS for n in (16, 64)},
    **{f"{name} rows": _rows(name) for name in LAYOUTS},
    **{f"{name} transposed": _transposed(name) for name in LAYOUTS},
    **{f"experts {n} tokens, {gate} {down}": _experts(n, gate, down)
       for n in (1, 64) for gate, down in (("Q4_K", "Q6_K"), ("Q8_0", "Q8_0"), ("Q4_K", "Q5_0"), ("MXFP4", "MXFP4"))},
    **{f"attention {model} {bits} bits": _attend(model, bits) for model in _MODELS for bits in (8, 16, 32)},
    **{f"attention {model} {bits} bits": _attend_grouped(model, bits) for model in _GROUPED for bits in (16, 32)},
    **{f"queries {model} {bits} bits": _queries(model, bits) for model in _MODELS for bits in (8, 16, 32)},
    **{f"{name} {n} tokens, {tile}": _by("few", tile, _few(name, n))
       for tile in _OTHERS["few"] for name in LAYOUTS for n in (1, 4, 5, 8)},
    **{f"{name} {n} tokens, {tile}": _by("many", tile, _many(name, n))
       for tile in _OTHERS["many"] for name in LAYOUTS for n in (16, 64)},
    **{f"experts 64 tokens, {gate} {down}, {tile}": _by("many", tile, _experts(64, gate, down))
       for tile in _OTHERS["many"] for gate, down in (("Q4_K", "Q6_K"), ("MXFP4", "MXFP4"))},
    **{f"attention {model} {bits} bits, {tile}": _by("attention", tile, _attend(model, bits))
       for tile in _OTHERS["attention"] for model in _MODELS for bits in (8, 16)},
    **{f"attention {model} 16 bits, {tile}": _by("attention", tile, _attend_grouped(model, 16))
       for tile in _OTHERS["attention"] for model in _GROUPED},
    "FP8 widened, small": _by("many", "small", _fp8(False)),
    "sparse attention V3.2, small": _by("attention", "small", _sparse),
    **{f"attention V4 {bits} bits": _compressed(bits) for bits in (16, 32)},
    "attention V4 16 bits, small": _by("attention", "small", _compressed(16)),
    "attention V4 to chosen rows": _compressed_chosen,
    "streams V4": _streams,
    "gated": _gated,
    "router V4": _hashed_router,
    "router V3": _router,
    "sparse attention V3.2": _sparse,
    "FP8 products": _fp8(True),
    "FP8 widened": _fp8(False),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--capability", type=int, default=80)
    parser.add_argument("--hip", metavar="ARCHITECTURE", help="of an AMD card, in place of a capability")
    arguments = parser.parse_args()
    compiling.set_up(lambda line: print(line, file=sys.stderr))
    target = GPUTarget("cuda", arguments.capability, 32)
    if arguments.hip:
        target = GPUTarget("hip", arguments.hip, 32 if arguments.hip.startswith("gfx1") else 64)
    for name in arguments.variants:
        for kernel, args, options in launches(VARIANTS[name]):
            try:
                figures = usage(compiled(kernel, args, options, target))
            except Exception as error:  # whatever a compiler raises
                figures = {"error": (str(error).strip() or repr(error)).splitlines()[0][:200]}
            print(json.dumps({"variant": name, "kernel": kernel.__name__, **figures}), flush=True)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
