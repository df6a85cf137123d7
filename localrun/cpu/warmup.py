"""Getting the kernels a file needs: compiled on a machine's first run (some 20 seconds), from the cache afterwards."""

from collections.abc import Callable, Collection
from importlib import import_module

# In the order of their imports, so that each step of the progress compiles its own part.
_MODULES = {
    "quant.threads.pool": "worker pool",
    "quant.gemm.linear": "products of many tokens",
    "quant.ops.linear": "matrix products",
    "quant.gemm.experts": "experts of many tokens",
    "quant.ops.experts": "experts",
    "quant.ops.attention": "attention of many tokens",
    "quant.decode.program": "decoding",
    "quant.decode.linear": "decoding: rows",
    "quant.decode.queries": "decoding: queries",
    "quant.decode.attention": "decoding: attention",
    "quant.decode.experts": "decoding: experts",
}


def prepare(
    types: Collection[str], progress: Callable[[int, int, str], None] | None, notice: Callable[[str], None]
) -> None:
    """Compile the kernels for tensors of these types, or load them from the cache.

    Args:
        progress: called as progress(done, total, what).
        notice: called with one line if there is something to compile and no progress to show it by.
    """
    from quant.formats import registry
    from quant.target import jit

    if progress is None and not jit.has_kernels():
        notice("first run on this machine: compiling the kernels, which takes a while")
    total = len(_MODULES) + len(types)
    for done, (module, what) in enumerate(_MODULES.items()):
        if progress is not None:
            progress(done, total, f"Kernels: {what}")
        import_module(module)
    from quant.gemm import packed  # only now: importing it compiles it, which the loop above has shown

    for done, type_name in enumerate(sorted(types), len(_MODULES)):
        if progress is not None:
            progress(done, total, f"Kernels: {type_name}")
        packed.find(registry.get(type_name))
    if progress is not None:
        progress(total, total, "Kernels")
