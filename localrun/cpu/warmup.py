"""Getting the kernels a file needs: compiled on a machine's first run, on all cores, from the cache afterwards."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from localrun import hardware

if TYPE_CHECKING:
    from quant.target.kernel import Kernel

# The modules whose kernels every model needs; first those that take longest, so that no core is left with one at the
# end.
_MODULES = {
    "quant.ops.attention": "attention of many tokens",
    "quant.decode.experts": "decoding: experts",
    "quant.ops.experts": "experts",
    "quant.decode.attention": "decoding: attention",
    "quant.decode.values": "decoding: heads",
    "quant.gemm.experts": "experts of many tokens",
    "quant.ops.linear": "matrix products",
    "quant.decode.queries": "decoding: queries",
    "quant.gemm.linear": "products of many tokens",
    "quant.gemm.pack_tokens": "packing of tokens",
    "quant.decode.linear": "decoding: rows",
    "quant.gemm.microkernel": "micro-kernels",
    "quant.decode.program": "decoding",
    "quant.threads.pool": "worker pool",
}
# What stands in for others where the CPU has products of 16-bit integers; and those of latent attention there.
_IN_INTEGERS = {"quant.ops.attention": "quant.ops.attention_i16"}
_OF_LATENTS = {"quant.decode.attention_i16": "decoding: attention", "quant.ops.rebuild_i16": "rebuilding of keys"}
# Those of a model with an indexer.
_OF_INDEXER = {
    "quant.ops.indexer": "choices of many tokens",
    "quant.ops.chosen": "attention to chosen tokens",
    "quant.decode.indexer": "decoding: choices",
}
# Those of a model with pooled rows and streams.
_OF_POOLED = {
    "quant.ops.chosen": "attention to chosen tokens",
    "quant.decode.compressor": "decoding: pooled rows",
    "quant.decode.stream_rows": "decoding: streams",
}
_CHILD_BYTES = 1 << 30  # a process that compiles takes half of it
_WORTH_A_CHILD = 4  # kernels: a child takes as long to start as one or two take
_PATIENCE_S = 0.5


def warm_up(
    types: Collection[str],
    progress: Callable[[int, int, str], None] | None,
    notice: Callable[[str], None],
    has_indexer: bool = False,
    pools_rows: bool = False,
    has_latents: bool = False,
) -> None:
    """Compile the kernels for tensors of these types, or load them from the cache.

    Args:
        progress: called as progress(done, total, what).
        notice: called with one line if there is something to compile and no progress to show it by.
        has_indexer: whether the model chooses the tokens that it attends to.
        pools_rows: whether it has pooled rows and streams.
        has_latents: whether its attention is over latents.
    """
    from quant.ops.attention_i16 import LEVEL
    from quant.target import isa, jit, kernel_cache

    if progress is None and not kernel_cache.kept():
        notice("first run on this machine: compiling the kernels, which takes a while")
    modules = _MODULES | (_OF_INDEXER if has_indexer else {}) | (_OF_POOLED if pools_rows else {})
    if isa.has(LEVEL):
        modules = {_IN_INTEGERS.get(name, name): what for name, what in modules.items()}
        modules |= _OF_LATENTS if has_latents else {}
    kernels = needed(modules, types)
    missing = [(kernel, what) for kernel, what in kernels if not jit.is_kept(kernel)]
    with _children(len(missing), modules, types):
        for done, (kernel, what) in enumerate(missing):
            if progress is not None:
                progress(done, len(missing), f"Compiling: {what}")
            jit.keep_unless_taken(kernel)
        for done, (kernel, what) in enumerate(kernels):
            if progress is not None:
                progress(done, len(kernels), f"Kernels: {what}")
            kernel.compiled  # noqa: B018 (waits for the one that is at it)
    if progress is not None:
        progress(len(kernels), len(kernels), "Kernels")


def needed(modules: Mapping[str, str], types: Collection[str]) -> list[tuple["Kernel", str]]:
    """The kernels of modules and for tensors of these types, and what each one is of."""
    from quant.formats import registry
    from quant.gemm import packed
    from quant.target import jit

    kernels = [(kernel, what) for module, what in modules.items() for kernel in jit.kernels_of(import_module(module))]
    for name in sorted(types):
        format_ = registry.get(name)
        panels = packed.find(format_)
        of_format = (format_.gemv, format_.gemv_batch, format_.expand, panels and panels.repack)
        kernels += [(kernel, name) for kernel in of_format if kernel]
    return kernels


@contextmanager
def _children(n_missing: int, modules: Mapping[str, str], types: Collection[str]) -> Iterator[None]:
    """Other processes that compile what is missing, one for each other core, as far as that and the memory are worth
    it. They end with the block: what they have not kept by then this process has compiled itself.
    """
    from quant.target import kernel_cache

    most = min(hardware.usable_cores() - 1, n_missing // _WORTH_A_CHILD, hardware.free_ram() // _CHILD_BYTES)
    children: list[subprocess.Popen[bytes]] = []
    try:
        if not kernel_cache.folder().refusal:
            with suppress(OSError):  # no process to be had: this one compiles
                children.extend(start_child(modules, types) for _ in range(most))
        yield
    finally:
        for child in children:
            with suppress(OSError), child.stdin:
                pass
            try:
                child.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:  # in the middle of a kernel, for a parent that gave up
                child.kill()
                child.wait()


def start_child(modules: Mapping[str, str], types: Collection[str]) -> subprocess.Popen[bytes]:
    """A process that compiles what `needed` gives, until its stdin is closed. Raises OSError."""
    child = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("warmup_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the parent to deal with
    )
    request = {"path": sys.path, "modules": dict(modules), "types": sorted(types)}
    with suppress(OSError):  # it has ended already
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
    return child
