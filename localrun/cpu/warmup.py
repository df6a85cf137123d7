"""Getting the kernels a file needs: compiled on a machine's first run, on all cores, from the cache afterwards."""

import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from localrun import hardware
from localrun.models.config import Config

if TYPE_CHECKING:
    from quant.target.kernel import Kernel

_STEP_PARTS, _PROMPT_PARTS = ("gemv", "gemv_batch", "expand"), ("repack",)  # of each tensor type's kernels
_CHILD_BYTES = 1 << 30  # a process that compiles takes half of it
WORTH_A_CHILD = 4  # kernels: a child takes as long to start as one or two take
_PATIENCE_S = 0.5


@dataclass(frozen=True)
class Kernels:
    """Which kernels are to be got ready, and what the user is told if all of them must be compiled.

    Attributes:
        modules: whose kernels, or "module:kernel" of one, and what each is of. First those that take longest, so that
            no core is left with one at the end.
        types: of tensors.
        parts: which of each type's.
        occasion: when all are missing.
    """

    modules: dict[str, str]
    types: list[str]
    parts: Sequence[str]
    occasion: str = "first run on this machine"


def for_steps(config: Config, types: Collection[str], cache_bits: int = 16) -> Kernels:
    """What a decode step needs of a model with tensors of these types: short prompts, and every reply."""
    in_integers = "attention_i16" if cache_bits == 16 else "attention_i8"
    is_in_integers = _attends_in_integers(config, types, cache_bits)
    attention = in_integers if is_in_integers else "attention"
    queries = "_run_latent" if config.attention == "mla" else "_run_grouped"
    modules = {f"quant.decode.{attention}": "attention", "quant.decode.values": "heads"}
    modules |= {"quant.decode.attention_lanes": "queries"} if is_in_integers else {}
    if config.n_routed_experts:
        modules |= {"quant.decode.router": "router", "quant.decode.experts": "experts"}
    modules |= {"quant.decode.indexer": "choices"} if config.index_topk else {}
    if config.compress_ratios:
        modules |= {"quant.decode.compressor": "pooled rows", "quant.decode.stream_rows": "streams"}
        modules |= {"quant.decode.stream_mean": "what drafts read"}
    else:
        modules |= {f"quant.decode.queries:{queries}": "queries"}
    modules |= {"quant.decode.linear": "rows", "quant.decode.program": "steps", "quant.threads.pool": "worker pool"}
    return Kernels({name: f"decoding: {what}" for name, what in modules.items()}, sorted(types), _STEP_PARTS)


def for_prompts(config: Config, types: Collection[str], cache_bits: int = 16) -> Kernels:
    """What the network for any number of tokens needs besides."""
    from quant.ops.attention_i16 import LEVEL
    from quant.target import isa

    in_integers = isa.has(LEVEL)
    modules = {
        "quant.ops.attention_i16" if in_integers else "quant.ops.attention": "attention of many tokens",
        "quant.ops.experts": "experts",
        "quant.gemm.experts": "experts of many tokens",
        "quant.ops.linear": "matrix products",
        "quant.gemm.linear": "products of many tokens",
        "quant.gemm.pack_tokens": "packing of tokens",
        "quant.gemm.microkernel": "micro-kernels",
    }
    if not config.n_routed_experts:
        modules = {name: what for name, what in modules.items() if not name.endswith(".experts")}
    if in_integers and config.attention == "mla":
        modules["quant.ops.rebuild_i16"] = "rebuilding of keys"
    if cache_bits == 8 or config.rows(0)[0].is_scaled:
        modules[f"quant.gemv.rows_i{cache_bits}"] = "rows of the cache"
    if config.index_topk:
        modules["quant.ops.indexer"] = "choices of many tokens"
    if config.index_topk or config.compress_ratios:
        modules["quant.ops.chosen"] = "attention to chosen tokens"
    return Kernels(modules, sorted(types), _PROMPT_PARTS, "first long prompt on this machine")


