"""What the GPU half reaches on this machine: kernels, decode steps by side, prompts, and V3 projected from its slice.

    python scripts/make_synthetic.py v3-slice v3-slice.gguf
    python scripts/bench_hybrid.py v3-slice.gguf [-t N] [--gpu-experts N] [--kernels]

Needs an NVIDIA card, torch with CUDA, triton, numba and gguf; no llama.cpp, since nothing is tokenised. The file can be
any deepseek2 one; it must be in RAM whole for the figures to mean anything. --kernels adds the kernels' own times (some
minutes). --stand-in runs it all through on the CPU as the device, to see that it works: its times mean nothing.
A few lines of progress go to stderr; stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

V3 = {"n_dense": 3, "n_sparse": 58, "vocabulary": 129280}


def card() -> dict[str, Any]:
    """The GPU in use. Raises SystemExit, with a line, if there is none."""
    from localrun.placement import available

    found = available.find()
    if isinstance(found, available.NoGpu):
        print(f"bench_hybrid: {found.reason}; --stand-in runs it through without one", file=sys.stderr)
        raise SystemExit(1)
    return vars(found)


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "triton", "numba", "llvmlite", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def say(what: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def kernels() -> dict[str, Any]:
    """The kernels' own times."""
    import torch
    from hybrid import attention
    from hybrid import kernels as products

    say("matrix products")
    found = products.figures(torch.device("cuda"))
    for name in ("V3", "V2-Lite"):
        for bits in (16, 8):
            say(f"attention of {name}, cache of {bits} bits")
            found[f"attention {name} {bits} bits"] = attention.time_decode(name, bits=bits)
    return found


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    from hybrid.steps import SMALL, Bench, Effort, projected

    from localrun import hardware
    from localrun.gguf.file import open_gguf
    from localrun.gpu.device import Cuda, StandIn
    from localrun.gpu.hybrid import HybridModel
    from localrun.models.reader import read_config
    from localrun.placement.devices import DeviceRequest, choose
    from localrun.placement.placement import Request, lay_out
    from quant.target import isa

    effort = SMALL if arguments.stand_in else Effort()
    ctx = max(*effort.prompts, effort.context + max(effort.tokens))
    with open_gguf(arguments.model) as file:
        config = read_config(file)
        if arguments.stand_in:
            much = 1 << 40
            request = Request(tuple(file.tensors.values()), config, ctx, much, much, gpu_experts=arguments.gpu_experts)
            placement, device = lay_out(request), StandIn()
        else:
            where = DeviceRequest("cuda", gpu_experts=arguments.gpu_experts)
            placement, device = choose(where, file, config, ctx, False, say), Cuda()
        say("loading")
        model = HybridModel(config, file, arguments.threads, placement, device)
        try:
            model.resident.wait()
            bench = Bench(model, effort)
            say("bandwidth")
            found: dict[str, Any] = {
                "model": str(arguments.model),
                "threads": arguments.threads,
                "isa": isa.LEVEL,
                "cpu": hardware.cpu_model(),
                "placement": placement.document(),
                "host_read_gb_per_s": bench.read_gb_per_s() if model.routed.in_ram else None,
                "upload_gb_per_s": bench.upload_gb_per_s(),
            }
            say("steps")
            found["decode"] = [bench.decode(n_tokens) for n_tokens in effort.tokens]
            found["layers_ms"] = bench.layers()
            if "experts" in found["layers_ms"]:
                found["as_many_layers_as_v3"] = projected(found["layers_ms"], **V3, own_vocabulary=config.vocab_size)
            say("prompts")
            found["prompts"] = [bench.prompt(n_tokens) for n_tokens in effort.prompts]
            found["tuning"] = bench.tuning()
        finally:
            model.close()
    return found


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a GGUF file of deepseek2")
    parser.add_argument("-t", "--threads", type=int, default=None, help="one a physical core if not given")
    parser.add_argument("--gpu-experts", type=int, default=0, help="of each layer, in VRAM")
    parser.add_argument("--kernels", action="store_true", help="measure the kernels by themselves, too")
    parser.add_argument("--stand-in", action="store_true", help="the CPU as the device, a little of everything")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    """Measure, print."""
    arguments = parse(words)
    found = {"date": time.strftime("%Y-%m-%d"), "card": None if arguments.stand_in else card()}
    from localrun import hardware

    arguments.threads = arguments.threads or hardware.usable_cores()
    found |= {"stand_in": arguments.stand_in, "versions": versions(), **measure(arguments)}
    found["kernels"] = kernels() if arguments.kernels and not arguments.stand_in else None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
