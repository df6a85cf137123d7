"""Getting the kernels a file needs: compiled on a machine's first run (some 20 seconds), from the cache afterwards."""

from collections.abc import Callable, Collection
from importlib import import_module

# In the order of their imports, so that each step of the progress compiles its own part.
_MODULES = {
    "quant.pool": "worker pool",
    "quant.panel_linear": "products of many tokens",
    "quant.linear": "matrix products",
    "quant.panel_experts": "experts of many tokens",
    "quant.experts": "experts",
    "quant.prompt_attention": "attention of many tokens",
    "quant.step": "decoding",
    "quant.step_rows": "decoding: rows",
    "quant.step_queries": "decoding: queries",
    "quant.step_attention": "decoding: attention",
    "quant.step_experts": "decoding: experts",
}


def prepare(
    types: Collection[str], progress: Callable[[int, int, str], None] | None, notice: Callable[[str], None]
) -> None:
    """Compile the kernels for tensors of these types, or load them from the cache.

    Args:
        progress: called as progress(done, total, what).
        notice: called with one line if there is something to compile and no progress to show it by.
    """
    from quant import formats, jit

    if progress is None and not jit.has_kernels():
        notice("first run on this machine: compiling the kernels, which takes a while")
    total = len(_MODULES) + len(types)
    for done, (module, what) in enumerate(_MODULES.items()):
        if progress is not None:
            progress(done, total, f"Kernels: {what}")
        import_module(module)
    from quant import panel  # only now: importing it compiles it, which the loop above has shown

    for done, type_name in enumerate(sorted(types), len(_MODULES)):
        if progress is not None:
            progress(done, total, f"Kernels: {type_name}")
        panel.find(formats.get(type_name))
    if progress is not None:
        progress(total, total, "Kernels")