def _attends_in_integers(config: Config, types: Collection[str], cache_bits: int) -> bool:
    """Whether a step's attention does, as far as this tells: v_b's type decides, which here are all of the file's."""
    from localrun.cpu.decode import heads_together
    from quant.decode.attention_lanes import FEWEST_HEADS
    from quant.formats import registry
    from quant.gemm import lanes_i8, lanes_i16
    from quant.ops.attention_i16 import LEVEL
    from quant.target import isa

    if config.attention != "mla" or config.compress_ratios or not isa.has(LEVEL):
        return False
    columns = lanes_i8.COLUMNS if cache_bits == 8 else lanes_i16.COLUMNS
    if config.kv_lora_rank % columns or (cache_bits == 16 and not config.rows(0)[0].is_scaled):
        return False
    has_integers = any(registry.get(name).integer for name in types)
    return has_integers and heads_together(config.num_attention_heads) >= FEWEST_HEADS


def warm_up(
    kernels: Kernels,
    progress: Callable[[int, int, str], None] | None,
    notice: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Compile kernels, or load them from the cache.

    Args:
        progress: called as progress(done, total, what).
        notice: called with one line if all are to be compiled and there is no progress to show it by.
        check: called before each; what it raises ends this.
    """
    from quant.target import jit

    wanted = needed(kernels)
    missing = [(kernel, what) for kernel, what in wanted if not jit.is_kept(kernel)]
    if progress is None and len(missing) == len(wanted):
        notice(f"{kernels.occasion}: compiling the kernels, which takes a while")
    with _children(len(missing), kernels):
        for done, (kernel, what) in enumerate(missing):
            check()
            if progress is not None:
                progress(done, len(missing), f"Compiling: {what}")
            jit.keep_unless_taken(kernel)
        for done, (kernel, what) in enumerate(wanted):
            check()
            if progress is not None:
                progress(done, len(wanted), f"Kernels: {what}")
            kernel.compiled  # noqa: B018 (waits for the one that is at it)
    if progress is not None:
        progress(len(wanted), len(wanted), "Kernels")


def needed(kernels: Kernels) -> list[tuple["Kernel", str]]:
    """The kernels themselves, and what each one is of."""
    from quant.formats import registry
    from quant.gemm import packed
    from quant.target import jit

    found = []
    for name, what in kernels.modules.items():
        module, _, only = name.partition(":")
        of_module = jit.kernels_of(import_module(module))
        found += [(kernel, what) for kernel in of_module if only in ("", kernel.__name__)]
    for name in kernels.types:
        format_ = registry.get(name)
        panels = packed.find(format_)
        of_format = {"repack": panels and panels.repack}
        of_format |= {part: getattr(format_, part) for part in kernels.parts if part != "repack"}
        found += [(of_format[part], name) for part in kernels.parts if of_format[part]]
    return list({id(kernel): (kernel, what) for kernel, what in found}.values())


@contextmanager
def _children(n_missing: int, kernels: Kernels) -> Iterator[None]:
    """Other processes that compile what is missing, one for each other core, as far as that and the memory are worth
    it. They end with the block: what they have not kept by then this process has compiled itself.
    """
    from quant.target import kernel_cache

    most = min(hardware.usable_cores() - 1, n_missing // WORTH_A_CHILD, hardware.free_ram() // _CHILD_BYTES)
    children: list[subprocess.Popen[bytes]] = []
    try:
        if not kernel_cache.folder().refusal:
            with suppress(OSError):  # no process to be had: this one compiles
                children.extend(start_child(kernels) for _ in range(most))
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


def start_child(kernels: Kernels) -> subprocess.Popen[bytes]:
    """A process that compiles what `needed` gives, until its stdin is closed. Raises OSError."""
    child = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("warmup_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the parent to deal with
    )
    request = {"path": sys.path, "kernels": asdict(kernels)}
    with suppress(OSError):  # it has ended already
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
    return child
