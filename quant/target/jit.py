"""How kernels are compiled: shared options, and one process at a time."""

import fcntl
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import NoReturn

import numba
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
from numba.core.sigutils import normalize_signature

from quant.errors import QuantError
from quant.target import isa, kernel_cache
from quant.target.inlined import InlinedCompiler
from quant.target.kernel import Kernel

# No nnan/ninf: a NaN in the weights must reach the logits instead of vanishing.
FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

_inlined = numba.njit(
    forceinline=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=InlinedCompiler,
)


def inline(function: Callable) -> Dispatcher:
    """Decorator: a helper that exists only inside kernels, inlined by LLVM, never cached on its own.

    It has no machine code: Python can't call it.
    """

    def refuse(*_: object) -> NoReturn:
        raise TypeError(f"{function.__name__} exists inside compiled functions alone")

    dispatcher = _inlined(function)
    dispatcher._insert = lambda *_: None  # what Python calls: nothing is there
    dispatcher._compile_for_args = refuse
    return dispatcher


class _KeptCFunc(CFunc):
    """A C function that is looked for in the kernel cache before it is compiled."""

    def __init__(self, kernel_: Kernel, name: str):
        super().__init__(kernel_.function, normalize_signature(kernel_.signature), {}, {"error_model": "numpy"})
        self._cache = kernel_cache.KernelCache(name)


def _compile(kernel_: Kernel) -> CFunc:
    if not isa.has(kernel_.level):
        raise QuantError(f"{kernel_.__name__} needs {kernel_.level}; this process is limited to {isa.LEVEL}")
    if not kernel_.function.__module__.startswith("quant."):  # the cache can't see a change of other sources
        return numba.cfunc(kernel_.signature, error_model="numpy")(kernel_.function)
    name = _full_name(kernel_)
    compiled = _KeptCFunc(kernel_, name)
    with _alone_with(name, wait=True):
        compiled.compile()
    return compiled


def _full_name(kernel_: Kernel) -> str:
    return f"{kernel_.function.__module__}.{kernel_.__name__}"


@contextmanager
def _alone_with(name: str, wait: bool) -> Iterator[bool]:
    """No other process compiles this kernel meanwhile: it waits, and then finds it in the cache.

    Args:
        wait: for another process that does; else False is given if there is one.
    """
    folder = kernel_cache.folder()
    how, alone = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), True
    with ExitStack() as held:
        if not folder.refusal:
            with suppress(OSError):  # a folder that can't be written to: there is nothing to wait for
                file = held.enter_context((folder.path / "compiling.lock").open("a"))
                try:
                    fcntl.lockf(file, how, 1, zlib.crc32(name.encode()))  # one byte a kernel; freed when closed
                except (BlockingIOError, PermissionError):  # POSIX leaves the choice between the two
                    alone = False
        yield alone


def kernel(signature: str, level: str = "generic") -> Callable[[Callable], Kernel]:
    """Decorator: a kernel, whose arguments are addresses and counts (int64).

    level: the lowest level of isa.py that has the instructions which the kernel names.
    """
    return lambda function: Kernel(function, signature, level, _compile)


def kernels_of(module: ModuleType) -> list[Kernel]:
    """All kernels of a module that this process can run."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, Kernel) and value.function.__module__ == module.__name__ and isa.has(value.level)
    ]


def is_kept(kernel_: Kernel) -> bool:
    """Whether the cache has the kernel."""
    return kernel_cache.has(_full_name(kernel_))


def keep_unless_taken(kernel_: Kernel) -> None:
    """Compile a kernel into the cache, unless it is there or another process is at it."""
    if not is_kept(kernel_):
        with _alone_with(_full_name(kernel_), wait=False) as alone:
            if alone:
                kernel_.compiled  # noqa: B018 (asking is compiling)
