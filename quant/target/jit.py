"""How kernels are compiled: shared options, and one process at a time."""

import fcntl
import gc
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import ModuleType
from typing import NoReturn

import numba
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher
from numba.core.sigutils import normalize_signature

from quant.errors import QuantError
from quant.target import isa, kernel_cache
from quant.target.inlined import InlinedCompiler
from quant.target.kernel import Kernel
from quant.target.pipeline import KernelCompiler

# No nnan/ninf: a NaN in the weights must reach the logits instead of vanishing.
FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

_inlined = numba.njit(
    forceinline=True,
    error_model="numpy",
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
    pipeline_class=InlinedCompiler,
    _nrt=False,
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
    """A C function that the kernel cache has, or has from now on."""

    def __init__(self, kernel_: Kernel, name: str):
        options = {"error_model": "numpy", "_nrt": False}
        super().__init__(kernel_.function, normalize_signature(kernel_.signature), {}, options, KernelCompiler)
        self._kept_name = name

    def load(self) -> bool:
        """Take it from the cache; whether it was there."""
        with global_compiler_lock:
            self._wrapper_address = kernel_cache.load(self._kept_name)
        self._cache_hits = int(self._wrapper_address != 0)
        return self._cache_hits > 0

    def _compile_uncached(self) -> CompileResult:
        with _no_collection():
            result = super()._compile_uncached()
        kernel_cache.keep(self._kept_name, result)
        return result


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for garbage meanwhile: a compiler makes much that lives, which each search would go through again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _compile(kernel_: Kernel) -> CFunc:
    if not isa.has(kernel_.level):
        raise QuantError(f"{kernel_.__name__} needs {kernel_.level}; this process is limited to {isa.LEVEL}")
    if not kernel_.function.__module__.startswith("quant."):  # the cache can't see a change of other sources
        return numba.cfunc(kernel_.signature, error_model="numpy")(kernel_.function)
    name = _full_name(kernel_)
    compiled = _KeptCFunc(kernel_, name)
    if not compiled.load():
        with _alone_with(name, wait=True):
            if not compiled.load():  # another process may have been at it
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
