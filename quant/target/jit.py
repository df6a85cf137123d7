"""How kernels are compiled: shared options and a cache directory that can't go stale.

Numba's on-disk cache does not see edits in another module than the kernel's own, nor NUMBA_BOUNDSCHECK, nor the ISA
level that chose the intrinsics. So the directory is named after all of them (measured: docs/lab-notes.md).
"""

import fcntl
import hashlib
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numba
from numba import config
from numba.core.ccallback import CFunc

from quant.errors import QuantError
from quant.target import isa
from quant.target.kernel import Kernel

# No nnan/ninf: a NaN in the weights must reach the logits instead of vanishing.
FASTMATH = frozenset({"nsz", "arcp", "contract", "afn", "reassoc"})

# Helpers that exist only inside kernels: inlined by LLVM, never cached on their own.
inline = numba.njit(forceinline=True, error_model="numpy")


def _compile(kernel_: Kernel) -> CFunc:
    if not isa.has(kernel_.level):
        raise QuantError(f"{kernel_.__name__} needs {kernel_.level}; this process is limited to {isa.LEVEL}")
    with _alone_with(kernel_):
        return numba.cfunc(kernel_.signature, cache=True, error_model="numpy")(kernel_.function)


@contextmanager
def _alone_with(kernel_: Kernel) -> Iterator[None]:
    """No other process compiles this kernel meanwhile: it waits, and then finds it in the cache."""
    name = f"{kernel_.function.__module__}.{kernel_.__name__}"
    with (Path(config.CACHE_DIR) / "compiling.lock").open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(name.encode()))  # one byte a kernel; freed when it is closed
        yield


def kernel(signature: str, level: str = "generic") -> Callable[[Callable], Kernel]:
    """Decorator: a kernel, whose arguments are addresses and counts (int64).

    level: the lowest level of isa.py that has the instructions which the kernel names.
    """
    return lambda function: Kernel(function, signature, level, _compile)


def compile_kernels(module: ModuleType) -> None:
    """Have all kernels of a module that this process can run compiled, or loaded from the cache."""
    for value in vars(module).values():
        if isinstance(value, Kernel) and value.function.__module__ == module.__name__ and isa.has(value.level):
            value.compiled  # noqa: B018 (asking is compiling)


_PACKAGE = Path(__file__).resolve().parents[1]  # quant: an edit anywhere in it may change any kernel


def _fingerprint() -> str:
    """A name for the cache directory that changes whenever compiled kernels could."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode())
        digest.update(path.read_bytes())
    digest.update(f"{numba.__version__} {sys.version_info[:2]} {config.BOUNDSCHECK}".encode())
    return f"{digest.hexdigest()[:16]}-{isa.LEVEL}"


def cache_dir() -> Path:
    """Where compiled kernels are kept: $LOCALRUN_CACHE, else the user's cache, else a folder in the temporary one."""
    base = os.environ.get("LOCALRUN_CACHE") or os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(base) / "localrun" / "kernels" / _fingerprint()
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    return path if writable else Path(tempfile.mkdtemp(prefix="localrun-kernels-"))


config.CACHE_DIR = str(cache_dir())


def has_kernels() -> bool:
    """Whether compiled kernels are kept from before."""
    return any(path.is_dir() for path in Path(config.CACHE_DIR).iterdir())
