"""Getting the kernels a file needs: compiled on a machine's first run (some 20 seconds), from the cache afterwards."""

from collections.abc import Callable, Collection
from importlib import import_module

# The modules whose kernels every model needs.
_MODULES = {
    "quant.threads.pool": "worker pool",
    "quant.gemm.microkernel": "micro-kernels",
    "quant.gemm.pack_tokens": "packing of tokens",
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
# Those of a model with an indexer.
_OF_INDEXER = {
    "quant.ops.indexer": "choices of many tokens",
    "quant.ops.chosen": "attention to chosen tokens",
    "quant.decode.indexer": "decoding: choices",
}


def warm_up(
    types: Collection[str],
    progress: Callable[[int, int, str], None] | None,
    notice: Callable[[str], None],
    has_indexer: bool = False,
) -> None:
    """Compile the kernels for tensors of these types, or load them from the cache.

    Args:
        progress: called as progress(done, total, what).
        notice: called with one line if there is something to compile and no progress to show it by.
        has_indexer: whether the model chooses the tokens that it attends to.
    """
    from quant.formats import registry
    from quant.gemm import packed
    from quant.target import jit, kernel_cache

    if progress is None and not kernel_cache.kept():
        notice("first run on this machine: compiling the kernels, which takes a while")
    modules = _MODULES | (_OF_INDEXER if has_indexer else {})
    total = len(modules) + len(types)
    for done, (module, what) in enumerate(modules.items()):
        if progress is not None:
            progress(done, total, f"Kernels: {what}")
        jit.compile_kernels(import_module(module))
    for done, type_name in enumerate(sorted(types), len(modules)):
        if progress is not None:
            progress(done, total, f"Kernels: {type_name}")
        format_ = registry.get(type_name)
        panels = packed.find(format_)
        for kernel in (format_.gemv, format_.gemv_batch, format_.expand, panels and panels.repack):
            if kernel:
                kernel.compiled  # noqa: B018 (asking is compiling)
    if progress is not None:
        progress(total, total, "Kernels")
