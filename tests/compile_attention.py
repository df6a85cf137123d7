"""A program, no test: compiles attention's kernels for cards that need not be there, and prints what each takes.

Run by test_gpu_attention.py in a process of its own, since Triton either compiles or interprets. Prints one JSON list
of {kernel, model, bits, capability, shared_bytes, spilled_bytes}.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource, CompiledKernel

from localrun.config import Config
from localrun.gpu import attention, routing

HALF, EXACT = torch.float16, torch.float32
DATA = {8: "*u8", 16: "*fp16", 32: "*fp32"}


def config(n_heads: int) -> Config:
    """DeepSeek's sizes of latent attention, and V3's router."""
    return Config(
        architecture="deepseek2", hidden_size=7168, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=n_heads, vocab_size=1, max_position_embeddings=163840, rms_norm_eps=1e-6, rope_theta=1e4,
        rope_scaling=None, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, qk_nope_head_dim=128,
        n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4, scoring_func="sigmoid",
        norm_topk_prob=True,
    )  # fmt: skip


MODELS = {"V3": config(128), "V2-Lite": config(16)}


def compiled(kernel, types: dict[str, str], constants: dict, capability: int, **options: int) -> CompiledKernel:
    """As a launch would compile it, all addresses and strides being multiples of 16."""
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [n for n, name in enumerate(names) if signature[name].startswith("*") or name.endswith("stride")]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(kernel: CompiledKernel, capability: int) -> int:
    """By the assembler's own account."""
    try:
        assembler = nvidia.get_ptxas(capability).path
    except TypeError:  # Triton before 3.5 has one for all
        assembler = nvidia.get_ptxas().path
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [assembler, "-v", f"--gpu-name={architecture}", str(source), "-o", str(source.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def attend(model: str, bits: int, dtype: torch.dtype, capability: int) -> CompiledKernel:
    c = MODELS[model]
    types = {name: "*fp32" for name in ("q_latent", "q_rope", "scales", "partials", "log_sums")}
    types |= {"latents": DATA[bits], "rope_keys": DATA[max(bits, 16)], "start": "*i32", "score_scale": "fp32"}
    types |= {name: "i32" for name in ("n_pieces", "latent_stride", "rope_stride")}
    constants, options = attention.attend_constants(c, bits, dtype), attention.attend_options(c, bits, dtype)
    return compiled(attention.attend_kernel, types, constants, capability, **options)


def combine(model: str, capability: int) -> CompiledKernel:
    types = {"partials": "*fp32", "log_sums": "*fp32", "start": "*i32", "out": "*fp32", "n_pieces": "i32"}
    constants = attention.combine_constants(MODELS[model], 16, HALF)
    return compiled(attention.combine_kernel, types, constants, capability, num_warps=4)


def queries(model: str, bits: int, capability: int) -> CompiledKernel:
    types = {name: "*fp32" for name in ("q", "kv", "norm", "q_nope", "q_rope", "scales", "fine", "coarse")}
    types |= {"latents": DATA[bits], "rope_keys": DATA[max(bits, 16)], "start": "*i32", "epsilon": "fp32"}
    types |= {"latent_stride": "i32", "rope_stride": "i32"}
    constants = routing.queries_constants(MODELS[model], bits)
    return compiled(routing.queries_kernel, types, constants, capability, num_warps=4)


def router(model: str, capability: int) -> CompiledKernel:
    types = {"logits": "*fp32", "bias": "*fp32", "ids": "*i64", "weights": "*fp32", "scaling": "fp32"}
    constants = routing.router_constants(MODELS[model], True)
    return compiled(routing.router_kernel, types | {"smallest_sum": "fp32"}, constants, capability, num_warps=4)


KERNELS = [
    ("attend", "V3", 16, 80, lambda: attend("V3", 16, HALF, 80)),
    ("attend", "V3", 16, 89, lambda: attend("V3", 16, HALF, 89)),
    ("attend", "V3", 16, 90, lambda: attend("V3", 16, HALF, 90)),
    ("attend", "V3", 8, 80, lambda: attend("V3", 8, HALF, 80)),
    ("attend", "V3", 8, 89, lambda: attend("V3", 8, HALF, 89)),
    ("attend", "V2-Lite", 16, 89, lambda: attend("V2-Lite", 16, HALF, 89)),
    ("attend", "V2-Lite", 8, 89, lambda: attend("V2-Lite", 8, HALF, 89)),
    ("combine", "V3", 16, 89, lambda: combine("V3", 89)),
    ("queries", "V3", 8, 80, lambda: queries("V3", 8, 80)),
    ("router", "V3", 16, 89, lambda: router("V3", 89)),
]


def main() -> None:
    warnings.simplefilter("ignore")  # Triton's, about defaults of its next version
    found = []
    for name, model, bits, capability, build in KERNELS:
        kernel = build()
        found.append(
            {
                "kernel": name, "model": model, "bits": bits, "capability": capability,
                "shared_bytes": kernel.metadata.shared, "spilled_bytes": spilled_bytes(kernel, capability),
            }
        )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
